//! A driver for tests of devices: a transport without PCI, KVM or threads, its registers, and rings in RAM of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use baton_ipc::StartMode;
use proptest::prelude::*;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::buffers::Ram;
use super::transport::Parts;
use super::transport::Transport;
use super::*;
use crate::devices::Device as _;
use crate::devices::pci::Function as _;
use crate::devices::pci::msix::Message;
use crate::devices::pci::msix::Sink;

/// Bytes of RAM; beyond them there is nothing.
pub(super) const RAM: u64 = 1 << 20;
/// Where each queue has its rings, and how far apart they are.
pub(super) const RINGS: u64 = 0x1000;
pub(super) const RING_STEP: u64 = 0x4000;
pub(super) const AVAILABLE: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;
/// Where requests have their buffers.
pub(super) const BUFFERS: u64 = 0x4_0000;
/// The size of the queues that the driver sets up.
pub(super) const SIZE: u16 = 16;

/// Flags of descriptors.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Interrupts that were fired, as the data of their messages.
#[derive(Clone, Default)]
pub(super) struct Fired(pub(super) Arc<Mutex<Vec<u32>>>);

impl Sink for Fired {
    fn fire(&self, _vector: u16) {
        panic!("no route was installed");
    }
    fn deliver(&self, message: Message) {
        self.0.lock().unwrap().push(message.data);
    }
    fn stale(&self) {}
}

/// A device behind its transport, and the driver's memory.
pub(super) struct Rig {
    pub(super) transport: Transport,
    pub(super) ram: Ram,
    pub(super) fired: Fired,
    /// The next descriptor and the next entry of the available ring of each queue.
    next: Vec<(u16, u16)>,
}

pub(super) fn blank_ram() -> Ram {
    let size = usize::try_from(RAM).unwrap();
    Box::leak(Box::new(
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap(),
    ))
}

