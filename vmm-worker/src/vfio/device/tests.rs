use std::sync::Arc;

use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VfioInterrupts;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::devices::pci::msix::Message;
use crate::devices::pci::msix::Sink;
use crate::devices::state::StateError;

const SPACE_AT: u64 = 0x4000;
const TABLE: u64 = 0x1000;
const BAR: u64 = 0xC010_0000;

/// A file in a device's place: BAR 0 at 0, configuration space behind it.
fn file() -> OwnedFd {
    let file = rustix::fs::memfd_create("device", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, SPACE_AT + 256).unwrap();
    file
}

/// Counts how often something is to be arranged anew.
#[derive(Clone, Default)]
struct Counter(Arc<std::sync::atomic::AtomicU32>);

impl Counter {
    fn take(&self) -> u32 {
        self.0.swap(0, std::sync::atomic::Ordering::SeqCst)
    }
}

impl Sink for Counter {
    fn fire(&self, _vector: u16) {
        panic!("the device fires by itself");
    }
    fn deliver(&self, _message: Message) {
        panic!("the device fires by itself");
    }
    fn stale(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

struct Site {
    device: HostDevice,
    file: OwnedFd,
    stale: Counter,
    vectors: Vec<OwnedFd>,
}

/// A device with two MSI-X vectors, whose table is at 0x1000 of its BAR of 0x4000 bytes.
fn site() -> Site {
    let mut space = vec![0; 256];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x34, 0x12, 0xE8, 0x11]);
    put(6, &[0x10, 0]);
    put(0x34, &[0x40]);
    put(0x40, &[0x11, 0, 1, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0]);
    let mut bars = vec![VfioBar::default(); 6];
    bars[0].size = SPACE_AT;
    let config = VfioConfig {
        slot: 3,
        space,
        space_at: SPACE_AT,
        bars,
        interrupts: VfioInterrupts::MsiX,
        vectors: 2,
        resets: false,
    };
    let shape = super::super::config::shape(&config, |_| Ok(u32::try_from(BAR).unwrap())).unwrap();
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.create_irq_chip().unwrap();
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let vectors: Vec<_> = (0..2)
        .map(|_| rustix::event::eventfd(0, flags).unwrap())
        .collect();
    let copies = vectors.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let container = Container::of_another(file(), Box::leak(Box::new(memory)));
    let (file, stale) = (file(), Counter::default());
    let device = HostDevice::new(Parts {
        slot: 3,
        file: file.try_clone().unwrap(),
        space_at: SPACE_AT,
        bars: config.bars,
        shape,
        resets: false,
        msix: Msix::new(2, Box::new(stale.clone())),
        vectors: Vectors::new(vm, 24, copies),
        container: Arc::new(Mutex::new(container)),
    });
    Site {
        device,
        file,
        stale,
        vectors,
    }
}

