//! The balloon as the control thread sees it: the broker's wish goes to the driver, and what the driver makes of it goes back,
//! not more often than [`QUIET`] allows, however often the guest says it.

use std::time::Duration;
use std::time::Instant;

use baton_ipc::worker::Report;

use crate::control::Phase;
use crate::control::Worker;
use crate::devices::virtio::balloon;

/// The least time between two reports: that of QEMU's BALLOON_CHANGE (`monitor/monitor.c`).
const QUIET: Duration = Duration::from_secs(1);

/// The balloon of this worker's guest.
pub(crate) struct Ballooning {
    slot: u8,
    link: balloon::Link,
    quiet_until: Option<Instant>,
}

impl Ballooning {
    pub(crate) fn new(slot: u8, link: balloon::Link) -> Self {
        Self {
            slot,
            link,
            quiet_until: None,
        }
    }

    /// Pages that the driver says are in it.
    pub(crate) fn pages(&self) -> u32 {
        self.link.actual()
    }

    /// How long until there is something to say, if there is.
    fn due(&self) -> Option<Duration> {
        let now = Instant::now();
        let left = |until: Instant| until.saturating_duration_since(now);
        self.link
            .has_changed()
            .then(|| self.quiet_until.map(left).unwrap_or_default())
    }

    /// The pages in it, when that is to be said now.
    fn news(&mut self) -> Option<u32> {
        if !self.due()?.is_zero() {
            return None;
        }
        self.quiet_until = Some(Instant::now() + QUIET);
        Some(self.link.take_change())
    }
}

impl Worker {
    /// When the control thread has to look at the balloon though nothing wakes it.
    pub(crate) fn balloon_due(&self) -> Option<Duration> {
        let balloon = self.machinery.balloon.as_ref()?;
        matches!(self.phase, Phase::Running)
            .then(|| balloon.due())
            .flatten()
    }

    pub(crate) fn look_after_balloon(&mut self) {
        let news = match (&self.phase, &mut self.machinery.balloon) {
            (Phase::Running, Some(balloon)) => balloon.news(),
            _ => None,
        };
        if let Some(pages) = news {
            self.report(Report::Balloon { pages });
        }
    }

    /// The broker wants so many pages in the balloon.
    pub(crate) fn inflate(&mut self, pages: u32) {
        match &self.machinery.balloon {
            Some(balloon) => {
                balloon.link.want(pages);
                self.machinery.platform.pci.reconfigured(balloon.slot);
            }
            None => self.fail("balloon", "this guest has none".to_owned()),
        }
    }
}
