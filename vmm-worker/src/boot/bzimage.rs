//! bzImage kernels, entered at their 64-bit entry point (Linux, `Documentation/arch/x86/boot.rst`).
//!
//! The image is loaded at its preferred address, where it decompresses itself in place; `init_size` says how much
//! memory from there it needs before it looks at the memory map.

use std::ops::Range;

use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::bootparam::XLF_KERNEL_64;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::ByteValued as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::pread_file::PreadFile;
use super::ram::RamShape;

/// Offset of the setup header in the file.
const SETUP_HEADER: u64 = 0x1F1;
/// Offset of `HdrS` in the file.
pub(super) const MAGIC_OFFSET: u64 = 0x202;
/// `HdrS`, which every kernel since Linux 1.3.73 has.
pub(super) const MAGIC: [u8; 4] = *b"HdrS";
/// Boot protocol 2.12 brought `xloadflags` (Linux 3.8).
const PROTOCOL_MIN: u16 = 0x020C;
/// The 64-bit entry point is this far into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// A loaded bzImage.
#[derive(Debug)]
pub(super) struct BzImageKernel {
    /// The memory that it occupies until it has read the memory map.
    pub(super) range: Range<u64>,
    /// The 64-bit entry point.
    pub(super) entry: u64,
    /// Its setup header, for the boot parameters.
    pub(super) setup: setup_header,
}

/// Checks and loads the kernel.
pub(super) fn load(
    mem: &GuestMemoryMmap,
    ram: RamShape,
    file: &mut PreadFile<'_>,
) -> Result<BzImageKernel, BootError> {
    let mut setup = setup_header::default();
    file.read_exact_at(setup.as_mut_slice(), SETUP_HEADER)?;
    let (version, flags, start) = (setup.version, setup.xloadflags, setup.pref_address);
    if version < PROTOCOL_MIN {
        return Err(BootError::BzImageHeader {
            field: "version",
            value: version.into(),
        });
    }
    if flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImageHeader {
            field: "xloadflags",
            value: flags.into(),
        });
    }

    let sectors = if setup.setup_sects == 0 {
        4
    } else {
        u64::from(setup.setup_sects)
    };
    let payload = file.len().saturating_sub((sectors + 1) * 512);
    if payload <= ENTRY_64 {
        return Err(BootError::BzImageHeader {
            field: "setup_sects",
            value: setup.setup_sects.into(),
        });
    }
    let range = start..start.saturating_add(payload.max(setup.init_size.into()));
    let allowed = ram.for_kernel();
    if range.start < allowed.start || range.end > allowed.end {
        return Err(BootError::BzImageOutside {
            needs: range,
            allowed,
        });
    }

    let result =
        BzImage::load(mem, Some(GuestAddress(start)), file, None).map_err(BootError::Loader)?;
    Ok(BzImageKernel {
        range,
        entry: start + ENTRY_64,
        setup: result.setup_header.unwrap_or(setup),
    })
}
