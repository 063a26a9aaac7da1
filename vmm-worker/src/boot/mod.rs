//! Cold boot: everything that is written into guest RAM when a guest starts, and again when it resets.
//!
//! A kernel is an ELF file or a bzImage. An ELF kernel with a PVH note is entered by the PVH protocol, any other at its
//! 64-bit entry point with `boot_params`, as is a bzImage. The kernel and the initrd come from descriptors that stay
//! open for as long as the worker lives and are read with `pread` alone, because their open file description is shared
//! with the broker and with later workers.
//!
//! Nothing here runs when a worker takes over a guest: RAM is the guest's own then.
//!
//! Every file is hostile input. What a kernel asks for is compared with where RAM is and with what is placed beside it
//! ([`layout`]); what does not fit is a [`BootError`] that names the value. The kernel is loaded first and all else after
//! it, so a file that changes underneath can harm only the guest that it is.

mod acpi;
mod acpi_hotplug;
mod acpi_pci;
mod bzimage;
mod elf;
mod error;
mod generation_id;
mod initrd;
pub mod layout;
mod linux;
mod pread_file;
mod pvh;
mod ram;
mod registers;

use std::fmt;
use std::fs::File;
use std::ops::Range;

use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

pub use acpi::AcpiExtras;
pub use acpi_hotplug::pci_hotplug;
pub use acpi_pci::mcfg;
pub use acpi_pci::pci_host_bridge;
pub use error::BootError;
pub use generation_id::generation_id_device;
pub use generation_id::write_generation_id;
pub use ram::ram_ranges;
pub use registers::Entry;
pub use registers::registers;

use pread_file::PreadFile;
use ram::MapEntry;
use ram::RamShape;

/// What is in guest RAM before a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamContent {
    /// Zeroes, never touched: a first start. Nothing is cleared, so no page is allocated for zeroes.
    Blank,
    /// Whatever a guest left there: a reset. The memory that a kernel expects to be zero is cleared.
    Used,
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootParams<'a> {
    /// The kernel: an ELF file or a bzImage.
    pub kernel: &'a File,
    /// The initrd, given to the kernel as it is.
    pub initrd: Option<&'a File>,
    /// The kernel command line, without a NUL; at most [`layout::CMDLINE_MAX`] bytes.
    pub cmdline: &'a str,
    /// Number of vCPUs, 1 to [`layout::CPUS_MAX`]; their APIC ids are 0 and up.
    pub cpus: u8,
    /// What RAM holds now.
    pub ram: RamContent,
    /// What devices add to the ACPI tables.
    pub acpi: AcpiExtras<'a>,
}

/// The boot protocol that a kernel was loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// An ELF kernel at its 64-bit entry point.
    Elf64,
    /// An ELF kernel at the entry point of its PVH note.
    Pvh,
    /// A bzImage at its 64-bit entry point.
    BzImage64,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Elf64 => "ELF, 64-bit entry",
            Protocol::Pvh => "ELF, PVH entry",
            Protocol::BzImage64 => "bzImage, 64-bit entry",
        })
    }
}

/// A guest in RAM, ready to be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Where the boot vCPU begins; [`registers()`] makes its registers of it.
    pub entry: Entry,
    /// How it was loaded, for people to read.
    pub protocol: Protocol,
    /// The memory that the kernel occupies.
    pub kernel: Range<u64>,
    /// Where the initrd is.
    pub initrd: Option<Range<u64>>,
}

/// What the boot parameters of either protocol tell the guest.
struct Given {
    cmdline_len: usize,
    initrd: Option<Range<u64>>,
    memory_map: Vec<MapEntry>,
}

/// Puts a guest into RAM.
///
/// # Errors
///
/// [`BootError`]; RAM may then hold parts of the guest.
pub fn load(mem: &GuestMemoryMmap, params: &BootParams<'_>) -> Result<Loaded, BootError> {
    if params.cpus == 0 || params.cpus > layout::CPUS_MAX {
        return Err(BootError::Cpus(params.cpus));
    }
    let ram = RamShape::of(mem)?;
    check_cmdline(params.cmdline, layout::CMDLINE_MAX)?;

    let mut file = PreadFile::new(params.kernel, "kernel")?;
    let kernel = match identify(&file)? {
        Format::Elf => Kernel::Elf(elf::load(mem, ram, params.ram, &mut file)?),
        Format::BzImage => Kernel::BzImage(bzimage::load(mem, ram, &mut file)?),
    };
    let (range, initrd_end) = match &kernel {
        Kernel::Elf(elf) => (elf.range.clone(), ram.low_end),
        Kernel::BzImage(image) => {
            let max = usize::try_from(image.setup.cmdline_size).unwrap_or(usize::MAX);
            check_cmdline(params.cmdline, max)?;
            (
                image.range.clone(),
                ram.low_end.min(u64::from(image.setup.initrd_addr_max) + 1),
            )
        }
    };
    let initrd = params
        .initrd
        .map(|file| initrd::load(mem, range.end..initrd_end, file))
        .transpose()?;

    write_cmdline(mem, params.cmdline)?;
    acpi::write_tables(mem, params.cpus, params.acpi)?;
    let given = Given {
        cmdline_len: params.cmdline.len(),
        initrd,
        memory_map: ram.memory_map(),
    };
    let long = |rip| Entry::Long64 {
        rip,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK_TOP,
    };
    let (entry, protocol) = match kernel {
        Kernel::Elf(elf::ElfKernel {
            pvh_entry: Some(rip),
            ..
        }) => {
            pvh::write_start_info(mem, &given)?;
            (
                Entry::Pvh {
                    rip,
                    rbx: layout::PVH_START_INFO,
                },
                Protocol::Pvh,
            )
        }
        Kernel::Elf(elf) => {
            linux::write_zero_page(mem, None, &given)?;
            (long(elf.entry), Protocol::Elf64)
        }
        Kernel::BzImage(image) => {
            linux::write_zero_page(mem, Some(image.setup), &given)?;
            (long(image.entry), Protocol::BzImage64)
        }
    };
    registers::write_page_tables(mem, ram)?;
    registers::write_gdt(mem, &entry)?;
    Ok(Loaded {
        entry,
        protocol,
        kernel: range,
        initrd: given.initrd,
    })
}

enum Format {
    Elf,
    BzImage,
}

enum Kernel {
    Elf(elf::ElfKernel),
    BzImage(bzimage::BzImageKernel),
}

fn identify(file: &PreadFile<'_>) -> Result<Format, BootError> {
    let magic_at = |offset: u64| -> Result<[u8; 4], BootError> {
        let mut magic = [0; 4];
        if file.len() >= offset + 4 {
            file.read_exact_at(&mut magic, offset)?;
        }
        Ok(magic)
    };
    let start = magic_at(0)?;
    if start == elf::MAGIC {
        Ok(Format::Elf)
    } else if magic_at(bzimage::MAGIC_OFFSET)? == bzimage::MAGIC {
        Ok(Format::BzImage)
    } else {
        Err(BootError::NotAKernel {
            size: file.len(),
            start,
        })
    }
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineLength {
            len: cmdline.len(),
            max,
        });
    }
    match cmdline.bytes().position(|byte| byte == 0) {
        Some(at) => Err(BootError::CmdlineNul(at)),
        None => Ok(()),
    }
}

fn write_cmdline(mem: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    let address = layout::CMDLINE;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what: "command line",
            address,
            source,
        })
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests;
