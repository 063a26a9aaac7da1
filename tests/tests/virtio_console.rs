//! A guest's virtio console, beside its serial port: what is typed there comes back once and in order, whoever runs the guest.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Child;

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_tests::Builder;
use baton_tests::Talk;
use baton_tests::Vm;
use baton_tests::talk;
use baton_tests::until;

/// open(2).
const O_NOCTTY: i32 = 0o400;

fn builder(table: &str) -> Builder {
    let line = CommandLine::new().hvc().console().period_ms(50);
    Builder::release()
        .line(line)
        .tables(&format!("[virtio_console]\n{table}\n"))
}

fn start(table: &str) -> Vm {
    let vm = builder(table).start();
    until("a driver", || {
        (vm.ram.hvc().state == DriverState::Working).then_some(())
    });
    vm
}

/// All that was typed has come back once; how many numbers that were.
#[track_caller]
fn finish(talk: Talk, vm: &Vm) -> u64 {
    let sent = talk.finish();
    let report = vm.ram.hvc();
    let bytes = sent * talk::LINE as u64;
    assert_eq!((report.echoed, report.wrong), (bytes, 0), "{report:?}");
    assert_eq!(vm.status()["console_dropped"], 0);
    sent
}

fn leave(mut person: Child) {
    person.kill().unwrap();
    person.wait().unwrap();
}

#[test]
fn what_is_typed_comes_back_once_and_in_order_over_twenty_upgrades() {
    let vm = start("kind = \"socket\"");
    let mut person = vm.at_console(&["--virtio"]);
    let talk = Talk::new(person.stdin.take().unwrap(), person.stdout.take().unwrap());
    for _ in 0..20 {
        talk.wait_for(500);
        vm.assert_upgrades();
    }
    talk.wait_for(500);
    finish(talk, &vm);
    leave(person);
    // The serial console is another one, and nothing of this is there.
    assert!(vm.status_lines().lines.len() > 1);
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let descriptors = audit["descriptors"].as_array().unwrap();
    let grants = descriptors.iter().filter_map(|one| one["grant"].as_str());
    let consoles: Vec<_> = grants
        .filter(|grant| grant.starts_with("console"))
        .collect();
    assert_eq!(consoles.len(), 2, "{consoles:?}");
}

#[test]
fn a_terminal_goes_along_to_other_brokers() {
    let mut vm = start("kind = \"pty\"");
    let link = vm
        .site
        .run_dir()
        .join(&vm.site.name)
        .join("virtio-console.pty");
    let mut options = File::options();
    options.read(true).write(true).custom_flags(O_NOCTTY);
    let terminal = options.open(&link).unwrap();
    let talk = Talk::new(terminal.try_clone().unwrap(), terminal);
    for _ in 0..3 {
        talk.wait_for(500);
        vm.assert_transfers();
        vm.assert_upgrades();
    }
    talk.wait_for(500);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    finish(talk, &vm);
}

#[test]
fn a_file_has_all_that_the_guest_wrote_however_the_upgrades_end() {
    let vm = start("kind = \"file\"\npath = \"hvc.log\"");
    let mut person = vm.at_console(&["--virtio"]);
    let talk = Talk::new(person.stdin.take().unwrap(), person.stdout.take().unwrap());
    for _ in 0..3 {
        talk.wait_for(500);
        vm.assert_upgrades();
        // This one ends before the pause.
        vm.baton("upgrade", ["--dry-run"]).expect(0);
    }
    let typed = finish(talk, &vm);
    leave(person);
    let log = std::fs::read_to_string(vm.site.path("hvc.log")).unwrap();
    assert!(log == (1..=typed).map(talk::line).collect::<String>());
}

#[test]
fn a_vm_without_one_says_so() {
    let vm = Builder::release().start();
    let refusal = vm.baton("console", ["--virtio"]).expect(3);
    assert!(
        refusal.stderr.contains("this VM has no virtio console"),
        "{refusal:?}"
    );
}

#[test]
fn a_policy_that_grants_one_console_refuses_the_other() {
    let vm = start("kind = \"socket\"");
    let policy =
        baton_policy::BUILTIN.replacen("count = 2\n# Where the broker may copy", "# Where", 1);
    assert_ne!(policy, baton_policy::BUILTIN);
    let narrow = vm.site.write("narrow.toml", policy);
    let file = vm.site.path("elsewhere.log");
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = text.replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1);
    for (from, to, status, said) in [
        (
            "\"default\"",
            format!("{:?}", narrow.display().to_string()),
            30,
            "console",
        ),
        (
            "\"socket\"",
            "\"stdio\"".to_owned(),
            3,
            "for the serial console alone",
        ),
        (
            "kind = \"socket\"",
            format!(
                "kind = \"file\"\npath = {:?}",
                file.join("x").display().to_string()
            ),
            3,
            "virtio_console.path",
        ),
    ] {
        vm.site.write("other.toml", other.replacen(from, &to, 1));
        let refusal = vm.site.run("other.toml").expect(status);
        assert!(
            (refusal.stdout.clone() + &refusal.stderr).contains(said),
            "{refusal:?}"
        );
    }
}

#[test]
fn a_broker_whose_vm_file_has_none_does_not_take_it_over() {
    let vm = start("kind = \"socket\"");
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    vm.site.write(
        "vm.toml",
        text.replacen("[virtio_console]\nkind = \"socket\"\n", "", 1),
    );
    let refused = vm.baton("upgrade", ["--broker"]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(
        (refused.stdout.clone() + &refused.stderr).contains("Console in slot 28"),
        "{refused:?}"
    );
    let before = vm.witness();
    vm.assert_goes_on(&before);
}
