//! The clocks that this worker reads.

use rustix::time::ClockId;
use rustix::time::clock_gettime;

fn ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of all reports.
#[must_use]
pub(crate) fn monotonic_ns() -> u64 {
    ns(ClockId::Monotonic)
}

/// CLOCK_MONOTONIC_RAW in nanoseconds: the clock that KVM's own paravirtual clock advances by
/// (`get_kvmclock_base_ns`, `arch/x86/kvm/x86.c`), which no time adjustment touches.
#[must_use]
pub(crate) fn raw_ns() -> u64 {
    ns(ClockId::MonotonicRaw)
}
