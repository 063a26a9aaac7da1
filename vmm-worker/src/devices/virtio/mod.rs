//! virtio 1.2 over PCI: the transport, virtqueues, and the devices. (Virtual I/O Device (VIRTIO) Version 1.2, Committee
//! Specification 01; section numbers in this folder are its.) Modern devices with MSI-X only.
//!
//! ```text
//!              vCPU threads                          I/O threads
//!   registers ──► transport ── activate, stop ──► seat { virtqueues, backend } ── requests ──► disk, tap, …
//!                    │                               │
//!                    └──────── interrupts ◄──────────┘
//! ```
//!
//! A device is two halves. The [`VirtioDevice`] is what the driver configures, behind the transport's lock. Its
//! [`Backend`]s do the work: each sits in a [`seat::Seat`] with the virtqueues that it serves, and an I/O thread takes it
//! out while it serves it. A vCPU never waits for one: a reset is over when the driver reads a status of 0. Parking waits,
//! within a bound.
//!
//! Everything that a driver puts into memory is hostile, and may change while it is looked at. What no driver may do
//! ([`queue::Broken`]) stops the queue and sets DEVICE_NEEDS_RESET; nothing else suffers.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
pub mod entropy;
pub(crate) mod guest_io;
pub mod interrupts;
pub mod net;
pub mod queue;
pub mod rate;
pub mod seat;
pub mod transport;
pub mod vhost_user;
pub mod vsock;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Instant;

use queue::Broken;
use queue::Virtqueue;
use rustix::event::PollFlags;
use seat::Seat;
use seat::Stop;

use super::DeviceKind;
use super::state::StateError;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// In a saved state.
    pub kind: DeviceKind,
    /// To a driver (chapter 5).
    pub virtio_type: u16,
    /// PCI class, sub-class and interface.
    pub pci_class: u32,
}

/// The half of a device that the driver configures.
pub trait VirtioDevice: Send {
    /// What it is.
    fn identity(&self) -> Identity;
    /// Features of the device type; the transport adds those of rings and of the version.
    fn features(&self) -> u64;
    /// Features of rings that whoever serves its queues has.
    fn ring_features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX
    }
    /// The largest size of each virtqueue: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The halves that work, each with the indices of the virtqueues that it serves. Asked for once.
    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)>;
    /// Where its backends sit, in their order. Said once.
    fn seated(&mut self, _seats: Vec<Weak<Seat>>) {}
    /// Configuration space as a driver reads it now; zeroes follow.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    /// The driver writes configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Bytes of what it stands for, if that has a size that can change.
    fn size(&self) -> Option<u64> {
        None
    }
    /// It has this many bytes from now on; where they are fewer, its backends stand still.
    fn resize(&mut self, _bytes: u64) {}
    /// The driver is ready, with these features.
    fn activate(&mut self, features: u64);
    /// The driver, or the guest, has reset the device; its backends stand still.
    fn reset(&mut self);
    /// Says all that a later worker has to know beside registers and queues.
    ///
    /// # Errors
    ///
    /// [`StateError::Malformed`] when postcard refuses the type.
    fn save(&self) -> Result<Vec<u8>, StateError>;
    /// Takes over what `save` said in this version of its section, one of those that [`DeviceKind::versions`] has; as
    /// [`VirtioDevice::load`].
    ///
    /// # Errors
    ///
    /// [`StateError`].
    fn load_version(
        &mut self,
        _version: u16,
        state: &[u8],
        features: Option<u64>,
    ) -> Result<(), StateError> {
        self.load(state, features)
    }
    /// Takes over what `save` said, which is hostile. `features` are those that the driver has accepted, if it is ready.
    ///
    /// # Errors
    ///
    /// [`StateError`].
    fn load(&mut self, state: &[u8], features: Option<u64>) -> Result<(), StateError>;
}

/// The half of a device that works, in an I/O thread.
pub trait Backend: Send {
    /// Serves its queues until there is nothing to do, `stop` says so, or a while has passed.
    ///
    /// # Errors
    ///
    /// [`Broken`]: the driver broke a rule after which the queue cannot be used.
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken>;

    /// What it waits for beside the notifications of its queues. Asked each time before its thread waits, and never while
    /// the device is parked or not yet committed.
    fn waits(&self) -> Vec<Wait> {
        Vec::new()
    }

    /// Whether another process serves its queues: that one then hears their notifications, and has to be told to stop.
    fn elsewhere(&self) -> bool {
        false
    }

    /// Has that process stop. `None` when it has; until then it is asked again, at the time that it says or after an event.
    ///
    /// # Errors
    ///
    /// [`Broken`]: nothing is to be had from that process any more.
    fn leave(&mut self, _queues: &mut [Virtqueue]) -> Result<Option<Next>, Broken> {
        Ok(None)
    }

    /// What it is that [`Backend::leave`] waits for.
    fn delay(&self) -> Option<&'static str> {
        None
    }
}

/// A descriptor, and the events of it (poll(2)) after which a backend is to serve.
pub type Wait = (Arc<OwnedFd>, PollFlags);

/// When a backend is to serve again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// When the driver notifies, or a source of the backend's is readable.
    Wait,
    /// Soon: there is more to do.
    Again,
    /// At this time, or when the driver notifies.
    At(Instant),
}

impl Next {
    /// The sooner of two.
    #[must_use]
    pub fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Again, _) | (_, Self::Again) => Self::Again,
            (Self::Wait, next) | (next, Self::Wait) => next,
            (Self::At(one), Self::At(another)) => Self::At(one.min(another)),
        }
    }
}

// Feature bits of all devices (chapter 6).
/// Descriptors may lie in tables of their own (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts at chosen indices (2.7.7, 2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// A driver of version 1 or later.
pub const F_VERSION_1: u64 = 1 << 32;

// Device status (2.1).
/// The driver has found the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u8 = 2;
/// The driver is ready.
pub const DRIVER_OK: u8 = 4;
/// Features are agreed.
pub const FEATURES_OK: u8 = 8;
/// The device cannot go on.
pub const NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub const FAILED: u8 = 128;
/// Status bits that a driver sets; what else it writes is nothing.
pub const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod test_driver;
#[cfg(test)]
mod tests;
