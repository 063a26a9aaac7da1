//! `baton upgrade VM --broker` replaces the broker, too: one command, which ends with the new broker in the old one's place, or
//! with the old one as it was and nobody beside it.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::os::unix::net::UnixDatagram;

use baton_tests::Answer;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::Witness;
use baton_tests::is_alive;
use baton_tests::until;

/// The new broker is the one that the command names, and the only one.
fn assert_succeeded(vm: &mut Vm, answer: Answer, before: &Witness) {
    let old = vm.broker;
    let document = answer.expect(0).json();
    assert_eq!(document["outcome"], "committed", "{document}");
    assert_eq!(document["generation"], vm.generation());
    assert!(document["blackout_us"].as_u64().unwrap() > 0, "{document}");
    let load = document["phases"]["load_us"].as_u64();
    assert!(load.is_some(), "{document}");
    let broker = i32::try_from(document["broker_pid"].as_i64().unwrap()).unwrap();
    assert_ne!(broker, old);
    until("the old broker ends", || (!is_alive(old)).then_some(()));
    vm.broker = broker;
    vm.cgroup = vm.site.cgroups().first().unwrap().clone();
    let status = vm.status();
    assert_eq!(status["broker_pid"], broker, "{status}");
    assert_eq!(status["worker_pid"], document["worker_pid"], "{status}");
    vm.assert_only_runner(vm.worker());
    vm.assert_goes_on(before);
    assert!(!vm.site.run_dir().join(incoming(vm)).exists());
}

fn incoming(vm: &Vm) -> String {
    format!("{}.incoming", vm.site.name)
}

#[test]
fn one_command_replaces_the_broker_and_its_worker() {
    let mut vm = Builder::release().disk("root", 4, "").start();
    let before = vm.witness();
    let answer = vm.baton("upgrade", ["--broker"]);
    assert_succeeded(&mut vm, answer, &before);
    // Again, from a binary that is named.
    let named = vm.site.path("broker").display().to_string();
    let answer = vm.baton("upgrade", [format!("--broker={named}")]);
    assert_succeeded(&mut vm, answer, &before);
    assert_eq!(vm.generation(), 3);
    assert_eq!(vm.audit_log().upgrades(), ["committed"; 2]);
    vm.ask("audit").expect(0);
    vm.assert_upgrades();
}

#[test]
fn what_fails_leaves_the_old_broker_and_nobody_beside_it() {
    let mut vm = Builder::release().start();
    let (before, old, worker) = (vm.witness(), vm.broker, vm.worker());
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let stranger = vm.site.path("stranger").display().to_string();
    std::fs::copy("/bin/true", &stranger).unwrap();
    let name = vm.site.name.clone();
    let plain = ["--broker"].as_slice();
    type Case<'a> = (&'a str, &'a str, &'a [&'a str], i32, &'a str);
    let cases: [Case<'_>; 5] = [
        (
            "count = 1",
            "count = 2",
            plain,
            10,
            "cpus.count: the running VM has 1",
        ),
        ("count = 1", "count = ", plain, 3, "vm.toml"),
        (&name, "another", plain, 3, "describes another by now"),
        (
            "",
            "",
            &["--broker=/nowhere/broker"],
            3,
            "cannot start the broker",
        ),
        ("", "", &["--broker", "--worker", &stranger], 10, "aborted"),
    ];
    for (from, to, arguments, code, words) in cases {
        vm.site.write("vm.toml", file.replacen(from, to, 1));
        let answer = vm.baton("upgrade", arguments).expect(code);
        let said = format!("{}{}", answer.stdout, answer.stderr);
        assert!(said.contains(words), "{words}: {said}");
        assert_eq!(vm.site.brokers(), [old], "{words}");
        for name in [incoming(&vm).as_str(), "another.incoming"] {
            assert!(!vm.site.run_dir().join(name).exists(), "{name}");
        }
        assert_eq!((vm.worker(), vm.state()), (worker, "running".to_owned()));
        vm.assert_goes_on(&before);
    }
    vm.site.write("vm.toml", &file);
    let answer = vm.baton("upgrade", ["--broker"]);
    assert_succeeded(&mut vm, answer, &before);
}

#[test]
fn a_paused_guest_is_handed_over_paused_and_a_vm_that_ended_not_at_all() {
    let mut vm = Builder::release().start();
    vm.ask("pause").expect(0);
    let old = vm.broker;
    let document = vm.baton("upgrade", ["--broker"]).expect(0).json();
    vm.broker = i32::try_from(document["broker_pid"].as_i64().unwrap()).unwrap();
    until("the old broker ends", || (!is_alive(old)).then_some(()));
    assert_eq!(vm.state(), "paused");
    vm.assert_stands_still();
    vm.end().expect(0);
    vm.baton("upgrade", ["--broker"]).expect(3);
    vm.site.assert_nothing_left();
}

#[test]
fn its_broker_does_not_outlive_whoever_started_it_for_nothing() {
    let mut vm = Builder::faulty("").start();
    let (before, old) = (vm.witness(), vm.broker);
    vm.site.environment("BATON_FAIL", "new@build:hang");
    let mut command = vm
        .site
        .command()
        .args(["upgrade", "--broker", &vm.site.name])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("the new worker is built", || {
        (vm.site.workers().len() == 2).then_some(())
    });
    command.kill().unwrap();
    command.wait().unwrap();
    until("the new broker has ended", || {
        (vm.site.brokers() == [old]).then_some(())
    });
    vm.assert_goes_on(&before);
    vm.site.environment("BATON_FAIL", "");
    let answer = vm.baton("upgrade", ["--broker"]);
    assert_succeeded(&mut vm, answer, &before);
}

#[test]
fn the_service_manager_is_told_of_the_new_process() {
    let place = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(place.path().join("notify")).unwrap();
    manager.set_nonblocking(true).unwrap();
    let socket = place.path().join("notify").display().to_string();
    let mut vm = Builder::release()
        .variable("NOTIFY_SOCKET", &socket)
        .start();
    for _ in 0..2 {
        let before = vm.witness();
        let answer = vm.baton("upgrade", ["--broker"]);
        assert_succeeded(&mut vm, answer, &before);
        let mut told = [0; 64];
        let length = manager.recv(&mut told).unwrap();
        let expected = format!("MAINPID={}\n", vm.broker);
        assert_eq!(told.get(..length), Some(expected.as_bytes()));
        manager.recv(&mut told).unwrap_err();
    }
}
