//! The order of calls, as a device that records them saw it: on success, on failure at every call, on cancel.

use super::*;
use crate::devices::id::DeviceKind;

type Log = Arc<Mutex<Vec<String>>>;

/// Records every call; fails at one.
struct Recorder {
    id: DeviceId,
    log: Log,
    fails: Option<Call>,
}

impl Recorder {
    fn note(&self, call: Call, mode: StartMode) -> Result<(), DeviceError> {
        let mode = if mode.preserves_guest() {
            "cpr"
        } else {
            "none"
        };
        let text = format!("{call:?}({}, {mode})", self.id.kind.0);
        self.log.lock().unwrap().push(text);
        match self.fails {
            Some(fails) if fails == call => Err(DeviceError::Busy(1)),
            _ => Ok(()),
        }
    }
}

impl Device for Recorder {
    fn id(&self) -> DeviceId {
        self.id
    }
    fn setup(&mut self, mode: StartMode) -> Result<(), DeviceError> {
        self.note(Call::Setup, mode)
    }
    fn park(&mut self, mode: StartMode) -> Result<(), DeviceError> {
        self.note(Call::Park, mode)
    }
    fn save(&mut self, mode: StartMode) -> Result<SavedSection, DeviceError> {
        self.note(Call::Save, mode)?;
        Ok(section(self.id.kind.0))
    }
    fn load(&mut self, mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        assert_eq!(section.id, self.id);
        self.note(Call::Load, mode)
    }
    fn resume(&mut self, mode: StartMode) -> Result<(), DeviceError> {
        self.note(Call::Resume, mode)
    }
    fn failed(&mut self, mode: StartMode) {
        let _ = self.note(Call::Failed, mode);
    }
}

fn id(kind: u16) -> DeviceId {
    DeviceId::new(DeviceKind(kind), 0)
}

fn section(kind: u16) -> SavedSection {
    SavedSection {
        id: id(kind),
        version: 1,
        bytes: vec![],
    }
}

/// Devices 1, 2 and 3; `fails` is the call at which device 2 fails.
fn devices(fails: Option<Call>) -> (Devices, Log) {
    let (mut devices, log) = (Devices::new(), Log::default());
    for kind in 1..=3 {
        devices
            .add(Arc::new(Mutex::new(Recorder {
                id: id(kind),
                log: Arc::clone(&log),
                fails: fails.filter(|_| kind == 2),
            })))
            .unwrap();
    }
    (devices, log)
}

fn running(fails: Option<Call>) -> (Devices, Log) {
    let (mut devices, log) = devices(fails);
    devices.setup(StartMode::None).unwrap();
    devices.resume(StartMode::None).unwrap();
    log.lock().unwrap().clear();
    (devices, log)
}

/// What was recorded since the last time.
fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.lock().unwrap())
}

/// `call` of these devices in this order.
fn calls(call: Call, kinds: &[u16], mode: &str) -> Vec<String> {
    kinds
        .iter()
        .map(|kind| format!("{call:?}({kind}, {mode})"))
        .collect()
}

const CPR: StartMode = StartMode::CprTransfer;

#[test]
fn a_cold_start_and_a_reset() {
    let (mut devices, log) = devices(None);
    devices.setup(StartMode::None).unwrap();
    devices.resume(StartMode::None).unwrap();
    let start = [
        calls(Call::Setup, &[1, 2, 3], "none"),
        calls(Call::Resume, &[3, 2, 1], "none"),
    ]
    .concat();
    assert_eq!(taken(&log), start);
    devices.park(StartMode::None).unwrap();
    devices.setup(StartMode::None).unwrap();
    devices.resume(StartMode::None).unwrap();
    assert_eq!(
        taken(&log),
        [calls(Call::Park, &[1, 2, 3], "none"), start].concat()
    );
}

#[test]
fn a_transfer_that_succeeds() {
    let (mut old, old_log) = running(None);
    old.park(CPR).unwrap();
    let sections = old.save(CPR).unwrap();
    assert_eq!(
        taken(&old_log),
        [
            calls(Call::Park, &[1, 2, 3], "cpr"),
            calls(Call::Save, &[1, 2, 3], "cpr")
        ]
        .concat()
    );
    assert!(
        matches!(
            old.resume(CPR),
            Err(LifecycleError::OutOfOrder {
                call: Call::Resume,
                phase: Phase::Saved,
                ..
            })
        ),
        "what was handed over does not run on"
    );

    let (mut new, new_log) = devices(None);
    new.setup(CPR).unwrap();
    new.rehearse(CPR).unwrap();
    assert!(new.resume(CPR).is_err(), "not before the load");
    taken(&new_log);
    new.load(CPR, &sections).unwrap();
    new.resume(CPR).unwrap();
    assert_eq!(
        taken(&new_log),
        [
            calls(Call::Load, &[1, 2, 3], "cpr"),
            calls(Call::Resume, &[3, 2, 1], "cpr")
        ]
        .concat()
    );
    assert_eq!(new.phase(), Phase::Running);
}

