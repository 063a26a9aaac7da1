//! A guest's socket device: connections of both sides, what policy says of them, and that upgrades do not touch them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::VsockReport;
use baton_guest::layout;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Site;
use baton_tests::Vm;
use baton_tests::transfer::channel;
use baton_tests::until;
use serde_json::json;

/// The port of the host that the guest connects to.
const PORT: u32 = 52;
/// Bytes that are under way at most: more than a connection's credit and what its sockets hold together, at times.
const WINDOW: u64 = 24 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

fn builder() -> Builder {
    let line = CommandLine::new().vsock(PORT).console().period_ms(50);
    Builder::release().line(line).vsock()
}

fn listener(site: &Site) -> UnixListener {
    UnixListener::bind(site.path(&format!("v_{PORT}"))).unwrap()
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A connection to a port of the guest, and which port the guest sees.
fn call(vm: &Vm, port: u32) -> (UnixStream, u32) {
    let mut stream = patient(UnixStream::connect(vm.site.path("v")).unwrap());
    // What comes right behind the line is the guest's already.
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if let Err(error) = stream.read_exact(&mut byte) {
            panic!("{error} instead of a connection: {:?}", vm.ram.vsock());
        }
        line.extend(byte);
    }
    let line = String::from_utf8(line).unwrap();
    let port = line.strip_prefix("OK ").unwrap().trim().parse().unwrap();
    (stream, port)
}

/// Sends numbers, and compares what comes back, in two threads.
struct Talk {
    back: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Talk {
    fn new(stream: UnixStream) -> Self {
        let back = Arc::new(AtomicU64::new(0));
        let end = Arc::new(AtomicBool::new(false));
        let (seen, over, mut out) = (
            Arc::clone(&back),
            Arc::clone(&end),
            stream.try_clone().unwrap(),
        );
        let sender = std::thread::spawn(move || {
            let mut sent = 0_u64;
            while !over.load(Ordering::SeqCst) {
                if sent * 8 > seen.load(Ordering::SeqCst) * 8 + WINDOW {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                }
                // Pieces of changing lengths, so that packets are of all sizes.
                let count = 1 + sent % 97;
                let piece: Vec<u8> = (sent + 1..=sent + count)
                    .flat_map(u64::to_le_bytes)
                    .collect();
                out.write_all(&piece).unwrap();
                sent += count;
            }
            out.shutdown(std::net::Shutdown::Write).unwrap();
            sent
        });
        let (seen, mut stream) = (Arc::clone(&back), stream);
        let receiver = std::thread::spawn(move || {
            let mut word = [0; 8];
            let mut expected = 0_u64;
            loop {
                match stream.read(&mut word[..1]).unwrap() {
                    0 => return expected,
                    _ => stream.read_exact(&mut word[1..]).unwrap(),
                }
                expected += 1;
                assert_eq!(u64::from_le_bytes(word), expected);
                seen.store(expected, Ordering::SeqCst);
            }
        });
        Self {
            back,
            end,
            threads: vec![sender, receiver],
        }
    }

    fn back(&self) -> u64 {
        self.back.load(Ordering::SeqCst)
    }

    #[track_caller]
    fn wait_for(&self, more: u64) {
        let before = self.back();
        until("numbers", || (self.back() > before + more).then_some(()));
    }

    /// Ends this side; all that was sent has to come back before the other side ends.
    #[track_caller]
    fn finish(self) -> u64 {
        self.end.store(true, Ordering::SeqCst);
        let counts: Vec<u64> = self
            .threads
            .into_iter()
            .map(|one| one.join().unwrap())
            .collect();
        assert_eq!(counts[0], counts[1]);
        counts[0]
    }
}

fn wait_for(vm: &Vm, what: &str, mut wanted: impl FnMut(&VsockReport) -> bool) -> VsockReport {
    until(what, || {
        let report = vm.ram.vsock();
        wanted(&report).then_some(report)
    })
}

/// How many connections an audit finds in the worker, all granted.
fn audited(vm: &Vm) -> usize {
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let descriptors = audit["descriptors"].as_array().unwrap();
    let grants = descriptors.iter().filter_map(|one| one["grant"].as_str());
    grants.filter(|grant| grant.starts_with("vsock#")).count()
}

#[test]
fn connections_of_both_sides_lose_nothing_over_twenty_upgrades() {
    let mut accepted = None;
    let vm = builder().start_in(|site| accepted = Some(listener(site)));
    let (theirs, _) = accepted.unwrap().accept().unwrap();
    let (ours, port) = call(&vm, 7);
    assert!(port >= 1 << 30, "{port}");
    let (theirs, ours) = (Talk::new(patient(theirs)), Talk::new(ours));
    for _ in 0..20 {
        theirs.wait_for(500);
        ours.wait_for(500);
        vm.assert_upgrades();
    }
    theirs.wait_for(500);
    ours.wait_for(500);
    assert_eq!(audited(&vm), 2);
    assert!(theirs.finish() > 10_000 && ours.finish() > 10_000);
    let report = wait_for(&vm, "the end of both", |vsock| vsock.open == 0);
    assert_eq!((report.wrong, report.refused), (0, 0), "{report:?}");
    until("the worker has closed both", || {
        (audited(&vm) == 0).then_some(())
    });
}

/// Says at its end that it is over.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn connections_are_made_while_workers_are_replaced() {
    let mut accepted = None;
    let vm = builder().start_in(|site| accepted = Some(listener(site)));
    let (theirs, _) = accepted.unwrap().accept().unwrap();
    let theirs = Talk::new(patient(theirs));
    let done = AtomicBool::new(false);
    let made = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3)
            .map(|caller| {
                let (vm, done) = (&vm, &done);
                scope.spawn(move || {
                    let mut made = 0_u32;
                    while !done.load(Ordering::SeqCst) {
                        let (mut stream, _) = call(vm, caller);
                        stream.write_all(&made.to_le_bytes()).unwrap();
                        let mut back = [0; 4];
                        stream.read_exact(&mut back).unwrap();
                        assert_eq!(u32::from_le_bytes(back), made);
                        made += 1;
                    }
                    made
                })
            })
            .collect();
        // Set also when an upgrade fails: the callers are waited for.
        let over = Over(&done);
        for _ in 0..15 {
            vm.assert_upgrades();
        }
        drop(over);
        callers
            .into_iter()
            .map(|one| one.join().unwrap())
            .sum::<u32>()
    });
    assert!(made > 15, "{made}");
    theirs.wait_for(100);
    theirs.finish();
    let report = wait_for(&vm, "the end of all", |vsock| vsock.open == 0);
    assert_eq!((report.wrong, report.turned_away), (0, 0), "{report:?}");
    until("the worker has closed all", || {
        (audited(&vm) == 0).then_some(())
    });
}

