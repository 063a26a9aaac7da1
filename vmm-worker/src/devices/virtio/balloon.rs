//! The memory balloon (5.5): the driver gives pages up, and the host's kernel gets them back.
//!
//! By free page reporting (5.5.6.7) the driver says which pages it does not use, without being asked, and may use them again
//! without a word. By the inflate queue it gives pages up, as many as an operator wants (`num_pages`), until it takes them back by the
//! deflate queue.
//!
//! Either way a hole is punched where the pages were in the memfd: it stays as large as it is, which its seals demand, every
//! mapping of it in every process sees zeroes there, and the next worker does not populate it. Only whole pages of the host
//! that lie in the driver's pages are freed, so nothing that the driver did not name is lost.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use rustix::fs::FallocateFlags;
use serde::Deserialize;
use serde::Serialize;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryRegion as _;

use super::Backend;
use super::Identity;
use super::Next;
use super::VirtioDevice;
use super::buffers::Buffers;
use super::buffers::Ram;
use super::queue::Broken;
use super::queue::Chain;
use super::queue::Virtqueue;
use super::seat::Stop;
use crate::devices::DeviceKind;
use crate::devices::Trigger;
use crate::devices::state;
use crate::devices::state::StateError;

/// Of PCI's class memory, RAM, as other VMMs have it.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::BALLOON,
    virtio_type: 5,
    pci_class: 0x05_0000,
};
/// Descriptors of the queues to inflate, to deflate, and to report. Those for statistics and hints are not offered, and
/// the numbers of the others close up.
const QUEUE_SIZES: [u16; 3] = [128; 3];
const INFLATE: u16 = 0;
const REPORT: u16 = 2;
/// Feature bits (5.5.3): the driver may take pages back when it runs out; free page reporting.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;
/// A page of the balloon (5.5.6: VIRTIO_BALLOON_PFN_SHIFT).
const PAGE_SHIFT: u32 = 12;
/// Pages of one request to inflate that are looked at: those of Linux's driver (VIRTIO_BALLOON_ARRAY_PFNS_MAX).
const MAX_PAGES: usize = 256;
/// Requests that are served before others of the same thread get their turn.
const BATCH: usize = 16;

/// The half that the driver configures.
pub struct Balloon {
    /// Bytes of the pages that the memory is made of, a power of two.
    page: u64,
    figures: Arc<Figures>,
    /// Told when the driver says how many pages are in the balloon.
    wake: Option<Arc<dyn Trigger>>,
}

/// Numbers of pages, of 4 KiB each.
#[derive(Debug, Default)]
struct Figures {
    /// That an operator wants in the balloon.
    target: AtomicU32,
    /// That the driver says are in it.
    actual: AtomicU32,
    /// The driver has said so, and nobody has taken it.
    changed: AtomicBool,
}

/// The operator's end of a balloon.
#[derive(Debug)]
pub struct Link(Arc<Figures>);

impl Link {
    /// Wants so many pages in it. The driver is told by an interrupt of its configuration, which is the caller's.
    pub fn want(&self, pages: u32) {
        self.0.target.store(pages, Ordering::SeqCst);
    }

    /// Pages that the driver says are in it.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    /// Whether the driver has said another number since [`Self::take_change`].
    #[must_use]
    pub fn has_changed(&self) -> bool {
        self.0.changed.load(Ordering::SeqCst)
    }

    /// What the driver says now.
    #[must_use]
    pub fn take_change(&self) -> u32 {
        self.0.changed.store(false, Ordering::SeqCst);
        self.actual()
    }
}

/// Version 1, in the transport's section.
#[derive(Debug, Serialize, Deserialize)]
struct SavedBalloon {
    page: u64,
    actual: u32,
    target: u32,
}

impl Balloon {
    /// A balloon for memory that is made of pages of so many bytes, a power of two.
    #[must_use]
    pub fn new(page: u64) -> Self {
        Self {
            page,
            figures: Arc::default(),
            wake: None,
        }
    }

    /// The operator's end. `wake` tells that the driver has said something.
    pub fn link(&mut self, wake: Arc<dyn Trigger>) -> Link {
        self.wake = Some(wake);
        Link(Arc::clone(&self.figures))
    }
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Balloon({:?})", self.figures)
    }
}

