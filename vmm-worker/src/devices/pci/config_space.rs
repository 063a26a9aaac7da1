//! The 256 bytes of a function's configuration space: a type 0 header (PCI Local Bus 3.0, 6.1), a chain of capabilities
//! (6.7), and for each bit whether a guest may change it.

use serde::Deserialize;
use serde::Serialize;

use crate::devices::state::StateError;

/// Bytes of configuration space without PCI Express's extension.
pub const SIZE: usize = 256;

// Offsets of the type 0 header.
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0C;
const BAR0: usize = 0x10;
/// BARs of a function.
pub const BARS: usize = 6;
const SUBSYSTEM_VENDOR: usize = 0x2C;
const SUBSYSTEM: usize = 0x2E;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
/// Capabilities begin here.
const FIRST_CAPABILITY: u8 = 0x40;

/// Command: memory BARs answer.
pub const MEMORY_SPACE: u16 = 1 << 1;
/// Command: the function may write and read memory by itself.
pub const BUS_MASTER: u16 = 1 << 2;
/// Command: no interrupts by its pin.
pub const INTX_DISABLE: u16 = 1 << 10;
/// Command bits that a guest sets: memory space, bus master, INTx disable. There is no I/O BAR.
const COMMAND_BITS: u16 = MEMORY_SPACE | BUS_MASTER | INTX_DISABLE;
/// A memory BAR's lowest bits say what it is (6.2.5.1); its type is in two of them, of which this says 64 bits.
const BAR_KIND: u32 = 0xF;
const BAR_TYPE: u32 = 0x6;
const BAR_WIDE: u32 = 0x4;
/// Status: there is a chain of capabilities.
const CAPABILITIES_LIST: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, sub-class and interface, as one number (PCI Code and ID Assignment 1.11).
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Bytes of each BAR, powers of two; 0 where there is none.
    bar_sizes: [u64; BARS],
    last_capability: Option<u8>,
    next_capability: u8,
}

