//! All platform devices together, under random accesses: none panics, and a copy made by save and load goes on like the
//! original.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use baton_ipc::StartMode;
use proptest::prelude::*;

use super::acpi_pm::AcpiPm;
use super::bus::Bus;
use super::bus::SharedDevice;
use super::i8042::I8042;
use super::lifecycle::Device;
use super::lifecycle::Devices;
use super::pci::Function;
use super::pci::hotplug;
use super::pci::hotplug::Hotplug;
use super::pci::segment::Segment;
use super::pci::segment::SegmentDevice;
use super::pci::segment::Window;
use super::pci::segment::WindowDevice;
use super::power::Power;
use super::power::PowerLatch;
use super::pvpanic::PvPanic;
use super::rtc::Rtc;
use super::serial::SerialPort;
use super::signal::IrqLine;
use super::state::SavedSection;
use crate::boot::layout;

const CPR: StartMode = StartMode::CprTransfer;
/// Devices of the platform, each with a section.
const DEVICES: usize = 8;

/// What the devices signalled, in order.
type Signals = Arc<Mutex<Vec<&'static str>>>;

struct Sci(Signals);

impl IrqLine for Sci {
    fn set(&self, high: bool) {
        self.0
            .lock()
            .unwrap()
            .push(if high { "SCI high" } else { "SCI low" });
    }
}

/// A function without a state.
struct Blank;

impl Function for Blank {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        data.fill(offset);
    }
    fn config_write(&mut self, _offset: u8, _data: &[u8]) {}
    fn decode(&self, _bytes: &std::ops::Range<u64>) -> Option<u64> {
        None
    }
    fn bar_read(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// Slots that have one.
const FUNCTIONS: std::ops::Range<u8> = 1..6;
/// Slots whose devices come and go: one of them has none.
const REMOVABLE: u32 = 0b0111_1100;

/// The platform of a VM, without the VM.
struct Platform {
    ports: Bus,
    devices: Devices,
    serial: Arc<Mutex<SerialPort>>,
    pm: Arc<Mutex<AcpiPm>>,
    power: Arc<PowerLatch>,
    panic: Arc<Mutex<PvPanic>>,
    segment: Arc<Mutex<Segment>>,
    hotplug: Arc<Mutex<Hotplug>>,
    signals: Signals,
}

fn platform(mode: StartMode) -> Platform {
    let signals = Signals::default();
    let signal = |what: &'static str| {
        let signals = Arc::clone(&signals);
        Arc::new(move || signals.lock().unwrap().push(what))
    };
    let power = PowerLatch::new(signal("power"));
    let serial = Arc::new(Mutex::new(SerialPort::new(
        0,
        signal("COM1"),
        signal("console"),
    )));
    let pm = Arc::new(Mutex::new(AcpiPm::new(
        Arc::clone(&power),
        Arc::new(Sci(Arc::clone(&signals))),
    )));
    let i8042 = Arc::new(Mutex::new(I8042::new(Arc::clone(&power))));
    let rtc = Arc::new(Mutex::new(Rtc::with_clock(|| {
        Duration::from_secs(1_700_000_000)
    })));
    let power_device = Arc::new(Mutex::new(Power::new(Arc::clone(&power))));

    let mut devices = Devices::new();
    let panic = Arc::new(Mutex::new(PvPanic::new(signal("panic"))));
    let segment = Arc::new(Mutex::new(Segment::new(layout::PCI_WINDOW_32)));
    for slot in FUNCTIONS {
        assert!(
            segment
                .lock()
                .unwrap()
                .plug(slot, Arc::new(Mutex::new(Blank)))
        );
    }
    let configuration = Arc::new(Mutex::new(WindowDevice {
        window: Window::Ports,
        segment: Arc::clone(&segment),
    }));
    let hotplug = Arc::new(Mutex::new(Hotplug::new(
        Arc::clone(&segment),
        REMOVABLE,
        Arc::new(Sci(Arc::clone(&signals))),
        signal("hot-plug"),
    )));
    let set: [Arc<Mutex<dyn Device>>; DEVICES] = [
        power_device,
        serial.clone(),
        i8042.clone(),
        pm.clone(),
        rtc.clone(),
        panic.clone(),
        Arc::new(Mutex::new(SegmentDevice(Arc::clone(&segment)))),
        hotplug.clone(),
    ];
    set.into_iter()
        .for_each(|device| devices.add(device).unwrap());
    let mut ports = Bus::new();
    let ranges: [(u16, u16, SharedDevice); 7] = [
        (layout::COM1_PORT, layout::COM1_PORTS, serial.clone()),
        (layout::I8042_PORT, layout::I8042_PORTS, i8042),
        (layout::ACPI_PM_PORT, layout::ACPI_PM_PORTS, pm.clone()),
        (layout::RTC_PORT, layout::RTC_PORTS, rtc),
        (layout::PVPANIC_PORT, layout::PVPANIC_PORTS, panic.clone()),
        (
            layout::PCI_CONFIG_PORT,
            layout::PCI_CONFIG_PORTS,
            configuration,
        ),
        (
            layout::PCI_HOTPLUG_PORT,
            layout::PCI_HOTPLUG_PORTS,
            hotplug.clone(),
        ),
    ];
    for (start, size, device) in ranges {
        ports.insert(start.into(), size.into(), device).unwrap();
    }
    devices.setup(mode).unwrap();
    Platform {
        ports,
        devices,
        serial,
        pm,
        power,
        panic,
        segment,
        hotplug,
        signals,
    }
}

