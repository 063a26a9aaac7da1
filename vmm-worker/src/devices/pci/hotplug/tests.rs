use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use super::*;
use crate::devices::pci::Function;

struct Nothing;

impl Function for Nothing {
    fn config_read(&mut self, _offset: u8, _data: &mut [u8]) {}
    fn config_write(&mut self, _offset: u8, _data: &[u8]) {}
    fn decode(&self, _bytes: &std::ops::Range<u64>) -> Option<u64> {
        None
    }
    fn bar_read(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[derive(Default)]
struct Line(AtomicU32);

impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.0.store(high.into(), Ordering::SeqCst);
    }
}

struct Rig {
    hotplug: Hotplug,
    segment: Arc<Mutex<Segment>>,
    sci: Arc<Line>,
    wakes: Arc<AtomicU32>,
}

const REMOVABLE: u32 = 0xF0;
const CPR: StartMode = StartMode::CprTransfer;

/// Functions in slots 1, 4 and 5; devices come to and go from 4 to 7.
fn rig() -> Rig {
    let segment = Arc::new(Mutex::new(Segment::new(0)));
    for slot in [1, 4, 5] {
        let plugged = segment
            .lock()
            .unwrap()
            .plug(slot, Arc::new(Mutex::new(Nothing)));
        assert!(plugged);
    }
    let (sci, wakes) = (Arc::new(Line::default()), Arc::new(AtomicU32::new(0)));
    let count = Arc::clone(&wakes);
    let wake = Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let mut hotplug = Hotplug::new(Arc::clone(&segment), REMOVABLE, sci.clone(), wake);
    hotplug.setup(StartMode::None).unwrap();
    hotplug.resume(StartMode::None).unwrap();
    hotplug.write(GPE0_ENABLE, &[0xFF]);
    Rig {
        hotplug,
        segment,
        sci,
        wakes,
    }
}

impl Rig {
    fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0xFF; 4];
        self.hotplug.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn high(&self) -> bool {
        self.sci.0.load(Ordering::SeqCst) == 1
    }

    fn acknowledge(&mut self) {
        self.hotplug.write(GPE0_STATUS, &[EVENT]);
    }

    fn eject(&mut self, slots: u32) {
        self.hotplug.write(EJECT, &slots.to_le_bytes());
    }

    fn there(&self, slot: u8) -> bool {
        let mut segment = self.segment.lock().unwrap();
        let free = segment.plug(slot, Arc::new(Mutex::new(Nothing)));
        if free {
            segment.unplug(slot);
        }
        !free
    }

    fn handed_over(&mut self) -> Self {
        self.hotplug.park(CPR).unwrap();
        let section = self.hotplug.save(CPR).unwrap();
        let mut new = rig();
        new.hotplug.setup(CPR).unwrap();
        new.hotplug.load(CPR, &section).unwrap();
        new.hotplug.resume(CPR).unwrap();
        new
    }
}

#[test]
fn a_guest_is_told_once_of_what_comes_and_until_it_goes_of_what_is_to_go() {
    let mut rig = rig();
    rig.hotplug.announce(4);
    assert!(rig.high());
    assert_eq!((rig.read(ADDED), rig.read(ADDED)), (1 << 4, 0));
    rig.acknowledge();
    assert!(!rig.high());
    rig.hotplug.ask_back(4);
    assert!(rig.high());
    assert_eq!((rig.read(LEAVING), rig.read(LEAVING)), (1 << 4, 1 << 4));
    rig.eject(1 << 4);
    assert_eq!(rig.read(LEAVING), 0);
    assert!(!rig.there(4) && rig.there(5));
    assert_eq!(rig.wakes.load(Ordering::SeqCst), 1);
    assert!(rig.hotplug.is_gone(4));
    assert_eq!(rig.hotplug.take_gone(), [4]);
    assert!(rig.hotplug.take_gone().is_empty());
    rig.hotplug.ended(4);
    assert!(!rig.hotplug.is_gone(4));
}

#[test]
fn what_stays_cannot_be_ejected_and_what_is_not_there_does_not_go() {
    let mut rig = rig();
    assert_eq!(rig.read(super::REMOVABLE), REMOVABLE);
    rig.eject(!(1 << 5));
    assert!(rig.there(1) && rig.there(5));
    assert_eq!(rig.hotplug.take_gone(), [4]);
    rig.hotplug.announce(1);
    rig.hotplug.ask_back(1);
    assert_eq!((rig.read(ADDED), rig.read(LEAVING)), (0, 0));
    // Neither another size nor another register.
    rig.hotplug.write(EJECT, &[0xFF]);
    rig.hotplug.write(ADDED, &[0xFF; 4]);
    rig.hotplug.write(0x11, &[0xFF; 4]);
    assert!(rig.there(5));
}

#[test]
fn a_successor_goes_on_asking_and_says_again_what_is_gone() {
    let mut rig = rig();
    rig.hotplug.announce(5);
    rig.hotplug.ask_back(5);
    rig.eject(1 << 4);
    assert_eq!(rig.hotplug.take_gone(), [4]);
    let mut new = rig.handed_over();
    assert!(new.high() && !new.there(4) && new.there(5));
    assert_eq!(new.hotplug.take_gone(), [4]);
    assert_eq!((new.read(ADDED), new.read(LEAVING)), (1 << 5, 1 << 5));
    // Also the old one, should it go on.
    rig.hotplug.resume(CPR).unwrap();
    assert_eq!(rig.hotplug.take_gone(), [4]);
}

#[test]
fn a_reset_takes_what_was_to_go() {
    let mut rig = rig();
    rig.hotplug.ask_back(5);
    rig.hotplug.park(StartMode::None).unwrap();
    rig.hotplug.setup(StartMode::None).unwrap();
    rig.hotplug.resume(StartMode::None).unwrap();
    assert!(!rig.there(5) && rig.there(4) && !rig.high());
    assert_eq!(rig.hotplug.take_gone(), [5]);
}

#[test]
fn a_state_that_no_registers_have_is_refused() {
    let saved = |change: fn(&mut SavedHotplug)| {
        let mut saved = SavedHotplug {
            added: 0x10,
            leaving: 0x20,
            gone: 0x10,
            status: EVENT,
            enable: EVENT,
        };
        change(&mut saved);
        let id = rig().hotplug.id();
        rig()
            .hotplug
            .load(CPR, &state::encode(id, VERSION, &saved).unwrap())
    };
    saved(|_| {}).unwrap();
    for (change, field) in [
        (
            (|saved| saved.added = 1 << 8) as fn(&mut SavedHotplug),
            "added",
        ),
        (|saved| saved.leaving = 1 << 1, "leaving"),
        (|saved| saved.gone = 1 << 1, "gone"),
        (|saved| saved.gone = 1 << 6, "gone"),
        (|saved| saved.status = 1, "status"),
        (|saved| saved.enable = 4, "enable"),
    ] {
        match saved(change) {
            Err(DeviceError::State(error)) => {
                assert!(error.to_string().contains(field), "{field}: {error}");
            }
            other => panic!("{field}: {other:?}"),
        }
    }
}
