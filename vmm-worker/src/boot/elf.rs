//! ELF kernels: checked here, loaded by linux-loader.
//!
//! linux-loader copies segments and finds the PVH note. It trusts the headers for the rest, so they are judged first:
//! class and machine, where every segment lies, and that none overlaps another (which also bounds what is read). It
//! does not clear the memory that segments have beyond their bytes in the file; blank RAM needs no clearing, but a
//! guest that resets leaves its own bytes there.

use std::ops::Range;

use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::elf::PvhBootCapability;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::BootError;
use super::RamContent;
use super::pread_file::PreadFile;
use super::ram::RamShape;

/// `e_ident` of a file: 0x7F "ELF" (System V ABI, chapter 4).
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
/// `EM_X86_64` (AMD64 ABI, section 4.1).
const MACHINE_X86_64: u16 = 62;
const PROGRAM_LOAD: u32 = 1;
/// More program headers than any kernel has (a Linux `vmlinux` has 5).
const PROGRAM_HEADERS_MAX: u16 = 64;

/// `Elf64_Ehdr` (System V ABI, chapter 4).
#[derive(Clone, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct FileHeader {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident_rest: [u8; 10],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    header_size: U16,
    program_header_size: U16,
    program_header_count: U16,
    section_header_size: U16,
    section_header_count: U16,
    section_names: U16,
}

/// `Elf64_Phdr` (System V ABI, chapter 5).
#[derive(Clone, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    physical_address: U64,
    file_size: U64,
    memory_size: U64,
    align: U64,
}

/// A loaded ELF kernel.
#[derive(Debug)]
pub(super) struct ElfKernel {
    /// The memory that it occupies, from the lowest segment to the end of the highest.
    pub(super) range: Range<u64>,
    /// `e_entry`.
    pub(super) entry: u64,
    /// The 32-bit entry point that a PVH note names.
    pub(super) pvh_entry: Option<u64>,
}

/// One segment in memory.
struct Segment {
    memory: Range<u64>,
    /// Where the bytes from the file end, and zeroes begin.
    bytes_end: u64,
}

/// Checks and loads the kernel.
pub(super) fn load(
    mem: &GuestMemoryMmap,
    ram: RamShape,
    content: RamContent,
    file: &mut PreadFile<'_>,
) -> Result<ElfKernel, BootError> {
    let header = read_header(file)?;
    let segments = read_segments(file, &header, ram)?;
    let inside = |address: u64| {
        if segments
            .iter()
            .any(|segment| segment.memory.contains(&address))
        {
            Ok(address)
        } else {
            Err(BootError::EntryOutside(address))
        }
    };
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
        return Err(BootError::EntryOutside(header.entry.get()));
    };
    let entry = inside(header.entry.get())?;

    let result = Elf::load(mem, None, file, None).map_err(BootError::Loader)?;
    let pvh_entry = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Some(inside(address.0)?),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => None,
    };
    if content == RamContent::Used {
        for segment in &segments {
            clear(mem, segment.bytes_end..segment.memory.end)?;
        }
    }
    Ok(ElfKernel {
        range: first.memory.start..last.memory.end,
        entry,
        pvh_entry,
    })
}

fn read_header(file: &PreadFile<'_>) -> Result<FileHeader, BootError> {
    let mut header = FileHeader::default();
    file.read_exact_at(header.as_mut_bytes(), 0)?;
    let fields = [
        (
            "EI_CLASS",
            u64::from(header.class),
            u64::from(CLASS_64),
            "not 2 (64-bit)",
        ),
        (
            "EI_DATA",
            u64::from(header.data),
            u64::from(DATA_LITTLE_ENDIAN),
            "not 1 (little-endian)",
        ),
        (
            "e_type",
            header.kind.into(),
            u64::from(TYPE_EXECUTABLE),
            "not 2 (executable)",
        ),
        (
            "e_machine",
            header.machine.into(),
            u64::from(MACHINE_X86_64),
            "not 62 (x86-64)",
        ),
        (
            "e_phentsize",
            header.program_header_size.into(),
            size_of::<ProgramHeader>() as u64,
            "not 56",
        ),
    ];
    for (field, value, wanted, expected) in fields {
        if value != wanted {
            return Err(BootError::ElfHeader {
                field,
                value,
                expected,
            });
        }
    }
    let count = header.program_header_count.get();
    if count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(BootError::ElfHeader {
            field: "e_phnum",
            value: count.into(),
            expected: "not 1 to 64",
        });
    }
    Ok(header)
}

/// Reads the loadable segments, in ascending order of their memory.
fn read_segments(
    file: &PreadFile<'_>,
    header: &FileHeader,
    ram: RamShape,
) -> Result<Vec<Segment>, BootError> {
    let mut headers = vec![ProgramHeader::default(); header.program_header_count.get().into()];
    file.read_exact_at(
        headers.as_mut_slice().as_mut_bytes(),
        header.program_headers.get(),
    )?;
    let allowed = ram.for_kernel();

    let mut segments = Vec::with_capacity(headers.len());
    for (index, header) in headers.iter().enumerate() {
        let (offset, file_size) = (header.offset.get(), header.file_size.get());
        let in_file = offset
            .checked_add(file_size)
            .is_some_and(|end| end <= file.len());
        let loaded = header.kind.get() == PROGRAM_LOAD;
        if !in_file || (loaded && file_size > header.memory_size.get()) {
            return Err(BootError::SegmentFile {
                index,
                offset,
                size: file_size,
                file: file.len(),
            });
        }
        if !loaded || header.memory_size.get() == 0 {
            continue;
        }
        let (start, size) = (header.physical_address.get(), header.memory_size.get());
        match start.checked_add(size) {
            Some(end) if start >= allowed.start && end <= allowed.end => {
                segments.push(Segment {
                    memory: start..end,
                    bytes_end: start + file_size,
                });
            }
            _ => {
                return Err(BootError::SegmentOutside {
                    index,
                    start,
                    size,
                    allowed,
                });
            }
        }
    }
    segments.sort_by_key(|segment| segment.memory.start);
    let mut previous: Option<&Segment> = None;
    for segment in &segments {
        if let Some(first) = previous.filter(|previous| previous.memory.end > segment.memory.start)
        {
            return Err(BootError::SegmentsOverlap {
                first: first.memory.clone(),
                second: segment.memory.clone(),
            });
        }
        previous = Some(segment);
    }
    Ok(segments)
}

/// Writes zeroes.
fn clear(mem: &GuestMemoryMmap, range: Range<u64>) -> Result<(), BootError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut address = range.start;
    while address < range.end {
        let len = usize::try_from(range.end - address)
            .unwrap_or(usize::MAX)
            .min(ZEROES.len());
        mem.write_slice(ZEROES.get(..len).unwrap_or_default(), GuestAddress(address))
            .map_err(|source| BootError::Write {
                what: "zeroes after a segment",
                address,
                source,
            })?;
        address += len as u64;
    }
    Ok(())
}
