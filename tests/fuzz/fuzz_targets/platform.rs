//! The platform devices and the PCI segment, driven through their ports and windows, with what their VM does to them and what an
//! upgrade does in between: no panic and no wait, whatever comes; a copy says what the original said; a state with a bit flipped is
//! loaded or refused.
#![no_main]

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use baton_fuzz::Script;
use baton_ipc::StartMode;
use baton_worker::boot::layout;
use baton_worker::devices::Bus;
use baton_worker::devices::Device;
use baton_worker::devices::Devices;
use baton_worker::devices::IrqLine;
use baton_worker::devices::acpi_pm::AcpiPm;
use baton_worker::devices::bus::SharedDevice;
use baton_worker::devices::i8042::I8042;
use baton_worker::devices::pci::Function;
use baton_worker::devices::pci::hotplug::Hotplug;
use baton_worker::devices::pci::segment::Segment;
use baton_worker::devices::pci::segment::SegmentDevice;
use baton_worker::devices::pci::segment::Window;
use baton_worker::devices::pci::segment::WindowDevice;
use baton_worker::devices::power::Power;
use baton_worker::devices::power::PowerLatch;
use baton_worker::devices::pvpanic::PvPanic;
use baton_worker::devices::rtc::Rtc;
use baton_worker::devices::serial::SerialPort;
use baton_worker::devices::state::SavedSection;
use libfuzzer_sys::fuzz_target;

const MODE: StartMode = StartMode::CprTransfer;
/// Slots that have a function, and those whose functions come and go.
const FUNCTIONS: std::ops::Range<u8> = 1..6;
const REMOVABLE: u32 = 0b0111_1100;
/// Where each device is, and how far. The windows of memory are longer, and most of them is empty.
const PLACES: [(u64, u64); 9] = [
    (layout::COM1_PORT as u64, layout::COM1_PORTS as u64),
    (layout::I8042_PORT as u64, layout::I8042_PORTS as u64),
    (layout::ACPI_PM_PORT as u64, layout::ACPI_PM_PORTS as u64),
    (layout::RTC_PORT as u64, layout::RTC_PORTS as u64),
    (layout::PVPANIC_PORT as u64, layout::PVPANIC_PORTS as u64),
    (layout::PCI_HOTPLUG_PORT as u64, layout::PCI_HOTPLUG_PORTS as u64),
    (layout::PCI_CONFIG_PORT as u64, layout::PCI_CONFIG_PORTS as u64),
    (layout::PCI_ECAM, layout::PCI_ECAM_SIZE),
    (layout::PCI_WINDOW_32, layout::PCI_WINDOW_32_SIZE),
];

/// A function without a state, whose BAR is the first page of the window.
struct Blank;

impl Function for Blank {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        data.fill(offset);
    }
    fn config_write(&mut self, _offset: u8, _data: &[u8]) {}
    fn decode(&self, bytes: &std::ops::Range<u64>) -> Option<u64> {
        let offset = bytes.start.checked_sub(layout::PCI_WINDOW_32)?;
        (bytes.end - layout::PCI_WINDOW_32 <= 0x1000).then_some(offset)
    }
    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// Interrupts go nowhere.
struct Nowhere;

impl IrqLine for Nowhere {
    fn set(&self, _high: bool) {}
}

