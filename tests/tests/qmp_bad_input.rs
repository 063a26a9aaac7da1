//! Whatever a QMP client writes, it gets an error, and nobody else is disturbed.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::io::BufRead as _;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use serde_json::json;

#[test]
fn nonsense_is_answered_with_errors_and_the_next_command_works() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let deep = "[".repeat(100_000);
    let long = format!("{{\"execute\": \"{}\"}}", "x".repeat(1 << 20));
    for nonsense in [
        b"}}}}".as_slice(),
        b"\xff\xfe\x80",
        b"{\"execute\": \"\xc3\x28\"}",
        b"{\"execute\": 1e999999}",
        b"{\"execute\": \"query-status\", \"arguments\": {\"x\": 123456789012345678901234567890}}",
        b"{\"execute\": \"query-status\\u0000\"}",
        b"<xml/>",
        deep.as_bytes(),
        long.as_bytes(),
    ] {
        qmp.send(nonsense);
        qmp.send("\n");
        let answer = qmp.answer();
        assert!(answer.get("error").is_some(), "{answer}");
        qmp.send("{\"execute\": \"query-name\", \"id\": \"after\"}\n");
        let mut answer = qmp.answer();
        while answer.get("id") != Some(&json!("after")) {
            assert!(answer.get("error").is_some(), "{answer}");
            answer = qmp.answer();
        }
        assert!(answer.get("return").is_some(), "{answer}");
    }
}

#[test]
fn one_client_that_floods_or_never_reads_does_not_disturb_the_others() {
    let vm = Builder::release().start();
    let mut good = Qmp::connect(&vm);
    let guest = vm.witness();
    // Half a command and silence; commands without end whose answers nobody reads.
    let mut silent = Qmp::connect(&vm);
    silent.send("{\"execute\": \"query-st");
    let mut flooding = Qmp::connect(&vm);
    flooding.send("{\"execute\": \"query-commands\"}\n".repeat(64));
    let flood = std::thread::spawn(move || {
        let commands = "{\"execute\": \"query-qmp-schema\"}\n".repeat(1000);
        let mut sent = 0;
        while sent < 1 << 20 {
            match flooding.flood(commands.as_bytes()) {
                0 => break,
                count => sent += count,
            }
        }
        flooding
    });
    for _ in 0..20 {
        assert_eq!(good.status(), "running");
    }
    good.migrate();
    assert_eq!(good.migrated()["status"], "completed");
    vm.assert_goes_on(&guest);
    silent.send("atus\"}\n");
    assert_eq!(silent.answer()["return"]["status"], "running");
    // Whoever reads nothing can make the front keep so much, and no more.
    let most = most_memory(&vm);
    assert!(most < 16 << 10, "{most} KiB");
    // Ended by its own timeout, or by the front; either way it is its own trouble.
    drop(good);
    drop(vm);
    drop(flood.join().unwrap());
}

/// The most memory that the front has ever had, in KiB (proc_pid_status(5), VmHWM).
fn most_memory(vm: &Vm) -> u64 {
    let log = vm.audit_log();
    let confirmed = log.of("front-confirmed").last().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", confirmed.fields["pid"]));
    let status = status.unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.unwrap().parse().unwrap()
}

#[test]
fn a_million_small_commands_are_all_answered_in_bounded_memory() {
    const COMMANDS: usize = 1_000_000;
    let vm = Builder::release().start();
    let mut other = Qmp::connect(&vm);
    let mut qmp = Qmp::connect(&vm);
    for _ in 0..100 {
        qmp.status();
    }
    let before = most_memory(&vm);
    let socket = vm.site.run_dir().join(&vm.site.name).join("qmp.sock");
    let stream = UnixStream::connect(socket).unwrap();
    let mut writer = stream.try_clone().unwrap();
    // As fast as they are taken, while the answers are read.
    let sender = std::thread::spawn(move || {
        writer
            .write_all(b"{\"execute\":\"qmp_capabilities\"}")
            .unwrap();
        let some = "{\"execute\":\"query-version\"}{\"execute\":\"nonsense\"}".repeat(500);
        for _ in 0..COMMANDS / 1000 {
            writer.write_all(some.as_bytes()).unwrap();
        }
    });
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().contains("QMP"));
    assert_eq!(lines.next().unwrap(), "{\"return\":{}}");
    for command in 0..COMMANDS {
        let line = lines.next().unwrap();
        let right = match command % 2 {
            0 => line.starts_with("{\"return\":"),
            _ => line.contains("CommandNotFound"),
        };
        assert!(right, "{command}: {line}");
        if command % 100_000 == 0 {
            assert_eq!(other.status(), "running");
        }
    }
    sender.join().unwrap();
    let grown = most_memory(&vm) - before;
    assert!(grown < 1024, "{grown} KiB");
}

#[test]
fn more_clients_than_there_is_room_for_wait_their_turn() {
    let vm = Builder::release().start();
    let mut clients: Vec<Qmp> = (0..16).map(|_| Qmp::connect(&vm)).collect();
    let waiting = std::thread::scope(|scope| {
        let next = scope.spawn(|| Qmp::connect(&vm));
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(!next.is_finished(), "the seventeenth waits");
        clients.pop();
        next.join().unwrap()
    });
    clients.push(waiting);
    for client in &mut clients {
        assert_eq!(client.status(), "running");
    }
}
