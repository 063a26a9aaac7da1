//! Every hostile value is refused by its name, and none brings the loader down.

use proptest::prelude::*;

use super::*;
use crate::boot::layout;

const CODE: u64 = 0x20_0000;

fn elf() -> ElfFile {
    ElfFile::new(CODE, &[0x90; 64])
}

fn refused(kernel: &[u8]) -> BootError {
    boot(&guest_memory(32), kernel).unwrap_err()
}

#[test]
fn no_kernel() {
    assert!(matches!(
        refused(b""),
        BootError::NotAKernel {
            size: 0,
            start: [0, 0, 0, 0]
        }
    ));
    assert!(matches!(
        refused(b"#!/bin/sh"),
        BootError::NotAKernel { size: 9, start } if &start == b"#!/b"
    ));
    assert!(matches!(
        refused(b"\x7fELF"),
        BootError::Read {
            what: "kernel",
            offset: 0,
            len: 64,
            ..
        }
    ));
    let (pipe, _write) = rustix::pipe::pipe().unwrap();
    let pipe = File::from(pipe);
    assert!(matches!(
        load(&guest_memory(32), &params(&pipe)),
        Err(BootError::NotAFile { what: "kernel", .. })
    ));
}

#[test]
fn elf_header_fields() {
    for (at, bytes, field, value) in [
        (4, &[1][..], "EI_CLASS", 1),
        (5, &[2], "EI_DATA", 2),
        (16, &[3, 0], "e_type", 3),
        (18, &[183, 0], "e_machine", 183),
        (54, &[32, 0], "e_phentsize", 32),
        (56, &[0, 0], "e_phnum", 0),
        (56, &[65, 0], "e_phnum", 65),
    ] {
        match refused(&patched(elf().build(), at, bytes)) {
            BootError::ElfHeader {
                field: f, value: v, ..
            } => assert_eq!((f, v), (field, value)),
            other => panic!("{field}: {other}"),
        }
    }
    // Program headers that are not in the file.
    for at in [1 << 20, u64::MAX] {
        let file = patched(elf().build(), 32, &at.to_le_bytes());
        assert!(matches!(
            refused(&file),
            BootError::Read { offset, .. } if offset == at
        ));
    }
}

#[test]
fn segments_in_memory() {
    for (start, size) in [
        (0, 64),
        (layout::ZERO_PAGE, 64),
        (layout::ACPI_START, 64),
        (layout::KERNEL_MIN - 1, 64),
        ((32 << 20) - 32, 64),
        (1 << 20, u64::MAX),
        (u64::MAX - 1, 64),
        (layout::IO_APIC, 64),
    ] {
        let file = elf().segment(start, b"x", size).build();
        match refused(&file) {
            BootError::SegmentOutside {
                index: 1,
                start: s,
                size: z,
                allowed,
            } => {
                assert_eq!((s, z), (start, size));
                assert_eq!(allowed, layout::KERNEL_MIN..32 << 20);
            }
            other => panic!("{start:#x}: {other}"),
        }
    }
    // A segment may fill RAM to its last byte.
    boot(
        &guest_memory(32),
        &elf().segment((32 << 20) - 64, b"x", 64).build(),
    )
    .unwrap();
    assert!(matches!(
        refused(&elf().segment(CODE + 63, b"x", 1).build()),
        BootError::SegmentsOverlap { first, second }
            if first == (CODE..CODE + 64) && second == (CODE + 63..CODE + 64)
    ));
}

#[test]
fn segments_in_the_file() {
    // The second program header's p_offset and p_filesz.
    let file = elf().segment(0x30_0000, b"data", 0x1000).build();
    for (at, value) in [
        (64 + 56 + 8, u64::MAX),
        (64 + 56 + 32, 0x1001),
        (64 + 56 + 32, 5),
    ] {
        assert!(
            matches!(
                refused(&patched(file.clone(), at, &value.to_le_bytes())),
                BootError::SegmentFile { index: 1, .. }
            ),
            "{value:#x}"
        );
    }
    // More bytes in the file than in memory.
    let file = elf().segment(0x30_0000, b"data", 3).build();
    assert!(matches!(
        refused(&file),
        BootError::SegmentFile {
            index: 1,
            size: 4,
            ..
        }
    ));
}

#[test]
fn entry_points() {
    let outside = ElfFile {
        entry: CODE + 64,
        ..elf()
    };
    assert!(matches!(refused(&outside.build()), BootError::EntryOutside(at) if at == CODE + 64));
    assert!(matches!(
        refused(&elf().pvh(0x1000).build()),
        BootError::EntryOutside(0x1000)
    ));
    let no_segments = ElfFile {
        entry: 5,
        parts: Vec::new(),
    }
    .pvh(0x1000);
    assert!(matches!(
        refused(&no_segments.build()),
        BootError::EntryOutside(5)
    ));
}

