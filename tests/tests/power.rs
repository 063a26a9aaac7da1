//! Pausing, resetting, crashing and switching off a guest, before and after its worker is replaced.

use baton_guest::layout::COMMAND_ACPI_OFF;
use baton_guest::layout::COMMAND_ACPI_RESET;
use baton_guest::layout::COMMAND_CRASH;
use baton_guest::layout::COMMAND_RESET;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::until;

/// Waits until the guest has booted so often, and goes on.
fn assert_booted(vm: &Vm, boots: u64) {
    until("the guest boots again", || {
        let report = vm.ram.report().ok()?;
        let counts = |slot: &baton_guest::Slot| slot.running && slot.sequence > 0;
        (report.boots == boots && report.slots.iter().all(counts)).then_some(())
    });
    let booted = vm.witness();
    vm.assert_goes_on(&booted);
    assert_eq!(vm.state(), "running");
}

#[test]
fn a_guest_resets_in_every_way_before_and_after_an_upgrade() {
    let vm = Builder::release().cpus(2).start();
    let mut nonces = vec![vm.witness().report().nonce];
    let mut boots = 1;
    for _ in 0..2 {
        for command in [COMMAND_RESET, COMMAND_ACPI_RESET, COMMAND_CRASH] {
            vm.ram.mail(command);
            boots += 1;
            assert_booted(&vm, boots);
            nonces.push(vm.witness().report().nonce);
        }
        vm.ask("reset").expect(0);
        boots += 1;
        assert_booted(&vm, boots);
        vm.assert_upgrades();
    }
    nonces.sort_unstable();
    nonces.dedup();
    assert_eq!(nonces.len(), 7, "each boot chose another nonce");
    // A reset cuts the line that is being printed, so that only the last boot's are looked at.
    until("the console goes on", || {
        let boot = format!("boot={boots} line=");
        vm.console().contains(&boot).then_some(())
    });
    let log = vm.audit_log();
    assert_eq!(log.upgrades(), ["committed", "committed"]);
    assert_eq!(log.count("guest"), 8, "every reset is on record");
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let vm = Builder::release().start();
    let before = vm.witness();
    vm.ask("pause").expect(0);
    vm.assert_stands_still();
    assert_eq!(vm.state(), "paused");
    // Not twice; and a new worker lets it stand as it stood.
    vm.ask("pause").expect(3);
    vm.ask("upgrade").expect(0);
    vm.assert_stands_still();
    assert_eq!(vm.state(), "paused");
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);
    vm.ask("resume").expect(3);
    vm.assert_upgrades();
    vm.ask("pause").expect(0);
    vm.assert_stands_still();
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);
}

#[test]
fn a_guest_that_switches_itself_off_ends_its_vm() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    vm.ram.mail(COMMAND_ACPI_OFF);
    vm.site.assert_nothing_left();
    let log = vm.audit_log();
    assert_eq!(log.count("vm-end"), 1);
    assert_eq!(
        log.0.last().map(|record| record.event.as_str()),
        Some("vm-end")
    );
}

#[test]
fn a_worker_that_is_killed_is_a_lost_vm_that_says_so() {
    let vm = Builder::release().start();
    baton_tests::kill_process(vm.worker());
    until("the broker knows", || (vm.state() == "lost").then_some(()));
    vm.assert_stands_still();
    for command in ["upgrade", "pause", "reset"] {
        vm.ask(command).expect(20);
    }
    assert_eq!(vm.audit_log().count("lost"), 1);
    vm.end().expect(0);
    vm.site.assert_nothing_left();
}