/// Something that happens to the platform.
#[derive(Clone, Debug)]
enum Event {
    Read(u16, usize),
    Write(u16, Vec<u8>),
    Input(Vec<u8>),
    Drain(usize),
    PowerButton,
    TakePower,
    TakePanic,
    /// A device has come to this slot.
    Announce(u8),
    AskBack(u8),
    TakeGone,
    /// The device that the guest let go is ended, and another comes to its slot.
    Ended(u8),
}

impl Platform {
    /// Lets `event` happen and says all that can be seen of it.
    fn happen(
        &self,
        event: &Event,
    ) -> (Vec<u8>, Option<super::power::PowerEvent>, Vec<&'static str>) {
        let (mut seen, mut power) = (Vec::new(), None);
        let hotplug = || self.hotplug.lock().unwrap();
        match event {
            Event::Read(port, len) => {
                seen.resize(*len, 0);
                self.ports.read((*port).into(), &mut seen);
            }
            Event::Write(port, data) => seen.push(self.ports.write((*port).into(), data).into()),
            Event::Input(bytes) => seen.push(self.serial.lock().unwrap().feed(bytes) as u8),
            Event::Drain(at_most) => {
                let mut left = *at_most;
                let drained = self.serial.lock().unwrap().drain(|chunk| {
                    let n = left.min(chunk.len());
                    left -= n;
                    seen.extend_from_slice(&chunk[..n]);
                    Ok(n)
                });
                assert_eq!(drained.unwrap(), seen.len());
            }
            Event::PowerButton => self.pm.lock().unwrap().press_power_button(),
            Event::TakePower => power = self.power.take(),
            Event::TakePanic => {
                let taken = self.panic.lock().unwrap().take();
                seen.extend(format!("{taken:?}").bytes());
            }
            Event::Announce(slot) => hotplug().announce(*slot),
            Event::AskBack(slot) => hotplug().ask_back(*slot),
            Event::TakeGone => seen = hotplug().take_gone(),
            Event::Ended(slot) => {
                if hotplug().is_gone(*slot) {
                    hotplug().ended(*slot);
                    let another = Arc::new(Mutex::new(Blank));
                    assert!(self.segment.lock().unwrap().plug(*slot, another));
                }
            }
        }
        (
            seen,
            power,
            std::mem::take(&mut *self.signals.lock().unwrap()),
        )
    }

