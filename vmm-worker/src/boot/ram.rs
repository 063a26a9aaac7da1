//! The shape of guest RAM, and the memory map that the guest is told.

use std::ops::Range;

use vm_memory::Address as _;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;

use super::BootError;
use super::layout;

/// `E820_TYPE_RAM` (ACPI 6.5, table 15.2); `hvm_memmap_table_entry` uses the same numbers.
const RAM: u32 = 1;
/// `E820_TYPE_RESERVED`.
const RESERVED: u32 = 2;

/// RAM, split around the hole for devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RamShape {
    /// Low RAM is from 0 to here.
    pub(super) low_end: u64,
    /// High RAM is from [`layout::HIGH_RAM_START`] to here; the same address when there is none.
    pub(super) high_end: u64,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) size: u64,
    /// An E820 type.
    pub(super) kind: u32,
}

/// Where the RAM of a guest of `size` bytes is: low RAM, and high RAM when there is more than fits below the hole.
#[must_use]
pub fn ram_ranges(size: u64) -> (Range<u64>, Option<Range<u64>>) {
    let low = size.min(layout::HOLE_START);
    let high = size - low;
    (
        0..low,
        (high > 0).then(|| layout::HIGH_RAM_START..layout::HIGH_RAM_START.saturating_add(high)),
    )
}

impl RamShape {
    /// Reads the shape off the mapped regions; they may be split in any number of slots.
    pub(super) fn of(mem: &GuestMemoryMmap) -> Result<Self, BootError> {
        let mut shape = RamShape {
            low_end: 0,
            high_end: layout::HIGH_RAM_START,
        };
        for region in mem.iter() {
            let start = region.start_addr().raw_value();
            let end = start.saturating_add(region.len());
            if shape.low_end == 0 && start != 0 {
                return Err(BootError::RamStart(start));
            }
            let (reached, limit) = if start < layout::HIGH_RAM_START {
                (&mut shape.low_end, layout::HOLE_START)
            } else {
                (&mut shape.high_end, layout::RAM_END_MAX)
            };
            if start != *reached {
                return Err(BootError::RamShape {
                    found: start,
                    expected: *reached,
                });
            }
            if end > limit {
                return Err(if limit == layout::RAM_END_MAX {
                    BootError::RamTooLarge(end)
                } else {
                    BootError::RamShape {
                        found: end,
                        expected: limit,
                    }
                });
            }
            *reached = end;
        }
        if shape.low_end <= layout::KERNEL_MIN {
            return Err(BootError::RamTooSmall(shape.low_end));
        }
        Ok(shape)
    }

    /// The memory that a kernel and an initrd may use.
    pub(super) fn for_kernel(self) -> Range<u64> {
        layout::KERNEL_MIN..self.low_end
    }

    /// The end of all RAM.
    pub(super) fn end(self) -> u64 {
        if self.high_end > layout::HIGH_RAM_START {
            self.high_end
        } else {
            self.low_end
        }
    }

    /// The memory map, in ascending order. The ECAM window must be reserved here or Linux does not use it
    /// (`arch/x86/pci/mmconfig-shared.c`), also when no PCI device is there yet.
    pub(super) fn memory_map(self) -> Vec<MapEntry> {
        let entry = |range: Range<u64>, kind| MapEntry {
            start: range.start,
            size: range.end - range.start,
            kind,
        };
        let mut map = vec![
            entry(0..layout::EBDA, RAM),
            entry(layout::EBDA..layout::CONVENTIONAL_END, RESERVED),
            entry(layout::ACPI_START..layout::ACPI_END, RESERVED),
            entry(layout::KERNEL_MIN..self.low_end, RAM),
            entry(
                layout::PCI_ECAM..layout::PCI_ECAM + layout::PCI_ECAM_SIZE,
                RESERVED,
            ),
            entry(
                layout::KVM_IDENTITY_MAP..layout::KVM_IDENTITY_MAP + layout::KVM_PAGES_SIZE,
                RESERVED,
            ),
        ];
        if self.high_end > layout::HIGH_RAM_START {
            map.push(entry(layout::HIGH_RAM_START..self.high_end, RAM));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn shape(ranges: &[(u64, usize)]) -> Result<RamShape, BootError> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(at, size)| (GuestAddress(*at), *size))
            .collect();
        RamShape::of(&GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(ram_ranges(512 << 20), (0..512 << 20, None));
        assert_eq!(ram_ranges(3 * GIB), (0..3 * GIB, None));
        assert_eq!(ram_ranges(16 * GIB), (0..3 * GIB, Some(4 * GIB..17 * GIB)));
    }

    #[test]
    fn slots_of_any_size_are_one_ram() {
        let shape = shape(&[
            (0, 1 << 20),
            (1 << 20, 7 << 20),
            (4 * GIB, 1 << 20),
            (4 * GIB + (1 << 20), 4096),
        ])
        .unwrap();
        assert_eq!(
            shape,
            RamShape {
                low_end: 8 << 20,
                high_end: 4 * GIB + (1 << 20) + 4096
            }
        );
        assert_eq!(shape.end(), 4 * GIB + (1 << 20) + 4096);
    }

    #[test]
    fn every_wrong_shape_is_named() {
        assert!(matches!(
            shape(&[(4096, 4 << 20)]),
            Err(BootError::RamStart(4096))
        ));
        assert!(matches!(
            shape(&[(0, 1 << 20)]),
            Err(BootError::RamTooSmall(0x10_0000))
        ));
        assert!(matches!(
            shape(&[(0, 2 << 20), (3 << 20, 4096)]),
            Err(BootError::RamShape {
                found: 0x30_0000,
                expected: 0x20_0000
            })
        ));
        assert!(matches!(
            shape(&[(0, 0xC000_1000)]),
            Err(BootError::RamShape {
                found: 0xC000_1000,
                expected: layout::HOLE_START
            })
        ));
        assert!(matches!(
            shape(&[(0, 2 << 20), (4 * GIB + 4096, 4096)]),
            Err(BootError::RamShape {
                expected: layout::HIGH_RAM_START,
                ..
            })
        ));
        assert!(matches!(
            shape(&[(0, 2 << 20), (4 * GIB, 18 << 30)]),
            Err(BootError::RamTooLarge(end)) if end == 22 * GIB
        ));
    }

    #[test]
    fn the_map_is_ordered_and_tells_all_ram() {
        let shape = RamShape {
            low_end: 3 * GIB,
            high_end: 17 * GIB,
        };
        let map = shape.memory_map();
        assert!(
            map.windows(2)
                .all(|pair| pair[0].start + pair[0].size <= pair[1].start)
        );
        let ram: u64 = map
            .iter()
            .filter(|entry| entry.kind == RAM)
            .map(|entry| entry.size)
            .sum();
        assert_eq!(ram, 16 * GIB - (layout::KERNEL_MIN - layout::EBDA));
        assert!(
            !RamShape {
                high_end: 4 * GIB,
                ..shape
            }
            .memory_map()
            .iter()
            .any(|entry| entry.start == 4 * GIB)
        );
    }
}
