//! The memory balloon (5.5): the driver gives pages up, and the host's kernel gets them back.
//!
//! By free page reporting (5.5.6.7) the driver says which pages it does not use, without being asked, and may use them again
//! without a word. By the inflate queue it gives pages up until it takes them back by the deflate queue; nobody asks it to
//! here (`num_pages` is 0), so drivers leave that alone.
//!
//! Either way a hole is punched where the pages were in the memfd: it stays as large as it is, which its seals demand, every
//! mapping of it in every process sees zeroes there, and the next worker does not populate it. Only whole pages of the host
//! that lie in the driver's pages are freed, so nothing that the driver did not name is lost.

use std::os::fd::AsFd as _;
use std::sync::Arc;
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
#[derive(Debug)]
pub struct Balloon {
    /// Bytes of the pages that the memory is made of, a power of two.
    page: u64,
    /// Pages that the driver says are in the balloon.
    actual: Arc<AtomicU32>,
}

/// Version 1, in the transport's section.
#[derive(Debug, Serialize, Deserialize)]
struct SavedBalloon {
    page: u64,
    actual: u32,
}

impl Balloon {
    /// A balloon for memory that is made of pages of so many bytes, a power of two.
    #[must_use]
    pub fn new(page: u64) -> Self {
        Self {
            page,
            actual: Arc::default(),
        }
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
        let actual = self.actual.load(Ordering::SeqCst);
        // num_pages, actual (5.5.4).
        [0_u32.to_le_bytes(), actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `actual` is the driver's; written in one piece, as every driver does.
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.actual
                .store(u32::from_le_bytes(bytes), Ordering::SeqCst);
        }
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.actual.store(0, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self { page, actual } = self;
        let saved = SavedBalloon {
            page: *page,
            actual: actual.load(Ordering::SeqCst),
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    fn load(&mut self, state: &[u8], _features: Option<u64>) -> Result<(), StateError> {
        let SavedBalloon { page, actual } = state::parse(state)?;
        if page != self.page {
            return Err(StateError::field("page", page, "not that of this memory"));
        }
        self.actual.store(actual, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
