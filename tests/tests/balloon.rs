//! What a guest does not use goes back to the host, in every generation of its worker.

use baton_guest::BalloonReport;
use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::until;

fn wait_for(vm: &Vm, what: &str, mut wanted: impl FnMut(&BalloonReport) -> bool) -> BalloonReport {
    until(what, || {
        let report = vm.ram.balloon();
        wanted(&report).then_some(report)
    })
}

#[test]
fn memory_that_the_guest_reports_is_the_hosts_again_over_upgrades() {
    let line = CommandLine::new().walk_bytes(4 << 20).balloon();
    let vm = Builder::release()
        .line(line.console().period_ms(20))
        .balloon()
        .start();
    wait_for(&vm, "a balloon", |balloon| {
        balloon.state == DriverState::Working
    });
    // What the guest takes elsewhere meanwhile.
    let other = 4 << 20;
    for round in 1..=3 {
        vm.ram.mail(layout::COMMAND_BALLOON_FILL);
        wait_for(&vm, "memory to be filled", |balloon| {
            balloon.filled == round
        });
        let full = vm.ram.taken();
        assert!(full > layout::BALLOON_BYTES, "{full}");
        // A new worker maps what is there, and takes no more.
        vm.assert_upgrades();
        assert!(vm.ram.taken() < full + other);
        vm.ram.mail(layout::COMMAND_BALLOON_REPORT);
        wait_for(&vm, "a report", |balloon| balloon.reported == round);
        let freed = vm.ram.taken();
        assert!(
            freed < full + other - layout::BALLOON_BYTES,
            "{full} {freed}"
        );
        vm.assert_upgrades();
        assert!(vm.ram.taken() < freed + other, "{freed}");
    }
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
}

#[test]
fn memory_that_was_reported_stays_the_hosts_over_transfers() {
    let line = CommandLine::new().walk_bytes(4 << 20).balloon();
    let mut vm = Builder::release()
        .line(line.console().period_ms(20))
        .balloon()
        .start();
    let other = 4 << 20;
    for round in 1..=2 {
        vm.ram.mail(layout::COMMAND_BALLOON_FILL);
        wait_for(&vm, "memory to be filled", |balloon| {
            balloon.filled == round
        });
        let full = vm.ram.taken();
        vm.ram.mail(layout::COMMAND_BALLOON_REPORT);
        wait_for(&vm, "a report", |balloon| balloon.reported == round);
        let freed = vm.ram.taken();
        assert!(
            freed < full + other - layout::BALLOON_BYTES,
            "{full} {freed}"
        );
        vm.assert_transfers();
        assert!(vm.ram.taken() < freed + other, "{freed}");
    }
}
