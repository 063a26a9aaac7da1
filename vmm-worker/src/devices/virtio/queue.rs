//! A split virtqueue (2.7) as a backend uses it, and its saved state.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use baton_ipc::vhost_user::RingPlace;
use baton_ipc::vhost_user::VhostUserError;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT as _;
use virtio_queue::QueueState;
use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;

use super::buffers::Buffers;
use super::buffers::Ram;
use super::interrupts::Interrupts;
use crate::devices::state::StateError;

/// The most descriptors of one request: those of a full indirect table of our largest queue. A driver has no reason for
/// more, and more is work that it makes for nothing.
const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of flags and index before the rings, and of an element of the used ring (2.7.6, 2.7.8).
const AVAILABLE_HEADER: u64 = 4;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// What a driver did that no driver may do, or a backend.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Broken {
    /// The rings, or their indices.
    #[error("queue {queue}: {reason}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What is wrong.
        reason: String,
    },
    /// A descriptor chain that loops, leads nowhere, is too long, or mixes the order of its parts.
    #[error("queue {queue}: the chain from descriptor {head} is malformed")]
    Chain {
        /// Which queue.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer that is not in RAM.
    #[error("queue {queue}: {length:#x} bytes at {address:#x} are not RAM")]
    Buffer {
        /// Which queue.
        queue: u16,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// The process that serves its queues is gone, or has broken the protocol.
    #[error("the vhost-user backend: {0}")]
    Backend(#[from] VhostUserError),
    /// A chain without room for what the device type requires.
    #[error("queue {queue}: a request without {what}")]
    Request {
        /// Which queue.
        queue: u16,
        /// What is missing.
        what: &'static str,
    },
}

/// A request as the driver framed it.
#[derive(Debug, Default)]
pub struct Chain {
    /// Its first descriptor, which is its name in the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
    /// How far it was served already when it was put back, in what its device counts. The driver may have written it
    /// anew since then.
    pub progress: u64,
}

/// A virtqueue that the driver has enabled.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    ram: Ram,
    kick: Arc<OwnedFd>,
    interrupts: Arc<Interrupts>,
    /// Up to which entry of the used ring the driver was considered for an interrupt.
    signalled: u16,
    /// How far the next request was served before it was put back. In another worker that begins anew.
    progress: u64,
}

/// What a driver chose for a queue (4.1.4.3), and how far both sides are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// Its size in descriptors.
    pub size: u16,
    /// Whether the driver uses it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The next entry of the available ring.
    pub next_available: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

impl SavedQueue {
    /// What no driver has touched yet.
    #[must_use]
    pub fn reset(max_size: u16) -> Self {
        Self {
            size: max_size,
            ..Self::default()
        }
    }

    /// The queue that this describes, with all of its rings in RAM.
    ///
    /// # Errors
    ///
    /// [`StateError::Field`].
    pub fn queue(&self, max_size: u16, event_idx: bool, ram: Ram) -> Result<Queue, StateError> {
        let Self {
            size,
            enabled,
            descriptors,
            available,
            used,
            next_available,
            next_used,
        } = *self;
        let state = QueueState {
            max_size,
            next_avail: next_available,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready: enabled,
            desc_table: descriptors,
            avail_ring: available,
            used_ring: used,
        };
        let queue = Queue::try_from(state).map_err(|_| {
            StateError::field(
                "queue",
                size,
                "of a size or an alignment that no queue here has",
            )
        })?;
        if enabled && !queue.is_valid(ram) {
            return Err(StateError::field(
                "queue",
                descriptors,
                "with a ring that is not in RAM",
            ));
        }
        Ok(queue)
    }
}

impl Virtqueue {
    /// A queue that was checked by [`SavedQueue::queue`].
    #[must_use]
    pub fn new(
        index: u16,
        queue: Queue,
        ram: Ram,
        kick: Arc<OwnedFd>,
        interrupts: Arc<Interrupts>,
    ) -> Self {
        Self {
            index,
            signalled: queue.next_used(),
            queue,
            ram,
            kick,
            interrupts,
            progress: 0,
        }
    }

    /// Which queue of the device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// What the driver notifies by.
    #[must_use]
    pub fn kick(&self) -> &Arc<OwnedFd> {
        &self.kick
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> Ram {
        self.ram
    }

    fn ring(&self) -> impl Fn(virtio_queue::Error) -> Broken + use<> {
        let queue = self.index;
        move |error| Broken::Ring {
            queue,
            reason: error.to_string(),
        }
    }

    /// Takes the next request into `chain`; `false` when there is none.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        let queue = self.index;
        chain.readable.clear();
        chain.writable.clear();
        let error = self.ring();
        let mut available = self.queue.iter(self.ram).map_err(error)?;
        let Some(mut descriptors) = available.next() else {
            return Ok(false);
        };
        let head = descriptors.head_index();
        chain.head = head;
        chain.progress = std::mem::take(&mut self.progress);
        let malformed = || Broken::Chain { queue, head };
        let (mut count, mut more) = (0, true);
        for descriptor in &mut descriptors {
            more = descriptor.has_next();
            count += 1;
            let (address, length) = (descriptor.addr(), descriptor.len());
            let buffers = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(malformed());
            };
            if count > MAX_DESCRIPTORS {
                return Err(malformed());
            }
            if !buffers.push(self.ram, address, length) {
                return Err(Broken::Buffer {
                    queue,
                    address: address.0,
                    length,
                });
            }
        }
        // The iterator ends without a word where a descriptor leads nowhere, or in a circle.
        if more { Err(malformed()) } else { Ok(true) }
    }

    /// Takes the next request of a driver that need not notify; with none left, asks it to notify again, and `false`.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn take(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        while !self.pop(chain)? {
            if !self.listen()? {
                return Ok(false);
            }
            self.ignore()?;
        }
        Ok(true)
    }

    /// Puts the request that was just taken back, as if it had not been.
    pub fn put_back(&mut self) {
        self.put_back_at(0);
    }

    /// Puts the request that was just taken back, served so far: whoever takes it from this queue again is told. Another
    /// worker is not, and serves it from its start.
    pub fn put_back_at(&mut self, progress: u64) {
        self.queue.go_to_previous_position();
        self.progress = progress;
    }

    /// Gives a request back to the driver; `written` bytes of it were written.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        let error = self.ring();
        self.queue.add_used(self.ram, head, written).map_err(error)
    }

    /// Gives several requests back at once: a driver that sees the first sees all. (What they hold is one packet, 5.1.6.4.)
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn complete_all(&mut self, used: &[(u16, u32)]) -> Result<(), Broken> {
        let error = self.ring();
        let (ring, size) = (self.queue.used_ring(), self.queue.size().max(1));
        let mut next = self.queue.next_used();
        let Some(((last, written), before)) = used.split_last() else {
            return Ok(());
        };
        for (head, written) in before {
            let place = USED_HEADER + USED_ELEMENT * u64::from(next % size);
            // struct virtq_used_elem: the chain's first descriptor, then bytes written.
            let element = (u64::from(*written) << 32 | u64::from(*head)).to_le();
            self.ram
                .write_obj(element, GuestAddress(ring.saturating_add(place)))
                .map_err(|_| self.broken("a used ring that is not RAM"))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // The index is written after the last of them, and covers all.
        self.queue
            .add_used(self.ram, *last, *written)
            .map_err(error)
    }

    fn broken(&self, reason: &str) -> Broken {
        Broken::Ring {
            queue: self.index,
            reason: reason.to_owned(),
        }
    }

    /// Interrupts the driver, if it wants to be (2.7.7).
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn interrupt(&mut self) -> Result<(), Broken> {
        let (old, new) = (self.signalled, self.queue.next_used());
        self.signalled = new;
        // What was completed is there before the driver's wish is looked at.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let word = |offset: u64| {
            let address = GuestAddress(available.saturating_add(offset));
            self.ram
                .load::<u16>(address, Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|_| self.broken("an available ring that is not RAM"))
        };
        let wanted = if self.queue.event_idx_enabled() {
            // `used_event` follows the ring: at this entry, an interrupt.
            let event = word(AVAILABLE_HEADER + 2 * u64::from(self.queue.size()))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            word(0)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupts.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to notify again. Whether requests came before it could know that.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn listen(&mut self) -> Result<bool, Broken> {
        let error = self.ring();
        self.queue.enable_notification(self.ram).map_err(error)
    }

    /// Lets the driver know that it need not notify.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn ignore(&mut self) -> Result<(), Broken> {
        let error = self.ring();
        self.queue.disable_notification(self.ram).map_err(error)
    }

    /// The next entries of the available and the used ring.
    #[must_use]
    pub fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Its size in descriptors, and where it is, for another process that serves it.
    #[must_use]
    pub fn place(&self) -> (u16, RingPlace) {
        let place = RingPlace {
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        };
        (self.queue.size(), place)
    }

    /// Requests that the driver has made and that were not given back, as both rings say; 0 when they say what no rings do.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        let available = self.queue.avail_idx(self.ram, Ordering::Acquire);
        let used = self.queue.used_idx(self.ram, Ordering::Acquire);
        match (available, used) {
            (Ok(available), Ok(used)) => {
                let outstanding = (available - used).0;
                if outstanding > self.queue.size() {
                    0
                } else {
                    outstanding
                }
            }
            _ => 0,
        }
    }

    /// Another process has served it to before this entry of the available ring, and has given all of that back.
    pub fn served(&mut self, next_available: u16) {
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_available);
        self.signalled = next_available;
    }

    /// Interrupts the driver, whose wishes whoever serves it elsewhere has heard.
    pub fn signal(&self) {
        self.interrupts.queue(self.index);
    }
}