struct Platform {
    bus: Bus,
    devices: Devices,
    serial: Arc<Mutex<SerialPort>>,
    pm: Arc<Mutex<AcpiPm>>,
    power: Arc<PowerLatch>,
    panic: Arc<Mutex<PvPanic>>,
    segment: Arc<Mutex<Segment>>,
    hotplug: Arc<Mutex<Hotplug>>,
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

impl Platform {
    fn new(mode: StartMode) -> Self {
        let silent = || Arc::new(|| {});
        let power = PowerLatch::new(silent());
        let serial = shared(SerialPort::new(0, silent(), silent()));
        let pm = shared(AcpiPm::new(Arc::clone(&power), Arc::new(Nowhere)));
        let i8042 = shared(I8042::new(Arc::clone(&power)));
        let rtc = shared(Rtc::with_clock(|| Duration::from_secs(1_700_000_000)));
        let panic = shared(PvPanic::new(silent()));
        let segment = shared(Segment::new(layout::PCI_WINDOW_32));
        for slot in FUNCTIONS {
            assert!(segment.lock().unwrap().plug(slot, shared(Blank)));
        }
        let hotplug = shared(Hotplug::new(
            Arc::clone(&segment),
            REMOVABLE,
            Arc::new(Nowhere),
            silent(),
        ));
        let set: [Arc<Mutex<dyn Device>>; 8] = [
            shared(Power::new(Arc::clone(&power))),
            serial.clone(),
            i8042.clone(),
            pm.clone(),
            rtc.clone(),
            panic.clone(),
            shared(SegmentDevice(Arc::clone(&segment))),
            hotplug.clone(),
        ];
        let mut devices = Devices::new();
        set.into_iter().for_each(|device| devices.add(device).unwrap());
        let window = |window| -> SharedDevice {
            let segment = Arc::clone(&segment);
            shared(WindowDevice { window, segment })
        };
        let there: [SharedDevice; PLACES.len()] = [
            serial.clone(),
            i8042,
            pm.clone(),
            rtc,
            panic.clone(),
            hotplug.clone(),
            window(Window::Ports),
            window(Window::Ecam),
            window(Window::Memory),
        ];
        let mut bus = Bus::new();
        for ((start, size), device) in PLACES.into_iter().zip(there) {
            bus.insert(start, size, device).unwrap();
        }
        devices.setup(mode).unwrap();
        Self {
            bus,
            devices,
            serial,
            pm,
            power,
            panic,
            segment,
            hotplug,
        }
    }

    fn access(&self, script: &mut Script<'_>) {
        let (start, size) = PLACES[usize::from(script.byte()) % PLACES.len()];
        let at = start + script.number() % size;
        let length = usize::from(script.byte() % 9);
        if script.byte() & 1 == 0 {
            self.bus.read(at, &mut [0; 8][..length]);
        } else {
            self.bus.write(at, script.bytes(length));
        }
    }

    fn outside(&self, script: &mut Script<'_>) {
        let (kind, slot) = (script.byte() % 9, script.byte() % 32);
        let hotplug = || self.hotplug.lock().unwrap();
        match kind {
            0 => drop(self.serial.lock().unwrap().feed(script.bytes(usize::from(slot)))),
            1 => drop(self.serial.lock().unwrap().drain(|chunk| Ok(chunk.len().min(slot.into())))),
            2 => self.pm.lock().unwrap().press_power_button(),
            3 => drop(self.power.take()),
            4 => drop(self.panic.lock().unwrap().take()),
            5 => hotplug().announce(slot),
            6 => hotplug().ask_back(slot),
            7 => drop(hotplug().take_gone()),
            _ => {
                if hotplug().is_gone(slot) {
                    hotplug().ended(slot);
                    assert!(self.segment.lock().unwrap().plug(slot, shared(Blank)));
                }
            }
        }
    }

    fn saved(&mut self) -> Vec<SavedSection> {
        self.devices.park(MODE).unwrap();
        self.devices.save(MODE).unwrap()
    }

    /// The next worker's, which has the same to say.
    fn handed_over(mut self) -> Self {
        let sections = self.saved();
        let mut new = Self::new(MODE);
        new.devices.load(MODE, &sections).expect("what was saved can be loaded");
        new.devices.resume(MODE).expect("it goes on");
        assert_eq!(new.saved(), sections, "something was lost");
        new.go_on();
        new
    }

    /// The next worker gets the state with a bit flipped, and runs if it takes it; this one goes on.
    fn forge(&mut self, script: &mut Script<'_>) {
        let mut sections = self.saved();
        let victim = usize::from(script.byte()) % sections.len();
        let bytes = &mut sections[victim].bytes;
        let bit = usize::from(script.short()) % (bytes.len() * 8).max(1);
        if let Some(byte) = bytes.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        let mut forged = Self::new(MODE);
        if forged.devices.load(MODE, &sections).is_ok() {
            forged.devices.resume(MODE).expect("it goes on");
            forged.access(script);
            forged.outside(script);
            forged.saved();
        }
        self.go_on();
    }

    /// There was no upgrade after all.
    fn go_on(&mut self) {
        self.devices.failed(MODE);
        self.devices.resume(MODE).expect("it goes on");
    }
}

fuzz_target!(|data: &[u8]| {
    let mut script = Script::new(data);
    let mut platform = Platform::new(StartMode::None);
    platform.devices.resume(StartMode::None).unwrap();
    while !script.is_empty() {
        match script.byte() % 16 {
            0..=9 => platform.access(&mut script),
            10..=13 => platform.outside(&mut script),
            14 => platform = platform.handed_over(),
            _ => platform.forge(&mut script),
        }
    }
});
