use baton_ipc::worker::VfioBar;

use super::*;

/// A device of its own making: two memory BARs (of 32 and 64 bits), an I/O BAR, and these capabilities, chained from 0x40 on.
fn device(interrupts: VfioInterrupts, capabilities: &[(u8, &[u8])]) -> VfioConfig {
    let mut space = vec![0; 256];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(VENDOR, &[0x34, 0x12, 0xE8, 0x11]);
    put(STATUS, &[0x10, 0]);
    put(REVISION, &[7, 1, 0, 2]);
    put(BAR0, &0xFEA0_0000_u32.to_le_bytes());
    put(BAR0 + 4, &0xC001_u32.to_le_bytes());
    put(BAR0 + 8, &0x0000_000C_u32.to_le_bytes());
    put(BAR0 + 12, &0x0000_0038_u32.to_le_bytes());
    put(SUBSYSTEM_VENDOR, &[0xF4, 0x1A, 0, 0x11]);
    put(0x3C, &[11, 1]);
    let (mut link, mut at) = (CAPABILITIES, FIRST_CAPABILITY);
    for (id, body) in capabilities {
        put(link, &[u8::try_from(at).unwrap()]);
        put(at, &[*id, 0]);
        put(at + 2, body);
        (link, at) = (at + 1, (at + 2 + body.len()).next_multiple_of(4));
    }
    let bar = |index: u64, size| VfioBar {
        at: index << 40,
        size,
    };
    VfioConfig {
        slot: 3,
        space,
        space_at: 7 << 40,
        bars: vec![
            bar(0, 0x10_0000),
            bar(1, 0x20),
            bar(2, 0x4000),
            bar(3, 0),
            bar(4, 0),
            bar(5, 0),
        ],
        interrupts,
        vectors: match interrupts {
            VfioInterrupts::Msi => 1,
            VfioInterrupts::MsiX => 5,
        },
        resets: false,
    }
}

fn made(config: &VfioConfig) -> Result<Shape, VfioError> {
    let mut next = 0xC010_0000_u64;
    shape(config, |size| {
        let address = next.next_multiple_of(size);
        next = address + size;
        Ok(u32::try_from(address).unwrap())
    })
}

fn refused(config: &VfioConfig) -> &'static str {
    match made(config) {
        Err(VfioError::Space { slot: 3, what }) => what,
        other => panic!("{other:?}"),
    }
}

/// Message control of 17 vectors; the table at 0x1000 of BAR 2, the pending bits at 0x2000.
const MSIX: [u8; 10] = [16, 0, 2, 0x10, 0, 0, 2, 0x20, 0, 0];
const VENDORS: [u8; 6] = [8, 1, 2, 3, 4, 5];

/// The ids and places of the capabilities that a guest finds.
fn chain(space: &ConfigSpace) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let mut at = space.word(0x34).to_le_bytes()[0];
    while at != 0 {
        let [id, next] = space.word(at).to_le_bytes();
        found.push((id, at));
        at = next;
    }
    found
}

