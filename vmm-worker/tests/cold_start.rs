//! A worker under its real filters starts a guest from nothing, and the guest runs.

mod harness;

use baton_guest::CommandLine;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use harness::Vm;

#[test]
fn the_guest_takes_turns_on_every_vcpu() {
    let vm = Vm::new(
        2,
        32,
        CommandLine::new().timer_us(1000).ipi_us(200).console(),
    );
    let mut worker = vm.start();
    let report = vm.wait_for_turns();
    assert_eq!(report.boots, 1);
    assert_eq!(report.tsc_source, baton_guest::TscSource::Hypervisor);
    let later = vm.wait_for("interrupts arrive", |report| {
        report
            .slots
            .iter()
            .all(|slot| slot.timer.ticks > 10 && slot.ipis.arrived > 10)
    });
    assert_eq!(later.nonce, report.nonce);
    assert_eq!(later.faults(), 0);
    worker.order(&Order::Query);
    let status = worker.expect("status", |report| match report {
        Report::Status(status) => Ok(status),
        other => Err(other),
    });
    assert_eq!(u64::from(status.tsc_khz), report.tsc_khz);
    assert!(status.exits > 0);
    assert!(worker.child.try_wait().unwrap().is_none());
}