#[test]
fn connections_of_both_sides_stay_over_transfers_to_other_brokers() {
    let mut accepted = None;
    let mut vm = builder().start_in(|site| accepted = Some(listener(site)));
    let (theirs, _) = accepted.unwrap().accept().unwrap();
    let (ours, _) = call(&vm, 7);
    let (theirs, ours) = (Talk::new(patient(theirs)), Talk::new(ours));
    let upgrade_broker = |vm: &mut Vm| {
        let old = vm.broker;
        let document = vm.baton("upgrade", ["--broker"]).expect(0).json();
        assert_eq!(document["outcome"], "committed", "{document}");
        vm.broker = i32::try_from(document["broker_pid"].as_i64().unwrap()).unwrap();
        until("the old broker ends", || {
            (!baton_tests::is_alive(old)).then_some(())
        });
    };
    for _ in 0..3 {
        theirs.wait_for(500);
        ours.wait_for(500);
        vm.assert_transfers();
        upgrade_broker(&mut vm);
        // Whoever has the guest accepts at the same path.
        let (mut third, _) = call(&vm, 8);
        third.write_all(b"third").unwrap();
        let mut back = [0; 5];
        third.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"third");
    }
    vm.assert_upgrades();
    theirs.wait_for(500);
    ours.wait_for(500);
    until("the third ones have ended", || {
        (audited(&vm) == 2).then_some(())
    });
    assert!(theirs.finish() > 3_000 && ours.finish() > 3_000);
    let report = wait_for(&vm, "the end of both", |vsock| vsock.open == 0);
    assert_eq!((report.wrong, report.refused), (0, 0), "{report:?}");
    until("the worker has closed both", || {
        (audited(&vm) == 0).then_some(())
    });
    assert!(vm.site.path("v").exists());
    vm.end().expect(0);
    assert!(!vm.site.path("v").exists());
}