#[test]
fn a_rehearsal_saves_and_loads_each_device() {
    let (mut new, log) = devices(None);
    new.setup(CPR).unwrap();
    taken(&log);
    new.rehearse(CPR).unwrap();
    let expected: Vec<_> = (1..=3)
        .flat_map(|kind| {
            [
                calls(Call::Save, &[kind], "cpr"),
                calls(Call::Load, &[kind], "cpr"),
            ]
            .concat()
        })
        .collect();
    assert_eq!((taken(&log), new.phase()), (expected, Phase::Ready));
}

#[test]
fn a_cancel_after_park_or_save_rolls_back() {
    for save in [false, true] {
        let (mut old, log) = running(None);
        old.park(CPR).unwrap();
        if save {
            old.save(CPR).unwrap();
        }
        taken(&log);
        old.failed(CPR);
        old.resume(CPR).unwrap();
        assert_eq!(
            taken(&log),
            [
                calls(Call::Failed, &[3, 2, 1], "cpr"),
                calls(Call::Resume, &[3, 2, 1], "cpr")
            ]
            .concat()
        );
        old.park(CPR).unwrap();
        old.save(CPR).unwrap();
    }
}

#[test]
fn a_cancel_before_park_reaches_no_device() {
    let (mut old, log) = running(None);
    old.failed(CPR);
    assert_eq!((taken(&log), old.phase()), (vec![], Phase::Running));
}

#[test]
fn a_park_that_fails_half_way_is_undone_half_way() {
    let (mut old, log) = running(Some(Call::Park));
    let error = old.park(CPR).unwrap_err();
    assert!(
        matches!(error, LifecycleError::Device { id: at, call: Call::Park, .. } if at == id(2))
    );
    assert!(old.save(CPR).is_err() && old.resume(CPR).is_err());
    old.failed(CPR);
    old.resume(CPR).unwrap();
    assert_eq!(
        taken(&log),
        [
            calls(Call::Park, &[1, 2], "cpr"),
            calls(Call::Failed, &[2, 1], "cpr"),
            calls(Call::Resume, &[2, 1], "cpr")
        ]
        .concat()
    );
    assert_eq!(old.phase(), Phase::Running);
}

#[test]
fn a_save_that_fails_rolls_back() {
    let (mut old, log) = running(Some(Call::Save));
    old.park(CPR).unwrap();
    assert!(old.save(CPR).is_err());
    taken(&log);
    old.failed(CPR);
    old.resume(CPR).unwrap();
    assert_eq!(
        taken(&log),
        [
            calls(Call::Failed, &[3, 2, 1], "cpr"),
            calls(Call::Resume, &[3, 2, 1], "cpr")
        ]
        .concat()
    );
}

#[test]
fn a_new_worker_that_fails_never_runs() {
    for fails in [None, Some(Call::Load)] {
        let (mut new, log) = devices(fails);
        new.setup(CPR).unwrap();
        let loaded = new.load(CPR, &[section(1), section(2), section(3)]);
        assert_eq!(loaded.is_err(), fails.is_some());
        taken(&log);
        new.failed(CPR);
        assert_eq!(taken(&log), calls(Call::Failed, &[3, 2, 1], "cpr"));
        assert!(new.resume(CPR).is_err() && new.setup(CPR).is_err() && new.park(CPR).is_err());
        assert_eq!((taken(&log), new.phase()), (vec![], Phase::Dead));
    }
}

#[test]
fn calls_out_of_order_reach_no_device() {
    let (mut fresh, log) = devices(None);
    assert!(fresh.park(CPR).is_err() && fresh.save(CPR).is_err() && fresh.resume(CPR).is_err());
    assert!(fresh.load(CPR, &[]).is_err() && fresh.rehearse(CPR).is_err());
    assert_eq!(taken(&log), Vec::<String>::new());

    let (mut busy, log) = running(None);
    assert!(busy.setup(StartMode::None).is_err() && busy.save(CPR).is_err());
    assert!(busy.load(CPR, &[]).is_err() && busy.resume(CPR).is_err());
    assert_eq!(taken(&log), Vec::<String>::new());

    // A cold start has nothing to load.
    let (mut cold, _) = devices(None);
    cold.setup(StartMode::None).unwrap();
    assert!(cold.load(StartMode::None, &[section(1)]).is_err());
}

