//! A hostile driver for fuzz targets of virtio devices: bytes become what a guest does with a device's registers, its configuration
//! space, its rings and its buffers, and what an upgrade does in between.
//!
//! What is promised: no panic and no wait, whatever comes; every state that is saved can be loaded, and one with a bit flipped is
//! loaded or refused; a driver that resets the device and behaves gets it back.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::LazyLock;
use std::time::Duration;

use baton_ipc::StartMode;
use baton_worker::devices::Device as _;
use baton_worker::devices::Trigger;
use baton_worker::devices::pci::Function as _;
use baton_worker::devices::pci::msix::Message;
use baton_worker::devices::pci::msix::Sink;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::buffers::Ram;
use baton_worker::devices::virtio::transport::Parts;
use baton_worker::devices::virtio::transport::Transport;
use vm_memory::Bytes as _;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

/// Bytes of RAM; beyond them there is nothing.
pub const RAM: u64 = 1 << 18;
/// Where each queue has its rings, how far apart they are, and where in them the available and the used ring are.
const RINGS: u64 = 0x1000;
const RING_STEP: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
/// Queues of which the driver knows, and their size.
const QUEUES: u64 = 8;
const SIZE: u16 = 16;
/// Where buffers are.
const BUFFERS: u64 = 0x1_0000;
/// Offsets in the BAR: common configuration, the status in it, and the MSI-X table.
const STATUS: u64 = 0x14;
const MSIX_TABLE: u64 = 0x4000;
/// The MSI-X capability's control, in configuration space.
const MSIX_CONTROL: u8 = 0x42;
/// How long a park waits for I/O threads. There are none but this, so it does not wait unless something is wrong.
const DRAIN: Duration = Duration::from_millis(10);
/// How often who serves elsewhere is given the time to answer: once for what it has to finish, and once for each of its queues.
const TURNS: usize = 4;
/// A device is handed over in this way.
const MODE: StartMode = StartMode::CprTransfer;

/// One for all inputs: guest RAM lives as long as its process.
static GUEST: LazyLock<(Ram, File)> = LazyLock::new(|| {
    let fd: OwnedFd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(RAM).unwrap();
    let backing = Some(FileOffset::new(file.try_clone().unwrap(), 0));
    let ranges = [(GuestAddress(0), RAM as usize, backing)];
    let ram = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    (Box::leak(Box::new(ram)), file)
});

/// A file in memory of so many bytes.
#[must_use]
pub fn file(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

/// Two ends of a socket that does not block.
#[must_use]
pub fn pair(kind: rustix::net::SocketType) -> (OwnedFd, OwnedFd) {
    let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
    rustix::net::socketpair(rustix::net::AddressFamily::UNIX, kind, flags, None).unwrap()
}

/// Interrupts go nowhere.
struct Nowhere;

impl Sink for Nowhere {
    fn fire(&self, _vector: u16) {}
    fn deliver(&self, _message: Message) {}
    fn stale(&self) {}
}

/// The bytes of an input, zeroes after their end.
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    /// Those of this input.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    /// The next bytes, at most so many.
    pub fn bytes(&mut self, count: usize) -> &[u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// A number of two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A number of eight bytes, small ones more often than not.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            kind @ 0..=0x7f => u64::from(kind),
            0x80..=0xbf => u64::from(self.short()),
            0xc0..=0xdf => u64::from(self.short()) << 8,
            _ => {
                let bytes: [u8; 8] = std::array::from_fn(|_| self.byte());
                u64::from_le_bytes(bytes)
            }
        }
    }

    /// Whether all of them were taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a fuzz target says of its device.
pub trait Subject {
    /// Another one, for the next worker.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// One that loads a forged state, and is nobody's afterwards.
    fn forged(&mut self) -> Box<dyn VirtioDevice> {
        self.device()
    }

    /// The device is parked, and is about to be saved.
    fn parked(&mut self) {}

