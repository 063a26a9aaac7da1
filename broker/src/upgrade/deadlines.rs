//! How long each step of an upgrade may take. Nothing here waits for ever.

use std::time::Duration;

use baton_ipc::control::Step;

/// The bounds of one broker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    ram_bytes: u64,
    slowness: u32,
}

impl Deadlines {
    /// Bounds for a guest of this size, `slowness` times the ordinary ones (1 on hardware; an emulated host needs more).
    pub(crate) fn new(ram_bytes: u64, slowness: u32) -> Self {
        Self {
            ram_bytes,
            slowness: slowness.max(1),
        }
    }

    /// How much slower than hardware the host is.
    pub(crate) fn slowness(self) -> u32 {
        self.slowness
    }

    /// The bound of one step.
    pub(crate) fn of(self, step: Step) -> Duration {
        let ms = match step {
            Step::Request | Step::Spawn | Step::Agree | Step::HandOver => 2_000,
            // 0.5 s a GiB, for populating.
            Step::Build => 2_000 + (self.ram_bytes >> 21),
            Step::Park | Step::Save | Step::Commit | Step::Run => 50,
            Step::Load => 100,
            Step::Kick | Step::Retire => 1_000,
        };
        Duration::from_millis(ms) * self.slowness
    }

    /// How long a guest may take on its way into a file, or out of one: 4 s a GiB, which disks of this century manage.
    pub(crate) fn file(self) -> Duration {
        Duration::from_millis(10_000 + (self.ram_bytes >> 18)) * self.slowness
    }

    /// How long a worker may wait for requests in flight: less than the bound of parking, so that it says itself that it
    /// cannot.
    pub(crate) fn drain(self) -> Duration {
        self.of(Step::Park) * 4 / 5
    }

    /// The bound of the whole pause, from "park" sent.
    pub(crate) fn pause(self) -> Duration {
        Duration::from_millis(250) * self.slowness
    }

    /// How long the confirmation of a fence may take.
    pub(crate) fn fence(self) -> Duration {
        Duration::from_millis(20) * self.slowness
    }

    /// How often, in the pause, the broker looks for workers that are dying but not yet dead.
    pub(crate) fn watch(self) -> Duration {
        Duration::from_millis(2)
    }

    /// How long the reading of all filters of one worker may take: on a busy host, as long as each of its threads waits for a
    /// processor. Until a thread has one it does not stop, and so stands no longer because of this.
    pub(crate) fn reading(self) -> Duration {
        Duration::from_millis(1_000) * self.slowness
    }

    /// How long the other side of a transfer may wait for its `migrate-incoming`, which a person may have to type.
    pub(crate) fn deferred(self) -> Duration {
        crate::fail_point::deferred().unwrap_or(Duration::from_secs(600))
    }

    /// How long a guest may take to power off before it is ended anyway: systemd gives each of its services 90 s
    /// (systemd-system.conf(5), DefaultTimeoutStopSec), and what is ended loses what it has not written.
    pub(crate) fn power_off(self) -> Duration {
        Duration::from_secs(180) * self.slowness
    }

    /// How long a running worker may take to answer an operator's order.
    pub(crate) fn order(self) -> Duration {
        Duration::from_millis(2_000) * self.slowness
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_gets_half_a_second_a_gib() {
        let deadlines = Deadlines::new(4 << 30, 1);
        // 2^32 >> 21 is 2048 ms: 0.512 s a GiB, the shift being the point of the unit.
        assert_eq!(
            deadlines.of(Step::Build),
            Duration::from_millis(2_000 + 2_048)
        );
        let pause: Duration = [Step::Park, Step::Save, Step::Load, Step::Commit, Step::Run]
            .map(|step| deadlines.of(step))
            .iter()
            .sum();
        assert!(
            pause >= deadlines.pause(),
            "the bound of the whole has to bind"
        );
    }
}
