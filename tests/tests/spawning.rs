//! Faults in S2, while the new worker has not said its first word: it never will, so there is time for them.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::path::Path;
use std::process::Child;
use std::process::Stdio;

use baton_tests::Answer;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::continue_process;
use baton_tests::hostility;
use baton_tests::kill_process;
use baton_tests::stop_process;
use baton_tests::until;

/// A VM and an upgrade of it that waits in S2 until its deadline.
fn spawning(slowness: u32) -> (Vm, Child) {
    let directory = tempfile::tempdir().unwrap();
    let hostile = Path::new(env!("CARGO_BIN_EXE_hostile-worker"));
    let silent = hostility::binary(hostile, "raw.silent", directory.path());
    let vm = Builder::release().allow(&silent).slowness(slowness).start();
    let child = vm
        .site
        .command()
        .args(["upgrade", &vm.site.name, "--worker"])
        .arg(&silent)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the new worker is there", || {
        (vm.site.workers().len() == 2).then_some(())
    });
    (vm, child)
}

fn outcome(child: Child) -> baton_tests::Upgrade {
    Answer::of(&child.wait_with_output().unwrap()).upgrade()
}

#[test]
fn the_old_worker_is_killed_and_the_vm_is_lost() {
    let (vm, child) = spawning(10);
    kill_process(vm.worker());
    let upgrade = outcome(child);
    assert_eq!(upgrade.outcome, "lost", "{upgrade:?}");
    until("nobody is left", || {
        vm.site.workers().is_empty().then_some(())
    });
    vm.assert_stands_still();
    assert_eq!(vm.state(), "lost");
    assert_eq!(vm.audit_log().upgrades(), ["lost"]);
}

#[test]
fn the_new_worker_is_killed_and_the_upgrade_is_aborted() {
    let (vm, child) = spawning(10);
    let (old, before) = (vm.worker(), vm.witness());
    let workers = vm.site.workers();
    let new = workers.iter().find(|worker| **worker != old).unwrap();
    kill_process(*new);
    let upgrade = outcome(child);
    assert_eq!(
        (upgrade.outcome.as_str(), upgrade.pause_us),
        ("aborted", 0),
        "{upgrade:?}"
    );
    assert_eq!(upgrade.failed_step.as_deref(), Some("spawn"));
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_upgrades();
    assert_eq!(vm.audit_log().upgrades(), ["aborted", "committed"]);
}

#[test]
fn the_old_worker_is_stopped_and_the_upgrade_is_aborted() {
    let (vm, child) = spawning(3);
    let (old, before) = (vm.worker(), vm.witness());
    stop_process(old);
    let upgrade = outcome(child);
    assert_eq!(
        (upgrade.outcome.as_str(), upgrade.pause_us),
        ("aborted", 0),
        "{upgrade:?}"
    );
    continue_process(old);
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_upgrades();
}

#[test]
fn a_second_upgrade_is_told_that_the_vm_is_busy_and_a_forced_end_ends_all() {
    let (vm, child) = spawning(10);
    for command in ["upgrade", "pause", "audit"] {
        let answer = vm.ask(command).expect(75);
        assert!(answer.stderr.contains("being upgraded"), "{answer:?}");
    }
    assert_eq!(vm.state(), "upgrading");
    vm.end().expect(0);
    let output = child.wait_with_output().unwrap();
    assert_ne!(output.status.code(), Some(0));
    vm.site.assert_nothing_left();
}
