//! The guest boots, counts, walks and prints, on a machine that has nothing but KVM.

mod machine;

use baton_guest::{CommandLine, TscSource};
use machine::Machine;

#[test]
fn one_vcpu_counts_and_walks_and_prints() {
    let machine = Machine::boot(
        64 << 20,
        1,
        CommandLine::new().walk().console().period_ms(20),
    );
    machine.report_when("it swept three times", |report| {
        report.slots[0].walk.sweeps >= 3
    });
    machine.until("it printed five lines", |machine| {
        (machine.status_lines().lines.len() >= 5).then_some(())
    });
    let report = machine.paused(|| machine.report().unwrap());
    assert_ne!(report.nonce, 0);
    assert_eq!(
        (report.boots, report.panic_line, report.tsc_source),
        (1, None, TscSource::CommandLine)
    );
    println!("{report:#?}\n{}", machine.console());
    assert!(report.slots[0].unbroken());
    assert_eq!(report.faults(), 0);
}
