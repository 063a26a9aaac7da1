//! The guest's balloon: what an operator wants in it, and what its worker says is in it. Both are numbers of pages, and
//! whether the guest does as it is asked is its own decision.

use std::time::Duration;
use std::time::Instant;

use baton_ipc::control::Happening;
use baton_ipc::worker::Order;

use crate::broker::Broker;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// Bytes of a page of the balloon (virtio 1.2, 5.5.6).
const PAGE: u64 = 4096;
/// The least time between two events, whatever a worker says: its own measure is a second.
const QUIET: Duration = Duration::from_millis(100);

/// What is known of the balloon.
#[derive(Debug, Default)]
pub(crate) struct BalloonNews {
    /// Pages that the worker has said are in it, and clients have not been told of.
    pub(crate) said: Option<u32>,
    /// When clients were told last, and of how many bytes.
    told: Option<(Instant, u64)>,
}

impl BalloonNews {
    /// When clients are to be told, if there is something to tell.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.said?;
        Some(self.told.map_or_else(Instant::now, |told| told.0 + QUIET))
    }
}

impl Broker {
    /// Leaves the guest so many bytes, in whole pages.
    pub(crate) fn want_balloon(&mut self, bytes: u64) -> Result<()> {
        if !self.vm.memory.balloon {
            return Err(unfit(
                "this VM has no balloon",
                "`memory.balloon = true` in its VM file gives it one",
            ));
        }
        let taken = self.vm.memory.size.0.saturating_sub(bytes) / PAGE;
        let pages = u32::try_from(taken).unwrap_or(u32::MAX);
        let worker = self.worker.as_ref();
        worker
            .ok_or_else(|| unfit("there is no worker to tell", ""))?
            .order(&Order::Balloon { pages })
            .doing("cannot tell the worker")
    }

    /// What is left to the guest when so many pages are in its balloon, in bytes.
    pub(crate) fn left_by_balloon(&self, pages: u32) -> u64 {
        let taken = u64::from(pages).saturating_mul(PAGE);
        self.vm.memory.size.0.saturating_sub(taken)
    }

    /// Tells clients what was said of the balloon, at its time.
    pub(crate) fn advance_balloon(&mut self) {
        if self.news.due().is_none_or(|due| Instant::now() < due) {
            return;
        }
        let left = self
            .news
            .said
            .take()
            .map(|pages| self.left_by_balloon(pages));
        let known = self.news.told.map_or(self.vm.memory.size.0, |told| told.1);
        match left {
            // A new worker says what it finds.
            Some(left) if left != known => {
                self.news.told = Some((Instant::now(), left));
                self.happened(Happening::BalloonChanged(left));
            }
            _ => {}
        }
    }
}