/// Version 1: all of it, so that what a guest cannot change is compared as well.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedConfigSpace {
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_sizes: [0; BARS],
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        let [class0, class1, class2, _] = identity.class.to_le_bytes();
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(DEVICE, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &[class0, class1, class2]);
        space.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_BITS.to_le_bytes());
        // Cache line size and interrupt line keep what is written and do nothing.
        space.allow(CACHE_LINE, &[0xFF]);
        space.allow(INTERRUPT_LINE, &[0xFF]);
        space
    }

    /// Gives it BAR 0: 32-bit memory, not prefetchable, `size` bytes (a power of two from 16), at `address`.
    #[must_use]
    pub fn with_bar(self, size: u32, address: u32) -> Self {
        self.with_memory_bar(0, size.into(), address)
    }

    /// Gives it a memory BAR of `size` bytes, a power of two from 16. `low` is its address below 4 GiB, with the bits that say
    /// what it is. One of 64 bits takes the next BAR's place too.
    #[must_use]
    pub fn with_memory_bar(mut self, index: usize, size: u64, low: u32) -> Self {
        let Some(place) = self.bar_sizes.get_mut(index) else {
            return self;
        };
        *place = size;
        let at = BAR0 + 4 * index;
        self.put(at, &low.to_le_bytes());
        let [low0, low1, low2, low3, high @ ..] = (!size.saturating_sub(1)).to_le_bytes();
        let kind = u32::from_le_bytes([low0, low1, low2, low3]) & !BAR_KIND;
        self.allow(at, &kind.to_le_bytes());
        if low & BAR_TYPE == BAR_WIDE && index + 1 < BARS {
            self.put(at + 4, &[0; 4]);
            self.allow(at + 4, &high);
        }
        self
    }

    /// Adds a capability at the end of the chain; `body` follows its id and link, `writable` are its bits that a guest
    /// may change. Where it is.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        match self.last_capability {
            Some(last) => self.put(usize::from(last) + 1, &[at]),
            None => {
                self.put(CAPABILITIES, &[at]);
                self.put(STATUS, &CAPABILITIES_LIST.to_le_bytes());
            }
        }
        let start = usize::from(at);
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        self.allow(start + 2, writable);
        self.last_capability = Some(at);
        let end = (start + 2 + body.len()).next_multiple_of(4);
        self.next_capability = u8::try_from(end).unwrap_or(u8::MAX);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to = *from;
        }
    }

    /// What a guest reads; nothing beyond the end is touched.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// What a guest writes, as far as it may.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in bytes.zip(data) {
            *byte = (*byte & !writable) | (new & writable);
        }
    }

    /// A little-endian word of it.
    #[must_use]
    pub fn word(&self, at: u8) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A little-endian double word of it.
    #[must_use]
    pub fn dword(&self, at: u8) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where BAR 0 is, whether it answers or not.
    #[must_use]
    pub fn bar_address(&self) -> u64 {
        let mut bytes = [0; 4];
        bytes
            .iter_mut()
            .zip(self.bytes.iter().skip(BAR0))
            .for_each(|(to, from)| *to = *from);
        u64::from(u32::from_le_bytes(bytes))
    }

    /// Where BAR 0 answers: nowhere while decoding is off.
    #[must_use]
    pub fn bar(&self) -> Option<std::ops::Range<u64>> {
        self.memory_bar(0)
    }

    /// Where a BAR answers: nowhere while decoding is off.
    #[must_use]
    pub fn memory_bar(&self, index: usize) -> Option<std::ops::Range<u64>> {
        let size = self.bar_sizes.get(index).copied()?;
        if size == 0 || self.command() & MEMORY_SPACE == 0 {
            return None;
        }
        let at = u8::try_from(BAR0 + 4 * index).ok()?;
        let low = self.dword(at);
        let high = match low & BAR_TYPE {
            BAR_WIDE => self.dword(at + 4),
            _ => 0,
        };
        let start = u64::from(high) << 32 | u64::from(low & !BAR_KIND);
        Some(start..start.checked_add(size)?)
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        u8::try_from(COMMAND).map_or(0, |at| self.word(at))
    }

    /// Says all of it.
    #[must_use]
    pub fn save(&self) -> SavedConfigSpace {
        let Self {
            bytes,
            writable: _,
            bar_sizes: _,
            last_capability: _,
            next_capability: _,
        } = self;
        SavedConfigSpace {
            bytes: bytes.to_vec(),
        }
    }

    /// Takes over what was said, if that is a state of this function.
    ///
    /// # Errors
    ///
    /// [`StateError::Field`] for another length, and for other bits than a guest can change.
    pub fn load(&mut self, saved: SavedConfigSpace) -> Result<(), StateError> {
        let SavedConfigSpace { bytes } = saved;
        let length = bytes.len() as u64;
        let bytes: [u8; SIZE] = bytes
            .try_into()
            .map_err(|_| StateError::field("config_space", length, "not 256 bytes"))?;
        let same = bytes
            .iter()
            .zip(&self.bytes)
            .zip(&self.writable)
            .all(|((new, own), writable)| (new ^ own) & !writable == 0);
        if !same {
            let id = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            return Err(StateError::field(
                "config_space",
                id,
                "of another function than this one",
            ));
        }
        self.bytes = bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_0000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut space = ConfigSpace::new(identity).with_bar(0x8000, 0xC001_0000);
        space.add_capability(0x11, &[1, 2, 3, 4, 5], &[0, 0xC0]);
        space.add_capability(0x09, &[9], &[]);
        space
    }

    #[test]
    fn a_guest_walks_the_capabilities_and_sizes_the_bar() {
        let mut space = space();
        assert_eq!(space.dword(0), 0x1042_1af4);
        assert_eq!(space.dword(8), 0x0100_0001);
        let first = space.word(0x34) & 0xFF;
        assert_eq!((first, space.word(0x40)), (0x40, 0x4811));
        assert_eq!(space.word(0x48), 0x0009);
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(space.dword(0x10), 0xFFFF_8000);
        space.write(0x10, &0xC123_4567_u32.to_le_bytes());
        assert_eq!(space.bar(), None);
        space.write(4, &[0xFF, 0xFF]);
        assert_eq!(space.word(4), COMMAND_BITS);
        assert_eq!(space.bar(), Some(0xC123_0000..0xC123_8000));
        space.write(0x43, &[0xFF]);
        assert_eq!(space.dword(0x40), 0xC201_4811);
        space.write(0xFF, &[1, 2, 3, 4]);
        let mut past = [7; 4];
        space.read(0xFE, &mut past);
        assert_eq!(past, [0, 0, 7, 7]);
    }

    #[test]
    fn bars_of_32_and_of_64_bits_stand_side_by_side() {
        let mut space = ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            class: 0x02_0000,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        })
        .with_memory_bar(0, 0x10_0000, 0xC000_000C)
        .with_memory_bar(2, 0x1000, 0xC010_0000)
        .with_memory_bar(6, 0x1000, 0xC020_0000);
        space.write(4, &[2, 0]);
        assert_eq!(space.memory_bar(0), Some(0xC000_0000..0xC010_0000));
        space.write(0x14, &[1]);
        assert_eq!(space.memory_bar(0), Some(0x1_C000_0000..0x1_C010_0000));
        assert_eq!(space.memory_bar(1), None);
        assert_eq!(space.memory_bar(2), Some(0xC010_0000..0xC010_1000));
        for (at, sized) in [
            (0x10, 0xFFF0_000C),
            (0x14, u32::MAX),
            (0x18, 0xFFFF_F000),
            (0x1C, 0),
        ] {
            space.write(at, &u32::MAX.to_le_bytes());
            assert_eq!(space.dword(at), sized, "{at:#x}");
        }
        // All ones leave no room above.
        assert_eq!(space.memory_bar(0), None);
    }

    #[test]
    fn another_function_and_another_length_are_refused() {
        let mut moved = space();
        moved.write(4, &[2, 0]);
        let saved = moved.save();
        let mut fresh = space();
        fresh.load(saved).unwrap();
        assert_eq!(fresh.bar(), moved.bar());
        for change in [0, 0x10, 0x41, 0x80] {
            let mut bytes = moved.save().bytes;
            bytes[change] ^= 1;
            assert!(
                matches!(
                    space().load(SavedConfigSpace { bytes }),
                    Err(StateError::Field {
                        name: "config_space",
                        ..
                    })
                ),
                "{change:#x}"
            );
        }
        for length in [0, 255, 257] {
            let bytes = vec![0; length];
            assert!(space().load(SavedConfigSpace { bytes }).is_err());
        }
    }
}
