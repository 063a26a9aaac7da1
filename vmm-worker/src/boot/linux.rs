//! `boot_params`, the zero page of the Linux boot protocol (Linux, `Documentation/arch/x86/zero-page.rst`).

use linux_loader::configurator::BootConfigurator as _;
use linux_loader::configurator::BootParams as Written;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::loader::bootparam::boot_e820_entry;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::Given;
use super::layout;

/// `boot_flag` (`Documentation/arch/x86/boot.rst`).
const BOOT_FLAG: u16 = 0xAA55;
/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The protocol version that an ELF kernel is told: 2.15.
const PROTOCOL: u16 = 0x020F;
/// `type_of_loader`: undefined, the value for loaders without an id of their own.
const LOADER_UNDEFINED: u8 = 0xFF;

/// Writes the zero page. `setup` is a bzImage's own header; an ELF kernel has none.
pub(super) fn write_zero_page(
    mem: &GuestMemoryMmap,
    setup: Option<setup_header>,
    given: &Given,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: setup.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: PROTOCOL,
            ..setup_header::default()
        }),
        acpi_rsdp_addr: layout::ACPI_START,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE);
    params.hdr.cmdline_size = low(given.cmdline_len as u64);
    // A setup header comes from the file; only a loader may fill these in.
    params.hdr.setup_data = 0;
    params.hdr.ramdisk_image = 0;
    params.hdr.ramdisk_size = 0;
    if let Some(initrd) = &given.initrd {
        params.hdr.ramdisk_image = low(initrd.start);
        params.hdr.ramdisk_size = low(initrd.end - initrd.start);
    }
    let mut table = params.e820_table;
    let mut used = 0;
    for (slot, entry) in table.iter_mut().zip(&given.memory_map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind,
        };
        used += 1;
    }
    params.e820_table = table;
    params.e820_entries = used;

    let written = Written::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&written, mem)
        .map_err(|source| BootError::Parameters { source })
}

/// All of this is below the hole, so below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