#[test]
fn who_wants_a_connection_while_the_guest_moves_gets_it_from_whoever_has_the_guest() {
    for completes in [true, false] {
        let mut vm = builder().start();
        wait_for(&vm, "a refusal", |vsock| vsock.refused == 1);
        let listener = listener(&vm.site);
        listener.set_nonblocking(true).unwrap();
        // One has said half of what it wants, and one connection is closed on the way.
        let mut early = patient(UnixStream::connect(vm.site.path("v")).unwrap());
        early.write_all(b"CONN").unwrap();
        let (closing, _) = call(&vm, 6);
        let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
        let name = format!("{}.incoming", vm.site.name);
        let (mut old, mut new) = (Qmp::connect(&vm), Qmp::connect_to(&vm, &name));
        old.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        old.done("migrate", json!({"channels": waiting.channels()}));
        new.wait_for_cpr_state();
        early.write_all(b"ECT 7\n").unwrap();
        drop(closing);
        vm.ram.mail(layout::COMMAND_VSOCK_CONNECT);
        let mut late = patient(UnixStream::connect(vm.site.path("v")).unwrap());
        late.write_all(b"CONNECT 8\n").unwrap();
        wait_for(&vm, "the end of the closed one", |vsock| vsock.open == 0);
        std::thread::sleep(Duration::from_millis(300));
        assert!(listener.accept().is_err(), "nobody connects meanwhile");

        if completes {
            let channels = json!({"channels": [channel("main", &waiting.main)]});
            new.done("migrate-incoming", channels);
            assert_eq!(old.migrated()["status"], "completed");
        } else {
            old.done("migrate_cancel", json!({}));
            assert_eq!(old.migrated()["status"], "cancelled");
        }
        drop((old, new));
        if completes {
            vm.assert_taken_over(&waiting);
        } else {
            vm.assert_nobody_waits(&waiting);
        }
        for stream in [&mut early, &mut late] {
            let mut word = [0; 3];
            stream.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"OK ");
        }
        let (mut asked, _) = until("the guest's connection", || listener.accept().ok());
        asked.set_nonblocking(false).unwrap();
        asked.write_all(b"hello").unwrap();
        let mut back = [0; 5];
        patient(asked.try_clone().unwrap())
            .read_exact(&mut back)
            .unwrap();
        assert_eq!(&back, b"hello");
        until("the closed one is gone", || {
            (audited(&vm) == 3).then_some(())
        });
        vm.assert_transfers();
    }
}

#[test]
fn another_vsock_on_the_new_side_is_refused_and_the_socket_stays_the_old_ones() {
    let mut vm = builder().start();
    let before = vm.witness();
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let without = file.split_once("[vsock]").unwrap().0.to_owned();
    for (text, words) in [
        (
            file.replace("socket = \"v\"", "socket = \"w\""),
            "vsock.socket: the running VM has ",
        ),
        (file.replace("cid = 3", "cid = 4"), "device 1: "),
        (without, "device 1: "),
    ] {
        assert_ne!(text, file);
        vm.site.write("other.toml", text);
        let waiting = vm.wait_from("other.toml", &[]);
        let mut qmp = Qmp::connect(&vm);
        let info = vm.migrate_to(&mut qmp, &waiting);
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(reason.contains(words), "{words}: {reason}");
        vm.assert_nobody_waits(&waiting);
        vm.assert_goes_on(&before);
        // Still there, and still answered.
        call(&vm, 9);
    }
    vm.assert_transfers();
}

#[test]
fn a_guest_that_reaches_nobody_is_refused_and_can_try_again() {
    let vm = builder().start();
    wait_for(&vm, "a refusal", |vsock| vsock.refused == 1);
    vm.assert_upgrades();
    let listener = listener(&vm.site);
    vm.ram.mail(layout::COMMAND_VSOCK_CONNECT);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    patient(stream.try_clone().unwrap())
        .read_exact(&mut back)
        .unwrap();
    assert_eq!(&back, b"hello");
    // The guest's end ends with the VM, whoever holds copies of it.
    let (mut ours, _) = call(&vm, 9);
    vm.end().expect(0);
    assert_eq!(ours.read(&mut back).unwrap(), 0);
    assert!(!vm.site.path("v").exists());
}