impl Site {
    fn command(&self) -> u16 {
        let mut bytes = [0; 2];
        rustix::io::pread(&self.file, &mut bytes, SPACE_AT + COMMAND).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn signal(&self, vector: usize) {
        rustix::io::write(&self.vectors[vector], &1_u64.to_ne_bytes()).unwrap();
    }

    /// Whether a vector has counted something that KVM has not taken.
    fn counted(&self, vector: usize) -> bool {
        rustix::io::read(&self.vectors[vector], &mut [0; 8]).is_ok()
    }

    /// Has the guest write a vector's message, and unmask it.
    fn program(&mut self, vector: u64) {
        let at = TABLE + vector * 16;
        for (offset, value) in [(0, 0xFEE0_0000_u32), (4, 0), (8, 0x30), (12, 0)] {
            self.device.bar_write(at + offset, &value.to_le_bytes());
        }
    }

    fn enable(&mut self) {
        self.device.config_write(0x42, &0x8001_u16.to_le_bytes());
    }

    /// As the control thread does once the guest has changed a vector.
    fn arrange(&mut self) {
        let routes = self.device.msix().routes();
        self.device.msix().installed(&routes);
        self.device.settle();
    }

    /// Its guest runs here; the container is nobody's concern in these tests, and no VFIO's.
    fn own(&mut self) {
        assert!(
            self.device.resume(StartMode::None).is_err(),
            "a container of no VFIO"
        );
        assert!(self.device.owned);
    }
}

#[test]
fn registers_are_the_devices_and_the_table_is_not() {
    let mut site = site();
    site.device.config_write(4, &[2, 0]);
    let at = |start: u64, length: u64| start..start + length;
    assert_eq!(site.device.decode(&at(BAR + 0x80, 8)), Some(0x80));
    assert_eq!(site.device.decode(&at(BAR + SPACE_AT - 4, 8)), None);
    site.device.bar_write(0x80, &[1, 2, 3, 4]);
    let mut found = [0; 4];
    rustix::io::pread(&site.file, &mut found, 0x80).unwrap();
    assert_eq!(found, [1, 2, 3, 4]);
    site.device.bar_read(0x82, &mut found[..2]);
    assert_eq!(found, [3, 4, 3, 4]);

    site.program(1);
    rustix::io::pread(&site.file, &mut found, TABLE + 16).unwrap();
    assert_eq!(found, [0; 4], "the table is the worker's");
    site.device.bar_read(TABLE + 24, &mut found);
    assert_eq!(found, [0x30, 0, 0, 0]);
    site.device.bar_write(0x2000, &[0xFF; 8]);
    site.device.bar_read(0x2000, &mut found);
    assert_eq!(found, [0; 4]);
    // What the device does not answer.
    site.device.bar_read(SPACE_AT + 256, &mut found);
    assert_eq!(found, [0xFF; 4]);
}

#[test]
fn a_guest_decides_whether_the_device_masters_the_bus() {
    let mut site = site();
    site.device.setup(StartMode::None).unwrap();
    assert_eq!(site.command(), INTX_DISABLE);
    site.device.config_write(4, &[0xFF, 0xFF]);
    assert_eq!(site.command(), MEMORY_SPACE | BUS_MASTER | INTX_DISABLE);
    site.own();
    site.device.setup(StartMode::None).unwrap();
    assert_eq!(site.command(), INTX_DISABLE, "a reset ends its DMA");
}

#[test]
fn a_new_worker_leaves_the_device_alone() {
    let mut site = site();
    let before = [0x5A; 256];
    rustix::io::pwrite(&site.file, &before, SPACE_AT).unwrap();
    site.device.setup(StartMode::CprTransfer).unwrap();
    let section = site.device.save(StartMode::CprTransfer).unwrap();
    site.device.load(StartMode::CprTransfer, &section).unwrap();
    site.device.failed(StartMode::CprTransfer);
    let mut after = [0; 256];
    rustix::io::pread(&site.file, &mut after, SPACE_AT).unwrap();
    assert_eq!(after, before);
    site.signal(0);
    assert!(site.counted(0));
}

#[test]
fn an_interrupt_waits_while_its_vector_is_masked_or_the_device_parked() {
    let mut site = site();
    site.own();
    site.program(0);
    assert!(site.stale.take() > 0);
    site.arrange();
    site.signal(0);
    assert!(site.counted(0), "MSI-X is off");
    site.enable();
    site.arrange();
    for (vector, fires) in [(0, true), (1, false)] {
        site.signal(vector);
        assert_eq!(site.counted(vector), !fires, "{vector}");
    }
    site.device.park(StartMode::None).unwrap();
    site.signal(0);
    site.device.settle();
    assert!(!site.counted(0), "what was counted fires");

    site.device.bar_write(TABLE + 12, &1_u32.to_le_bytes());
    assert!(site.stale.take() > 0);
    site.arrange();
    site.signal(0);
    site.program(0);
    site.arrange();
    assert!(!site.counted(0));
    site.device.park(StartMode::None).unwrap();
    site.signal(0);
    site.device.setup(StartMode::None).unwrap();
    assert!(!site.counted(0), "a reset forgets");
}

#[test]
fn its_state_goes_over_and_another_devices_is_refused() {
    let mut old = site();
    old.device.config_write(4, &[6, 0]);
    old.device
        .config_write(0x10, &0xC020_0000_u32.to_le_bytes());
    old.program(1);
    old.enable();
    let section = old.device.save(StartMode::CprTransfer).unwrap();
    let mut new = site();
    new.device.load(StartMode::CprTransfer, &section).unwrap();
    assert_eq!(new.device.decode(&(0xC020_0000..0xC020_0004)), Some(0));
    let messages = new.device.msix().enabled_messages();
    assert_eq!(messages, old.device.msix().enabled_messages());
    assert_eq!(messages.len(), 1);
    new.device.msix().installed(&messages);
    assert_eq!(new.device.msix().deliverable(), [1]);

    let refused = |change: &dyn Fn(&mut SavedHostDevice)| {
        let mut saved: SavedHostDevice = state::decode(&section, VERSION).unwrap();
        change(&mut saved);
        let section = state::encode(section.id, VERSION, &saved).unwrap();
        match site().device.load(StartMode::CprTransfer, &section) {
            Err(DeviceError::State(StateError::Field { name, .. })) => name,
            other => panic!("{other:?}"),
        }
    };
    let mut other = site();
    other.device.space = ConfigSpace::new(crate::devices::pci::config_space::Identity {
        vendor: 1,
        device: 2,
        class: 3,
        revision: 4,
        subsystem_vendor: 5,
        subsystem: 6,
    });
    let space = other.device.space;
    assert_eq!(
        refused(&|saved| saved.config = space.save()),
        "config_space"
    );
    let msix = Msix::new(3, Box::new(Counter::default()));
    assert_eq!(refused(&|saved| saved.msix = msix.save()), "msix.entries");
}
