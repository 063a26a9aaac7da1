//! A virtio device on PCI (virtio 1.2, 4.1): where its registers are, and its first steps with a driver.
//!
//! Touches the registers of PCI devices.

use core::ptr;

/// The machine's PCI Express configuration space, and bits of a BAR that are no address.
const ECAM: u64 = 0xe000_0000;
const SLOTS: u64 = 32;
const BAR_FLAGS: u32 = 0xf;
/// Offsets in configuration space; memory space and bus master in the command register.
const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;
const ENABLE_DEVICE: u32 = 0b110;
/// Capability ids, and types of virtio's.
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

/// Offsets in the common configuration.
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
pub const STATUS: u64 = 0x14;
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const QUEUE_VECTOR: u64 = 0x1a;
pub const QUEUE_ENABLE: u64 = 0x1c;
pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_RINGS: [u64; 3] = [0x20, 0x28, 0x30];
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

/// Addresses of a device's parts.
pub struct Function {
    pub bar: u64,
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
        let function = (0..SLOTS)
            .map(|slot| ECAM + (slot << 15))
            .find(|function| read::<u32>(*function) == id)?;
        write(function + COMMAND, ENABLE_DEVICE);
        let bar = u64::from(read::<u32>(function + BAR0) & !BAR_FLAGS);
        let mut found = Self {
            bar,
            common: 0,
            device: 0,
            notify: 0,
            notify_step: 0,
            msix: 0,
        };
        let mut capability = u64::from(read::<u8>(function + CAPABILITIES));
        while capability != 0 {
            let at = function + capability;
            let region = bar + u64::from(read::<u32>(at + 8));
            match (read::<u8>(at), read::<u8>(at + 3)) {
                (VENDOR_SPECIFIC, COMMON) => found.common = region,
                (VENDOR_SPECIFIC, DEVICE) => found.device = region,
                (VENDOR_SPECIFIC, NOTIFY) => {
                    found.notify = region;
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

    /// Resets it and agrees on features. Whether it takes them.
    pub fn agree(&self, features: [u32; 2]) -> bool {
        let common = self.common;
        write(common + STATUS, 0_u8);
        while read::<u8>(common + STATUS) != 0 {}
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
        let notify_off = u64::from(read::<u16>(self.common + QUEUE_NOTIFY_OFF));
        write(self.common + QUEUE_ENABLE, 1_u16);
        self.notify + notify_off * self.notify_step
    }

    /// The driver is ready.
    pub fn go(&self) {
        write(
            self.common + STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );
    }
}

pub fn descriptor(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    write(at, address);
    write(at + 8, length);
    write(at + 12, flags);
    write(at + 14, next);
}