impl Rig {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::on(device, blank_ram())
    }

    pub(super) fn on(device: Box<dyn VirtioDevice>, ram: Ram) -> Self {
        let queues = device.queue_sizes().len();
        let fired = Fired::default();
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let eventfd = |_| Arc::new(rustix::event::eventfd(0, flags).unwrap());
        let waker = |_| Arc::new(|| {}) as Arc<dyn crate::devices::Trigger>;
        let parts = Parts {
            slot: 1,
            bar: 0xC000_8000,
            sink: Box::new(fired.clone()),
            kicks: (0..queues).map(eventfd).collect(),
            ram,
            wakers: (0..queues).map(waker).collect(),
            drain: Duration::from_millis(10),
        };
        let mut transport = Transport::new(device, parts);
        transport.config_write(4, &[6, 0]);
        Self {
            transport,
            ram,
            fired,
            next: vec![(0, 0); queues],
        }
    }

    pub(super) fn write(&mut self, offset: u64, value: u64, length: usize) {
        self.transport
            .bar_write(offset, &value.to_le_bytes()[..length]);
    }

    pub(super) fn read(&mut self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.bar_read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn status(&mut self) -> u8 {
        self.read(0x14, 1) as u8
    }

    /// Everything that a driver does until it is ready, with all features of the device.
    pub(super) fn bring_up(&mut self) {
        self.write(0x14, 0, 1);
        assert_eq!(self.status(), 0);
        self.write(0x14, 3, 1);
        let mut features = 0;
        for half in [0, 1] {
            self.write(0x00, half, 4);
            features |= self.read(0x04, 4) << (32 * half);
        }
        self.negotiate(features & !F_EVENT_IDX);
    }

    /// The rest of it, with these features.
    pub(super) fn negotiate(&mut self, features: u64) {
        for half in [0, 1] {
            self.write(0x08, half, 4);
            self.write(0x0C, features >> (32 * half) & 0xFFFF_FFFF, 4);
        }
        self.write(0x14, 11, 1);
        assert_eq!(self.status(), 11);
        // MSI-X: vector N+1 for queue N, vector 0 for the configuration; vector V sends 0x40 + V.
        let queues = self.next.len() as u64;
        for vector in 0..=queues {
            let at = 0x4000 + 16 * vector;
            for (word, value) in [(0, 0xFEE0_0000), (1, 0), (2, 0x40 + vector), (3, 0)] {
                self.write(at + 4 * word, value, 4);
            }
        }
        self.transport.config_write(0x42, &0x8000_u16.to_le_bytes());
        self.write(0x10, 0, 2);
        for queue in 0..queues {
            let rings = RINGS + RING_STEP * queue;
            for at in (0..RING_STEP).step_by(8) {
                self.ram.write_obj(0_u64, GuestAddress(rings + at)).unwrap();
            }
            self.write(0x16, queue, 2);
            self.write(0x18, SIZE.into(), 2);
            self.write(0x1A, queue + 1, 2);
            for (register, ring) in [
                (0x20, rings),
                (0x28, rings + AVAILABLE),
                (0x30, rings + USED),
            ] {
                self.write(register, ring, 8);
            }
            self.write(0x1C, 1, 2);
        }
        self.next.iter_mut().for_each(|next| *next = (0, 0));
        self.write(0x14, 15, 1);
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub(super) fn descriptor(&self, at: u64, part: (u64, u32, u16), next: u16) {
        let (address, length, flags) = part;
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Writes a chain and makes it available; its first descriptor.
    pub(super) fn offer(&mut self, queue: u64, parts: &[(u64, u32, u16)]) -> u16 {
        let rings = RINGS + RING_STEP * queue;
        let (first, entry) = self.next[queue as usize];
        for (index, part) in (0..).zip(parts) {
            let (address, length, flags) = *part;
            let more = usize::from(index + 1) < parts.len();
            let flags = flags | if more { NEXT } else { 0 };
            let at = (first + index) % SIZE;
            let next = (first + index + 1) % SIZE;
            self.descriptor(rings + 16 * u64::from(at), (address, length, flags), next);
        }
        self.next[queue as usize].0 = (first + parts.len() as u16) % SIZE;
        self.make_available(queue, first);
        assert_eq!(self.next[queue as usize].1, entry.wrapping_add(1));
        first
    }

    pub(super) fn make_available(&mut self, queue: u64, head: u16) {
        let available = RINGS + RING_STEP * queue + AVAILABLE;
        let (_, entry) = &mut self.next[queue as usize];
        let slot = available + 4 + u64::from(*entry % SIZE) * 2;
        *entry = entry.wrapping_add(1);
        let index = *entry;
        self.put(slot, &head.to_le_bytes());
        self.put(available + 2, &index.to_le_bytes());
    }

    /// Takes the last chain back that was made available and that no device has looked at.
    pub(super) fn take_back(&mut self, queue: u64) {
        let available = RINGS + RING_STEP * queue + AVAILABLE;
        let (_, entry) = &mut self.next[queue as usize];
        *entry = entry.wrapping_sub(1);
        let index = *entry;
        self.put(available + 2, &index.to_le_bytes());
    }

    /// The same driver with a device of another worker, which has to be loaded yet.
    pub(super) fn succeeded_by(&self, device: Box<dyn VirtioDevice>) -> Self {
        let mut new = Self::on(device, self.ram);
        new.transport.setup(StartMode::CprTransfer).unwrap();
        new.next.clone_from(&self.next);
        new
    }

    /// Serves all backends, as I/O threads would.
    pub(super) fn serve(&self) {
        for seat in self.transport.seats() {
            seat.serve();
        }
    }

    /// How many requests of a queue were given back.
    pub(super) fn used(&self, queue: u64) -> u16 {
        let used = RINGS + RING_STEP * queue + USED;
        self.ram.read_obj(GuestAddress(used + 2)).unwrap()
    }

    /// The last one's descriptor and length.
    pub(super) fn last_used(&self, queue: u64) -> (u32, u32) {
        let used = RINGS + RING_STEP * queue + USED;
        let slot = used + 4 + u64::from(self.used(queue).wrapping_sub(1) % SIZE) * 8;
        let word = |at| self.ram.read_obj(GuestAddress(at)).unwrap();
        (word(slot), word(slot + 4))
    }
}

/// What a hostile driver can do to any device.
#[derive(Clone, Debug)]
pub(super) enum Hostility {
    /// A write and a read in the BAR, of 1, 2, 4 or 8 bytes.
    Bar(u64, u64, usize),
    /// A write and a read in configuration space.
    Config(u8, u32, usize),
    /// Bytes in the rings.
    Ram(u64, Vec<u8>),
}

pub(super) fn hostility(queues: u64) -> impl Strategy<Value = Hostility> {
    let length = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
    let registers = prop_oneof![
        (0..0x8000_u64, any::<u64>()),
        (0..0x40_u64, 0..0x100_u64),
        (0x2000..0x2040_u64, any::<u64>()),
    ];
    let bytes = prop::collection::vec(any::<u8>(), 1..32);
    prop_oneof![
        4 => (registers, length).prop_map(|((at, value), length)| Hostility::Bar(at, value, length)),
        1 => (any::<u8>(), any::<u32>(), 1..=4_usize)
            .prop_map(|(at, value, length)| Hostility::Config(at, value, length)),
        3 => (RINGS..RINGS + queues * RING_STEP, bytes).prop_map(|(at, bytes)| Hostility::Ram(at, bytes)),
    ]
}

impl Rig {
    pub(super) fn suffer(&mut self, hostility: Hostility) {
        match hostility {
            Hostility::Bar(at, value, length) => {
                self.write(at, value, length);
                self.read(at, length);
            }
            Hostility::Config(at, value, length) => {
                if usize::from(at) + length <= 256 {
                    let bytes = &value.to_le_bytes()[..length];
                    self.transport.config_write(at, bytes);
                    self.transport.config_read(at, &mut [0; 4][..length]);
                }
            }
            Hostility::Ram(at, bytes) => self.put(at, &bytes),
        }
    }

    /// Saves it parked, and lets `device` go on from that.
    pub(super) fn hand_over(mut self, device: Box<dyn VirtioDevice>) -> Self {
        let mode = StartMode::CprTransfer;
        self.transport.park(mode).unwrap();
        let section = self.transport.save(mode).unwrap();
        let mut new = self.succeeded_by(device);
        new.transport.load(mode, &section).unwrap();
        new.transport.resume(mode).unwrap();
        new
    }

    /// Has `device` load the state with one bit flipped, and serve if it does; goes on itself.
    pub(super) fn forge(&mut self, bit: usize, device: Box<dyn VirtioDevice>) {
        let mode = StartMode::CprTransfer;
        self.transport.park(mode).unwrap();
        let mut section = self.transport.save(mode).unwrap();
        let bits = section.bytes.len() * 8;
        section.bytes[bit % bits / 8] ^= 1 << (bit % 8);
        let mut forged = self.succeeded_by(device);
        if forged.transport.load(mode, &section).is_ok() {
            forged.transport.resume(mode).unwrap();
            forged.serve();
            forged.transport.park(mode).unwrap();
        }
        self.transport.resume(mode).unwrap();
    }
}

/// A file in memory.
pub(super) fn file(bytes: u64) -> File {
    let fd: OwnedFd = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}
