//! A serial console, wherever it goes, is the same one in the next broker: who reads it misses nothing.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt as _;

use baton_guest::StatusLog;
use baton_tests::Builder;
use baton_tests::Vm;

/// open(2).
const O_NOCTTY: i32 = 0o400;

/// A VM whose serial console is of this kind.
fn start(kind: &str) -> Vm {
    let mut vm = Builder::release().start();
    vm.end().expect(0);
    vm.assert_over();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let file = "kind = \"file\"\npath = \"console.log\"";
    assert!(text.contains(file), "{text}");
    let text = text.replace(file, &format!("kind = \"{kind}\""));
    vm.site.write("vm.toml", text);
    let started = vm.run_again(&[]).expect(0).json();
    vm.is_now(&started);
    vm
}

/// Reads that much more.
fn read_on(stream: &mut impl Read, seen: &mut String, more: usize) {
    let enough = seen.len() + more;
    let mut buffer = [0; 4096];
    while seen.len() < enough {
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the console hung up");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// Goes to other brokers with somebody who reads.
fn goes_along(vm: &mut Vm, stream: &mut impl Read) {
    let mut seen = String::new();
    read_on(stream, &mut seen, 200);
    for _ in 0..3 {
        vm.assert_transfers();
        read_on(stream, &mut seen, 2048);
        vm.assert_upgrades();
        read_on(stream, &mut seen, 2048);
    }
    // A terminal makes two characters of a line's end.
    let log = StatusLog::parse(&seen.replace('\r', ""));
    assert!(log.unwrap().lines.len() > 10, "every line once, in order");
    assert_eq!(vm.status()["console_dropped"], 0);
}

#[test]
fn a_terminal_goes_along_to_other_brokers() {
    let mut vm = start("pty");
    let link = vm.site.run_dir().join(&vm.site.name).join("console.pty");
    let mut options = File::options();
    options.read(true).write(true).custom_flags(O_NOCTTY);
    let mut terminal = options.open(&link).unwrap();
    let leads = std::fs::read_link(&link).unwrap();
    goes_along(&mut vm, &mut terminal);
    assert_eq!(std::fs::read_link(&link).unwrap(), leads);
}

#[test]
fn who_is_connected_by_a_socket_goes_along_to_other_brokers() {
    let mut vm = start("socket");
    let mut person = vm.at_console(&[]);
    goes_along(&mut vm, person.stdout.as_mut().unwrap());
    person.kill().unwrap();
    person.wait().unwrap();
    // And whoever comes later is let in by the new one.
    let mut other = vm.at_console(&[]);
    read_on(other.stdout.as_mut().unwrap(), &mut String::new(), 200);
    other.kill().unwrap();
    other.wait().unwrap();
}
