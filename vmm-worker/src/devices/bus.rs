//! Port I/O and MMIO buses: address ranges, and the device behind each.
//!
//! A bus is built before the vCPUs run and never changes after, so that looking up takes no lock; whatever moves in a
//! range (PCI BARs in their window) is dispatched by the one device that has the range.
//!
//! An access that no device answers reads all ones and writes nothing, as on a PC: outside every range, reaching past
//! the end of a range, or of a size that no x86 instruction makes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use thiserror::Error;

/// A device on a bus.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range. `data` holds all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` (1, 2, 4 or 8 bytes) at `offset` from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device, shared by the vCPU threads and the control thread.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range cannot be had.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("{size:#x} bytes from {start:#x} are no range")]
    Range {
        /// First address.
        start: u64,
        /// Number of addresses.
        size: u64,
    },
    /// The range overlaps one that another device has.
    #[error("{wanted:#x?} overlaps {taken:#x?}")]
    Overlap {
        /// The range asked for.
        wanted: Range<u64>,
        /// The range that is there already.
        taken: Range<u64>,
    },
}

/// One bus: ports, or memory-mapped I/O.
#[derive(Default)]
pub struct Bus {
    /// In ascending order, without overlaps.
    slots: Vec<Slot>,
}

struct Slot {
    range: Range<u64>,
    device: SharedDevice,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Bus::default()
    }

    /// Puts `device` at `size` addresses from `start`.
    ///
    /// # Errors
    ///
    /// [`BusError`] when that is no range or another device has a part of it.
    pub fn insert(&mut self, start: u64, size: u64, device: SharedDevice) -> Result<(), BusError> {
        let end = start
            .checked_add(size)
            .filter(|end| *end > start)
            .ok_or(BusError::Range { start, size })?;
        let wanted = start..end;
        let at = self.slots.partition_point(|slot| slot.range.end <= start);
        if let Some(next) = self.slots.get(at).filter(|next| next.range.start < end) {
            return Err(BusError::Overlap {
                wanted,
                taken: next.range.clone(),
            });
        }
        self.slots.insert(
            at,
            Slot {
                range: wanted,
                device,
            },
        );
        Ok(())
    }

    /// One read by the guest: fills `data` with what `address` answers, all ones when nothing does.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
        }
    }

    /// One write by the guest. Says whether a device was there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(address, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
        true
    }

    /// A string instruction (`rep ins`): one read of `size` bytes after another, all at the same `address`.
    pub fn read_string(&self, address: u64, size: usize, data: &mut [u8]) {
        data.chunks_mut(size.max(1))
            .for_each(|item| self.read(address, item));
    }

    /// A string instruction (`rep outs`): one write of `size` bytes after another, all at the same `address`.
    pub fn write_string(&self, address: u64, size: usize, data: &[u8]) {
        data.chunks(size.max(1)).for_each(|item| {
            self.write(address, item);
        });
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        if !matches!(len, 1 | 2 | 4 | 8) {
            return None;
        }
        let at = self.slots.partition_point(|slot| slot.range.end <= address);
        let slot = self
            .slots
            .get(at)
            .filter(|slot| slot.range.contains(&address))?;
        let within = address.checked_add(len as u64)? <= slot.range.end;
        within.then_some((&*slot.device, address - slot.range.start))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.slots.iter().map(|slot| &slot.range))
            .finish()
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests {
    use super::*;

    /// Remembers writes; reads give the offset.
    #[derive(Default)]
    struct Probe {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn read(bus: &Bus, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0x55; len];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn accesses_reach_the_device_of_their_range() {
        let (low, high) = (
            Arc::new(Mutex::new(Probe::default())),
            Arc::new(Mutex::new(Probe::default())),
        );
        let mut bus = Bus::new();
        bus.insert(0x200, 8, high.clone()).unwrap();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        bus.insert(u64::MAX - 4, 4, low.clone()).unwrap();

        assert_eq!(read(&bus, 0x10c, 4), [0xc; 4]);
        assert!(bus.write(0x204, &[1, 2, 3, 4]));
        assert_eq!(high.lock().unwrap().writes, [(4, vec![1, 2, 3, 4])]);
        assert!(low.lock().unwrap().writes.is_empty());
        bus.write_string(0x200, 2, &[1, 2, 3, 4]);
        assert_eq!(
            high.lock().unwrap().writes[1..],
            [(0, vec![1, 2]), (0, vec![3, 4])]
        );
        let mut string = [0; 3];
        bus.read_string(0x105, 1, &mut string);
        assert_eq!(string, [5; 3]);
    }

    #[test]
    fn nothing_answers_all_ones() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, probe.clone()).unwrap();
        for (address, len) in [
            (0xff, 1),
            (0xff, 2),
            (0x110, 1),
            (0x10d, 4),
            (0x10f, 2),
            (0x100, 3),
            (0x100, 16),
            (u64::MAX, 8),
        ] {
            assert_eq!(
                read(&bus, address, len),
                vec![0xFF; len],
                "{address:#x} {len}"
            );
            assert!(!bus.write(address, &vec![1; len]), "{address:#x} {len}");
        }
        assert!(!bus.write(0x100, &[]));
        assert!(probe.lock().unwrap().writes.is_empty());
    }

    #[test]
    fn overlaps_are_refused() {
        let probe = || Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, probe()).unwrap();
        for (start, size) in [
            (0x100, 0x10),
            (0xf8, 0x9),
            (0x10f, 1),
            (0, 0x1000),
            (0x104, 2),
        ] {
            assert_eq!(
                bus.insert(start, size, probe()),
                Err(BusError::Overlap {
                    wanted: start..start + size,
                    taken: 0x100..0x110
                })
            );
        }
        assert_eq!(
            bus.insert(5, 0, probe()),
            Err(BusError::Range { start: 5, size: 0 })
        );
        assert_eq!(
            bus.insert(u64::MAX, 2, probe()),
            Err(BusError::Range {
                start: u64::MAX,
                size: 2
            })
        );
        bus.insert(0xf8, 8, probe()).unwrap();
        bus.insert(0x110, 1, probe()).unwrap();
    }
}
