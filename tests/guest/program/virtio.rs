//! A virtio device on PCI (virtio 1.2, 4.1): where its registers are, and its first steps with a driver.
//!
//! Touches the registers of PCI devices.

use core::ptr;
use core::sync::atomic::{Ordering, fence};

/// The machine's PCI Express configuration space, and bits of a BAR that are no address.
pub const ECAM: u64 = 0xe000_0000;
pub const SLOTS: u64 = 32;
const BAR_FLAGS: u32 = 0xf;
/// Offsets in configuration space; memory space and bus master in the command register.
pub const COMMAND: u64 = 0x04;
pub const BAR0: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;
pub const ENABLE_DEVICE: u32 = 0b110;
/// Capability ids, and types of virtio's.
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// Offsets in the common configuration.
pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub const DEVICE_FEATURE: u64 = 0x04;
pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub const DRIVER_FEATURE: u64 = 0x0c;
pub const CONFIG_VECTOR: u64 = 0x10;
pub const STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const QUEUE_VECTOR: u64 = 0x1a;
pub const QUEUE_ENABLE: u64 = 0x1c;
pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
pub const QUEUE_RINGS: [u64; 3] = [0x20, 0x28, 0x30];
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

/// Flags of a descriptor; of the used ring: the device looks by itself.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const NO_NOTIFY: u16 = 1;
/// Flag of the available ring: the driver looks by itself.
const NO_INTERRUPT: u16 = 1;

/// Addresses of a device's parts.
pub struct Function {
    /// Its PCI device number.
    pub slot: u64,
    /// Its configuration space.
    pub function: u64,
    pub common: u64,
    pub device: u64,
    notify: u64,
    notify_step: u64,
    /// The MSI-X capability.
    pub msix: u64,
}

pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: a register of a PCI device, or RAM that only the device and its driver use; all below 4 GiB is mapped.
    unsafe { ptr::read_volatile(address as *const T) }
}

pub fn write<T>(address: u64, value: T) {
    // SAFETY: as in `read`.
    unsafe { ptr::write_volatile(address as *mut T, value) }
}

impl Function {
    /// The first device with this vendor and device id, enabled, if it has what a modern one has.
    pub fn find(id: u32) -> Option<Self> {
        (0..SLOTS).find_map(|slot| Self::at(slot, id))
    }

    /// The same of that PCI device number.
    pub fn at(slot: u64, id: u32) -> Option<Self> {
        let function = ECAM + (slot << 15);
        if read::<u32>(function) != id {
            return None;
        }
        write(function + COMMAND, ENABLE_DEVICE);
        let mut found = Self {
            slot,
            function,
            common: 0,
            device: 0,
            notify: 0,
            notify_step: 0,
            msix: 0,
        };
        let mut capability = u64::from(read::<u8>(function + CAPABILITIES));
        while capability != 0 {
            let at = function + capability;
            let region = || found.bar(read::<u8>(at + 4)) + u64::from(read::<u32>(at + 8));
            match (read::<u8>(at), read::<u8>(at + 3)) {
                (VENDOR_SPECIFIC, COMMON) => found.common = region(),
                (VENDOR_SPECIFIC, DEVICE) => found.device = region(),
                (VENDOR_SPECIFIC, NOTIFY) => {
                    found.notify = region();
                    found.notify_step = u64::from(read::<u32>(at + 16));
                }
                (MSIX, _) => found.msix = at,
                _ => {}
            }
            capability = u64::from(read::<u8>(at + 1));
        }
        let parts = [found.common, found.notify, found.device, found.msix];
        parts.iter().all(|part| *part != 0).then_some(found)
    }

    /// Where that BAR is. All are below 4 GiB.
    fn bar(&self, number: u8) -> u64 {
        u64::from(read::<u32>(self.function + BAR0 + 4 * u64::from(number)) & !BAR_FLAGS)
    }

    /// Where its MSI-X table is (PCI 3.0, 6.8.2.4): an offset, and the BAR in the low three bits.
    pub fn msix_table(&self) -> u64 {
        let word = read::<u32>(self.msix + 4);
        self.bar((word & 7) as u8) + u64::from(word & !7)
    }

