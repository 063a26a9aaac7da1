//! A guest runs through one upgrade after another, and can tell none of them.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use baton_guest::CommandLine;
use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::until;

/// Upgrades, with the guest's word after each; then what the console and the audit log have of it.
fn upgrade_often(vm: &Vm, times: u32) {
    let first = vm.witness();
    for generation in 2..=times + 1 {
        let upgrade = vm.assert_upgrades();
        assert_eq!(upgrade.generation, generation);
        assert!(
            upgrade.blackout_us > 0 && upgrade.pause_us > 0,
            "{upgrade:?}"
        );
        assert_eq!(upgrade.state_digest.len(), 64, "{upgrade:?}");
    }
    let last = vm.assert_goes_on(&first);
    let lines = until("the guest prints on", || {
        let lines = vm.status_lines().lines;
        let printed_since = lines.last()?.sequence > last.report().slots.first()?.sequence;
        printed_since.then_some(lines)
    });
    assert_eq!(
        lines.first().map(|line| (line.boots, line.line)),
        Some((1, 1))
    );
    assert!(lines.iter().all(|line| line.nonce == last.report().nonce));
    let committed = vec!["committed"; usize::try_from(times).unwrap()];
    assert_eq!(vm.audit_log().upgrades(), committed);
    assert_eq!(vm.audit_log().count("commit-intent"), committed.len());
}

#[test]
fn a_cold_started_guest_counts_walks_and_prints() {
    let vm = Builder::release().start();
    let report = until("the guest has walked its memory", || {
        let report = vm.ram.report().ok()?;
        (report.slots[0].walk.sweeps > 2).then_some(report)
    });
    assert_eq!((report.boots, report.vcpus_running), (1, 1));
    let _undisturbed = vm.witness();
    until("it has printed", || {
        (vm.status_lines().lines.len() > 3).then_some(())
    });
    let status = vm.status();
    assert_eq!(status["state"], "running");
    assert_eq!(status["generation"], 1);
    assert_eq!(status["ram_bytes"], 64 << 20);
    assert_eq!(vm.site.workers(), [vm.worker()]);
    assert_eq!(vm.audit_log().upgrades(), [""; 0]);
}

#[test]
fn twelve_upgrades_of_one_vcpu_disturb_nothing() {
    upgrade_often(&Builder::release().start(), 12);
}

#[test]
fn ten_upgrades_of_four_vcpus_with_timers_and_interrupts_disturb_nothing() {
    let line = CommandLine::new()
        .walk_bytes(4 << 20)
        .console()
        .period_ms(20)
        .timer_us(1000)
        .ipi_us(1000);
    let vm = Builder::release().cpus(4).line(line).start();
    upgrade_often(&vm, 10);
    let before = vm.witness();
    until("timers tick and interrupts arrive on every vCPU", || {
        let now = vm.ram.report().ok()?;
        let mut pairs = now.slots.iter().zip(&before.report().slots);
        let alive = pairs.all(|(now, then)| {
            now.timer.ticks > then.timer.ticks && now.ipis.arrived > then.ipis.arrived
        });
        alive.then_some(())
    });
}

#[test]
fn a_worker_of_one_build_hands_over_to_another_build_and_back() {
    let (here, there) = (
        Binaries::release().worker(),
        Binaries::with_fail_points().worker(),
    );
    let vm = Builder::release().allow(&there).start();
    let first = vm.status()["worker_digest"].clone();
    let guest = vm.witness();
    let away = vm.upgrade_to(&there).upgrade();
    assert_eq!(away.outcome, "committed", "{away:?}");
    assert_ne!(first, away.worker_digest);
    assert_eq!(vm.status()["worker_digest"], away.worker_digest);
    let guest = vm.assert_goes_on(&guest);
    let back = vm.upgrade_to(&here).upgrade();
    assert_eq!(back.outcome, "committed", "{back:?}");
    assert_eq!(first, back.worker_digest);
    vm.assert_goes_on(&guest);
}

#[test]
fn a_rehearsal_goes_as_far_as_the_pause_and_changes_nothing() {
    let vm = Builder::release().start();
    let (guest, worker) = (vm.witness(), vm.worker());
    let rehearsed = vm.baton("upgrade", ["--dry-run"]).upgrade();
    assert_eq!(rehearsed.outcome, "rehearsed");
    assert_eq!((rehearsed.generation, rehearsed.pause_us), (1, 0));
    assert_eq!(vm.worker(), worker);
    vm.assert_only_runner(worker);
    vm.assert_goes_on(&guest);
    vm.assert_upgrades();
    assert_eq!(vm.audit_log().upgrades(), ["rehearsed", "committed"]);
}
