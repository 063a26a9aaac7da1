//! I5: after upgrades, aborts and cancels, broker and survivor hold what they held before, and nobody else is left.

#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use baton_tests::Builder;
use baton_tests::Residue;
use baton_tests::Vm;
use baton_tests::is_stopped;
use baton_tests::until;

/// What there is once the workers of earlier upgrades are gone.
fn settled(vm: &Vm) -> Residue {
    until("nothing changes any more", || {
        let before = vm.residue();
        std::thread::sleep(std::time::Duration::from_millis(50));
        (vm.residue() == before).then_some(before)
    })
}

/// The VM comes back to this; retired workers take a moment to be gone.
fn assert_as_before(vm: &Vm, before: &Residue) {
    let mut now = vm.residue();
    for _ in 0..400 {
        if now == *before {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        now = vm.residue();
    }
    assert_eq!(now, *before);
}

#[test]
fn twenty_upgrades_leave_nothing() {
    let vm = Builder::release().cpus(2).start();
    // The second generation sets the measure: it holds no kernel image's leftovers of a first start.
    vm.assert_upgrades();
    let before = settled(&vm);
    let guest = vm.witness();
    for _ in 0..20 {
        assert_eq!(vm.upgrade().outcome, "committed");
    }
    assert_as_before(&vm, &before);
    vm.assert_goes_on(&guest);
}

#[test]
fn an_aborted_upgrade_leaves_nothing() {
    for fault in [
        "new@build:error",
        "new@agree:die",
        "new@load:error",
        "old@save:error",
        "new@commit:die",
    ] {
        let vm = Builder::faulty(fault).start();
        let before = settled(&vm);
        assert_eq!(vm.upgrade().outcome, "aborted", "{fault}");
        assert_as_before(&vm, &before);
        vm.assert_upgrades();
    }
}

#[test]
fn a_rehearsed_upgrade_leaves_nothing() {
    let vm = Builder::release().start();
    let before = settled(&vm);
    assert_eq!(
        vm.baton("upgrade", ["--dry-run"]).upgrade().outcome,
        "rehearsed"
    );
    assert_as_before(&vm, &before);
}

/// Asks for an upgrade, and changes one's mind when it is where `there` says: Ctrl-C of the command cancels.
fn assert_cancelled(vm: &Vm, there: impl Fn() -> bool) {
    let (before, guest, worker) = (settled(vm), vm.witness(), vm.worker());
    let child = vm
        .site
        .command()
        .args(["upgrade", &vm.site.name])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    until("the upgrade is under way", || there().then_some(()));
    let interrupt = rustix::process::Signal::INT;
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, interrupt).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(10), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the operator cancelled it"), "{said}");
    assert_as_before(vm, &before);
    vm.assert_only_runner(worker);
    vm.assert_goes_on(&guest);
    assert_eq!(vm.audit_log().upgrades(), ["aborted"]);
    vm.assert_upgrades();
}

#[test]
fn a_cancelled_upgrade_is_aborted_and_leaves_nothing() {
    // The new worker hangs before its offer, so that there is time to change one's mind.
    let vm = Builder::faulty("new@agree:hang").slowness(20).start();
    assert_cancelled(&vm, || {
        let log = vm.audit_log();
        let confirmed = log.of("confirmed-fresh").last();
        let second =
            confirmed.and_then(|record| record.fields.get("generation")) == Some(&2.into());
        if second {
            let busy = vm.ask("upgrade").expect(75);
            assert!(busy.stderr.contains("being upgraded"), "{busy:?}");
        }
        second
    });
}

#[test]
fn an_upgrade_can_be_cancelled_while_the_guest_is_paused() {
    // One of them stands still where it is, with seconds to go until its deadline.
    for fault in ["S6:stop-old", "new@load:hang"] {
        let vm = Builder::faulty(fault).slowness(60).start();
        let old = vm.worker();
        // The old one is stopped by the fault, or because it has saved everything.
        assert_cancelled(&vm, || {
            let log = vm.audit_log();
            let mut settled = log.of("confirmed-settled");
            let paused = settled.any(|record| record.fields.get("generation") == Some(&2.into()));
            paused && is_stopped(old)
        });
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_leaves_nothing() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    let (before, guest) = (settled(&vm), vm.witness());
    let mut child = vm
        .site
        .command()
        .args(["upgrade", &vm.site.name])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("the upgrade has begun", || {
        (vm.audit_log().count("upgrade-begin") == 2).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    until("the upgrade has ended", || {
        (vm.audit_log().upgrades().len() == 2).then_some(())
    });
    assert_as_before(&vm, &before);
    vm.assert_goes_on(&guest);
}