#[test]
fn bzimage_fields() {
    for (at, bytes, field, value) in [
        (0x206, &0x020B_u16.to_le_bytes()[..], "version", 0x020B),
        (0x236, &0x7E_u16.to_le_bytes(), "xloadflags", 0x7E),
        (0x1F1, &[64], "setup_sects", 64),
        (0x1F1, &[0], "setup_sects", 0),
    ] {
        match refused(&patched(bz_image(b"x"), at, bytes)) {
            BootError::BzImageHeader { field: f, value: v } => assert_eq!((f, v), (field, value)),
            other => panic!("{field}: {other}"),
        }
    }
    for (pref_address, init_size) in [
        (0_u64, 0x40_0000_u32),
        (0xF_FFFF, 1),
        (0x100_0000, 0x100_0001),
        (0x1F0_0000, u32::MAX),
        (u64::MAX, 0x1000),
        (4 << 30, 0x1000),
    ] {
        let file = patched(bz_image(b"x"), 0x258, &pref_address.to_le_bytes());
        let file = patched(file, 0x260, &init_size.to_le_bytes());
        assert!(
            matches!(
                refused(&file),
                BootError::BzImageOutside { needs, .. } if needs.start == pref_address
            ),
            "{pref_address:#x} {init_size:#x}"
        );
    }
    // linux-loader's own condition: not a zImage.
    assert!(matches!(
        refused(&patched(bz_image(b"x"), 0x211, &[0])),
        BootError::Loader(_)
    ));
}

#[test]
fn initrds() {
    let kernel = file(&elf().segment(0x100_0000, b"x", 0x1000).build());
    let size_of = |initrd: &File| {
        load(
            &guest_memory(32),
            &BootParams {
                initrd: Some(initrd),
                ..params(&kernel)
            },
        )
    };
    assert!(matches!(size_of(&file(b"")), Err(BootError::InitrdEmpty)));
    let free = 0x100_1000..32 << 20;
    let initrd = file(b"");
    for size in [
        free.end - free.start + 1,
        32 << 20,
        1 << 40,
        i64::MAX as u64,
    ] {
        initrd.set_len(size).unwrap_or_default();
        let real = initrd.metadata().unwrap().len();
        match size_of(&initrd) {
            Err(BootError::InitrdSize { size, free: f }) => {
                assert_eq!((size, f), (real, free.clone()));
            }
            other => panic!("{size:#x}: {other:?}"),
        }
    }
    initrd.set_len(free.end - free.start).unwrap();
    assert_eq!(size_of(&initrd).unwrap().initrd, Some(free));
    // A limit below the kernel's own end.
    let kernel = file(&patched(bz_image(b"x"), 0x22C, &0x1000_u32.to_le_bytes()));
    let result = load(
        &guest_memory(32),
        &BootParams {
            initrd: Some(&file(b"x")),
            ..params(&kernel)
        },
    );
    assert!(matches!(
        result,
        Err(BootError::InitrdSize { size: 1, free }) if (free.start, free.end) == (0x140_0000, 0x1001)
    ));
}

#[test]
fn command_lines() {
    let with = |kernel: &[u8], cmdline: &str| {
        load(
            &guest_memory(32),
            &BootParams {
                cmdline,
                ..params(&file(kernel))
            },
        )
    };
    let kernel = elf().build();
    with(&kernel, "").unwrap();
    with(&kernel, &"x".repeat(2047)).unwrap();
    assert!(matches!(
        with(&kernel, &"x".repeat(2048)),
        Err(BootError::CmdlineLength {
            len: 2048,
            max: 2047
        })
    ));
    assert!(matches!(
        with(&kernel, "quiet\0init=/x"),
        Err(BootError::CmdlineNul(5))
    ));
    let small = patched(bz_image(b"x"), 0x238, &255_u32.to_le_bytes());
    with(&small, &"x".repeat(255)).unwrap();
    assert!(matches!(
        with(&small, &"x".repeat(256)),
        Err(BootError::CmdlineLength { len: 256, max: 255 })
    ));
}

#[test]
fn numbers_of_cpus() {
    let kernel = file(&elf().build());
    for cpus in [0, 9, 255] {
        let result = load(
            &guest_memory(32),
            &BootParams {
                cpus,
                ..params(&kernel)
            },
        );
        assert!(matches!(result, Err(BootError::Cpus(n)) if n == cpus));
    }
    load(
        &guest_memory(32),
        &BootParams {
            cpus: 8,
            ..params(&kernel)
        },
    )
    .unwrap();
}

#[test]
fn acpi_extras_have_their_limit() {
    let table = vec![0_u8; 0x2_0000];
    let table = crate::boot::tests::tables::Raw(table);
    let kernel = file(&elf().build());
    let result = load(
        &guest_memory(32),
        &BootParams {
            acpi: AcpiExtras {
                dsdt: &[],
                tables: &[&table],
            },
            ..params(&kernel)
        },
    );
    assert!(matches!(result, Err(BootError::AcpiSize(size)) if size > 0x2_0000));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes changed anywhere in the headers: loaded or refused, and a refusal can be printed.
    #[test]
    fn damaged_kernels(
        pvh in any::<bool>(),
        elf_file in any::<bool>(),
        damage in prop::collection::vec((0_usize..0x300, any::<u8>()), 0..8),
    ) {
        let mut kernel = if elf_file {
            let file = elf().segment(0x30_0000, b"data", 0x3000);
            if pvh { file.pvh(CODE as u32) } else { file }.build()
        } else {
            bz_image(&[0x90; 64])
        };
        for (at, byte) in damage {
            if let Some(place) = kernel.get_mut(at) {
                *place = byte;
            }
        }
        match boot(&guest_memory(32), &kernel) {
            Ok(loaded) => prop_assert!(loaded.kernel.start >= layout::KERNEL_MIN && loaded.kernel.end <= 32 << 20),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    /// Files of noise behind the right magic.
    #[test]
    fn noise(mut bytes in prop::collection::vec(any::<u8>(), 0x210..0x800), elf_file in any::<bool>()) {
        if elf_file {
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        } else {
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
        }
        if let Err(error) = boot(&guest_memory(32), &bytes) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
