//! The main channel over TCP: within this host, at addresses that policy grants, and only from broker to broker.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::io::Read;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::path::Path;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::Waiting;
use baton_tests::transfer::channel;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

/// A port where nobody listens.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn channels(host: &str, port: u16, cpr: &Path) -> Value {
    let port = port.to_string();
    let main = json!({"channel-type": "main",
        "addr": {"transport": "socket", "type": "inet", "host": host, "port": port}});
    json!({"channels": [main, channel("cpr", cpr)]})
}

fn wait_at(vm: &Vm, host: &str, port: u16) -> Waiting {
    vm.wait_from("vm.toml", &["--incoming", &format!("tcp:{host}:{port}")])
}

fn migrate(qmp: &mut Qmp, channels: Value) -> Value {
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    qmp.done("migrate", channels);
    qmp.migrated()
}

#[test]
fn a_guest_goes_over_with_its_state_on_a_tcp_connection() {
    let mut vm = Builder::release().cpus(2).start();
    for host in ["127.0.0.1", "localhost"] {
        let before = vm.witness();
        let port = free_port();
        let waiting = wait_at(&vm, host, port);
        let mut qmp = Qmp::connect(&vm);
        let info = migrate(&mut qmp, channels("localhost", port, &waiting.cpr));
        assert_eq!(info["status"], "completed", "{info}");
        drop(qmp);
        vm.assert_taken_over(&waiting);
        vm.assert_only_runner(vm.worker());
        vm.assert_goes_on(&before);
        vm.ask("audit").expect(0);
        let refused = TcpStream::connect(("127.0.0.1", port)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    // The same by `migrate-incoming`.
    let before = vm.witness();
    let (port, waiting) = (
        free_port(),
        vm.wait_from("vm.toml", &["--incoming", "defer"]),
    );
    let name = format!("{}.incoming", vm.site.name);
    let (mut old, mut new) = (Qmp::connect(&vm), Qmp::connect_to(&vm, &name));
    for (uri, words) in [
        ("tcp:localhost:0", "is no port"),
        ("tcp:localhost", "is no address"),
        ("tcp:localhost.localdomain:4444", "no name is looked up"),
        (
            "tcp:127.0.0.2:4444",
            "policy grants the main channel no TCP at 127.0.0.2",
        ),
        (
            "tcp:0.0.0.0:4444",
            "policy grants the main channel no TCP at 0.0.0.0",
        ),
    ] {
        let refused = new.refused("migrate-incoming", json!({"uri": uri}));
        assert!(refused.contains(words), "{uri}: {refused}");
    }
    new.done(
        "migrate-incoming",
        json!({"uri": format!("tcp:localhost:{port}")}),
    );
    let info = migrate(&mut old, channels("127.0.0.1", port, &waiting.cpr));
    assert_eq!(info["status"], "completed", "{info}");
    drop((old, new));
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
}

#[test]
fn who_is_not_there_or_not_granted_is_named_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let nobody = vm.site.path("nobody");
    for (host, port, words) in [
        ("localhost", 0, "is no port"),
        ("example.org", 1, "no name is looked up"),
    ] {
        let refused = qmp.refused("migrate", channels(host, port, &nobody));
        assert!(refused.contains(words), "{refused}");
    }
    let cpr = json!({"channel-type": "cpr",
        "addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "4444"}});
    let main = channel("main", &nobody);
    let refused = qmp.refused("migrate", json!({"channels": [main, cpr]}));
    assert_eq!(refused, "bad cpr channel address; must be unix");

    for (host, words) in [
        ("127.0.0.1", "Connection refused"),
        (
            "127.0.0.2",
            "policy grants the main channel no TCP at 127.0.0.2",
        ),
        (
            "192.0.2.1",
            "policy grants the main channel no TCP at 192.0.2.1",
        ),
    ] {
        let waiting = wait_at(&vm, "127.0.0.1", free_port());
        let info = migrate(&mut qmp, channels(host, free_port(), &waiting.cpr));
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(reason.contains(words), "{reason}");
        vm.assert_nobody_waits(&waiting);
    }
    assert!(!qmp.event_names().contains(&"STOP".to_owned()));
    drop(qmp);
    vm.assert_goes_on(&before);
    // A port that is taken, before there is anything to wait for.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("tcp:{}", taken.local_addr().unwrap());
    let (refused, _) = vm.try_to_wait("vm.toml", &["--incoming", &place]);
    let refused = refused.expect(3);
    assert!(
        refused.stderr.contains("Address already in use"),
        "{refused:?}"
    );
    vm.assert_transfers();
}

/// Passes on what comes, as somebody would who wants to read a guest's registers.
fn listen_between(to: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (old, _) = listener.accept().unwrap();
        let new = TcpStream::connect(("127.0.0.1", to)).unwrap();
        let (from, to) = (old.try_clone().unwrap(), new.try_clone().unwrap());
        std::thread::spawn(move || pass_on(from, to));
        pass_on(new, old);
    });
    port
}

fn pass_on(mut from: TcpStream, mut to: TcpStream) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to
            .write_all(bytes.get(..count).unwrap_or_default())
            .is_err()
        {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn who_listens_in_between_gets_no_state() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let port = free_port();
    let waiting = wait_at(&vm, "127.0.0.1", port);
    let mut qmp = Qmp::connect(&vm);
    let info = migrate(
        &mut qmp,
        channels("127.0.0.1", listen_between(port), &waiting.cpr),
    );
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap();
    let words = "the main channel does not lead to the other broker";
    assert!(reason.contains(words), "{reason}");
    assert!(!qmp.event_names().contains(&"STOP".to_owned()));
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}

#[test]
fn a_crowd_at_the_port_that_says_nothing_is_not_in_the_way() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let port = free_port();
    let waiting = wait_at(&vm, "127.0.0.1", port);
    let crowd: Vec<TcpStream> = (0..8)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    let mut qmp = Qmp::connect(&vm);
    let info = migrate(&mut qmp, channels("127.0.0.1", port, &waiting.cpr));
    assert_eq!(info["status"], "completed", "{info}");
    drop((qmp, crowd));
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
}

#[test]
fn policy_may_grant_more_addresses_or_none() {
    let mut vm = Builder::release().start();
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let text = std::fs::read_to_string(&policy).unwrap();
    let granted = "addresses = [\"127.0.0.1\", \"::1\"]";
    assert!(text.contains(granted));
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let file = file.replacen(
        "\"default\"",
        &format!("{:?}", policy.display().to_string()),
        1,
    );
    vm.site.write("other.toml", file);
    let place = format!("tcp:127.0.0.2:{}", free_port());
    std::fs::write(&policy, text.replace(granted, "addresses = []")).unwrap();
    for place in [&place, "tcp:127.0.0.1:4444"] {
        let (refused, _) = vm.try_to_wait("other.toml", &["--incoming", place]);
        let refused = refused.expect(3);
        assert!(refused.stderr.contains("no TCP at 127.0.0."), "{refused:?}");
    }
    let more = "addresses = [\"127.0.0.2\"]";
    std::fs::write(&policy, text.replace(granted, more)).unwrap();
    let waiting = vm.wait_from("other.toml", &["--incoming", &place]);
    until("it listens", || {
        TcpStream::connect(place.strip_prefix("tcp:").unwrap()).ok()
    });
    // The running broker is under another policy, and would not connect there.
    vm.site
        .baton(["stop", "--force", &format!("{}.incoming", vm.site.name)])
        .expect(0);
    vm.assert_nobody_waits(&waiting);
    vm.assert_transfers();
}
