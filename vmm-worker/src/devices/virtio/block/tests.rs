use std::fs::File;
use std::os::unix::fs::FileExt as _;

use baton_ipc::StartMode;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::RateLimit;
use proptest::prelude::*;

use super::*;
use crate::devices::Device as _;
use crate::devices::lifecycle::DeviceError;
use crate::devices::state::SavedSection;
use crate::devices::virtio::DRIVER_OK;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const SECTORS: u64 = 256;
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;

fn config() -> BlockConfig {
    BlockConfig {
        bytes: SECTORS * SECTOR,
        device: false,
        readonly: false,
        direct: false,
        block_size: 512,
        queues: 2,
        serial: "serial-1".to_owned(),
        limits: DeviceLimits::default(),
    }
}

fn disk(config: &BlockConfig) -> (Box<Block>, File) {
    let file = file(config.bytes);
    let copy = file.try_clone().unwrap();
    (Box::new(Block::new(file.into(), config)), copy)
}

fn rig(config: &BlockConfig) -> (Rig, File) {
    let (device, file) = disk(config);
    let mut rig = Rig::new(device);
    rig.bring_up();
    (rig, file)
}

/// Makes a request with `data` on queue 0, serves it, and returns its status and the length that the device said.
fn request(rig: &mut Rig, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    rig.put(HEADER, &header);
    rig.put(STATUS, &[0xEE]);
    let mut parts = vec![(HEADER, 16, 0)];
    parts.extend(data);
    parts.push((STATUS, 1, WRITE));
    let before = rig.used(0);
    let head = rig.offer(0, &parts);
    rig.serve();
    assert_eq!(
        rig.used(0),
        before.wrapping_add(1),
        "{rig}",
        rig = rig.status()
    );
    let (used, length) = rig.last_used(0);
    assert_eq!(used, u32::from(head));
    (rig.get(STATUS, 1)[0], length)
}

#[test]
fn reads_writes_and_flushes_reach_the_file() {
    let (mut rig, file) = rig(&config());
    let bytes: Vec<u8> = (0..1024_u32).map(|i| (i % 251) as u8).collect();
    rig.put(DATA, &bytes);
    // Framed as no driver of today does.
    let out = [(DATA, 3, 0), (DATA + 3, 0, 0), (DATA + 3, 1021, 0)];
    assert_eq!(request(&mut rig, 1, 7, &out), (0, 1));
    let mut found = vec![0; 1024];
    file.read_exact_at(&mut found, 7 * 512).unwrap();
    assert_eq!(found, bytes);
    assert_eq!(request(&mut rig, 4, 0, &[]), (0, 1));
    let into = [(DATA + 0x2000, 1000, WRITE), (DATA + 0x3000, 24, WRITE)];
    assert_eq!(request(&mut rig, 0, 7, &into), (0, 1025));
    assert_eq!(rig.get(DATA + 0x2000, 1000), bytes[..1000]);
    assert_eq!(rig.get(DATA + 0x3000, 24), bytes[1000..]);
    // One interrupt each, on the queue's vector.
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x41; 3]);
    let id = [(DATA, 20, WRITE)];
    assert_eq!(request(&mut rig, 8, 0, &id), (0, 21));
    assert_eq!(rig.get(DATA, 20), b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn direct_io_takes_buffers_as_they_come() {
    let mut config = config();
    config.direct = true;
    let (mut rig, file) = rig(&config);
    let bytes: Vec<u8> = (0..8192_u32).map(|i| (i % 249) as u8).collect();
    // On a page's boundary, and across two of them.
    for start in [DATA, DATA + 0x201] {
        rig.put(start, &bytes);
        assert_eq!(request(&mut rig, 1, 1, &[(start, 8192, 0)]), (0, 1));
        let mut found = vec![0; 8192];
        file.read_exact_at(&mut found, 512).unwrap();
        assert_eq!(found, bytes);
        let back = start + 0x8000;
        assert_eq!(request(&mut rig, 0, 1, &[(back, 8192, WRITE)]), (0, 8193));
        assert_eq!(rig.get(back, 8192), bytes);
        file.write_all_at(&[0; 8192], 512).unwrap();
    }
}

#[test]
fn an_indirect_table_and_the_second_queue_work_as_well() {
    let (mut rig, file) = rig(&config());
    file.write_all_at(&[9; 512], 0).unwrap();
    let table = DATA + 0x4000;
    rig.put(HEADER, &[0; 16]);
    for (index, part) in (0..).zip([
        (HEADER, 16, NEXT),
        (DATA, 512, NEXT | WRITE),
        (STATUS, 1, WRITE),
    ]) {
        rig.descriptor(table + 16 * u64::from(index), part, index + 1);
    }
    rig.offer(1, &[(table, 48, INDIRECT)]);
    rig.serve();
    assert_eq!((rig.used(0), rig.used(1)), (0, 1));
    assert_eq!(rig.get(DATA, 512), [9; 512]);
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x42]);
}

