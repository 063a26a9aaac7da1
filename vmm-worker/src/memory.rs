//! Guest RAM: the memfds that the broker made, mapped shared, and filled into this process's page tables before the
//! pause where there is something to fill.
//!
//! Mapping changes nothing that the running guest could notice. Populating reads which parts of a file exist and touches
//! those only: a hole stays a hole, so overcommitted memory stays overcommitted.
#![expect(
    unsafe_code,
    reason = "madvise(2) takes an address and has no safe interface"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use baton_ipc::StartMode;
use baton_ipc::worker::Pages;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::RamRegion;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;
use vm_memory::mmap::GuestRegionMmap;

/// Regions are whole small pages.
const PAGE: u64 = 4096;
/// With huge pages, whole huge pages, at guest addresses of their size.
const HUGE_PAGE: u64 = 2 << 20;

/// Why guest RAM cannot be had.
#[derive(Debug, Error)]
pub(crate) enum MemoryError {
    /// There is no RAM.
    #[error("the guest has no RAM region")]
    None,
    /// A region is no whole number of pages, or not at a multiple of them.
    #[error(
        "RAM region {index} ({size:#x} bytes at {address:#x}) is not made of {page:#x}-byte pages"
    )]
    Unaligned {
        /// Which region.
        index: usize,
        /// Its guest physical address.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// The page size in bytes.
        page: u64,
    },
    /// The memfd has another size than the region.
    #[error("RAM region {index} has {expected:#x} bytes, its memfd {found:#x}")]
    Size {
        /// Which region.
        index: usize,
        /// The region's size in bytes.
        expected: u64,
        /// The memfd's size in bytes.
        found: u64,
    },
    /// Overlapping regions, or the mapping itself failed.
    #[error("mapping guest RAM: {0}")]
    Map(String),
    /// A system call on a region failed.
    #[error("guest RAM: {call} at {address:#x}: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// Guest physical address.
        address: u64,
        /// Its error.
        source: io::Error,
    },
}

/// Bytes of the pages that RAM is made of.
pub(crate) fn page(pages: Pages) -> u64 {
    match pages {
        Pages::Huge => HUGE_PAGE,
        Pages::Small | Pages::Transparent => PAGE,
    }
}

/// Maps all of guest RAM. A new worker of a running guest also fills its page tables with every page that exists, so
/// that the guest does not pay for it after the pause; a cold start touches nothing.
///
/// # Errors
///
/// [`MemoryError`].
pub(crate) fn map(
    regions: &[RamRegion],
    memfds: Vec<OwnedFd>,
    pages: Pages,
    backing: RamBacking,
    mode: StartMode,
) -> Result<GuestMemoryMmap, MemoryError> {
    if regions.is_empty() {
        return Err(MemoryError::None);
    }
    let page = page(pages);
    let mut ranges = Vec::with_capacity(regions.len());
    for (index, (region, memfd)) in regions.iter().zip(memfds).enumerate() {
        let RamRegion { address, size } = *region;
        if size == 0 || size % page != 0 || address % page != 0 {
            return Err(MemoryError::Unaligned {
                index,
                address,
                size,
                page,
            });
        }
        let found = rustix::fs::fstat(&memfd)
            .map_err(|e| call("fstat", address, e))
            .map(|stat| u64::try_from(stat.st_size).unwrap_or(0))?;
        if found != size {
            return Err(MemoryError::Size {
                index,
                expected: size,
                found,
            });
        }
        let length = usize::try_from(size).map_err(|e| MemoryError::Map(e.to_string()))?;
        ranges.push((
            GuestAddress(address),
            length,
            (backing != RamBacking::Private).then(|| FileOffset::new(File::from(memfd), 0)),
        ));
    }
    let memory = GuestMemoryMmap::from_ranges_with_files(ranges)
        .map_err(|e| MemoryError::Map(e.to_string()))?;
    for region in memory.iter() {
        advise(
            region,
            0..region.len(),
            Advice::LinuxDontDump,
            "madvise(MADV_DONTDUMP)",
        )?;
        if pages == Pages::Transparent {
            advise(
                region,
                0..region.len(),
                Advice::LinuxHugepage,
                "madvise(MADV_HUGEPAGE)",
            )?;
        }
        // hugetlbfs cannot say where its holes are (its files seek as if they were full), and one fault maps 2 MiB.
        if mode.preserves_guest() && pages != Pages::Huge {
            populate(region)?;
        }
    }
    Ok(memory)
}

