//! What lies between a guest's last instruction in one worker and its first in the next, and how its clocks get over it.
//!
//! Within one boot of the host its clocks run on, and the guest's with them: the TSC keeps its offset, the paravirtual clock
//! its distance from CLOCK_MONOTONIC_RAW. A boot lets the host's TSC and CLOCK_MONOTONIC_RAW begin anew; what remains is the
//! host's CLOCK_REALTIME, by which the guest's clocks are put forward as Documentation/virt/kvm/devices/vcpu.rst, 4.1 has it.

use std::time::Duration;

use baton_ipc::state_file::Moment;
use kvm_ioctls::VmFd;
use thiserror::Error;
use vmm_sys_util::errno;

use crate::kvmclock;
use crate::kvmclock::Reading;

/// No upgrade's pause is nearly as long; a longer one is a forged state.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// The longest that a state may lie in a file: ten years.
const STORED_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How much the kernel's measure of one TSC may differ from boot to boot, in parts per million. Linux takes a TSC for
/// unstable that differs from its other clocks by 200 (`WATCHDOG_THRESHOLD`, `kernel/time/clocksource.c`).
const TSC_TOLERANCE_PPM: u64 = 100;

/// What lies between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gap {
    /// The pause of an upgrade.
    Pause,
    /// The guest lay in a file, while the host ran on.
    Stored,
    /// The guest lay in a file, and the host booted; a moment of the boot before.
    Boot(Moment),
}

/// Why a guest's clocks cannot get over it.
#[derive(Debug, Error)]
pub(crate) enum GapError {
    /// The clock cannot be read.
    #[error("KVM_GET_CLOCK: {0}")]
    Clock(#[from] errno::Error),
    /// KVM does not tell a moment of all clocks.
    #[error(
        "the host has booted since the guest was saved, and its KVM does not tell the paravirtual clock, CLOCK_REALTIME and the TSC of \
         one moment (KVM_CLOCK_REALTIME, KVM_CLOCK_HOST_TSC): let the host's clocksource be its TSC"
    )]
    NoMoment,
    /// Too long ago.
    #[error("the guest was saved {0} s ago by the host's clock (at most {max})", max = STORED_MAX.as_secs())]
    TooLong(u64),
}

/// What is added to a guest's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    /// What the paravirtual clock is to say, and when.
    pub(crate) clock: Reading,
    /// To be added to the offset of each vCPU's TSC, modulo 2^64.
    pub(crate) tsc: u64,
}

impl Gap {
    /// How long it can have lasted within one boot of the host.
    pub(crate) fn longest(self) -> Duration {
        match self {
            Self::Pause => PAUSE_MAX,
            Self::Stored | Self::Boot(_) => STORED_MAX,
        }
    }

    /// Whether a guest whose TSC had the `saved` frequency may go on with a TSC of the frequency `here`, both in kHz: with
    /// the same one, or after a boot one that was measured to be nearly the same.
    pub(crate) fn allows(self, saved: u32, here: u32) -> bool {
        let tolerance = match self {
            Self::Pause | Self::Stored => 0,
            Self::Boot(_) => u64::from(saved) * TSC_TOLERANCE_PPM / 1_000_000,
        };
        u64::from(saved.abs_diff(here)) <= tolerance
    }

    /// What the clocks of a guest in this VM have to be put forward by, whose TSC had the `saved` frequency in kHz; `None` if
    /// they run on by themselves.
    ///
    /// # Errors
    ///
    /// [`GapError`].
    pub(crate) fn forward(self, vm: &VmFd, saved: u32) -> Result<Option<Forward>, GapError> {
        let Self::Boot(then) = self else {
            return Ok(None);
        };
        let (now, at_raw_ns) = kvmclock::moment(vm)?.ok_or(GapError::NoMoment)?;
        Forward::over(then, now, at_raw_ns, saved).map(Some)
    }
}

impl Forward {
    /// From a moment of one boot to one of another, which was when CLOCK_MONOTONIC_RAW said `at_raw_ns`. If the host's clock
    /// went back, no time has passed.
    fn over(then: Moment, now: Moment, at_raw_ns: u64, tsc_khz: u32) -> Result<Self, GapError> {
        let elapsed = now.real_ns.saturating_sub(then.real_ns);
        if Duration::from_nanos(elapsed) > STORED_MAX {
            return Err(GapError::TooLong(elapsed / 1_000_000_000));
        }
        // At most ten years at 4.3 GHz: 2^61.
        let ticks = u128::from(elapsed) * u128::from(tsc_khz) / 1_000_000;
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
        Ok(Self {
            clock: Reading {
                ns: then.clock_ns.saturating_add(elapsed),
                at_raw_ns,
            },
            tsc: then.host_tsc.wrapping_add(ticks).wrapping_sub(now.host_tsc),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const KHZ: u32 = 2_000_000;

    fn then() -> Moment {
        Moment {
            clock_ns: 100 * SECOND,
            real_ns: 1_000_000 * SECOND,
            host_tsc: 9_000_000_000_000,
        }
    }

    fn later(by_ns: u64) -> Moment {
        Moment {
            clock_ns: 7,
            real_ns: then().real_ns + by_ns,
            host_tsc: 4_000_000_000,
        }
    }

    #[test]
    fn both_clocks_go_forward_by_the_time_that_has_passed() {
        let forward = Forward::over(then(), later(3600 * SECOND), 55, KHZ).unwrap();
        let expected = Reading {
            ns: 3700 * SECOND,
            at_raw_ns: 55,
        };
        assert_eq!(forward.clock, expected);
        // A guest whose TSC had an offset: what it read then, and what it reads now.
        let offset = 0_u64.wrapping_sub(1_000_000_000_000);
        let read_then = then().host_tsc.wrapping_add(offset);
        let reads_now = later(0)
            .host_tsc
            .wrapping_add(offset)
            .wrapping_add(forward.tsc);
        assert_eq!(reads_now - read_then, 3600 * 2_000_000_000);
    }

    #[test]
    fn a_host_whose_clock_went_back_lets_no_time_pass() {
        let mut now = later(0);
        now.real_ns = 0;
        let forward = Forward::over(then(), now, 55, KHZ).unwrap();
        assert_eq!(forward.clock.ns, then().clock_ns);
        assert_eq!(now.host_tsc.wrapping_add(forward.tsc), then().host_tsc);
    }

    #[test]
    fn more_than_ten_years_are_no_gap() {
        let eleven_years = 11 * 365 * 86_400 * SECOND;
        let error = Forward::over(then(), later(eleven_years), 55, KHZ).unwrap_err();
        assert!(matches!(error, GapError::TooLong(_)), "{error}");
    }

    #[test]
    fn only_after_a_boot_may_the_tsc_be_measured_anew() {
        let boot = Gap::Boot(then());
        assert!(boot.allows(2_000_000, 2_000_200));
        assert!(!boot.allows(2_000_000, 2_000_201));
        assert!(!boot.allows(2_000_000, 1_999_799));
        for gap in [Gap::Pause, Gap::Stored] {
            assert!(gap.allows(2_000_000, 2_000_000) && !gap.allows(2_000_000, 2_000_001));
        }
        assert!(!boot.allows(u32::MAX, 0));
    }
}