#[test]
fn discards_and_zeroes_are_checked_whole_before_anything_is_done() {
    let (mut rig, file) = rig(&config());
    let fill = |file: &File| file.write_all_at(&[7; 4096], 0).unwrap();
    let segment = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let read = |file: &File| {
        let mut bytes = vec![0; 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    for (kind, flags) in [(11, 0), (13, 0), (13, 1)] {
        fill(&file);
        rig.put(DATA, &segment(2, 4, flags));
        assert_eq!(request(&mut rig, kind, 0, &[(DATA, 16, 0)]), (0, 1));
        let bytes = read(&file);
        assert_eq!((bytes[1023], bytes[3072]), (7, 7), "{kind} {flags}");
        assert!(bytes[1024..3072].iter().all(|byte| *byte == 0));
        assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
    }
    fill(&file);
    let good = segment(0, 1, 0);
    for (kind, second, status) in [
        (11, segment(SECTORS, 1, 0), 1),
        (11, segment(u64::MAX, 2, 0), 1),
        (13, segment(0, u32::MAX, 0), 1),
        (11, segment(0, 1, 1), 2),
        (13, segment(0, 1, 2), 2),
    ] {
        rig.put(DATA, &[good.clone(), second].concat());
        assert_eq!(request(&mut rig, kind, 0, &[(DATA, 32, 0)]).0, status);
        assert_eq!(read(&file), [7; 4096], "{kind}");
    }
    assert_eq!(request(&mut rig, 11, 0, &[(DATA, 15, 0)]).0, 1);
    assert_eq!(request(&mut rig, 11, 0, &[]).0, 1);
}

#[test]
fn what_is_no_place_of_the_disk_is_an_error_of_the_request() {
    let (mut rig, _) = rig(&config());
    for (kind, sector, length, status) in [
        (0, SECTORS, 512, 1),
        (0, SECTORS - 1, 1024, 1),
        (0, u64::MAX, 512, 1),
        (0, 0, 511, 1),
        (99, 0, 512, 2),
    ] {
        let data = [(DATA, length, WRITE)];
        assert_eq!(
            request(&mut rig, kind, sector, &data),
            (status, 1),
            "{sector}"
        );
    }
    assert_eq!(
        request(&mut rig, 1, SECTORS - 1, &[(DATA, 1024, 0)]),
        (1, 1)
    );
    assert_eq!(rig.status() & NEEDS_RESET, 0);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut config = config();
    config.readonly = true;
    let (mut rig, file) = rig(&config);
    rig.put(DATA, &[1; 512]);
    assert_eq!(request(&mut rig, 1, 0, &[(DATA, 512, 0)]).0, 1);
    assert_eq!(request(&mut rig, 11, 0, &[(DATA, 16, 0)]).0, 2);
    assert_eq!(request(&mut rig, 0, 0, &[(DATA, 512, WRITE)]).0, 0);
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn a_limit_leaves_requests_in_the_ring() {
    let mut config = config();
    config.limits.operations = Some(RateLimit {
        per_second: 1,
        burst: 2,
    });
    let (mut rig, _) = rig(&config);
    for _ in 0..4 {
        rig.offer(
            0,
            &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        );
    }
    rig.serve();
    rig.serve();
    assert_eq!(rig.used(0), 2);
}

const MIB: u64 = 1 << 20;

/// A disk of 128 MiB, full of sevens, with a bucket for bytes that has this much and gains nothing to speak of.
fn large(burst: u64) -> (BlockConfig, Rig, File, Arc<Disk>) {
    let mut config = config();
    config.bytes = 128 * MIB;
    config.limits.bytes = Some(RateLimit {
        per_second: 1,
        burst,
    });
    let (device, file) = disk(&config);
    let shared = Arc::clone(&device.disk);
    let mut rig = Rig::new(device);
    rig.bring_up();
    for at in 0..128 {
        file.write_all_at(&[7; 1 << 20], at * MIB).unwrap();
    }
    (config, rig, file, shared)
}

/// MiB that were paid for since there were `burst` bytes.
fn paid(disk: &Disk, burst: u64) -> u64 {
    let left = disk.limits().save().bytes_left().unwrap();
    (burst as i64 - left + (MIB / 2) as i64) as u64 / MIB
}

/// What the MiB at these places of the file are made of.
fn found(file: &File, places: &[u64]) -> Vec<u8> {
    let byte = |at: &u64| {
        let mut bytes = vec![0; 1 << 20];
        file.read_exact_at(&mut bytes, at * MIB).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "MiB {at}");
        bytes[0]
    };
    places.iter().map(byte).collect()
}

/// Offers a request of many parts, at the start of the disk: of reads and writes of 3 MiB, of the others for segments.
fn offer_large(rig: &mut Rig, kind: u32, segments: &[(u64, u32, u32)]) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 12]);
    rig.put(HEADER, &header);
    rig.put(STATUS, &[0xEE]);
    let mut parts = vec![(HEADER, 16, 0)];
    if segments.is_empty() {
        let flags = if kind == 0 { WRITE } else { 0 };
        parts.extend([(DATA, 1 << 18, flags); 12]);
    } else {
        let bytes = segments.iter().flat_map(|(offset, length, flags)| {
            let sectors = length * u32::try_from(MIB / SECTOR).unwrap();
            let place = (offset * (MIB / SECTOR)).to_le_bytes();
            [&place[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        });
        let bytes: Vec<u8> = bytes.collect();
        rig.put(DATA, &bytes);
        parts.push((DATA, u32::try_from(16 * segments.len()).unwrap(), 0));
    }
    parts.push((STATUS, 1, WRITE));
    rig.offer(0, &parts);
}

#[test]
fn zeroes_written_by_hand_are_paid_for_and_wait_for_the_limit() {
    // A memfd cannot zero a range, but it can punch holes.
    let burst = 3 * MIB;
    let (config, mut rig, file, disk) = large(burst);
    offer_large(&mut rig, 13, &[(0, 2, 0), (8, 4, 0)]);
    rig.serve();
    rig.serve();
    assert_eq!((rig.used(0), rig.get(STATUS, 1)), (0, vec![0xEE]));
    assert_eq!(found(&file, &[0, 1, 2, 8, 9]), [0, 0, 7, 0, 7]);
    assert_eq!(paid(&disk, burst), 3);
    // So does the other queue.
    rig.put(HEADER + 0x20, &[0; 16]);
    rig.offer(
        1,
        &[
            (HEADER + 0x20, 16, 0),
            (DATA, 512, WRITE),
            (STATUS, 1, WRITE),
        ],
    );
    rig.serve();
    assert_eq!(rig.used(1), 0);
    // Whoever has no limit has to do all of it.
    let unlimited = BlockConfig {
        limits: DeviceLimits::default(),
        ..config
    };
    rig = rig.hand_over(successor(&unlimited, &file));
    rig.serve();
    assert_eq!(
        (rig.used(0), rig.used(1), rig.get(STATUS, 1)),
        (1, 1, vec![0])
    );
    assert_eq!(found(&file, &[0, 1, 2, 8, 11, 12]), [0, 0, 7, 0, 0, 7]);

    // What is only let go costs no bytes.
    let (_, mut rig, file, disk) = large(burst);
    offer_large(&mut rig, 13, &[(0, 64, 1)]);
    rig.serve();
    assert_eq!((rig.used(0), paid(&disk, burst)), (1, 0));
    assert_eq!(found(&file, &[0, 63, 64]), [0, 0, 7]);
}

/// A request that is stopped between its parts goes on there in the same worker, and is done again by another one; the
/// driver is told once.
#[test]
fn a_request_that_is_stopped_in_its_middle_is_done_once_in_effect() {
    struct Case {
        what: &'static str,
        kind: u32,
        segments: &'static [(u64, u32, u32)],
        /// Places in the file, and what is there when two of three parts are done, and when all are.
        places: &'static [u64],
        halfway: &'static [u8],
        done: &'static [u8],
        /// MiB that a part costs.
        cost: u64,
    }
    let cases = [
        Case {
            what: "a read",
            kind: 0,
            segments: &[],
            places: &[0, 1, 2, 3],
            halfway: &[7; 4],
            done: &[7; 4],
            cost: 1,
        },
        Case {
            what: "a write",
            kind: 1,
            segments: &[],
            places: &[0, 1, 2, 3],
            halfway: &[5, 5, 7, 7],
            done: &[5, 5, 5, 7],
            cost: 1,
        },
        Case {
            what: "segments to discard",
            kind: 11,
            segments: &[(0, 1, 0), (2, 1, 0), (4, 1, 0)],
            places: &[0, 1, 2, 3, 4, 5],
            halfway: &[0, 7, 0, 7, 7, 7],
            done: &[0, 7, 0, 7, 0, 7],
            cost: 0,
        },
        Case {
            what: "a long segment to discard",
            kind: 11,
            segments: &[(0, 96, 0)],
            places: &[0, 63, 64, 95, 96],
            halfway: &[0, 0, 7, 7, 7],
            done: &[0, 0, 0, 0, 7],
            cost: 0,
        },
        Case {
            what: "segments to zero by hand",
            kind: 13,
            segments: &[(0, 2, 0), (3, 1, 0)],
            places: &[0, 1, 2, 3, 4],
            halfway: &[0, 0, 7, 7, 7],
            done: &[0, 0, 7, 0, 7],
            cost: 1,
        },
    ];
    let burst = 1 << 40;
    for case in cases {
        for replaced in [false, true] {
            let what = format!("{}, worker replaced: {replaced}", case.what);
            let (config, mut rig, file, disk) = large(burst);
            rig.put(DATA, &[5; 1 << 18]);
            offer_large(&mut rig, case.kind, case.segments);
            // It is looked before the request, and after each part.
            for seat in rig.transport.seats() {
                seat.stop_at_look(3);
            }
            rig.serve();
            assert_eq!((rig.used(0), rig.get(STATUS, 1)), (0, vec![0xEE]), "{what}");
            assert_eq!(found(&file, case.places), case.halfway, "{what}");
            assert_eq!(paid(&disk, burst), 2 * case.cost, "{what}");
            assert!(rig.fired.0.lock().unwrap().is_empty(), "{what}");
            let (new_disk, paid_before) = if replaced {
                let device = successor(&config, &file);
                let disk = Arc::clone(&device.disk);
                rig = rig.hand_over(device);
                rig.fired.0.lock().unwrap().clear();
                (disk, 5)
            } else {
                rig.transport.park(StartMode::CprTransfer).unwrap();
                rig.transport.resume(StartMode::CprTransfer).unwrap();
                (disk, 3)
            };
            rig.serve();
            rig.serve();
            assert_eq!((rig.used(0), rig.get(STATUS, 1)), (1, vec![0]), "{what}");
            assert_eq!(found(&file, case.places), case.done, "{what}");
            assert_eq!(paid(&new_disk, burst), paid_before * case.cost, "{what}");
            assert_eq!(*rig.fired.0.lock().unwrap(), [0x41], "{what}");
            if case.kind == 0 {
                assert_eq!(rig.get(DATA, 1 << 18), vec![7; 1 << 18], "{what}");
            }
        }
    }
}

/// How far a request was goes with the rings that it was in.
#[test]
fn a_reset_forgets_how_far_a_request_was() {
    let (_, mut rig, file, _) = large(1 << 40);
    let three = [(0, 3, 0)];
    offer_large(&mut rig, 13, &three);
    rig.transport.seats().for_each(|seat| seat.stop_at_look(3));
    rig.serve();
    assert_eq!(found(&file, &[0, 1, 2]), [0, 0, 7]);
    rig.bring_up();
    file.write_all_at(&[9; 1 << 20], 0).unwrap();
    offer_large(&mut rig, 13, &three);
    rig.serve();
    assert_eq!(rig.used(0), 1);
    assert_eq!(found(&file, &[0, 1, 2, 3]), [0, 0, 0, 7]);
}

/// What drivers must not do: each breaks the queue and nothing else, and a reset mends it.
#[test]
fn a_broken_queue_needs_a_reset_and_gets_one() {
    type Break = fn(&mut Rig);
    let breaks: [(&str, Break); 9] = [
        ("a chain in a circle", |rig| {
            rig.descriptor(RINGS, (HEADER, 16, NEXT), 1);
            rig.descriptor(RINGS + 16, (HEADER, 16, NEXT), 0);
            rig.make_available(0, 0);
        }),
        ("a chain that leads out of its table", |rig| {
            rig.descriptor(RINGS, (HEADER, 16, NEXT), SIZE);
            rig.make_available(0, 0);
        }),
        ("a head that is none", |rig| rig.make_available(0, SIZE)),
        ("a buffer behind RAM", |rig| {
            rig.offer(
                0,
                &[(HEADER, 16, 0), (RAM - 8, 16, WRITE), (STATUS, 1, WRITE)],
            );
        }),
        ("a buffer that overflows", |rig| {
            rig.offer(0, &[(HEADER, 16, 0), (u64::MAX - 1, 512, WRITE)]);
        }),
        ("an indirect table in the hole", |rig| {
            rig.offer(0, &[(0xC000_0000, 32, INDIRECT)]);
        }),
        ("an available ring that jumps", |rig| {
            rig.put(RINGS + AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
        }),
        ("no header", |rig| {
            rig.offer(0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
        }),
        ("no status", |rig| {
            rig.offer(0, &[(HEADER, 16, 0)]);
        }),
    ];
    let (mut rig, _) = rig(&config());
    for (what, broken) in breaks {
        broken(&mut rig);
        rig.serve();
        assert_eq!(rig.used(0), 0, "{what}");
        assert_ne!(rig.status() & NEEDS_RESET, 0, "{what}");
        // The change of configuration is told.
        assert_eq!(rig.fired.0.lock().unwrap().last(), Some(&0x40), "{what}");
        rig.bring_up();
        assert_eq!(
            rig.status() & (NEEDS_RESET | DRIVER_OK),
            DRIVER_OK,
            "{what}"
        );
        let read = [(DATA, 512, WRITE)];
        assert_eq!(request(&mut rig, 0, 0, &read), (0, 513), "{what}");
        rig.bring_up();
    }
}

#[test]
fn rings_do_not_move_while_the_driver_is_ready() {
    let (mut rig, _) = rig(&config());
    rig.write(0x16, 0, 2);
    for register in [0x20, 0x28, 0x30] {
        rig.write(register, 0xdead_0000, 8);
        rig.write(register + 4, 1, 4);
    }
    rig.write(0x18, 4, 2);
    rig.write(0x1C, 0, 2);
    assert_eq!(rig.read(0x20, 8), RINGS);
    assert_eq!((rig.read(0x18, 2), rig.read(0x1C, 2)), (SIZE.into(), 1));
    assert_eq!(request(&mut rig, 0, 0, &[(DATA, 512, WRITE)]), (0, 513));
}

fn successor(config: &BlockConfig, file: &File) -> Box<Block> {
    Box::new(Block::new(file.try_clone().unwrap().into(), config))
}

#[test]
fn a_successor_goes_on_where_the_rings_are_and_repeats_interrupts() {
    let config = config();
    let (mut rig, file) = rig(&config);
    for round in 0..40_u8 {
        file.write_all_at(&[round; 512], 512).unwrap();
        // Offered before, served after.
        rig.put(HEADER, &[0; 8]);
        rig.put(HEADER + 8, &1_u64.to_le_bytes());
        rig.offer(
            0,
            &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        );
        rig = rig.hand_over(successor(&config, &file));
        assert_eq!(rig.fired.0.lock().unwrap()[..], [0x41, 0x42]);
        rig.serve();
        assert_eq!(rig.used(0), u16::from(round) + 1);
        assert_eq!(rig.get(DATA, 512), [round; 512]);
    }
}

/// A section of a device in use.
fn section() -> (SavedSection, Ram) {
    let mut config = config();
    config.limits.bytes = Some(RateLimit {
        per_second: 1000,
        burst: 1000,
    });
    let (mut rig, _) = rig(&config);
    rig.transport.park(StartMode::CprTransfer).unwrap();
    (rig.transport.save(StartMode::CprTransfer).unwrap(), rig.ram)
}

use crate::devices::virtio::buffers::Ram;

#[test]
fn a_disk_of_another_size_and_bytes_that_are_none_are_refused() {
    let (section, ram) = section();
    let (mut other, mut coarse) = (config(), config());
    other.bytes *= 2;
    coarse.block_size = 4096;
    for (config, section, expected) in [
        (other, section.clone(), "sectors"),
        (coarse, section.clone(), "block_size"),
        (
            config(),
            SavedSection {
                version: 3,
                ..section.clone()
            },
            "version 3",
        ),
        (
            config(),
            SavedSection {
                version: 0,
                ..section.clone()
            },
            "version 0",
        ),
        // The layout of one version under another's number.
        (
            config(),
            SavedSection {
                version: 1,
                ..section.clone()
            },
            "2 bytes too many",
        ),
        (
            config(),
            SavedSection {
                bytes: section.bytes[..section.bytes.len() - 1].to_vec(),
                ..section.clone()
            },
            "malformed",
        ),
        (
            config(),
            SavedSection {
                bytes: [&section.bytes[..], &[0]].concat(),
                ..section.clone()
            },
            "1 bytes too many",
        ),
    ] {
        let mut rig = Rig::on(disk(&config).0, ram);
        match rig.transport.load(StartMode::CprTransfer, &section) {
            Err(DeviceError::State(error)) => {
                let error = error.to_string();
                assert!(error.contains(expected), "{expected}: {error}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn the_first_version_of_a_state_is_still_read() {
    let (mut rig, _) = rig(&config());
    let mode = StartMode::CprTransfer;
    rig.transport.park(mode).unwrap();
    let mut section = rig.transport.save(mode).unwrap();
    // What the device says is the last of all: its length, 256 sectors, no bucket, no bucket, and blocks of 512 bytes.
    let at = section.bytes.len() - 7;
    assert_eq!(section.bytes[at..], [6, 0x80, 2, 0, 0, 0x80, 4]);
    section.version = 1;
    section.bytes[at] = 4;
    section.bytes.truncate(at + 5);
    let mut new = rig.succeeded_by(disk(&config()).0);
    new.transport.load(mode, &section).unwrap();
    section.version = 2;
    assert!(new.transport.load(mode, &section).is_err());
}

#[test]
fn buckets_that_owe_more_than_any_request_costs_are_refused() {
    let limit = Some(RateLimit {
        per_second: 1,
        burst: 1,
    });
    let one = |bytes, operations| DeviceLimits { bytes, operations };
    for limits in [one(limit, None), one(None, limit)] {
        let mut config = config();
        config.limits = limits;
        let saved = SavedBlock {
            sectors: SECTORS,
            limits: SavedLimits::impossible(limits),
            block_size: 512,
        };
        let state = postcard::to_stdvec(&saved).unwrap();
        assert!(matches!(
            disk(&config).0.load(&state, None),
            Err(StateError::Field {
                name: "bucket.tokens",
                ..
            })
        ));
    }
}

#[test]
fn another_size_holds_from_the_next_request_on_and_the_driver_is_told() {
    let (mut rig, file) = rig(&config());
    let generation = |rig: &mut Rig| rig.read(0x15, 1);
    let capacity = |rig: &mut Rig| rig.read(0x2000, 8);
    rig.write(0x10, 0, 2);
    let before = generation(&mut rig);
    // Offered, and not yet served: it is judged by the size that there is then.
    rig.put(HEADER, &1_u32.to_le_bytes());
    rig.put(HEADER + 8, &(SECTORS - 1).to_le_bytes());
    rig.offer(0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    rig.transport.resize((SECTORS - 1) * SECTOR).unwrap();
    file.set_len((SECTORS - 1) * SECTOR).unwrap();
    rig.serve();
    assert_eq!(rig.get(STATUS, 1), [1]);
    assert_eq!(file.metadata().unwrap().len(), (SECTORS - 1) * SECTOR);
    assert_eq!(capacity(&mut rig), SECTORS - 1);
    assert_ne!(generation(&mut rig), before);
    assert_eq!(rig.fired.0.lock().unwrap().len(), 2);

    rig.transport.resize(2 * SECTORS * SECTOR).unwrap();
    file.set_len(2 * SECTORS * SECTOR).unwrap();
    let beyond = [(DATA, 512, 0)];
    assert_eq!(request(&mut rig, 1, 2 * SECTORS - 1, &beyond), (0, 1));
    assert_eq!(request(&mut rig, 1, 2 * SECTORS, &beyond).0, 1);
}

#[test]
fn a_parked_disk_stays_parked_when_it_gets_another_size() {
    let (mut rig, file) = rig(&config());
    rig.transport.park(StartMode::None).unwrap();
    rig.put(HEADER, &[0; 16]);
    rig.offer(
        0,
        &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
    );
    rig.transport.resize(2 * SECTORS * SECTOR).unwrap();
    file.set_len(2 * SECTORS * SECTOR).unwrap();
    rig.serve();
    assert_eq!(rig.used(0), 0);
    rig.transport.resume(StartMode::None).unwrap();
    rig.serve();
    assert_eq!(rig.used(0), 1);
    let mut grown = config();
    grown.bytes *= 2;
    rig.hand_over(successor(&grown, &file));
}

/// What a hostile guest and a hostile predecessor do.
#[derive(Clone, Debug)]
enum Action {
    Driver(Hostility),
    /// A request that may be a good one.
    Offer(u32, u64, u32),
    Serve,
    BringUp,
    HandOver,
    /// A bit of the saved state is flipped, and the result loaded.
    Forge(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        16 => hostility(1).prop_map(Action::Driver),
        6 => (0..16_u32, 0..2 * SECTORS, 0..2048_u32)
            .prop_map(|(kind, sector, length)| Action::Offer(kind, sector, length)),
        6 => Just(Action::Serve),
        2 => Just(Action::BringUp),
        1 => Just(Action::HandOver),
        1 => any::<usize>().prop_map(Action::Forge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, nothing panics, the file keeps its size, and a driver that behaves gets its disk back.
    #[test]
    fn hostile_drivers_harm_nobody_but_themselves(actions in prop::collection::vec(action(), 1..60)) {
        let config = config();
        let (mut rig, file) = rig(&config);
        for action in actions {
            match action {
                Action::Driver(hostility) => rig.suffer(hostility),
                Action::Offer(kind, sector, length) => {
                    rig.put(HEADER, &kind.to_le_bytes());
                    rig.put(HEADER + 8, &sector.to_le_bytes());
                    let flags = if kind == 0 { WRITE } else { 0 };
                    rig.offer(0, &[(HEADER, 16, 0), (DATA, length, flags), (STATUS, 1, WRITE)]);
                }
                Action::Serve => rig.serve(),
                Action::BringUp => rig.bring_up(),
                Action::HandOver => rig = rig.hand_over(successor(&config, &file)),
                Action::Forge(bit) => rig.forge(bit, successor(&config, &file)),
            }
        }
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
        rig.bring_up();
        rig.put(HEADER + 4, &[0; 4]);
        prop_assert_eq!(request(&mut rig, 0, 0, &[(DATA, 512, WRITE)]), (0, 513));
    }
}