#[test]
fn who_hangs_up_is_gone_for_the_guest_too() {
    let vm = builder().start();
    let (stream, _) = call(&vm, 1);
    wait_for(&vm, "a connection", |vsock| vsock.open == 1);
    vm.assert_upgrades();
    drop(stream);
    wait_for(&vm, "its end", |vsock| vsock.open == 0);
    until("the worker has closed it", || {
        (audited(&vm) == 0).then_some(())
    });
    // One that says nothing sensible reaches no guest.
    let mut stream = patient(UnixStream::connect(vm.site.path("v")).unwrap());
    stream.write_all(b"HELO\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let report = vm.ram.vsock();
    assert_eq!((report.state, report.open), (DriverState::Working, 0));
}

#[test]
fn who_comes_when_there_are_as_many_connections_as_may_be_is_hung_up_on() {
    let vm = builder().start();
    wait_for(&vm, "a refusal", |vsock| vsock.refused == 1);
    // A guest that stands still answers nobody, and turns nobody away.
    vm.ask("pause").expect(0);
    let knock = || {
        let mut stream = patient(UnixStream::connect(vm.site.path("v")).unwrap());
        stream.write_all(b"CONNECT 7\n").unwrap();
        stream
    };
    let mut crowd: Vec<UnixStream> = (0..MAX_VSOCK_CONNECTIONS).map(|_| knock()).collect();
    until("all of them are the worker's", || {
        (audited(&vm) == crowd.len()).then_some(())
    });
    let mut byte = [0];
    assert_eq!(knock().read(&mut byte).unwrap(), 0, "without an OK");
    let log = vm.audit_log();
    let refused = log.of("vsock-refused").last().unwrap();
    assert_eq!(
        refused.fields["reason"],
        "there are as many connections as there may be"
    );
    // Nobody else notices, nor do they when the worker is replaced.
    assert_eq!(vm.upgrade().outcome, "committed");
    assert_eq!(audited(&vm), crowd.len());
    assert_eq!(knock().read(&mut byte).unwrap(), 0);
    vm.ask("resume").expect(0);
    // The guest has room for some of them.
    crowd.retain_mut(|stream| stream.read_exact(&mut byte).is_ok());
    assert!(!crowd.is_empty());
    drop(crowd);
    wait_for(&vm, "the end of all", |vsock| vsock.open == 0);
    let (mut stream, _) = call(&vm, 8);
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut byte).unwrap();
}

#[test]
fn policy_decides_which_ports_a_guest_reaches() {
    let vm = builder().start();
    wait_for(&vm, "a refusal", |vsock| vsock.refused == 1);
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let granted = std::fs::read_to_string(&policy).unwrap();
    let (before, after) = granted.split_once("name = \"vsock\"").unwrap();
    let narrowed = |paths: &str| {
        let after = after.replacen("paths = [\"/**\"]", &format!("paths = [{paths}]"), 1);
        assert!(after.contains(paths));
        let text = format!("{before}name = \"vsock\"{after}");
        std::fs::write(&policy, text).unwrap();
    };
    vm.end().expect(0);
    let text = text.replacen(
        "\"default\"",
        &format!("{:?}", policy.display().to_string()),
        1,
    );
    vm.site.write("vm.toml", text);

    narrowed("\"/nowhere/*\"");
    let refusal = vm.site.run("vm.toml").expect(30);
    let said = refusal.stdout + &refusal.stderr;
    assert!(said.contains("does not grant a vsock at"), "{said}");

    // Its own socket, and another port than the guest asks for.
    narrowed("\"/**/v\", \"/**/v_51\"");
    let listener = listener(&vm.site);
    vm.site.run("vm.toml").expect(0);
    until("a record of the refusal", || {
        let log = vm.site.baton(["log", "show", &vm.site.name, "--json"]);
        let refused = "does not grant the guest's vsock";
        log.stdout.contains(refused).then_some(())
    });
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    vm.site.baton(["stop", &vm.site.name, "--force"]).expect(0);
}
