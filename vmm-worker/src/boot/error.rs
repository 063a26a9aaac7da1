//! What can be wrong with a kernel, an initrd or a command line.

use std::io;
use std::ops::Range;

use linux_loader::loader;
use thiserror::Error;

use super::layout;

/// Why a guest could not be put into RAM. Every variant carries the value that is wrong.
#[derive(Debug, Error)]
pub enum BootError {
    /// The number of vCPUs is outside 1 to [`layout::CPUS_MAX`].
    #[error("{0} vCPUs; 1 to {max} are possible", max = layout::CPUS_MAX)]
    Cpus(u8),
    /// RAM does not begin at address 0.
    #[error("RAM begins at {0:#x}, not at 0")]
    RamStart(u64),
    /// RAM has a gap that is not the hole for devices, or reaches into that hole.
    #[error(
        "RAM at {found:#x} where it should go on at {expected:#x}, or be in the hole for devices"
    )]
    RamShape {
        /// Where the region begins or ends.
        found: u64,
        /// Where it may.
        expected: u64,
    },
    /// RAM ends at or below the lowest address of a kernel.
    #[error("{0} bytes of low RAM hold no kernel: more than 1 MiB is needed")]
    RamTooSmall(u64),
    /// RAM ends above what the boot page tables can map.
    #[error("RAM ends at {0:#x}, above {max:#x}", max = layout::RAM_END_MAX)]
    RamTooLarge(u64),
    /// A file is not a regular file, so it has no size.
    #[error("the {what} is not a regular file (mode {mode:#o})")]
    NotAFile {
        /// "kernel" or "initrd".
        what: &'static str,
        /// `st_mode`.
        mode: u32,
    },
    /// A file could not be read.
    #[error("reading {len} bytes of the {what} at offset {offset}")]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Number of bytes wanted.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// Neither an ELF file nor a bzImage.
    #[error(
        "not a kernel: {size} bytes that begin with {start:02x?} (an ELF file or a bzImage is needed)"
    )]
    NotAKernel {
        /// Size of the file, in bytes.
        size: u64,
        /// Its first bytes, zero-padded.
        start: [u8; 4],
    },
    /// An ELF header field has a value that no x86-64 kernel has.
    #[error("ELF header: {field} is {value:#x}, {expected}")]
    ElfHeader {
        /// Name of the field in the ELF specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// An ELF segment lies outside the memory that a kernel may use.
    #[error("ELF segment {index}: memory {start:#x}, {size:#x} bytes, is not within {allowed:#x?}")]
    SegmentOutside {
        /// Index of the program header.
        index: usize,
        /// `p_paddr`.
        start: u64,
        /// `p_memsz`.
        size: u64,
        /// From 1 MiB to the end of low RAM.
        allowed: Range<u64>,
    },
    /// An ELF segment's bytes are not all in the file, or are more than its memory.
    #[error(
        "ELF segment {index}: {size:#x} bytes at offset {offset:#x} are not within the file's {file} bytes, or exceed its memory"
    )]
    SegmentFile {
        /// Index of the program header.
        index: usize,
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        size: u64,
        /// Size of the file, in bytes.
        file: u64,
    },
    /// Two ELF segments overlap.
    #[error("ELF segments overlap in memory: {first:#x?} and {second:#x?}")]
    SegmentsOverlap {
        /// The lower one.
        first: Range<u64>,
        /// The higher one.
        second: Range<u64>,
    },
    /// The entry point is in no loaded segment.
    #[error("the entry point {0:#x} is in no loaded segment")]
    EntryOutside(u64),
    /// A bzImage that does not speak the 64-bit boot protocol.
    #[error(
        "bzImage: {field} is {value:#x}; boot protocol 2.12 with a 64-bit entry point is needed"
    )]
    BzImageHeader {
        /// Name of the field in the setup header.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A bzImage needs memory that is not there.
    #[error("bzImage: it needs memory {needs:#x?}, and may use {allowed:#x?}")]
    BzImageOutside {
        /// From its preferred address, for `init_size` or the size of its payload.
        needs: Range<u64>,
        /// From 1 MiB to the end of low RAM.
        allowed: Range<u64>,
    },
    /// linux-loader refused the kernel.
    #[error("loading the kernel: {0}")]
    Loader(loader::Error),
    /// The initrd is empty.
    #[error("the initrd is empty")]
    InitrdEmpty,
    /// The initrd does not fit between the kernel and the end of the memory that it may use.
    #[error("the initrd's {size} bytes do not fit within {free:#x?}")]
    InitrdSize {
        /// Its size, in bytes.
        size: u64,
        /// The memory that it may use.
        free: Range<u64>,
    },
    /// The command line is too long.
    #[error("the command line is {len} bytes long; the kernel takes {max}")]
    CmdlineLength {
        /// Its length, in bytes.
        len: usize,
        /// What the kernel takes, in bytes.
        max: usize,
    },
    /// The command line has a NUL byte, which would end it.
    #[error("the command line has a NUL byte at {0}")]
    CmdlineNul(usize),
    /// The ACPI tables are too large.
    #[error("the ACPI tables take {0} bytes; {max} are there", max = layout::GENERATION_ID - layout::ACPI_START)]
    AcpiSize(usize),
    /// The boot parameters could not be written.
    #[error("writing the boot parameters: {source}")]
    Parameters {
        /// Why.
        source: linux_loader::configurator::Error,
    },
    /// Guest memory could not be written.
    #[error("writing the {what} at {address:#x}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Where.
        address: u64,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
}