/// The half that works.
struct Valve {
    page: u64,
}

impl Valve {
    /// Frees the pages of the host that lie wholly between these guest-physical addresses.
    fn free(&self, ram: Ram, start: u64, end: u64) {
        let Some(region) = ram.find_region(GuestAddress(start)) else {
            return;
        };
        let (base, Some(file)) = (region.start_addr().0, region.file_offset()) else {
            return;
        };
        let end = end.min(base.saturating_add(region.len()));
        let start = start
            .checked_next_multiple_of(self.page)
            .unwrap_or(u64::MAX);
        let length = (end & !(self.page - 1)).saturating_sub(start);
        if length == 0 {
            return;
        }
        let offset = file.start().saturating_add(start - base);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // What cannot be freed stays where it is, and is as good to the driver.
        let _ = rustix::fs::fallocate(file.file().as_fd(), punch, offset, length);
    }

    /// The driver does not use what is in these buffers.
    fn report(&self, ram: Ram, free: &Buffers) {
        for (start, length) in free.addresses(ram) {
            self.free(ram, start, start.saturating_add(length));
        }
    }

    /// The driver gives pages up, by their numbers.
    fn inflate(&self, ram: Ram, numbers: &Buffers) {
        let mut bytes = [0; 4 * MAX_PAGES];
        let count = numbers.copy_out(&mut bytes);
        let words = bytes.get(..count).unwrap_or_default().chunks_exact(4);
        for word in words.filter_map(|word| word.first_chunk().copied()) {
            let start = u64::from(u32::from_le_bytes(word)) << PAGE_SHIFT;
            self.free(ram, start, start + (1 << PAGE_SHIFT));
        }
    }
}

impl Backend for Valve {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        let mut next = Next::Wait;
        for queue in queues {
            queue.ignore()?;
            for left in (0..BATCH).rev() {
                if stop.requested() || !queue.take(&mut chain)? {
                    break;
                }
                match queue.index() {
                    INFLATE => self.inflate(queue.ram(), &chain.readable),
                    REPORT => self.report(queue.ram(), &chain.writable),
                    // Taken back: the next access finds zeroes.
                    _ => {}
                }
                queue.complete(chain.head, 0)?;
                queue.interrupt()?;
                if left == 0 {
                    next = Next::Again;
                }
            }
        }
        Ok(next)
    }
}

impl VirtioDevice for Balloon {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let valve = Valve { page: self.page };
        vec![(vec![0, 1, 2], Box::new(valve))]
    }

    fn config(&self) -> Vec<u8> {
        // num_pages, actual (5.5.4).
        let Figures { target, actual, .. } = &*self.figures;
        let word = |pages: &AtomicU32| pages.load(Ordering::SeqCst).to_le_bytes();
        [word(target), word(actual)].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `actual` is the driver's; written in one piece, as every driver does.
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            let pages = u32::from_le_bytes(bytes);
            let before = self.figures.actual.swap(pages, Ordering::SeqCst);
            let news = before != pages && !self.figures.changed.swap(true, Ordering::SeqCst);
            if let (true, Some(wake)) = (news, &self.wake) {
                wake.trigger();
            }
        }
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        // What is wanted stays: another driver is told of it too.
        self.figures.actual.store(0, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self {
            page,
            figures,
            wake: _,
        } = self;
        let Figures {
            target,
            actual,
            changed: _,
        } = &**figures;
        let saved = SavedBalloon {
            page: *page,
            actual: actual.load(Ordering::SeqCst),
            target: target.load(Ordering::SeqCst),
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    fn load(&mut self, state: &[u8], _features: Option<u64>) -> Result<(), StateError> {
        let SavedBalloon {
            page,
            actual,
            target,
        } = state::parse(state)?;
        if page != self.page {
            return Err(StateError::field("page", page, "not that of this memory"));
        }
        self.figures.actual.store(actual, Ordering::SeqCst);
        self.figures.target.store(target, Ordering::SeqCst);
        // Whoever is told of it may not have been.
        self.figures.changed.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
