//! The initrd: as high as the kernel allows, below the hole, away from the kernel.

use std::fs::File;
use std::ops::Range;

use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::pread_file::PreadFile;

const PAGE: u64 = 4096;

/// Puts `file` at the end of `free`, page-aligned, and says where it is.
pub(super) fn load(
    mem: &GuestMemoryMmap,
    free: Range<u64>,
    file: &File,
) -> Result<Range<u64>, BootError> {
    let mut file = PreadFile::new(file, "initrd")?;
    let size = file.len();
    if size == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let start = free
        .end
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= free.start);
    // Low RAM ends at 3 GiB, so a usize holds what fits.
    let (Some(start), Ok(len)) = (start, usize::try_from(size)) else {
        return Err(BootError::InitrdSize { size, free });
    };
    mem.read_exact_volatile_from(GuestAddress(start), &mut file, len)
        .map_err(|source| BootError::Write {
            what: "initrd",
            address: start,
            source,
        })?;
    Ok(start..start + size)
}
