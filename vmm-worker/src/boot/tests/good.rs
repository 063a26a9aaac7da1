//! What a kernel that loads finds in memory.

use std::io::Seek as _;
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::boot::Entry;
use crate::boot::Protocol;
use crate::boot::layout;

const GIB: u64 = 1 << 30;

/// The memory map in the zero page or, at 24 bytes an entry, in the PVH table.
fn memory_map(mem: &GuestMemoryMmap, at: u64, stride: u64, count: u64) -> Vec<(u64, u64, u32)> {
    (0..count)
        .map(|i| at + i * stride)
        .map(|at| (u64_at(mem, at), u64_at(mem, at + 8), u32_at(mem, at + 16)))
        .collect()
}

fn expected_map(low_end: u64, high: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xE_0000, 0x2_0000, 2),
        (0x10_0000, low_end - 0x10_0000, 1),
        (0xE000_0000, 0x1000_0000, 2),
        (0xFFFB_C000, 0x4000, 2),
    ];
    if high > 0 {
        map.push((4 * GIB, high, 1));
    }
    map
}

#[test]
fn a_plain_elf_is_entered_in_long_mode() {
    let mem = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 0xC000_0000),
        (GuestAddress(4 * GIB), 13 << 30),
    ])
    .unwrap();
    let kernel = file(
        &ElfFile::new(0x20_0000, b"first")
            .segment(0x40_0000, b"second", 0x3000)
            .build(),
    );
    let initrd = file(&[7; 5000]);
    let loaded = load(
        &mem,
        &BootParams {
            initrd: Some(&initrd),
            ..params(&kernel)
        },
    )
    .unwrap();

    let initrd = 0xC000_0000 - 0x2000;
    assert_eq!(
        loaded,
        Loaded {
            entry: Entry::Long64 {
                rip: 0x20_0000,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK_TOP
            },
            protocol: Protocol::Elf64,
            kernel: 0x20_0000..0x40_3000,
            initrd: Some(initrd..initrd + 5000),
        }
    );
    assert_eq!(bytes_at(&mem, 0x20_0000, 5), b"first");
    assert_eq!(bytes_at(&mem, 0x40_0000, 7), b"second\0");
    assert_eq!(
        bytes_at(&mem, initrd, 5001),
        [&[7; 5000][..], &[0]].concat()
    );
    assert_eq!(bytes_at(&mem, layout::CMDLINE, 14), b"console=ttyS0\0");

    // Offsets are those of Documentation/arch/x86/zero-page.rst and boot.rst.
    let zero = layout::ZERO_PAGE;
    assert_eq!(bytes_at(&mem, zero + 0x202, 4), b"HdrS");
    assert_eq!(u32_at(&mem, zero + 0x228), 0x2_0000, "cmd_line_ptr");
    assert_eq!(u64_at(&mem, zero + 0x70), 0xE_0000, "acpi_rsdp_addr");
    assert_eq!(bytes_at(&mem, zero + 0x210, 1), [0xFF], "type_of_loader");
    assert_eq!(u32_at(&mem, zero + 0x218), initrd as u32);
    assert_eq!(u32_at(&mem, zero + 0x21C), 5000);
    assert_eq!(bytes_at(&mem, zero + 0x1E8, 1), [7]);
    assert_eq!(
        memory_map(&mem, zero + 0x2D0, 20, 7),
        expected_map(0xC000_0000, 13 * GIB)
    );
}

#[test]
fn a_pvh_note_is_preferred() {
    let mem = guest_memory(64);
    let kernel = file(
        &ElfFile::new(0x100_0000, &[0x90; 64])
            .pvh(0x100_0010)
            .build(),
    );
    let initrd = file(&[9; 4096]);
    let loaded = load(
        &mem,
        &BootParams {
            initrd: Some(&initrd),
            ..params(&kernel)
        },
    )
    .unwrap();
    assert_eq!(
        (loaded.entry, loaded.protocol),
        (
            Entry::Pvh {
                rip: 0x100_0010,
                rbx: layout::PVH_START_INFO
            },
            Protocol::Pvh
        )
    );

    // Offsets are those of struct hvm_start_info.
    let info = layout::PVH_START_INFO;
    assert_eq!(u32_at(&mem, info), 0x336E_C578);
    assert_eq!(u32_at(&mem, info + 4), 1, "version");
    assert_eq!(u32_at(&mem, info + 12), 1, "nr_modules");
    assert_eq!(u64_at(&mem, info + 24), layout::CMDLINE);
    assert_eq!(u64_at(&mem, info + 32), layout::ACPI_START);
    let module = u64_at(&mem, info + 16);
    assert_eq!(
        (u64_at(&mem, module), u64_at(&mem, module + 8)),
        ((64 << 20) - 4096, 4096)
    );
    assert_eq!(u32_at(&mem, info + 48), 6, "memmap_entries");
    assert_eq!(
        memory_map(&mem, u64_at(&mem, info + 40), 24, 6),
        expected_map(64 << 20, 0)
    );
}

