//! Where everything is in guest-physical memory. All addresses and sizes are in bytes.
//!
//! ```text
//! 0x0000_0500  GDT of the boot vCPU                  0xC000_0000  32-bit PCI window (512 MiB)
//! 0x0000_6000  hvm_start_info, modules, memory map   0xE000_0000  PCI ECAM (256 MiB)
//! 0x0000_7000  zero page (boot_params)               0xF000_0000  platform MMIO window (virtio-mmio and kin)
//! 0x0000_8000  boot stack, downwards from 0x9000     0xFEC0_0000  I/O APIC
//! 0x0000_9000  PML4, PDPT, page directories          0xFEE0_0000  local APICs
//! 0x0002_0000  command line                          0xFFFB_C000  KVM identity map page, then the 3 TSS pages
//! 0x0009_FC00  EBDA                                  0x1_0000_0000  high RAM
//! 0x000E_0000  ACPI tables, RSDP first               0x40_0000_0000  64-bit PCI window (64 GiB)
//! 0x0010_0000  kernel; initrd as high as it may be
//! ```

/// Low RAM ends here at the latest, and the hole for devices begins. 3 GiB leaves a hole of 1 GiB, as most firmware of
/// PCs with PCI Express does.
pub const HOLE_START: u64 = 0xC000_0000;
/// High RAM begins here, above all 32-bit addresses.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// RAM must end at or below this address: what the boot page tables can map ([`PAGE_DIRECTORIES_MAX`] GiB).
pub const RAM_END_MAX: u64 = PAGE_DIRECTORIES_MAX << 30;

/// The GDT that the boot vCPU starts with: above the real-mode interrupt vectors and the BIOS data area
/// (0x0 to 0x4FF, PC/AT convention).
pub const BOOT_GDT: u64 = 0x500;
/// `struct hvm_start_info` (Xen, `include/public/arch-x86/hvm/start_info.h`), 56 bytes.
pub const PVH_START_INFO: u64 = 0x6000;
/// The one `hvm_modlist_entry` (32 bytes), which is the initrd.
pub const PVH_MODULES: u64 = 0x6040;
/// The table of `hvm_memmap_table_entry` (24 bytes each), up to [`ZERO_PAGE`].
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `struct boot_params`, 4 KiB (Linux, `Documentation/arch/x86/zero-page.rst`).
pub const ZERO_PAGE: u64 = 0x7000;
/// RSP at a 64-bit entry. Linux brings its own stack; a bare guest may use these 4 KiB, which grow down to 0x8000.
pub const BOOT_STACK_TOP: u64 = 0x9000;
/// The PML4 of the boot vCPU; the PDPT follows.
pub const BOOT_PML4: u64 = 0x9000;
/// The PDPT of the boot vCPU.
pub const BOOT_PDPT: u64 = 0xA000;
/// The first page directory; one for each GiB, up to [`PAGE_DIRECTORIES_MAX`] of them.
pub const BOOT_PAGE_DIRECTORIES: u64 = 0xB000;
/// How many page directories fit below [`CMDLINE`].
pub const PAGE_DIRECTORIES_MAX: u64 = (CMDLINE - BOOT_PAGE_DIRECTORIES) / 0x1000;
/// The command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line, without its NUL: Linux keeps `COMMAND_LINE_SIZE` (2048, `arch/x86/include/asm/setup.h`)
/// bytes and cuts the rest off in silence.
pub const CMDLINE_MAX: usize = 2047;
/// The extended BIOS data area: RAM below 1 MiB is the guest's up to here (PC/AT convention).
pub const EBDA: u64 = 0x9_FC00;
/// The end of conventional memory, where the VGA window begins (PC/AT convention).
pub const CONVENTIONAL_END: u64 = 0xA_0000;
/// The ACPI tables. The RSDP stands at the start, in the range that the guest scans for it (ACPI 6.5, 5.2.5.1).
pub const ACPI_START: u64 = 0xE_0000;
/// The VM generation id, 16 bytes, behind the ACPI tables.
pub const GENERATION_ID: u64 = ACPI_END - 0x1000;
/// The end of the ACPI tables, the generation id included (exclusive).
pub const ACPI_END: u64 = 0x10_0000;
/// The lowest address of a kernel: 1 MiB, where `LOADED_HIGH` kernels live (Linux, `Documentation/arch/x86/boot.rst`).
pub const KERNEL_MIN: u64 = 0x10_0000;

