//! Measures the rates that the crate's documentation gives: `cargo run --release -p baton-guest --example measure [MIB]`.
#![expect(clippy::indexing_slicing, reason = "every report has a first slot")]

use std::time::Duration;

use baton_guest::{CommandLine, Report};

#[path = "../tests/machine/mod.rs"]
mod machine;
use machine::Machine;

/// Microseconds, with as much behind the point as is worth it.
fn us(report: &Report, ticks: u64) -> f64 {
    ticks as f64 * 1000.0 / report.tsc_khz as f64
}

fn turns(what: &str, line: CommandLine) {
    let machine = Machine::boot(16 << 20, 1, line);
    let first = machine.report_when("it counts", |report| report.slots[0].sequence > 1000);
    std::thread::sleep(Duration::from_secs(1));
    let last = machine.report_when("it counts on", |report| report.slots[0].sequence > 1000);
    let (a, b) = (&first.slots[0], &last.slots[0]);
    let ns = us(&last, b.last_tsc - a.last_tsc) * 1000.0 / (b.sequence - a.sequence) as f64;
    println!(
        "{what}: {ns:.1} ns a turn, largest gap {:.0} us",
        us(&last, b.max_gap)
    );
}

fn main() {
    let mib: u64 = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(256);
    turns("counting", CommandLine::new());
    turns(
        "counting, console each 100 ms",
        CommandLine::new().console(),
    );

    let machine = Machine::boot((mib + 4) << 20, 1, CommandLine::new().walk());
    let report = machine.report_when("20 warm sweeps", |report| report.slots[0].walk.sweeps > 20);
    let walk = &report.slots[0].walk;
    for (what, ticks) in [
        ("first", walk.first_sweep),
        ("median", walk.median_sweep),
        ("fastest", walk.min_sweep),
    ] {
        let us = us(&report, ticks);
        let (per_mib, per_page) = (us / mib as f64, us * 1000.0 / walk.pages as f64);
        println!(
            "{what} sweep of {mib} MiB: {us:.0} us, {per_mib:.2} us a MiB, {per_page:.1} ns a page"
        );
    }

    let machine = Machine::boot(16 << 20, 1, CommandLine::new().ipi_us(0));
    let ipis = |report: &Report| (report.slots[0].ipis.arrived, report.slots[0].last_tsc);
    let report = machine.report_when("interrupts come", |report| ipis(report).0 > 100);
    let (first, start) = ipis(&report);
    let report = machine.report_when("more come", |report| ipis(report).0 > 20_000);
    let (last, end) = ipis(&report);
    let each = us(&report, end - start) / (last - first) as f64;
    println!("interrupts to itself, one after the other: {each:.1} us each");
}
