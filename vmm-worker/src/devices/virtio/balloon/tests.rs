use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;
use vm_memory::FileOffset;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const PAGE: u64 = 4096;

/// A driver whose RAM is a file, and that file.
fn rig(page: u64) -> (Rig, File) {
    let file = file(RAM);
    let range = (
        GuestAddress(0),
        usize::try_from(RAM).unwrap(),
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
    );
    let ram = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    let mut rig = Rig::on(Box::new(Balloon::new(page)), Box::leak(Box::new(ram)));
    rig.bring_up();
    (rig, file)
}

/// Bytes that a file takes.
fn taken(file: &File) -> u64 {
    // Of 512 bytes, whatever the file system's are (stat(3type)).
    file.metadata().unwrap().blocks() * 512
}

fn fill(rig: &Rig, from: u64, to: u64) {
    for page in (from..to).step_by(4096) {
        rig.put(page, &[7; 4096]);
    }
}

#[test]
fn memory_that_is_reported_goes_back_to_the_host_in_every_generation() {
    let (mut rig, file) = rig(PAGE);
    let before = taken(&file);
    for _ in 0..3 {
        fill(&rig, BUFFERS, RAM);
        assert_eq!(taken(&file) - before, RAM - BUFFERS);
        rig.offer(
            2,
            &[
                (BUFFERS, 0x4_0000, WRITE),
                (BUFFERS + 0x4_0000, 0x8_0000, WRITE),
            ],
        );
        rig.serve();
        assert_eq!(taken(&file), before);
        assert_eq!(rig.get(BUFFERS, 4096), [0; 4096]);
        assert_eq!(file.metadata().unwrap().len(), RAM);
        rig = rig.hand_over(Box::new(Balloon::new(PAGE)));
    }
}

#[test]
fn only_whole_pages_that_were_named_are_freed() {
    for page in [PAGE, 4 * PAGE] {
        let (mut rig, file) = rig(page);
        fill(&rig, BUFFERS, BUFFERS + 0x1_0000);
        let before = taken(&file);
        rig.offer(2, &[(BUFFERS + 1, 0x8000, WRITE)]);
        rig.serve();
        assert_eq!(before - taken(&file), 0x8000 - page);
        assert_eq!(rig.get(BUFFERS, 2), [7, 7]);
        assert_eq!(rig.get(BUFFERS + 0x8000, 1), [7]);
    }
}

#[test]
fn pages_are_inflated_by_their_numbers_and_the_driver_counts_them() {
    let (mut rig, file) = rig(PAGE);
    fill(&rig, BUFFERS, BUFFERS + 0x1_0000);
    let before = taken(&file);
    // Two that are, one that is not RAM, one beyond any address.
    let numbers = [BUFFERS >> 12, (BUFFERS >> 12) + 3, RAM >> 12, 0xFFFF_FFFF];
    let bytes: Vec<u8> = numbers
        .iter()
        .flat_map(|number| u32::try_from(*number).unwrap().to_le_bytes())
        .collect();
    rig.put(BUFFERS + 0x1000, &bytes);
    rig.offer(0, &[(BUFFERS + 0x1000, 16, 0)]);
    rig.serve();
    assert_eq!(before - taken(&file), 2 * PAGE);
    rig.write(0x2004, 2, 4);
    let mut rig = rig.hand_over(Box::new(Balloon::new(PAGE)));
    assert_eq!((rig.read(0x2000, 4), rig.read(0x2004, 4)), (0, 2));
    rig.offer(1, &[(BUFFERS + 0x1000, 16, 0)]);
    rig.serve();
    assert_eq!(rig.used(1), 1);
}

#[test]
fn what_is_wanted_is_the_drivers_to_read_in_every_generation() {
    let woken = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&woken);
    let mut balloon = Balloon::new(PAGE);
    let link = balloon.link(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    link.want(7);
    assert_eq!(balloon.config(), [7, 0, 0, 0, 0, 0, 0, 0]);
    for (pages, wakings) in [(0, 0), (5, 1), (5, 1), (6, 1)] {
        balloon.write_config(4, &u32::to_le_bytes(pages));
        assert_eq!(woken.load(Ordering::SeqCst), wakings, "{pages}");
    }
    assert!(link.has_changed());
    assert_eq!((link.take_change(), link.has_changed()), (6, false));
    // `num_pages` is not the driver's to write.
    balloon.write_config(0, &[9, 0, 0, 0]);
    let mut new = Balloon::new(PAGE);
    new.load(&balloon.save().unwrap(), None).unwrap();
    assert_eq!(new.config(), [7, 0, 0, 0, 6, 0, 0, 0]);
    new.reset();
    assert_eq!(new.config(), [7, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_state_of_other_pages_is_refused() {
    let state = Balloon::new(2 << 20).save().unwrap();
    assert!(matches!(
        Balloon::new(PAGE).load(&state, None),
        Err(StateError::Field { name: "page", .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, nothing panics, no page that was not named changes, and a driver that behaves is served.
    #[test]
    fn hostile_drivers_harm_nobody_but_themselves(
        actions in prop::collection::vec(
            prop_oneof![
                2 => hostility(3).prop_map(Ok),
                2 => (0..4_u64, BUFFERS + 0x1_0000..2 * RAM, any::<u32>(), any::<bool>()).prop_map(Err),
            ],
            1..60,
        )
    ) {
        let (mut rig, file) = rig(PAGE);
        rig.put(BUFFERS, &[3; 0x1000]);
        for action in actions {
            match action {
                Ok(hostility) => rig.suffer(hostility),
                Err((3, ..)) => rig = rig.hand_over(Box::new(Balloon::new(PAGE))),
                Err((queue, at, length, write)) => {
                    let flags = if write { WRITE } else { 0 };
                    rig.offer(queue, &[(at, length % 0x10_0000, flags)]);
                }
            }
            rig.serve();
        }
        prop_assert_eq!(file.metadata().unwrap().len(), RAM);
        rig.bring_up();
        fill(&rig, BUFFERS + 0x1_0000, BUFFERS + 0x1_1000);
        rig.offer(2, &[(BUFFERS + 0x1_0000, 0x1000, WRITE)]);
        rig.serve();
        prop_assert_eq!(rig.status() & NEEDS_RESET, 0);
        prop_assert_eq!(rig.get(BUFFERS + 0x1_0000, 1), [0]);
    }
}
