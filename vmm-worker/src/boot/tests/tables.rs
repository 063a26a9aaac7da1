//! The ACPI tables, page tables and registers, judged by their specifications' offsets.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml;
use kvm_bindings::kvm_sregs;

use super::*;
use crate::boot;
use crate::boot::Entry;
use crate::boot::layout;
use crate::boot::registers;

/// Bytes as they are.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Boots with `cpus` and `acpi` on 32 MiB.
fn booted(cpus: u8, acpi: AcpiExtras<'_>) -> GuestMemoryMmap {
    let mem = guest_memory(32);
    let kernel = file(&ElfFile::new(0x20_0000, &[0xF4]).build());
    load(
        &mem,
        &BootParams {
            cpus,
            acpi,
            ..params(&kernel)
        },
    )
    .unwrap();
    mem
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A table by its address, its checksum and place checked.
fn table(mem: &GuestMemoryMmap, at: u64) -> Vec<u8> {
    let len = u32_at(mem, at + 4) as usize;
    let table = bytes_at(mem, at, len);
    assert_eq!(
        sum(&table),
        0,
        "checksum of {:?}",
        String::from_utf8_lossy(&table[..4])
    );
    assert!(at > layout::ACPI_START && at + len as u64 <= layout::ACPI_END);
    table
}

/// All tables that the XSDT names.
fn tables(mem: &GuestMemoryMmap) -> Vec<Vec<u8>> {
    let rsdp = bytes_at(mem, layout::ACPI_START, 36);
    assert_eq!((&rsdp[..8], rsdp[15]), (&b"RSD PTR "[..], 2));
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(mem, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
    assert_eq!(&xsdt[..4], b"XSDT");
    xsdt[36..]
        .chunks(8)
        .map(|at| table(mem, u64::from_le_bytes(at.try_into().unwrap())))
        .collect()
}

fn named(tables: &[Vec<u8>], name: &[u8; 4]) -> Vec<u8> {
    tables
        .iter()
        .find(|table| &table[..4] == name)
        .unwrap()
        .clone()
}

fn int(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[test]
fn the_fadt_tells_the_ports_of_the_devices() {
    let mem = booted(1, AcpiExtras::default());
    let fadt = named(&tables(&mem), b"FACP");
    // Offsets are those of ACPI 6.5, table 5.9.
    assert_eq!(int(&fadt, 46, 2), 9, "SCI_INT");
    assert_eq!(int(&fadt, 48, 4), 0, "SMI_CMD: always in ACPI mode");
    assert_eq!((int(&fadt, 56, 4), fadt[88]), (0x600, 4), "PM1a event");
    assert_eq!((int(&fadt, 64, 4), fadt[89]), (0x604, 2), "PM1a control");
    assert_eq!((int(&fadt, 76, 4), fadt[91]), (0, 0), "no PM timer");
    assert_eq!(fadt[108], 0x32, "CENTURY");
    assert_eq!(int(&fadt, 109, 2), 0b101, "IAPC_BOOT_ARCH");
    let flags = int(&fadt, 112, 4);
    assert_eq!(flags & 1 << 4, 0, "a power button in the fixed registers");
    assert_ne!(flags & 1 << 10, 0, "a reset register");
    assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
    assert_eq!(
        (fadt[116], int(&fadt, 120, 8), fadt[128]),
        (1, 0x612, 1),
        "reset register"
    );
    assert_eq!(
        (int(&fadt, 80, 4), fadt[92], int(&fadt, 224, 8), fadt[220]),
        (0xAE10, 2, 0xAE10, 1),
        "GPE0 block"
    );
    assert_eq!(int(&fadt, 40, 4), int(&fadt, 140, 8), "DSDT and X_DSDT");

    let facs = int(&fadt, 36, 4);
    assert_eq!((bytes_at(&mem, facs, 4), facs % 64), (b"FACS".to_vec(), 0));
    assert_eq!(u32_at(&mem, facs + 4), 64);
}

#[test]
fn the_madt_lists_processors_and_overrides() {
    for cpus in [1, 2, 8] {
        let madt = named(&tables(&booted(cpus, AcpiExtras::default())), b"APIC");
        assert_eq!(int(&madt, 36, 4), 0xFEE0_0000);
        assert_eq!(int(&madt, 40, 4), 1, "8259s are there");
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let [_, len, ..] = rest {
            let (entry, next) = rest.split_at(usize::from(*len));
            entries.push(entry.to_vec());
            rest = next;
        }
        let local: Vec<_> = entries.iter().filter(|e| e[0] == 0).cloned().collect();
        let expected: Vec<_> = (0..cpus).map(|i| vec![0, 8, i, i, 1, 0, 0, 0]).collect();
        assert_eq!(local, expected);
        let others: Vec<_> = entries.into_iter().filter(|e| e[0] != 0).collect();
        assert_eq!(
            others,
            [
                vec![1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0],
                vec![2, 10, 0, 9, 9, 0, 0, 0, 13, 0],
                vec![4, 6, 0xFF, 0, 0, 1],
            ]
        );
    }
}

#[test]
fn the_dsdt_has_s5_and_com1_and_takes_more() {
    let address = |mem: &GuestMemoryMmap| int(&named(&tables(mem), b"FACP"), 40, 4);
    let plain = booted(1, AcpiExtras::default());
    let dsdt = table(&plain, address(&plain));
    assert_eq!(&dsdt[..4], b"DSDT");
    // Name (_S5_, Package () { 5, 5, 0, 0 })
    let s5 = [
        0x08, b'_', b'S', b'5', b'_', 0x12, 8, 4, 0x0A, 5, 0x0A, 5, 0, 0,
    ];
    assert_eq!(&dsdt[36..36 + s5.len()], s5);
    let contains = |what: &[u8]| dsdt.windows(what.len()).any(|window| window == what);
    // IO (Decode16, 0x3F8, 0x3F8, 1, 8), then Interrupt (ResourceConsumer, Edge, ActiveHigh) { 4 }
    assert!(contains(&[
        0x47, 1, 0xF8, 3, 0xF8, 3, 1, 8, 0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0
    ]));
    assert!(contains(&[0x41, 0xD0, 0x05, 0x01]), "PNP0501");
    assert!(contains(&[0x41, 0xD0, 0x0B, 0x00]), "PNP0B00");
    // Name (_HID, "QEMU0001"), by which Linux's driver finds it; then IO (Decode16, 0x505, 0x505, 1, 1)
    assert!(contains(b"_HID\x0DQEMU0001\0"));
    assert!(contains(&[0x47, 1, 5, 5, 5, 5, 1, 1]));

    let fragment = aml::Name::new("_SB_.XTRA".into(), &0x5A_u8);
    let mut extra = b"XTRA\x28\0\0\0".to_vec();
    extra.resize(40, 0);
    extra[9] = 0_u8.wrapping_sub(sum(&extra));
    let extra = Raw(extra);
    let more = booted(
        1,
        AcpiExtras {
            dsdt: &[&fragment],
            tables: &[&extra],
        },
    );
    let longer = table(&more, address(&more));
    assert_eq!(&longer[36..dsdt.len()], &dsdt[36..]);
    assert!(longer.ends_with(b"XTRA\x0A\x5A"));
    assert_eq!(named(&tables(&more), b"XTRA"), extra.0);
}

#[test]
fn slots_that_devices_come_to_have_an_object_and_the_others_none() {
    let mut bytes = Vec::new();
    let bridge = boot::pci_host_bridge();
    bridge.to_aml_bytes(&mut bytes);
    boot::pci_hotplug(1 << 5 | 1 << 31).to_aml_bytes(&mut bytes);
    let count = |what: &[u8]| {
        let windows = bytes.windows(what.len());
        windows.filter(|window| *window == what).count()
    };
    // Device (S05) { Name (_ADR, 0x00050000), Name (_SUN, 5), Method (_EJ0, 1) { PEJ0 = 0x20 } }
    let device = [
        &b"\x5B\x82\x24S05_"[..],
        b"\x08_ADR\x0C\0\0\x05\0",
        b"\x08_SUN\x0A\x05",
        b"\x14\x0D_EJ0\x01\x70\x0A\x20PEJ0",
    ]
    .concat();
    assert_eq!(count(&device), 1, "{bytes:x?}");
    assert_eq!(count(b"S1F_"), 3);
    assert_eq!(count(b"_SUN"), 2);
    // Notify (S05, 1) and Notify (S05, 3).
    assert_eq!((count(b"\x86S05_\x01"), count(b"\x86S05_\x0A\x03")), (1, 1));
    assert_eq!(count(b"_E01"), 1);
    // The largest machine's fits.
    let all = boot::pci_hotplug(!1);
    booted(
        8,
        AcpiExtras {
            dsdt: &[&*bridge, &*all],
            tables: &[],
        },
    );
}

/// Walks the boot page tables as the processor does.
fn translate(mem: &GuestMemoryMmap, address: u64) -> Option<u64> {
    let mut table = layout::BOOT_PML4;
    for shift in [39, 30, 21] {
        let entry = u64_at(mem, table + (address >> shift & 511) * 8);
        if entry & 0b111 != 0b111 {
            return None;
        }
        if shift == 21 {
            assert_ne!(entry & 1 << 7, 0, "a 2 MiB page");
        }
        table = entry & !0xFFF;
    }
    Some(table | address & 0x1F_FFFF)
}

#[test]
fn the_page_tables_map_memory_to_itself() {
    let mem = booted(1, AcpiExtras::default());
    for address in [0, 0x1234, 0x20_0000, 0xC000_0000, 0xFEE0_0030, 0xFFFF_FFFF] {
        assert_eq!(translate(&mem, address), Some(address));
    }
    for address in [1 << 32, 1 << 39, 1 << 46] {
        assert_eq!(translate(&mem, address), None);
    }
    let mem = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 0xC000_0000),
        (GuestAddress(1 << 32), 13 << 30),
    ])
    .unwrap();
    boot(&mem, &ElfFile::new(0x20_0000, &[0xF4]).build()).unwrap();
    assert_eq!(translate(&mem, (17 << 30) - 1), Some((17 << 30) - 1));
    assert_eq!(translate(&mem, 17 << 30), None);
    assert_eq!(
        bytes_at(&mem, layout::CMDLINE, 7),
        b"console",
        "nothing overlaps"
    );
}

