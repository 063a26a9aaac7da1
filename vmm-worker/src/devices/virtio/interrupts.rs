//! How a virtio device interrupts its driver: the vectors that the driver chose for its queues and for changes of
//! configuration (4.1.5.1.2), and the ISR status (4.1.4.5).

use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

use crate::devices::pci::msix::Msix;

/// No vector (4.1.4.3).
pub const NO_VECTOR: u16 = 0xFFFF;
/// ISR status: a queue.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration.
const ISR_CONFIG: u8 = 2;

/// A device's interrupts, shared by its transport and its backends.
#[derive(Debug)]
pub struct Interrupts {
    msix: Msix,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
    needs_reset: AtomicBool,
}

impl Interrupts {
    /// For a device with `queues` queues; no vector is chosen.
    #[must_use]
    pub fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// The vectors.
    #[must_use]
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Buffers of a queue were used.
    pub fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        if let Some(vector) = self.queues.get(usize::from(index)) {
            self.fire(vector);
        }
    }

    /// The configuration has changed.
    pub fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.fire(&self.config);
    }

    fn fire(&self, vector: &AtomicU16) {
        let vector = vector.load(Ordering::SeqCst);
        if vector != NO_VECTOR {
            self.msix.fire(vector);
        }
    }

    /// The device cannot go on until it is reset; the driver is told.
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config();
    }

    /// Whether it cannot go on.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Restores whether it can go on.
    pub fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The ISR status, which reading clears.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The ISR status, as it is.
    #[must_use]
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Restores the ISR status; other bits than it has are dropped.
    pub fn set_isr(&self, isr: u8) {
        self.isr
            .store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::SeqCst);
    }

    /// The vector for changes of configuration.
    #[must_use]
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    /// Chooses it; one that the device does not have is none, which the driver reads back.
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::SeqCst);
    }

    /// The vector of a queue.
    #[must_use]
    pub fn queue_vector(&self, index: u16) -> u16 {
        self.queues
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Chooses it; one that the device does not have is none, which the driver reads back.
    pub fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queues.get(usize::from(index)) {
            slot.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Fires the vector of every queue once: whatever was on its way in another worker may be lost, and an interrupt too
    /// many means nothing. One that says that the configuration has changed does mean something (a disk's driver reads
    /// its size again, and says so in the guest's log), so it is repeated only where the device cannot go on.
    pub fn repeat_all(&self) {
        for index in (0..).take(self.queues.len()) {
            self.queue(index);
        }
        if self.needs_reset() {
            self.config();
        }
    }

    /// Forgets the driver's choices; the vectors' messages are PCI's and stay.
    pub fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}