    fn handed_over(&mut self) -> Vec<SavedSection> {
        self.devices.park(CPR).unwrap();
        self.devices.save(CPR).unwrap()
    }
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        8 => layout::COM1_PORT..layout::COM1_PORT + layout::COM1_PORTS,
        2 => layout::I8042_PORT..layout::I8042_PORT + layout::I8042_PORTS,
        4 => layout::ACPI_PM_PORT..layout::ACPI_PM_PORT + layout::ACPI_PM_PORTS,
        4 => layout::RTC_PORT..layout::RTC_PORT + layout::RTC_PORTS,
        2 => layout::PVPANIC_PORT..layout::PVPANIC_PORT + layout::PVPANIC_PORTS,
        1 => any::<u16>(),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let byte = || {
        prop_oneof![
            any::<u8>(),
            Just(0),
            Just(1),
            Just(0x34),
            Just(0xD1),
            Just(0xFE)
        ]
    };
    // Registers of four bytes, of which most writes do nothing at all unless they are aimed.
    let slots = prop_oneof![any::<u32>(), (0..8_u8).prop_map(|slot| 1_u32 << slot)];
    let eject = slots.prop_map(|slots| {
        let port = layout::PCI_HOTPLUG_PORT + u16::try_from(hotplug::EJECT).unwrap();
        Event::Write(port, slots.to_le_bytes().to_vec())
    });
    let hotplug = || {
        let first = layout::PCI_HOTPLUG_PORT;
        let registers = (0..4_u16).prop_map(move |register| (first + 4 * register, 4));
        let gpe = (0..2_u16).prop_map(move |byte| (first + hotplug::GPE0 + byte, 1));
        prop_oneof![registers, gpe]
    };
    let address = (any::<bool>(), 0..8_u32, 0..64_u32).prop_map(|(enabled, slot, register)| {
        let address = u32::from(enabled) << 31 | slot << 11 | register << 2;
        Event::Write(layout::PCI_CONFIG_PORT, address.to_le_bytes().to_vec())
    });
    let data = || {
        let at = 4..layout::PCI_CONFIG_PORTS;
        (at, 1_usize..5).prop_map(|(at, length)| (layout::PCI_CONFIG_PORT + at, length))
    };
    prop_oneof![
        2 => eject,
        2 => hotplug().prop_map(|(port, length)| Event::Read(port, length)),
        2 => (hotplug(), byte()).prop_map(|((port, length), byte)| Event::Write(port, vec![byte; length])),
        2 => address,
        2 => data().prop_map(|(port, length)| Event::Read(port, length)),
        2 => (data(), byte()).prop_map(|((port, length), byte)| Event::Write(port, vec![byte; length])),
        1 => Just(Event::TakePanic),
        1 => (0..8_u8).prop_map(Event::Announce),
        1 => (0..8_u8).prop_map(Event::AskBack),
        1 => Just(Event::TakeGone),
        1 => (0..8_u8).prop_map(Event::Ended),
        4 => (port(), 0_usize..9).prop_map(|(port, len)| Event::Read(port, len)),
        6 => (port(), prop::collection::vec(byte(), 1..3)).prop_map(|(port, data)| Event::Write(port, data)),
        1 => (port(), prop::collection::vec(byte(), 0..9)).prop_map(|(port, data)| Event::Write(port, data)),
        1 => prop::collection::vec(any::<u8>(), 0..80).prop_map(Event::Input),
        1 => (0_usize..40).prop_map(Event::Drain),
        1 => Just(Event::PowerButton),
        1 => Just(Event::TakePower),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The new worker's platform cannot be told from one that was never handed over: same state, and the same answers
    /// and signals from then on. (At the moment of resuming it may signal more.)
    #[test]
    fn a_copy_goes_on_like_the_original(
        before in prop::collection::vec(event(), 0..120),
        after in prop::collection::vec(event(), 0..60),
    ) {
        let mut old = platform(StartMode::None);
        old.devices.resume(StartMode::None).unwrap();
        for event in &before {
            old.happen(event);
        }
        let sections = old.handed_over();
        let mut new = platform(CPR);
        new.devices.rehearse(CPR).unwrap();
        new.devices.load(CPR, &sections).unwrap();
        prop_assert_eq!(&*new.signals.lock().unwrap(), &Vec::<&str>::new(), "silent until the commit");
        new.devices.resume(CPR).unwrap();
        old.devices.failed(CPR);
        old.devices.resume(CPR).unwrap();
        old.signals.lock().unwrap().clear();
        new.signals.lock().unwrap().clear();

        for event in &after {
            prop_assert_eq!(old.happen(event), new.happen(event), "{:?}", event);
        }
        let (old, new) = (old.handed_over(), new.handed_over());
        prop_assert_eq!(old, new);
    }

    /// Damaged sections are loaded or refused; what is loaded can be run and saved.
    #[test]
    fn damaged_sections(
        before in prop::collection::vec(event(), 0..40),
        victim in 0_usize..DEVICES,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        after in prop::collection::vec(event(), 0..40),
    ) {
        let mut old = platform(StartMode::None);
        old.devices.resume(StartMode::None).unwrap();
        for event in &before {
            old.happen(event);
        }
        let mut sections = old.handed_over();
        let bytes = &mut sections[victim].bytes;
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut new = platform(CPR);
        if new.devices.load(CPR, &sections).is_ok() {
            new.devices.resume(CPR).unwrap();
            for event in &after {
                new.happen(event);
            }
            new.handed_over();
        } else {
            new.devices.failed(CPR);
            prop_assert!(new.devices.resume(CPR).is_err());
        }
    }
}