/// Fills the page tables with the pages that the region's file has.
fn populate(region: &GuestRegionMmap) -> Result<(), MemoryError> {
    let Some(file) = region.file_offset().map(FileOffset::file) else {
        return Ok(());
    };
    let at = region.start_addr().0;
    let mut end = 0;
    loop {
        // A memfd's file position means nothing to anybody: RAM is only ever mapped.
        let start = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(call("lseek(SEEK_DATA)", at, e)),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .map_err(|e| call("lseek(SEEK_HOLE)", at, e))?;
        advise(
            region,
            start..end.min(region.len()),
            Advice::LinuxPopulateWrite,
            "madvise(MADV_POPULATE_WRITE)",
        )?;
    }
}

fn advise(
    region: &GuestRegionMmap,
    range: std::ops::Range<u64>,
    advice: Advice,
    name: &'static str,
) -> Result<(), MemoryError> {
    let address = region.start_addr().0.saturating_add(range.start);
    let bounds = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end - range.start).ok());
    let slice = bounds.and_then(|(offset, length)| {
        region
            .as_volatile_slice()
            .ok()?
            .subslice(offset, length)
            .ok()
    });
    let Some(slice) = slice else {
        return Err(call(name, address, Errno::RANGE));
    };
    loop {
        // SAFETY: the slice lies within the region's mapping, which lives as long as `region`. The advices that are
        // used here neither unmap nor change the content of shared memory: they set flags of the mapping, or fill page
        // tables with pages that exist.
        match unsafe {
            rustix::mm::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice)
        } {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(call(name, address, e)),
        }
    }
}

fn call(call: &'static str, address: u64, source: Errno) -> MemoryError {
    MemoryError::Call {
        call,
        address,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use rustix::fs::MemfdFlags;
    use vm_memory::Bytes as _;

    use super::*;

    fn memfd(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        fd
    }

    fn blocks(fd: &OwnedFd) -> i64 {
        rustix::fs::fstat(fd).unwrap().st_blocks
    }

    #[test]
    fn populating_allocates_no_hole_and_changes_no_byte() {
        let fd = memfd(4 << 20);
        for (offset, byte) in [(0x3000, 7), (0x10_0000, 9)] {
            rustix::io::pwrite(&fd, &[byte; 4096], offset).unwrap();
        }
        let before = blocks(&fd);
        let regions = [RamRegion {
            address: 0,
            size: 4 << 20,
        }];
        let copy = fd.as_fd().try_clone_to_owned().unwrap();
        let memory = map(
            &regions,
            vec![copy],
            Pages::Small,
            RamBacking::Shared,
            StartMode::CprTransfer,
        )
        .unwrap();
        assert_eq!(blocks(&fd), before);
        assert_eq!(before, 16);
        for (address, byte) in [(0x3000, 7), (0x10_0fff, 9), (0x4000, 0)] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(address)).unwrap(), byte);
        }
    }

    #[test]
    fn a_write_reaches_the_file() {
        for pages in [Pages::Small, Pages::Transparent] {
            writes_through(pages);
        }
    }

    fn writes_through(pages: Pages) {
        let fd = memfd(1 << 20);
        let copy = fd.as_fd().try_clone_to_owned().unwrap();
        let regions = [RamRegion {
            address: 0,
            size: 1 << 20,
        }];
        let memory = map(
            &regions,
            vec![copy],
            pages,
            RamBacking::Shared,
            StartMode::None,
        )
        .unwrap();
        memory.write_obj(0x55_u8, GuestAddress(0x1234)).unwrap();
        let mut byte = [0];
        rustix::io::pread(&fd, &mut byte, 0x1234).unwrap();
        assert_eq!(byte, [0x55]);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let one = |address, size| [RamRegion { address, size }];
        let map = |regions: &[RamRegion], sizes: &[u64], pages| {
            map(
                regions,
                sizes.iter().map(|size| memfd(*size)).collect(),
                pages,
                RamBacking::Shared,
                StartMode::None,
            )
            .unwrap_err()
        };
        assert!(matches!(map(&[], &[], Pages::Small), MemoryError::None));
        assert!(matches!(
            map(&one(0, 4095), &[4095], Pages::Small),
            MemoryError::Unaligned { size: 4095, .. }
        ));
        assert!(matches!(
            map(&one(4096, 1 << 20), &[1 << 20], Pages::Huge),
            MemoryError::Unaligned { .. }
        ));
        assert!(matches!(
            map(&one(0, 8192), &[4096], Pages::Small),
            MemoryError::Size {
                expected: 8192,
                found: 4096,
                ..
            }
        ));
        let overlapping = [one(0, 8192)[0], one(4096, 8192)[0]];
        assert!(matches!(
            map(&overlapping, &[8192, 8192], Pages::Small),
            MemoryError::Map(_)
        ));
    }
}