#[test]
fn a_guest_finds_the_device_and_what_it_may_use_of_it() {
    let power_management = (0x01, &[3, 0, 8, 0, 0, 0][..]);
    let express = (0x10, &[2, 0, 0, 0][..]);
    let config = device(
        VfioInterrupts::MsiX,
        &[
            power_management,
            (VENDOR_SPECIFIC, &VENDORS),
            (MSI, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            express,
            (msix::CAPABILITY, &MSIX),
        ],
    );
    let Shape { mut space, signal } = made(&config).unwrap();
    assert_eq!(space.dword(0), 0x11E8_1234);
    assert_eq!(space.dword(8), 0x0200_0107);
    assert_eq!(space.dword(0x2C), 0x1100_1AF4);
    assert_eq!(space.word(0x3C), 0, "no interrupt pin");
    let bars = [0x10, 0x14, 0x18, 0x1C, 0x20, 0x24].map(|at| space.dword(at));
    assert_eq!(bars, [0xC010_0000, 0, 0xC020_000C, 0, 0, 0]);
    assert_eq!(
        chain(&space),
        [(msix::CAPABILITY, 0x40), (VENDOR_SPECIFIC, 0x4C)]
    );
    assert_eq!(space.dword(0x4C), 0x0108_0009);
    assert_eq!(
        space.word(0x42),
        4,
        "as many vectors as there are eventfds, less one"
    );
    assert_eq!(
        signal,
        Signal::MsiX {
            at: 0x40,
            table: (2 << 40) + 0x1000..(2 << 40) + 0x1050,
            pending: (2 << 40) + 0x2000..(2 << 40) + 0x2008,
        }
    );
    for at in 0..=255 {
        space.write(at, &[0xFF]);
    }
    assert_eq!(space.word(4), MEMORY_MASTER_INTX);
    assert_eq!(space.dword(0x44), 0x1002, "where the table is");
    assert_eq!(space.word(0x42), 0xC004);
    assert_eq!(space.dword(0x4C), 0x0108_0009);
    assert_eq!(signal.control(&space), 0xC004);
}

const MEMORY_MASTER_INTX: u16 = 1 << 1 | 1 << 2 | 1 << 10;

#[test]
fn an_msi_is_what_the_guest_writes_into_its_capability() {
    // Without an upper address, as some devices have it: the guest has one all the same.
    let config = device(VfioInterrupts::Msi, &[(MSI, &[0; 8])]);
    let Shape { mut space, signal } = made(&config).unwrap();
    assert_eq!(signal, Signal::Msi { at: 0x40 });
    assert_eq!((space.word(0x42), signal.control(&space)), (0x80, 0));
    space.write(0x44, &0xFEE0_1003_u32.to_le_bytes());
    space.write(0x48, &1_u32.to_le_bytes());
    space.write(0x4C, &0x4021_u16.to_le_bytes());
    space.write(0x42, &[0xFF, 0xFF]);
    assert_eq!(space.word(0x42), 0x81);
    assert_eq!(signal.control(&space), msix::ENABLE);
    let message = Message {
        address: 0x1_FEE0_1000,
        data: 0x4021,
    };
    assert_eq!(signal.message(&space), Some(message));
}

#[test]
fn what_a_device_says_of_itself_is_not_believed() {
    let msix = |body: [u8; 10]| device(VfioInterrupts::MsiX, &[(msix::CAPABILITY, &body)]);
    for (place, what) in [(0, 6), (0, 7), (0, 3), (0, 1), (1, 0x40), (4, 7), (5, 0x40)] {
        let mut body = MSIX;
        body[2 + place] = what;
        assert_eq!(refused(&msix(body)), "MSI-X lies in no BAR", "{body:?}");
    }
    assert_eq!(
        refused(&device(VfioInterrupts::MsiX, &[])),
        "it has no MSI-X, which VFIO says it has"
    );
    let mut bridge = device(VfioInterrupts::Msi, &[]);
    bridge.space[HEADER_TYPE] = 0x81;
    assert_eq!(refused(&bridge), "it is a bridge's");
    for size in [1, 8, 0x3000, u64::MAX] {
        let mut config = device(VfioInterrupts::Msi, &[]);
        config.bars[0].size = size;
        assert_eq!(refused(&config), "a BAR's size is no power of two");
    }
}

#[test]
fn a_chain_that_goes_round_or_out_ends() {
    let mut config = device(
        VfioInterrupts::Msi,
        &[(VENDOR_SPECIFIC, &VENDORS), (VENDOR_SPECIFIC, &VENDORS)],
    );
    config.space[0x49] = 0x40;
    let two = [
        (MSI, 0x40),
        (VENDOR_SPECIFIC, 0x50),
        (VENDOR_SPECIFIC, 0x58),
    ];
    assert_eq!(chain(&made(&config).unwrap().space), two);
    // One that is said to reach beyond the end, or to be shorter than its own beginning, is not there.
    for length in [0xFF, 0, 2] {
        config.space[0x42] = length;
        let left = [(MSI, 0x40), (VENDOR_SPECIFIC, 0x50)];
        assert_eq!(chain(&made(&config).unwrap().space), left, "{length}");
    }
    // As many as fit.
    let mut full = device(VfioInterrupts::Msi, &[]);
    for at in (0x40..0x100).step_by(4) {
        full.space[at..at + 4].copy_from_slice(&[
            VENDOR_SPECIFIC,
            u8::try_from(at).unwrap().wrapping_add(4),
            200,
            0,
        ]);
    }
    full.space[CAPABILITIES] = 0x40;
    full.space[0x42] = 120;
    assert_eq!(chain(&made(&full).unwrap().space).len(), 2);
}

proptest::proptest! {
    #[test]
    fn no_bytes_are_too_much(
        space in proptest::collection::vec(proptest::prelude::any::<u8>(), 256),
        sizes in proptest::collection::vec(0_u32..64, 6),
        msix in proptest::prelude::any::<bool>(),
    ) {
        let mut config = device(if msix { VfioInterrupts::MsiX } else { VfioInterrupts::Msi }, &[]);
        config.space = space;
        for (bar, shift) in config.bars.iter_mut().zip(sizes) {
            bar.size = 1 << shift;
        }
        if let Ok(Shape { mut space, signal }) = shape(&config, |_| Ok(0xC010_0000)) {
            for at in 0..=255 {
                space.write(at, &[0xFF]);
            }
            signal.control(&space);
            signal.message(&space);
            proptest::prop_assert!(chain(&space).len() < 64);
        }
    }
}
