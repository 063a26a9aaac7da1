//! `hvm_start_info`, what a PVH kernel is given (Xen, `docs/misc/pvh.pandoc`).

use linux_loader::configurator::BootConfigurator as _;
use linux_loader::configurator::BootParams as Written;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use linux_loader::loader::elf::start_info::hvm_modlist_entry;
use linux_loader::loader::elf::start_info::hvm_start_info;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::Given;
use super::layout;

/// `XEN_HVM_START_MAGIC_VALUE` (Xen, `include/public/arch-x86/hvm/start_info.h`).
const MAGIC: u32 = 0x336E_C578;
/// The first version that has a memory map.
const VERSION: u32 = 1;

/// Writes the start info, the module list and the memory map.
pub(super) fn write_start_info(mem: &GuestMemoryMmap, given: &Given) -> Result<(), BootError> {
    let map: Vec<_> = given
        .memory_map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: given.initrd.iter().len().try_into().unwrap_or(0),
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len().try_into().unwrap_or(0),
        reserved: 0,
    };
    let mut written = Written::new(&info, GuestAddress(layout::PVH_START_INFO));
    written.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some(initrd) = &given.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            cmdline_paddr: 0,
            reserved: 0,
        };
        written.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&written, mem)
        .map_err(|source| BootError::Parameters { source })
}
