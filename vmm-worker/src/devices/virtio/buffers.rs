//! A request's buffers in guest RAM, as streams: what a driver's framing looks like does not matter (2.7.4).

use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;
use vm_memory::MemoryRegionAddress;
use vm_memory::VolatileSlice;

/// Guest RAM, mapped for as long as the process lives.
pub type Ram = &'static GuestMemoryMmap;
/// A piece of it.
pub type Piece = VolatileSlice<'static>;

/// Pieces of guest RAM, one after another.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    pieces: Vec<Piece>,
    length: usize,
}

impl Buffers {
    /// Appends `length` bytes at `address`; `false` when not all of them are RAM.
    pub fn push(&mut self, ram: Ram, address: GuestAddress, length: u32) -> bool {
        let Ok(length) = usize::try_from(length) else {
            return false;
        };
        if length == 0 {
            return true;
        }
        match ram.get_slice(address, length) {
            Ok(piece) => {
                self.length = self.length.saturating_add(length);
                self.pieces.push(piece);
                true
            }
            Err(_) => false,
        }
    }

    /// Forgets all, and keeps the memory of the list.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.length = 0;
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The pieces.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Where in guest-physical memory they are: starts and lengths.
    pub fn addresses(&self, ram: Ram) -> Vec<(u64, u64)> {
        let place = |piece: &Piece| {
            let at = piece.ptr_guard().as_ptr().addr();
            ram.iter().find_map(|region| {
                let base = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                let offset = u64::try_from(at.checked_sub(base.addr())?).ok()?;
                let length = u64::try_from(piece.len()).ok()?;
                (offset < region.len()).then(|| (region.start_addr().0 + offset, length))
            })
        };
        self.pieces.iter().filter_map(place).collect()
    }

    /// The bytes from `from` on, at most `count`, as a list of its own.
    #[must_use]
    pub fn range(&self, from: usize, count: usize) -> Buffers {
        let (mut skip, mut left) = (from, count);
        let mut part = Buffers::default();
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            let length = piece.len();
            if skip >= length {
                skip -= length;
                continue;
            }
            let take = (length - skip).min(left);
            if let Ok(piece) = piece.subslice(skip, take) {
                part.length += take;
                part.pieces.push(piece);
            }
            left -= take;
            skip = 0;
        }
        part
    }

    /// Copies bytes out from the start; how many there were.
    pub fn copy_out(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done += piece.copy_to(rest);
        }
        done
    }

    /// Copies bytes in from the start; how many had room.
    pub fn copy_in(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let part = rest.get(..rest.len().min(piece.len())).unwrap_or_default();
            piece.copy_from(part);
            done += part.len();
        }
        done
    }

    /// The first `N` bytes, if there are as many.
    #[must_use]
    pub fn head<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.copy_out(&mut bytes) == N).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x2000), 0x1000)];
        Box::leak(Box::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()))
    }

    #[test]
    fn framing_does_not_matter() {
        let ram = ram();
        let mut buffers = Buffers::default();
        for (address, length) in [(0x10, 3), (0x800, 0), (0x100, 1), (0x2ff0, 0x10)] {
            assert!(buffers.push(ram, GuestAddress(address), length));
        }
        assert_eq!((buffers.len(), buffers.pieces().len()), (20, 3));
        let bytes: Vec<u8> = (1..=30).collect();
        assert_eq!(buffers.copy_in(&bytes), 20);
        assert_eq!(buffers.head::<4>(), Some([1, 2, 3, 4]));
        assert_eq!(buffers.head::<21>(), None);
        let middle = buffers.range(2, 4);
        assert_eq!((middle.len(), middle.head::<4>()), (4, Some([3, 4, 5, 6])));
        assert_eq!(buffers.range(19, 5).head::<1>(), Some([20]));
        assert!(buffers.range(20, 1).is_empty());
        let places = buffers.addresses(ram);
        assert_eq!(places, [(0x10, 3), (0x100, 1), (0x2ff0, 0x10)]);
    }

    #[test]
    fn only_ram_is_taken() {
        let ram = ram();
        let mut buffers = Buffers::default();
        for (address, length) in [
            (0xFFF, 2),
            (0x1000, 1),
            (0x1FFF, 2),
            (0x2FFF, 2),
            (u64::MAX, 1),
            (u64::MAX - 1, u32::MAX),
            (0, u32::MAX),
        ] {
            assert!(
                !buffers.push(ram, GuestAddress(address), length),
                "{address:#x} {length:#x}"
            );
        }
        assert!(buffers.is_empty());
    }
}
