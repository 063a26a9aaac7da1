//! The host's monotonic clock, and the guest's TSC read against it.

use baton_guest::Report;
use rustix::time::ClockId;

/// CLOCK_MONOTONIC, in nanoseconds.
pub(crate) fn monotonic_ns() -> i128 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// When the guest's TSC read zero, on the host's monotonic clock.
///
/// Each reading of the guest's last turn is of a moment before it was read, so that every sample is late, by the time for
/// which its vCPU did not run. The earliest is the best.
#[derive(Debug, Default)]
pub(crate) struct TscOrigin(Option<i128>);

impl TscOrigin {
    /// Takes a reading of the report of just now.
    pub(crate) fn sample(&mut self, report: &Report, tsc_khz: u32) {
        let now = monotonic_ns();
        for slot in &report.slots {
            let origin = now - nanoseconds(slot.last_tsc, tsc_khz);
            self.0 = Some(self.0.map_or(origin, |least| least.min(origin)));
        }
    }

    /// A TSC value on the host's monotonic clock, in nanoseconds.
    pub(crate) fn at(&self, tsc: u64, tsc_khz: u32) -> Option<i128> {
        Some(self.0? + nanoseconds(tsc, tsc_khz))
    }
}

fn nanoseconds(ticks: u64, tsc_khz: u32) -> i128 {
    i128::from(ticks) * 1_000_000 / i128::from(tsc_khz.max(1))
}