    /// Whoever is at the device's other end does something.
    fn outside(&mut self, _script: &mut Script<'_>) {}

    /// What is so whatever the driver does.
    fn check(&mut self) {}

    /// Whether another process serves the rings, so that a park or a reset takes its answer, and waits for none here.
    fn elsewhere(&self) -> bool {
        false
    }

    /// That process answers what it was asked.
    fn answer(&mut self) {}

    /// Whether a driver that behaves gets the device back; not if the device's other end has broken it.
    fn usable(&self) -> bool {
        true
    }
}

struct Rig {
    transport: Transport,
    queues: u64,
    /// The next descriptor and the next entry of the available ring of each queue.
    next: [(u16, u16); QUEUES as usize],
}

/// Writes guest RAM, if all of it is there.
pub fn put(at: u64, bytes: &[u8]) {
    let _ = GUEST.0.write(bytes, GuestAddress(at));
}

/// Reads a ring's index.
#[must_use]
pub fn index(at: u64) -> u16 {
    GUEST.0.read_obj(GuestAddress(at)).unwrap_or_default()
}

impl Rig {
    fn new(device: Box<dyn VirtioDevice>, elsewhere: bool) -> Self {
        let queues = device.queue_sizes().len();
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let eventfd = |_| Arc::new(rustix::event::eventfd(0, flags).unwrap());
        let waker = |_| Arc::new(|| {}) as Arc<dyn Trigger>;
        let parts = Parts {
            slot: 1,
            bar: 0xC000_8000,
            sink: Box::new(Nowhere),
            kicks: (0..queues).map(eventfd).collect(),
            ram: GUEST.0,
            wakers: (0..queues).map(waker).collect(),
            drain: if elsewhere { Duration::ZERO } else { DRAIN },
        };
        let mut transport = Transport::new(device, parts);
        transport.config_write(4, &[6, 0]);
        Self {
            transport,
            queues: queues as u64,
            next: [(0, 0); QUEUES as usize],
        }
    }

    fn write(&mut self, offset: u64, value: u64, length: usize) {
        self.transport.bar_write(offset, &value.to_le_bytes()[..length]);
    }

    fn read(&mut self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.bar_read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    /// Everything that a driver does until it is ready, with all features of the device but those that `without` has. It waits in
    /// vain for a reset that another process keeps from its end.
    fn bring_up(&mut self, without: u64, subject: &mut impl Subject) {
        self.write(STATUS, 0, 1);
        for _ in 0..TURNS {
            if self.read(STATUS, 1) != 0 && subject.elsewhere() {
                self.turn(subject);
            }
        }
        if self.read(STATUS, 1) != 0 {
            assert!(subject.elsewhere(), "a reset that is not over");
            return;
        }
        self.write(STATUS, 3, 1);
        for half in [0, 1] {
            self.write(0x00, half, 4);
            let features = self.read(0x04, 4);
            let without = if half == 0 { without } else { 0 };
            self.write(0x08, half, 4);
            self.write(0x0C, features & !without, 4);
        }
        self.write(STATUS, 11, 1);
        for vector in 0..=self.queues {
            for (word, value) in [(0, 0xFEE0_0000), (4, 0), (8, 0x40 + vector), (12, 0)] {
                self.write(MSIX_TABLE + 16 * vector + word, value, 4);
            }
        }
        self.transport.config_write(MSIX_CONTROL, &0x8000_u16.to_le_bytes());
        for queue in 0..self.queues.min(QUEUES) {
            let rings = RINGS + RING_STEP * queue;
            put(rings, &[0; RING_STEP as usize]);
            self.write(0x16, queue, 2);
            self.write(0x18, SIZE.into(), 2);
            self.write(0x1A, queue + 1, 2);
            for (register, ring) in [(0x20, rings), (0x28, rings + AVAILABLE), (0x30, rings + USED)] {
                self.write(register, ring, 8);
            }
            self.write(0x1C, 1, 2);
        }
        self.next = [(0, 0); QUEUES as usize];
        self.write(STATUS, 15, 1);
    }

    /// A chain of up to 8 descriptors with buffers of any place and length, made available.
    fn offer(&mut self, script: &mut Script<'_>) {
        let queue = u64::from(script.byte()) % self.queues.min(QUEUES);
        let count = u16::from(script.byte() % 8) + 1;
        let rings = RINGS + RING_STEP * queue;
        let (first, entry) = self.next[queue as usize];
        for index in 0..count {
            let at = (first + index) % SIZE;
            let kind = script.byte();
            let address = match kind >> 6 {
                0 | 1 => BUFFERS + u64::from(script.short()),
                2 => RAM - u64::from(script.byte()),
                _ => script.number(),
            };
            let length = match kind & 0x30 {
                0x30 => script.number() as u32,
                _ => u32::from(script.short() % 0x1000),
            };
            // NEXT, as it should be or not; WRITE and INDIRECT as they come.
            let flags = u16::from(kind & 6) | u16::from((index + 1 < count) != (kind & 9 == 9));
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&((at + 1) % SIZE).to_le_bytes());
            put(rings + 16 * u64::from(at), &bytes);
        }
        put(rings + AVAILABLE + 4 + 2 * u64::from(entry % SIZE), &first.to_le_bytes());
        let entry = entry.wrapping_add(1);
        put(rings + AVAILABLE + 2, &entry.to_le_bytes());
        self.next[queue as usize] = ((first + count) % SIZE, entry);
    }

