//! A split virtqueue (2.7) as a backend uses it, and its saved state.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT as _;
use virtio_queue::QueueState;
use virtio_queue::QueueT as _;

use super::buffers::Buffers;
use super::buffers::Ram;
use super::interrupts::Interrupts;
use crate::devices::state::StateError;

/// The most descriptors of one request: those of a full indirect table of our largest queue. A driver has no reason for
/// more, and more is work that it makes for nothing.
const MAX_DESCRIPTORS: usize = 1024;

/// What a driver did that no driver may do.
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
}

/// A virtqueue that the driver has enabled.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    ram: Ram,
    kick: Arc<OwnedFd>,
    interrupts: Arc<Interrupts>,
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
            queue,
            ram,
            kick,
            interrupts,
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

    /// Puts the request that was just taken back, as if it had not been.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
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

    /// Interrupts the driver, if it wants to be.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn interrupt(&mut self) -> Result<(), Broken> {
        let error = self.ring();
        if self.queue.needs_notification(self.ram).map_err(error)? {
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
}
