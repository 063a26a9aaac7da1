//! Prints how fast this machine's time stamp counter runs, in kHz. QEMU's emulator hands that counter through (`cpu_get_host_ticks`).

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// A reading of the clock, and of the counter in the middle of it: of several, that which took the least.
fn reading() -> (Instant, u64) {
    let attempts = (0..20).map(|_| {
        // SAFETY: every x86-64 processor has the instruction, which reads a register.
        let before = unsafe { _rdtsc() };
        let clock = Instant::now();
        let took = unsafe { _rdtsc() }.saturating_sub(before);
        (took, clock, before + took / 2)
    });
    let (_, clock, counter) = attempts
        .min_by_key(|(took, ..)| *took)
        .expect("there are some");
    (clock, counter)
}

fn main() {
    let (began, first) = reading();
    thread::sleep(Duration::from_millis(100));
    let (ended, last) = reading();
    let ticks = u128::from(last - first);
    println!("{}", ticks * 1_000_000 / (ended - began).as_nanos());
}