#[test]
fn registers_keep_what_is_not_the_entrys() {
    let base = kvm_sregs {
        apic_base: 0xFEE0_0900,
        cr0: 0x6000_0010,
        cr8: 5,
        ..kvm_sregs::default()
    };
    let (regs, sregs) = registers(
        &Entry::Long64 {
            rip: 0x20_0000,
            rsi: 0x7000,
            rsp: 0x9000,
        },
        base,
    );
    assert_eq!(
        (regs.rip, regs.rsi, regs.rsp, regs.rflags),
        (0x20_0000, 0x7000, 0x9000, 2)
    );
    assert_eq!(
        (sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3),
        (0x8000_0011, 0x20, 0x500, 0x9000)
    );
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    assert_eq!((sregs.apic_base, sregs.cr8), (0xFEE0_0900, 5));

    let (regs, sregs) = registers(
        &Entry::Pvh {
            rip: 0x100_0000,
            rbx: 0x6000,
        },
        base,
    );
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!(
        (sregs.cs.l, sregs.cs.db, sregs.cs.limit),
        (0, 1, 0xFFFF_FFFF)
    );
    assert_eq!(sregs.tr.limit, 0x67);
}

#[test]
fn the_gdt_says_what_the_segment_registers_say() {
    let mem = booted(1, AcpiExtras::default());
    let entry = |selector: u64| u64_at(&mem, layout::BOOT_GDT + selector);
    // As Linux has them (arch/x86/kernel/cpu/common.c: 64-bit code, data), accessed.
    assert_eq!(entry(0x10), 0x00AF_9B00_0000_FFFF);
    assert_eq!(entry(0x18), 0x00CF_9300_0000_FFFF);
    assert_eq!(entry(0x20), 0x0000_8B00_0000_0067);
    let pvh = guest_memory(32);
    boot(
        &pvh,
        &ElfFile::new(0x20_0000, &[0xF4]).pvh(0x20_0000).build(),
    )
    .unwrap();
    assert_eq!(u64_at(&pvh, layout::BOOT_GDT + 0x10), 0x00CF_9B00_0000_FFFF);
}