#[test]
fn a_name_is_taken_once() {
    let (mut devices, log) = devices(None);
    let twin = Arc::new(Mutex::new(Recorder {
        id: id(2),
        log,
        fails: None,
    }));
    assert!(matches!(devices.add(twin), Err(LifecycleError::Added(at)) if at == id(2)));
    assert_eq!(devices.ids().collect::<Vec<_>>(), [id(1), id(2), id(3)]);
}

#[test]
fn sections_must_be_the_devices() {
    type Judge = fn(&LifecycleError) -> bool;
    let cases: [(&[u16], Judge); 8] = [
        (
            &[],
            |e| matches!(e, LifecycleError::Missing(at) if *at == id(1)),
        ),
        (
            &[1, 2],
            |e| matches!(e, LifecycleError::Missing(at) if *at == id(3)),
        ),
        (
            &[1, 3],
            |e| matches!(e, LifecycleError::Missing(at) if *at == id(2)),
        ),
        (
            &[1, 2, 2, 3],
            |e| matches!(e, LifecycleError::Duplicate(at) if *at == id(2)),
        ),
        (
            &[1, 2, 3, 1],
            |e| matches!(e, LifecycleError::Duplicate(at) if *at == id(1)),
        ),
        (
            &[1, 9, 2, 3],
            |e| matches!(e, LifecycleError::Unknown(at) if *at == id(9)),
        ),
        (
            &[1, 2, 3, 9],
            |e| matches!(e, LifecycleError::Unknown(at) if *at == id(9)),
        ),
        (
            &[1, 3, 2],
            |e| matches!(e, LifecycleError::Reordered { expected, found } if (*expected, *found) == (id(2), id(3))),
        ),
    ];
    for (kinds, judge) in cases {
        let (mut new, log) = devices(None);
        new.setup(CPR).unwrap();
        taken(&log);
        let sections: Vec<_> = kinds.iter().map(|kind| section(*kind)).collect();
        let error = new.load(CPR, &sections).unwrap_err();
        assert!(judge(&error), "{kinds:?}: {error}");
        assert_eq!(taken(&log), Vec::<String>::new(), "{kinds:?}: none loaded");
    }
}

#[test]
fn a_device_joins_in_its_place_as_the_others_are_and_leaves() {
    let (mut devices, log) = devices(None);
    let device = |instance: u16, fails| {
        Arc::new(Mutex::new(Recorder {
            id: DeviceId::new(DeviceKind(9), instance),
            log: Arc::clone(&log),
            fails,
        }))
    };
    assert!(devices.join(device(4, None)).is_err(), "not before a start");
    devices.setup(StartMode::None).unwrap();
    devices.resume(StartMode::None).unwrap();
    taken(&log);
    devices.join(device(4, None)).unwrap();
    let begun = [
        calls(Call::Setup, &[9], "none"),
        calls(Call::Resume, &[9], "none"),
    ]
    .concat();
    assert_eq!(taken(&log), begun);
    devices.join(device(6, None)).unwrap();
    assert!(devices.join(device(4, None)).is_err(), "there is one");
    for call in [Call::Setup, Call::Resume] {
        assert!(devices.join(device(5, Some(call))).is_err());
    }
    devices.park(StartMode::None).unwrap();
    taken(&log);
    devices.join(device(2, None)).unwrap();
    assert_eq!(taken(&log), calls(Call::Setup, &[9], "none"));
    let instances: Vec<u16> = devices.ids().map(|id| id.instance).collect();
    assert_eq!(instances, [0, 0, 0, 2, 4, 6]);
    devices.leave(DeviceId::new(DeviceKind(9), 4)).unwrap();
    devices.resume(StartMode::None).unwrap();
    assert_eq!(taken(&log), calls(Call::Resume, &[9, 9, 3, 2, 1], "none"));
    devices.park(CPR).unwrap();
    devices.save(CPR).unwrap();
    assert!(devices.leave(DeviceId::new(DeviceKind(9), 6)).is_err());
    assert!(devices.join(device(7, None)).is_err());
}
