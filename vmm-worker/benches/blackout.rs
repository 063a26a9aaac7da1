//! Where the time of a pause goes, over many upgrades of one guest: prints percentiles, asserts nothing about them.
//!
//! `cargo bench -p baton-worker --bench blackout -- [UPGRADES] [VCPUS]`

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::time::Instant;

use baton_guest::CommandLine;
use baton_ipc::worker::Order;
use harness::Upgrade;
use harness::Vm;

fn percentile(values: &mut [u64], percent: usize) -> u64 {
    values.sort_unstable();
    values
        .get(values.len().saturating_sub(1) * percent / 100)
        .copied()
        .unwrap_or(0)
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter_map(|argument| argument.parse::<u32>().ok());
    let (upgrades, cpus) = (
        arguments.next().unwrap_or(100),
        arguments.next().unwrap_or(1),
    );
    let vm = Vm::new(
        u8::try_from(cpus).unwrap_or(1),
        128,
        CommandLine::new().walk_bytes(16 << 20),
    );
    let mut old = vm.start();
    vm.wait_for_turns();
    let mut columns: Vec<(&str, Vec<u64>)> = [
        "build", "park", "save", "load", "run", "blackout", "rss_kib",
    ]
    .map(|name| (name, Vec::new()))
    .into();
    for generation in 2..upgrades + 2 {
        let mut upgrade = Upgrade::agree(&vm, &mut old, generation);
        let build = upgrade.build(&vm).rehearsed_us;
        let begun = Instant::now();
        let saved = Upgrade::park(&mut old);
        let saved_at = begun.elapsed();
        upgrade.expect_loaded();
        let loaded_at = begun.elapsed();
        old.order(&Order::Ceded);
        upgrade.new.order(&Order::Commit);
        let last_run_ns = upgrade.new.expect_running();
        let park = (saved.parked_ns - saved.first_exit_ns) / 1000;
        let blackout = (last_run_ns - saved.first_exit_ns) / 1000;
        let us =
            |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let rss = upgrade.new.status_field("RssAnon") + upgrade.new.status_field("RssFile");
        let load = us(loaded_at - saved_at);
        let row = [
            build,
            park,
            us(saved_at) - park,
            load,
            blackout.saturating_sub(us(loaded_at)),
            blackout,
            rss,
        ];
        for ((_, values), value) in columns.iter_mut().zip(row) {
            values.push(value);
        }
        old = upgrade.new;
        vm.wait_for_turns();
    }
    assert_eq!(vm.wait_for_turns().faults(), 0);
    println!("{upgrades} upgrades, {cpus} vCPUs, times in microseconds");
    println!(
        "{:>10} {:>8} {:>8} {:>8} {:>8}",
        "", "p50", "p90", "p99", "max"
    );
    for (name, mut values) in columns {
        let [p50, p90, p99, max] =
            [50, 90, 99, 100].map(|percent| percentile(&mut values, percent));
        println!("{name:>10} {p50:>8} {p90:>8} {p99:>8} {max:>8}");
    }
}
