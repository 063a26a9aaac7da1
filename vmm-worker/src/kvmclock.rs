//! KVM's paravirtual clock, read and set together with a clock of the host, as exactly as the host lets us.
//!
//! Between reading the one and the other this thread may lose its processor. A guest whose paravirtual clock and TSC then
//! drift apart takes its TSC for unstable: Linux's clocksource watchdog allows some 100 µs. So both clocks are read again
//! until nothing came in between.

use std::time::Duration;

use baton_ipc::state_file::Moment;
use kvm_bindings::KVM_CLOCK_HOST_TSC;
use kvm_bindings::KVM_CLOCK_REALTIME;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;

use crate::clock;

/// How often it is tried, and what the first try has to keep within; each next one may take twice as long. The call takes
/// 1 µs on hardware.
const TRIES: u32 = 8;
const WITHIN: Duration = Duration::from_micros(5);

/// The clock's value, and CLOCK_MONOTONIC_RAW when it had that, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) ns: u64,
    pub(crate) at_raw_ns: u64,
}

/// What was done between two readings of CLOCK_MONOTONIC_RAW.
struct Timed<T> {
    done: T,
    began_ns: u64,
    ended_ns: u64,
}

impl<T> Timed<T> {
    /// The middle: at most half of it away from the truth.
    fn middle_ns(&self) -> u64 {
        u64::midpoint(self.began_ns, self.ended_ns)
    }

    fn took_ns(&self) -> u64 {
        self.ended_ns.saturating_sub(self.began_ns)
    }
}

/// Does it again until it took no longer than such a thing takes; the last try counts, however long it took.
fn undisturbed<T>(
    mut what: impl FnMut() -> Result<T, errno::Error>,
) -> Result<Timed<T>, errno::Error> {
    let mut within = WITHIN;
    let mut tries = 1;
    loop {
        let began_ns = clock::raw_ns();
        let done = what()?;
        let timed = Timed {
            done,
            began_ns,
            ended_ns: clock::raw_ns(),
        };
        if timed.took_ns() <= u64::try_from(within.as_nanos()).unwrap_or(u64::MAX) || tries == TRIES
        {
            return Ok(timed);
        }
        tries += 1;
        within *= 2;
    }
}

/// What the VM's clock says (KVM_GET_CLOCK).
///
/// # Errors
///
/// The ioctl's.
pub(crate) fn read(vm: &VmFd) -> Result<Reading, errno::Error> {
    let timed = undisturbed(|| vm.get_clock())?;
    Ok(Reading {
        ns: timed.done.clock,
        at_raw_ns: timed.middle_ns(),
    })
}

/// One moment on all clocks, and CLOCK_MONOTONIC_RAW then, in nanoseconds; `None` if KVM does not tell it, as on a host whose
/// own clocksource is not its TSC.
///
/// # Errors
///
/// The ioctl's.
pub(crate) fn moment(vm: &VmFd) -> Result<Option<(Moment, u64)>, errno::Error> {
    let timed = undisturbed(|| vm.get_clock())?;
    let told = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    let moment = Moment {
        clock_ns: timed.done.clock,
        real_ns: timed.done.realtime,
        host_tsc: timed.done.host_tsc,
    };
    Ok((timed.done.flags & told == told).then(|| (moment, timed.middle_ns())))
}

/// Sets the VM's clock to what it would be if it had gone on since that reading (KVM_SET_CLOCK).
///
/// # Errors
///
/// The ioctl's.
pub(crate) fn go_on(vm: &VmFd, since: Reading) -> Result<(), errno::Error> {
    undisturbed(|| {
        let elapsed = clock::raw_ns().saturating_sub(since.at_raw_ns);
        vm.set_clock(&kvm_clock_data {
            clock: since.ns.saturating_add(elapsed),
            ..kvm_clock_data::default()
        })
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    /// How far the second VM's clock is from the first's, and what that can be known to.
    fn apart(first: &VmFd, second: &VmFd) -> (u64, u64) {
        let reading = |vm: &VmFd| undisturbed(|| vm.get_clock()).unwrap();
        let (one, other) = (reading(first), reading(second));
        let between = other.middle_ns() - one.middle_ns();
        let expected = one.done.clock + between;
        (
            other.done.clock.abs_diff(expected),
            one.took_ns() + other.took_ns(),
        )
    }

    #[test]
    fn a_clock_that_goes_on_elsewhere_goes_on_there_as_if_nothing_had_been() {
        let kvm = Kvm::new().unwrap();
        let (old, new) = (kvm.create_vm().unwrap(), kvm.create_vm().unwrap());
        for _ in 0..100 {
            let reading = read(&old).unwrap();
            std::thread::yield_now();
            go_on(&new, reading).unwrap();
            // Each of both was known to WITHIN or, on a busy host, somewhat worse.
            let (apart, known) = apart(&old, &new);
            let most = u64::try_from((WITHIN * 16).as_nanos()).unwrap();
            assert!(
                apart <= known + most,
                "{apart} ns apart, known to {known} ns"
            );
        }
    }

    #[test]
    fn what_was_disturbed_is_done_again_and_at_last_taken() {
        let mut tries = 0;
        let timed = undisturbed(|| {
            tries += 1;
            if tries == 1 {
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(tries)
        });
        assert!(timed.unwrap().done > 1);
        tries = 0;
        let timed = undisturbed(|| {
            tries += 1;
            std::thread::sleep(Duration::from_millis(2));
            Ok(())
        });
        assert!(timed.unwrap().took_ns() > 1_000_000);
        assert_eq!(tries, TRIES);
    }

    #[test]
    fn an_error_ends_it() {
        let failed = undisturbed(|| Err::<(), _>(errno::Error::new(5)));
        assert_eq!(failed.err(), Some(errno::Error::new(5)));
    }
}
