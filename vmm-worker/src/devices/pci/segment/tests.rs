use super::*;

/// A function whose BAR is at a fixed place and remembers what was written.
struct Probe {
    config: ConfigSpace,
    written: Vec<(u64, Vec<u8>)>,
}

impl Function for Probe {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn decode(&self, bytes: &std::ops::Range<u64>) -> Option<u64> {
        let bar = self.config.bar()?;
        (bar.start <= bytes.start && bytes.end <= bar.end).then(|| bytes.start - bar.start)
    }
    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xFF).unwrap());
    }
    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }
}

fn machine() -> (Arc<Mutex<Segment>>, Arc<Mutex<Probe>>) {
    let identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        ..HOST_BRIDGE
    };
    let probe = Arc::new(Mutex::new(Probe {
        config: ConfigSpace::new(identity).with_bar(0x1000, 0xC000_1000),
        written: Vec::new(),
    }));
    let mut segment = Segment::new(0xC000_0000);
    assert!(segment.plug(3, probe.clone()));
    for slot in [0, 3, 32] {
        assert!(!segment.plug(slot, probe.clone()), "{slot}");
    }
    (Arc::new(Mutex::new(segment)), probe)
}

fn window(segment: &Arc<Mutex<Segment>>, window: Window) -> WindowDevice {
    WindowDevice {
        window,
        segment: Arc::clone(segment),
    }
}

fn read(device: &mut WindowDevice, offset: u64, length: usize) -> u64 {
    let mut data = vec![0xFF; length];
    device.read(offset, &mut data);
    data.resize(8, 0);
    u64::from_le_bytes(data.try_into().unwrap())
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let (segment, _) = machine();
    let (mut ports, mut ecam) = (
        window(&segment, Window::Ports),
        window(&segment, Window::Ecam),
    );
    ports.write(0, &0x8000_0000_u32.to_le_bytes());
    assert_eq!(read(&mut ports, 0, 4), 0x8000_0000);
    assert_eq!(read(&mut ports, 4, 4), 0x0008_1b36);
    ports.write(0, &(0x8000_0000_u32 | 3 << 11 | 4).to_le_bytes());
    ports.write(4, &[2]);
    assert_eq!(read(&mut ecam, 3 << 15 | 4, 2), 2);
    ecam.write(3 << 15 | 4, &[6, 0]);
    assert_eq!(read(&mut ports, 4, 2), 6);
    assert_eq!(read(&mut ecam, 3 << 15, 4), 0x1042_1af4);
    assert_eq!(read(&mut ecam, 3 << 15 | 0x100, 4), 0);
}

#[test]
fn what_is_not_there_reads_as_all_ones() {
    let (segment, _) = machine();
    let (mut ports, mut ecam) = (
        window(&segment, Window::Ports),
        window(&segment, Window::Ecam),
    );
    for selected in [
        // No enable bit; another slot, function, bus.
        3 << 11,
        0x8000_0000_u32 | 4 << 11,
        0x8000_0000 | 3 << 11 | 1 << 8,
        0x8001_0000 | 3 << 11,
    ] {
        ports.write(0, &selected.to_le_bytes());
        assert_eq!(read(&mut ports, 4, 4), 0xFFFF_FFFF, "{selected:#x}");
        ports.write(4, &[2, 0]);
    }
    for offset in [4 << 15, 3 << 15 | 1 << 12, 1 << 20 | 3 << 15] {
        assert_eq!(read(&mut ecam, offset, 4), 0xFFFF_FFFF, "{offset:#x}");
        ecam.write(offset | 4, &[2, 0]);
    }
    // A byte into the address port is no address.
    ports.write(1, &[0x80]);
    ports.write(3, &[0x80]);
    assert_eq!(read(&mut ports, 1, 1), 0xFF);
}

#[test]
fn a_bar_answers_where_and_while_it_is_told_to() {
    let (segment, probe) = machine();
    let mut memory = window(&segment, Window::Memory);
    assert_eq!(read(&mut memory, 0x1010, 4), 0xFFFF_FFFF);
    probe.lock().unwrap().config.write(4, &[2]);
    assert_eq!(read(&mut memory, 0x1010, 4), 0x1010_1010);
    memory.write(0x1FFC, &[1, 2, 3, 4]);
    // Across its end.
    memory.write(0x1FFE, &[1, 2, 3, 4]);
    assert_eq!(read(&mut memory, 0x1FFE, 4), 0xFFFF_FFFF);
    probe
        .lock()
        .unwrap()
        .config
        .write(0x10, &0xC100_0000_u32.to_le_bytes());
    memory.write(0x1000, &[9]);
    memory.write(0x100_0000, &[8]);
    assert_eq!(
        probe.lock().unwrap().written,
        [(0xFFC, vec![1, 2, 3, 4]), (0, vec![8])]
    );
}

#[test]
fn the_address_survives_and_a_wrong_one_is_refused() {
    let (segment, _) = machine();
    window(&segment, Window::Ports).write(0, &0x8000_1804_u32.to_le_bytes());
    let mut device = SegmentDevice(segment);
    let section = device.save(StartMode::CprTransfer).unwrap();
    let (fresh, _) = machine();
    SegmentDevice(Arc::clone(&fresh))
        .load(StartMode::CprTransfer, &section)
        .unwrap();
    assert_eq!(read(&mut window(&fresh, Window::Ports), 0, 4), 0x8000_1804);
    let wrong = SavedSegment {
        address: 0x8000_1803,
        host_bridge: ConfigSpace::new(HOST_BRIDGE).save(),
    };
    let section = state::encode(device.id(), VERSION, &wrong).unwrap();
    assert!(matches!(
        device.load(StartMode::CprTransfer, &section),
        Err(DeviceError::State(StateError::Field {
            name: "address",
            ..
        }))
    ));
    let mut other = HOST_BRIDGE;
    other.device += 1;
    let wrong = SavedSegment {
        address: 0,
        host_bridge: ConfigSpace::new(other).save(),
    };
    let section = state::encode(device.id(), VERSION, &wrong).unwrap();
    assert!(matches!(
        device.load(StartMode::CprTransfer, &section),
        Err(DeviceError::State(StateError::Field {
            name: "config_space",
            ..
        }))
    ));
}
