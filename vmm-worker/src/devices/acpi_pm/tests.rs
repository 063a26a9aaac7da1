//! The power button, shutdown and reset as a guest and an upgrade see them.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use super::*;
use crate::devices::power::Power;

const CPR: StartMode = StartMode::CprTransfer;

#[derive(Default)]
struct Line(AtomicBool);

impl IrqLine for Line {
    fn set(&self, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

struct Bench {
    pm: AcpiPm,
    line: Arc<Line>,
    power: Arc<PowerLatch>,
}

fn bench(run: bool) -> Bench {
    let power = PowerLatch::new(Arc::new(|| {}));
    Power::new(Arc::clone(&power))
        .resume(StartMode::None)
        .unwrap();
    let line = Arc::new(Line::default());
    let mut pm = AcpiPm::new(Arc::clone(&power), line.clone());
    pm.setup(StartMode::None).unwrap();
    if run {
        pm.resume(StartMode::None).unwrap();
    }
    Bench { pm, line, power }
}

impl Bench {
    fn read(&mut self, offset: u16) -> u16 {
        let mut data = [0xFF; 2];
        self.pm.read(offset.into(), &mut data);
        u16::from_le_bytes(data)
    }
    fn write(&mut self, offset: u16, value: u16) {
        self.pm.write(offset.into(), &value.to_le_bytes());
    }
    fn sci(&self) -> bool {
        self.line.0.load(Ordering::SeqCst)
    }
}

#[test]
fn the_power_button_raises_the_sci_until_cleared() {
    let mut bench = bench(true);
    bench.pm.press_power_button();
    assert!(!bench.sci() && !bench.pm.power_button_enabled());
    bench.write(PM1_ENABLE, POWER_BUTTON);
    assert!(bench.sci() && bench.pm.power_button_enabled());
    assert_eq!(bench.read(PM1_STATUS), POWER_BUTTON);
    bench.write(PM1_STATUS, !POWER_BUTTON);
    assert!(bench.sci(), "writing 0 clears nothing");
    bench.write(PM1_STATUS, POWER_BUTTON);
    assert!(!bench.sci());
    assert_eq!(bench.read(PM1_STATUS), 0);
}

#[test]
fn s5_shuts_down_and_other_states_do_not() {
    let mut bench = bench(true);
    for sleep_type in [0, 1, 3, 7] {
        bench.write(PM1_CONTROL, sleep_type << 10 | SLEEP_ENABLE);
    }
    bench.write(PM1_CONTROL, 5 << 10);
    assert_eq!(bench.power.take(), None);
    assert_eq!(
        bench.read(PM1_CONTROL),
        5 << 10 | SCI_ENABLE,
        "as Linux reads it back"
    );
    bench.write(PM1_CONTROL, 5 << 10 | SLEEP_ENABLE);
    assert_eq!(bench.power.take(), Some(PowerEvent::Shutdown));
    assert_eq!(bench.read(PM1_CONTROL) & SLEEP_ENABLE, 0);
    // A byte at a time, the high one alone.
    bench.pm.write(u64::from(PM1_CONTROL) + 1, &[0x34]);
    assert_eq!(bench.power.take(), Some(PowerEvent::Shutdown));
}

#[test]
fn the_reset_register_takes_its_value_only() {
    let mut bench = bench(true);
    bench.pm.write(RESET.into(), &[0]);
    bench.pm.write(RESET.into(), &[6]);
    bench.pm.write(u64::from(RESET) + 1, &[RESET_VALUE]);
    assert_eq!(bench.power.take(), None);
    bench.pm.write(RESET.into(), &[RESET_VALUE]);
    assert_eq!(bench.power.take(), Some(PowerEvent::Reset));
}

#[test]
fn wide_accesses_reach_both_registers() {
    let mut bench = bench(true);
    bench.pm.write(PM1_STATUS.into(), &[0, 0, 0x20, 0x07]);
    let mut data = [0; 4];
    bench.pm.read(PM1_STATUS.into(), &mut data);
    assert_eq!(data, [0, 0, 0x20, 0x07]);
    let mut rest = [0xFF; 4];
    bench.pm.read(8, &mut rest);
    assert_eq!(rest, [0xFF; 4], "nothing is there");
}

#[test]
fn a_button_pressed_while_parked_is_not_lost() {
    let mut old = bench(true);
    old.write(PM1_ENABLE, POWER_BUTTON);
    old.pm.park(CPR).unwrap();
    old.pm.press_power_button();
    assert!(!old.sci(), "a parked device raises nothing");
    let section = old.pm.save(CPR).unwrap();

    let mut new = bench(false);
    new.pm.load(CPR, &section).unwrap();
    assert!(!new.sci(), "nor does one that is not committed");
    assert_eq!(new.pm.save(CPR).unwrap(), section);
    new.pm.resume(CPR).unwrap();
    assert!(new.sci());

    old.pm.failed(CPR);
    old.pm.resume(CPR).unwrap();
    assert!(old.sci());
}

#[test]
fn a_reset_clears_the_registers() {
    let mut bench = bench(true);
    bench.write(PM1_ENABLE, POWER_BUTTON);
    bench.pm.press_power_button();
    bench.pm.park(StartMode::None).unwrap();
    bench.pm.setup(StartMode::None).unwrap();
    bench.pm.resume(StartMode::None).unwrap();
    assert_eq!(
        (bench.read(PM1_STATUS), bench.read(PM1_ENABLE), bench.sci()),
        (0, 0, false)
    );
}

#[test]
fn every_impossible_field_is_named() {
    let good = || SavedAcpiPm {
        status: POWER_BUTTON,
        enable: ENABLE_BITS,
        control: CONTROL_BITS,
    };
    let load = |saved: SavedAcpiPm| {
        let mut pm = bench(false).pm;
        let section = state::encode(pm.id(), VERSION, &saved).unwrap();
        pm.load(CPR, &section)
    };
    load(good()).unwrap();
    let cases = [
        (
            SavedAcpiPm {
                status: 1,
                ..good()
            },
            "status",
            1,
        ),
        (
            SavedAcpiPm {
                enable: 1,
                ..good()
            },
            "enable",
            1,
        ),
        (
            SavedAcpiPm {
                control: SLEEP_ENABLE,
                ..good()
            },
            "control",
            u64::from(SLEEP_ENABLE),
        ),
        (
            SavedAcpiPm {
                control: SCI_ENABLE,
                ..good()
            },
            "control",
            1,
        ),
    ];
    for (saved, field, bad) in cases {
        match load(saved) {
            Err(DeviceError::State(StateError::Field { name, value, .. })) => {
                assert_eq!((name, value), (field, bad));
            }
            other => panic!("{field}: {other:?}"),
        }
    }
}