    fn serve(&self) {
        self.transport.seats().for_each(|seat| seat.serve());
    }

    /// Who serves elsewhere does.
    fn turn(&mut self, subject: &mut impl Subject) {
        self.serve();
        subject.answer();
        self.serve();
    }

    /// Whether the device could be parked; if not, it goes on.
    fn park(&mut self, subject: &mut impl Subject) -> bool {
        for _ in 0..TURNS {
            match self.transport.park(MODE) {
                Ok(()) => {
                    subject.parked();
                    return true;
                }
                Err(error) => assert!(subject.elsewhere(), "something is under way: {error}"),
            }
            self.turn(subject);
        }
        self.transport.failed(MODE);
        self.transport.resume(MODE).expect("it goes on");
        false
    }

    /// The same driver with the device of the next worker, which goes on from what this one saved.
    fn hand_over(mut self, subject: &mut impl Subject) -> Self {
        if !self.park(subject) {
            return self;
        }
        let section = self.transport.save(MODE).expect("a state");
        let mut new = Self::new(subject.device(), subject.elsewhere());
        new.transport.setup(MODE).expect("a reset device");
        new.transport.load(MODE, &section).expect("what was saved can be loaded");
        new.transport.resume(MODE).expect("it goes on");
        new.next = self.next;
        new
    }

    /// The next worker gets the state with a bit flipped, and serves if it takes it; this one goes on.
    fn forge(&mut self, bit: usize, subject: &mut impl Subject) {
        if !self.park(subject) {
            return;
        }
        let mut section = self.transport.save(MODE).expect("a state");
        let bits = section.bytes.len() * 8;
        section.bytes[bit % bits / 8] ^= 1 << (bit % 8);
        let mut forged = Self::new(subject.forged(), subject.elsewhere());
        forged.transport.setup(MODE).expect("a reset device");
        if forged.transport.load(MODE, &section).is_ok() {
            forged.transport.resume(MODE).expect("it goes on");
            forged.serve();
            let parked = forged.transport.park(MODE);
            assert!(parked.is_ok() || subject.elsewhere(), "something is under way");
        }
        self.transport.resume(MODE).expect("it goes on");
    }
}

/// Does with the device what an input says.
pub fn drive(data: &[u8], subject: &mut impl Subject) {
    let mut script = Script(data);
    let mut rig = Rig::new(subject.device(), subject.elsewhere());
    rig.bring_up(u64::from(script.byte()) << 24, subject);
    while !script.is_empty() {
        match script.byte() % 16 {
            0 | 1 => {
                let (at, length) = (u64::from(script.short()) % 0x8000, 1 << (script.byte() % 4));
                let value = script.number();
                rig.write(at, value, length);
                rig.read(at, length);
            }
            2 => {
                let (at, length) = (script.byte(), 1 << (script.byte() % 3));
                let value = script.number().to_le_bytes();
                if usize::from(at) + length <= 256 {
                    rig.transport.config_write(at, &value[..length]);
                    rig.transport.config_read(at, &mut [0; 4][..length]);
                }
            }
            3 => {
                let at = RINGS + u64::from(script.short()) % (QUEUES * RING_STEP);
                let count = usize::from(script.byte() % 32);
                put(at, script.bytes(count));
            }
            4 => {
                let at = BUFFERS + u64::from(script.short());
                let count = usize::from(script.byte() % 128);
                put(at, script.bytes(count));
            }
            5..=8 => rig.offer(&mut script),
            9 | 10 => rig.serve(),
            11 => rig.bring_up(u64::from(script.byte()) << 24, subject),
            12 => rig = rig.hand_over(subject),
            13 => {
                let bit = usize::from(script.short()) * 256 + usize::from(script.byte());
                rig.forge(bit, subject);
            }
            _ => subject.outside(&mut script),
        }
        subject.check();
    }
    rig.serve();
    rig.bring_up(0, subject);
    rig.serve();
    subject.check();
    if subject.usable() {
        assert_eq!(rig.read(STATUS, 1), 15, "a driver that behaves is not served");
    }
}