/// 32-bit PCI memory BARs.
pub const PCI_WINDOW_32: u64 = 0xC000_0000;
/// Size of [`PCI_WINDOW_32`].
pub const PCI_WINDOW_32_SIZE: u64 = 0x2000_0000;
/// PCI Express enhanced configuration space (ECAM): 1 MiB a bus, 256 buses.
pub const PCI_ECAM: u64 = 0xE000_0000;
/// Size of [`PCI_ECAM`].
pub const PCI_ECAM_SIZE: u64 = 0x1000_0000;
/// MMIO devices that are not on PCI.
pub const PLATFORM_MMIO: u64 = 0xF000_0000;
/// Size of [`PLATFORM_MMIO`].
pub const PLATFORM_MMIO_SIZE: u64 = 0x0100_0000;
/// The I/O APIC of KVM's irqchip (`IOAPIC_DEFAULT_BASE_ADDRESS`, `arch/x86/kvm/ioapic.h`).
pub const IO_APIC: u64 = 0xFEC0_0000;
/// The local APICs (`APIC_DEFAULT_PHYS_BASE`, `arch/x86/include/asm/apicdef.h`).
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// KVM_SET_IDENTITY_MAP_ADDR: one page that KVM's VMX needs for real mode; this is also its default
/// (Linux, `Documentation/virt/kvm/api.rst`, 4.54).
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// KVM_SET_TSS_ADDR: three pages that KVM's VMX needs for real mode (`api.rst`, 4.35).
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// From [`KVM_IDENTITY_MAP`] to the end of the TSS pages.
pub const KVM_PAGES_SIZE: u64 = 0x4000;
/// 64-bit PCI memory BARs: above all RAM, and within the 39 physical address bits of the smallest hosts.
pub const PCI_WINDOW_64: u64 = 0x40_0000_0000;
/// Size of [`PCI_WINDOW_64`].
pub const PCI_WINDOW_64_SIZE: u64 = 0x10_0000_0000;

/// I/O ports of the first serial port, COM1: 8 ports (PC/AT convention).
pub const COM1_PORT: u16 = 0x3F8;
/// Number of ports of a 16550.
pub const COM1_PORTS: u16 = 8;
/// Interrupt line of COM1 (PC/AT convention).
pub const COM1_IRQ: u32 = 4;
/// First I/O port of the i8042: data at 0x60, command and status at 0x64 (PC/AT convention).
pub const I8042_PORT: u16 = 0x60;
/// From the data port to the command port.
pub const I8042_PORTS: u16 = 5;
/// CMOS index port; the data port follows (PC/AT convention).
pub const RTC_PORT: u16 = 0x70;
/// Index and data.
pub const RTC_PORTS: u16 = 2;
/// The pvpanic port (QEMU's `docs/specs/pvpanic.rst`).
pub const PVPANIC_PORT: u16 = 0x505;
/// Its one register.
pub const PVPANIC_PORTS: u16 = 1;
/// First I/O port of PCI's configuration mechanism #1: address, then data (PCI Local Bus 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_PORT: u16 = 0xCF8;
/// Address and data.
pub const PCI_CONFIG_PORTS: u16 = 8;
/// First port of the PCI hot-plug registers (QEMU's `docs/specs/acpi_pci_hotplug.rst`; the DSDT and the FADT tell the guest).
pub const PCI_HOTPLUG_PORT: u16 = 0xAE00;
/// Number of the hot-plug registers' ports, the general-purpose event block included.
pub const PCI_HOTPLUG_PORTS: u16 = 0x12;
/// First port of the ACPI power-management registers (ours; the FADT tells the guest).
pub const ACPI_PM_PORT: u16 = 0x600;
/// Number of ports of the ACPI registers.
pub const ACPI_PM_PORTS: u16 = 0x14;
/// The system control interrupt: IRQ 9, level-triggered, active high (the MADT's override tells the guest).
pub const SCI_IRQ: u32 = 9;

/// The largest number of vCPUs.
pub const CPUS_MAX: u8 = 8;

const _: () = {
    assert!(ZERO_PAGE + 0x1000 < BOOT_STACK_TOP && BOOT_STACK_TOP <= BOOT_PML4);
    assert!(
        RAM_END_MAX >= HIGH_RAM_START + (16 << 30) - HOLE_START,
        "16 GiB of RAM must be mapped"
    );
    assert!(
        PCI_WINDOW_32 + PCI_WINDOW_32_SIZE <= PCI_ECAM && PCI_ECAM + PCI_ECAM_SIZE <= PLATFORM_MMIO
    );
    assert!(PLATFORM_MMIO + PLATFORM_MMIO_SIZE <= IO_APIC && RAM_END_MAX <= PCI_WINDOW_64);
    assert!(KVM_IDENTITY_MAP + 0x1000 == KVM_TSS);
};