    /// Resets it and agrees on features. Whether it takes them.
    pub fn agree(&self, features: [u32; 2]) -> bool {
        let common = self.common;
        self.reset();
        write(common + STATUS, ACKNOWLEDGE | DRIVER);
        for (select, features) in (0..).zip(features) {
            write::<u32>(common + DRIVER_FEATURE_SELECT, select);
            write::<u32>(common + DRIVER_FEATURE, features);
        }
        write(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        read::<u8>(common + STATUS) & FEATURES_OK != 0
    }

    /// Sets the selected queue up with descriptors, available ring and used ring there; where it is notified.
    pub fn enable_queue(&self, rings: [u64; 3]) -> u64 {
        for (register, ring) in QUEUE_RINGS.into_iter().zip(rings) {
            write(self.common + register, ring as u32);
            write(self.common + register + 4, 0_u32);
        }
        write(self.common + QUEUE_ENABLE, 1_u16);
        self.notified_at()
    }

    /// Where the selected queue is notified.
    pub fn notified_at(&self) -> u64 {
        let notify_off = u64::from(read::<u16>(self.common + QUEUE_NOTIFY_OFF));
        self.notify + notify_off * self.notify_step
    }

    /// Eight bytes of the device's configuration, all of one generation (2.5.1).
    pub fn config_word(&self, offset: u64) -> u64 {
        let generation = || read::<u8>(self.common + CONFIG_GENERATION);
        loop {
            let before = generation();
            let at = self.device + offset;
            let word = u64::from(read::<u32>(at)) | u64::from(read::<u32>(at + 4)) << 32;
            if generation() == before {
                return word;
            }
        }
    }

    /// Ends what the driver has begun.
    pub fn reset(&self) {
        write(self.common + STATUS, 0_u8);
        while read::<u8>(self.common + STATUS) != 0 {}
    }

    /// The driver is ready.
    pub fn go(&self) {
        write(
            self.common + STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );
    }
}

/// Parts of a queue of 256 descriptors: where its rings are from its table on, and how far apart two queues may be.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
pub const RING_STEP: u64 = 0x4000;
const RING_SIZE: u16 = 256;

/// A queue of up to 256 descriptors.
pub struct Ring {
    at: u64,
    index: u16,
    size: u16,
    notify: u64,
    next_available: u16,
    next_used: u16,
}

impl Ring {
    /// The queue of that index, set up with blank rings there; none when the device has no such.
    pub fn new(function: &Function, index: u16, at: u64) -> Option<Self> {
        for word in (at..at + RING_STEP).step_by(8) {
            write(word, 0_u64);
        }
        write(function.common + QUEUE_SELECT, index);
        let size = read::<u16>(function.common + QUEUE_SIZE).min(RING_SIZE);
        if size == 0 {
            return None;
        }
        write(function.common + QUEUE_SIZE, size);
        let notify = function.enable_queue([at, at + AVAILABLE, at + USED]);
        Some(Self {
            at,
            index,
            size,
            notify,
            next_available: 0,
            next_used: 0,
        })
    }

    /// The driver looks by itself.
    pub fn refuse_interrupts(&self) {
        write(self.at + AVAILABLE, NO_INTERRUPT);
    }

    /// Where the descriptor of that number is.
    pub fn descriptor(&self, number: u16) -> u64 {
        self.at + 16 * u64::from(number)
    }

    /// Makes the chain from that descriptor on available, once published.
    pub fn offer(&mut self, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        write(self.at + AVAILABLE + 4 + 2 * entry, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Publishes what was offered, and notifies the device if it wants to be.
    pub fn publish(&self) {
        fence(Ordering::SeqCst);
        write(self.at + AVAILABLE + 2, self.next_available);
        fence(Ordering::SeqCst);
        if read::<u16>(self.at + USED) & NO_NOTIFY == 0 {
            write(self.notify, self.index);
        }
    }

    fn used(&self) -> u16 {
        let used = read(self.at + USED + 2);
        // What the device wrote before it counted is read after.
        fence(Ordering::SeqCst);
        used
    }

    /// Chains that the device has.
    pub fn flying(&self) -> u16 {
        self.next_available.wrapping_sub(self.used())
    }

    /// The next chain that the device gave back, and how much it wrote there.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.next_used == self.used() {
            return None;
        }
        let entry = self.at + USED + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        Some((read(entry), read(entry + 4)))
    }
}

pub fn descriptor(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    write(at, address);
    write(at + 8, length);
    write(at + 12, flags);
    write(at + 14, next);
}
