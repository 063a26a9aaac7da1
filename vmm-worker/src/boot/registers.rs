//! The boot vCPU's registers, GDT and page tables at a kernel's entry.

use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::layout;
use super::ram::RamShape;

/// Selectors of the Linux 64-bit boot protocol (`Documentation/arch/x86/boot.rst`: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Null, null, code, data, and a task segment of 16 bytes, as long mode has them.
const GDT_ENTRIES: usize = 6;
const GDT_LIMIT: u16 = 8 * 6 - 1;

// Control registers and EFER (Intel SDM volume 3, 2.5 and 2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 is always 1; interrupts are off.
const RFLAGS: u64 = 1 << 1;

// Page table entries (Intel SDM volume 3, 4.5).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// A guest that runs at CPL 3 throughout then needs no tables of its own.
const USER: u64 = 1 << 2;
/// A 2 MiB page in a page directory.
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;

/// How the boot vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, identity-mapped, by the Linux 64-bit boot protocol.
    Long64 {
        /// The entry point.
        rip: u64,
        /// Address of `boot_params`.
        rsi: u64,
        /// Top of a small stack, which Linux does not use.
        rsp: u64,
    },
    /// 32-bit protected mode without paging, by the PVH protocol.
    Pvh {
        /// The entry point.
        rip: u64,
        /// Address of `hvm_start_info`.
        rbx: u64,
    },
}

/// The registers for `entry`, on top of a vCPU's reset state `base` (which keeps its APIC base and what else is not
/// about the entry).
#[must_use]
pub fn registers(entry: &Entry, base: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut sregs = base;
    let long = matches!(entry, Entry::Long64 { .. });
    let code = segment(CODE, 0xFFFF_FFFF, Kind::Code { long });
    let data = segment(DATA, 0xFFFF_FFFF, Kind::Data);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 0x67, Kind::Task);
    sregs.gdt = kvm_dtable {
        base: layout::BOOT_GDT,
        limit: GDT_LIMIT,
        ..kvm_dtable::default()
    };
    sregs.idt = kvm_dtable::default();
    let regs = match *entry {
        Entry::Long64 { rip, rsi, rsp } => {
            sregs.cr0 = CR0_PG | CR0_ET | CR0_PE;
            sregs.cr3 = layout::BOOT_PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs {
                rip,
                rsi,
                rsp,
                rflags: RFLAGS,
                ..kvm_regs::default()
            }
        }
        Entry::Pvh { rip, rbx } => {
            sregs.cr0 = CR0_ET | CR0_PE;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
            kvm_regs {
                rip,
                rbx,
                rflags: RFLAGS,
                ..kvm_regs::default()
            }
        }
    };
    (regs, sregs)
}

/// Writes the GDT for `entry`.
pub(super) fn write_gdt(mem: &GuestMemoryMmap, entry: &Entry) -> Result<(), BootError> {
    let (_, sregs) = registers(entry, kvm_sregs::default());
    let gdt: [u64; GDT_ENTRIES] = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
        0,
    ];
    write_entries(mem, "GDT", layout::BOOT_GDT, &gdt)
}

/// Writes identity page tables of 2 MiB pages, over all RAM and at least the first 4 GiB.
pub(super) fn write_page_tables(mem: &GuestMemoryMmap, ram: RamShape) -> Result<(), BootError> {
    let directories = ram.end().max(layout::HIGH_RAM_START).div_ceil(1 << 30);
    let directory = |i: u64| layout::BOOT_PAGE_DIRECTORIES + i * 0x1000;
    let table = |used: u64, entry: &dyn Fn(u64) -> u64| -> Vec<u64> {
        (0..ENTRIES)
            .map(|i| if i < used { entry(i) } else { 0 })
            .collect()
    };
    let pml4 = table(1, &|_| layout::BOOT_PDPT | PRESENT | WRITABLE | USER);
    write_entries(mem, "PML4", layout::BOOT_PML4, &pml4)?;
    let pdpt = table(directories, &|i| directory(i) | PRESENT | WRITABLE | USER);
    write_entries(mem, "PDPT", layout::BOOT_PDPT, &pdpt)?;
    for i in 0..directories {
        let pages = table(ENTRIES, &|j| {
            ((i * ENTRIES + j) * LARGE_PAGE) | PRESENT | WRITABLE | USER | LARGE
        });
        write_entries(mem, "page directory", directory(i), &pages)?;
    }
    Ok(())
}

fn write_entries(
    mem: &GuestMemoryMmap,
    what: &'static str,
    address: u64,
    entries: &[u64],
) -> Result<(), BootError> {
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    mem.write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what,
            address,
            source,
        })
}

enum Kind {
    Code { long: bool },
    Data,
    Task,
}

/// A segment register at base 0, as its descriptor in the GDT says (Intel SDM volume 3, 3.4.5).
fn segment(selector: u16, limit: u32, kind: Kind) -> kvm_segment {
    let (type_, s, l, db) = match kind {
        // Execute, read, accessed.
        Kind::Code { long } => (0xB, 1, u8::from(long), u8::from(!long)),
        // Read, write, accessed.
        Kind::Data => (0x3, 1, 0, 1),
        // A busy TSS.
        Kind::Task => (0xB, 0, 0, 0),
    };
    let g = u8::from(limit > 0xF_FFFF);
    kvm_segment {
        base: 0,
        limit,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s,
        l,
        g,
        ..kvm_segment::default()
    }
}

/// The descriptor of a segment at base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xFFFF)
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xF) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}