#[test]
fn a_bzimage_is_loaded_at_its_preferred_address() {
    let mem = guest_memory(64);
    let loaded = boot(&mem, &bz_image(b"entry")).unwrap();
    assert_eq!(
        loaded,
        Loaded {
            entry: Entry::Long64 {
                rip: 0x100_0200,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK_TOP
            },
            protocol: Protocol::BzImage64,
            kernel: 0x100_0000..0x140_0000,
            initrd: None,
        }
    );
    assert_eq!(bytes_at(&mem, 0x100_0200, 5), b"entry");
    let zero = layout::ZERO_PAGE;
    assert_eq!(u64_at(&mem, zero + 0x258), 0x100_0000, "its own header");
    assert_eq!(
        u64_at(&mem, zero + 0x250),
        0,
        "but not setup_data from the file"
    );
    assert_eq!(u32_at(&mem, zero + 0x218), 0, "and no initrd");
}

#[test]
fn an_initrd_obeys_the_kernels_limit() {
    let mem = guest_memory(64);
    let kernel = file(&patched(
        bz_image(b"x"),
        0x22C,
        &0x17F_FFFF_u32.to_le_bytes(),
    ));
    let initrd = file(&[1; 4097]);
    let loaded = load(
        &mem,
        &BootParams {
            initrd: Some(&initrd),
            ..params(&kernel)
        },
    )
    .unwrap();
    assert_eq!(loaded.initrd, Some(0x17F_E000..0x17F_F001));
}

#[test]
fn a_second_boot_leaves_nothing_of_the_first_guest() {
    let kernel = file(
        &ElfFile::new(0x20_0000, b"code")
            .segment(0x30_0000, b"data", 0x2345)
            .build(),
    );
    let fresh = guest_memory(8);
    let loaded = load(&fresh, &params(&kernel)).unwrap();

    let used = guest_memory(8);
    used.write_slice(&vec![0xEE; 8 << 20], GuestAddress(0))
        .unwrap();
    let mut kernel_offset = kernel;
    kernel_offset.seek(std::io::SeekFrom::Start(3)).unwrap();
    let again = load(
        &used,
        &BootParams {
            ram: RamContent::Used,
            ..params(&kernel_offset)
        },
    )
    .unwrap();
    assert_eq!(again, loaded);
    assert_eq!(kernel_offset.stream_position().unwrap(), 3, "read by pread");

    // From the page tables to the command line's NUL, the ACPI area, and all of the kernel.
    for (at, len) in [
        (layout::BOOT_GDT, 48),
        (layout::ZERO_PAGE, 0x1000),
        (layout::BOOT_PML4, 0x6000),
        (layout::CMDLINE, 14),
        (layout::ACPI_START, 0x2_0000),
        (0x20_0000, 4),
        (0x30_0000, 0x2345),
    ] {
        assert_eq!(
            bytes_at(&used, at, len),
            bytes_at(&fresh, at, len),
            "{at:#x}"
        );
    }
    assert_eq!(bytes_at(&used, 0x30_2345, 1), [0xEE], "and no more");
}

#[test]
fn blank_memory_is_not_cleared() {
    // What lies behind a segment's bytes stays a hole of the memfd.
    let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let ram = std::fs::File::from(memfd);
    ram.set_len(64 << 20).unwrap();
    let range = (
        GuestAddress(0),
        64 << 20,
        Some(vm_memory::FileOffset::new(ram.try_clone().unwrap(), 0)),
    );
    let mem = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    boot(
        &mem,
        &ElfFile::new(0x20_0000, b"code")
            .segment(0x40_0000, b"data", 32 << 20)
            .build(),
    )
    .unwrap();
    let allocated = rustix::fs::fstat(&ram).unwrap().st_blocks * 512;
    assert!(allocated < 1 << 20, "{allocated} bytes of RAM allocated");
    let mut data = [0; 4];
    ram.read_exact_at(&mut data, 0x40_0000).unwrap();
    assert_eq!(&data, b"data");
}
