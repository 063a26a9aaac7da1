//! The first virtio network interface of the machine, driven by the first vCPU: numbered, checksummed frames go out, as
//! many as whoever is at the other end acknowledges, and what comes in is counted and compared.
//!
//! The device may put a frame into several small buffers, and usually has to.
//!
//! Touches the registers of PCI devices, and RAM between the disk's buffers and the image.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio network interface.
const NET_DEVICE: u32 = 0x1041_1af4;
/// Features: mergeable receive buffers; version 1 in the second word.
const FEATURES: [u32; 2] = [1 << 15, 1];
/// Bytes of the header of each packet, and where it says how many buffers it is in.
const HEADER: u64 = 12;
const NUM_BUFFERS: u64 = 10;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Rings of both queues, buffers, and a frame put together.
const RINGS: u64 = 0x16_0000;
const RECEIVE_BUFFERS: u64 = 0x17_0000;
const TRANSMIT_BUFFERS: u64 = 0x18_0000;
const FRAME: u64 = 0x19_0000;
const BUFFERS: u16 = 128;
const BUFFER: u64 = 512;
const TRANSMIT_BUFFER: u64 = 0x800;

pub struct Net {
    slot: u64,
    common: u64,
    rings: [Ring; 2],
    /// Number of the last frame sent, received, and acknowledged by the other end.
    sent: u64,
    received: u64,
    acknowledged: u64,
    working: bool,
    turns: u64,
}

fn fail(state: u64) -> Option<Net> {
    report::write(NET_STATE_OFFSET, state);
    None
}

impl Net {
    /// The interface, set up, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        if !options.net {
            return None;
        }
        match Function::find(NET_DEVICE) {
            Some(function) => Self::of(&function, options),
            None => fail(DRIVER_ABSENT),
        }
    }

    /// The interface of that PCI device number, if it is one.
    pub fn at(slot: u64, options: &Options) -> Option<Self> {
        Self::of(&Function::at(slot, NET_DEVICE)?, options)
    }

    fn of(function: &Function, options: &Options) -> Option<Self> {
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let ring = |queue: u16| Ring::new(function, queue, RINGS + u64::from(queue) * RING_STEP);
        let (Some(receive), Some(transmit)) = (ring(0), ring(1)) else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        let mut net = Self {
            slot: function.slot,
            common: function.common,
            rings: [receive, transmit],
            sent: 0,
            received: 0,
            acknowledged: 0,
            working: !options.net_rest,
            turns: 0,
        };
        for buffer in 0..BUFFERS {
            let address = RECEIVE_BUFFERS + u64::from(buffer) * BUFFER;
            let ring = &mut net.rings[RECEIVE];
            descriptor(ring.descriptor(buffer), address, BUFFER as u32, WRITE, 0);
            ring.offer(buffer);
        }
        net.rings[RECEIVE].publish();
        report::write(NET_STATE_OFFSET, DRIVER_WORKING);
        Some(net)
    }

    pub fn slot(&self) -> u64 {
        self.slot
    }

    /// Lets it go: the device is reset, whatever is under way.
    pub fn leave(&self) {
        write(self.common + STATUS, 0_u8);
        while read::<u8>(self.common + STATUS) != 0 {}
        report::write(NET_STATE_OFFSET, DRIVER_ABSENT);
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64) {
        match command {
            COMMAND_NET_REST => self.working = false,
            COMMAND_NET_WORK => {
                self.working = true;
                report::write(NET_STATE_OFFSET, DRIVER_WORKING);
            }
            _ => {}
        }
    }

    /// Takes a frame that came, and sends one.
    pub fn step(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        self.receive();
        let flying = self.rings[TRANSMIT].flying();
        let window = self.sent < self.acknowledged + NET_WINDOW;
        if self.working && window && u64::from(flying) < NET_WINDOW {
            self.send();
        }
        if !self.working && self.acknowledged == self.sent {
            report::write(NET_STATE_OFFSET, DRIVER_RESTING);
        } else if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(NET_STATE_OFFSET, DRIVER_BROKEN);
        }
    }

    fn send(&mut self) {
        self.sent += 1;
        let number = self.sent;
        let slot = number % NET_WINDOW;
        let at = TRANSMIT_BUFFERS + slot * TRANSMIT_BUFFER;
        for word in 0..2 {
            write(at + 8 * word, 0_u64);
        }
        let frame = at + HEADER;
        for (offset, byte) in (0..).zip(NET_FRAME_HEADER) {
            write(frame + offset, byte);
        }
        let words = net_words(number);
        for word in 0..words {
            let value = net_word(NET_FROM_GUEST, number, self.received, word);
            write_unaligned(frame + NET_DATA + 8 * word, value);
        }
        let length = (NET_DATA + 8 * words) as u32;
        // Header and frame apart, or at one.
        let own = 2 * slot as u16;
        let table = self.rings[TRANSMIT].descriptor(own);
        if number % 2 == 0 {
            descriptor(table, at, HEADER as u32, NEXT, own + 1);
            descriptor(table + 16, frame, length, 0, 0);
        } else {
            descriptor(table, at, HEADER as u32 + length, 0, 0);
        }
        self.rings[TRANSMIT].offer(own);
        self.rings[TRANSMIT].publish();
        report::write(NET_SENT_OFFSET, number);
    }

    fn receive(&mut self) {
        let mut next = self.rings[RECEIVE].take();
        if next.is_none() {
            return;
        }
        let mut length = 0;
        let mut buffers = 1;
        let mut taken = 0;
        while taken < buffers {
            let Some((head, written)) = next else {
                // All buffers of a frame are there at once.
                report::increment(NET_CORRUPT_OFFSET);
                break;
            };
            let written = u64::from(written);
            if head >= u32::from(BUFFERS) || written > BUFFER {
                report::increment(NET_CORRUPT_OFFSET);
                return;
            }
            let buffer = RECEIVE_BUFFERS + u64::from(head) * BUFFER;
            if taken == 0 {
                buffers = read::<u16>(buffer + NUM_BUFFERS);
            }
            for offset in 0..written {
                write(FRAME + length + offset, read::<u8>(buffer + offset));
            }
            length += written;
            taken += 1;
            self.rings[RECEIVE].offer(head as u16);
            if taken < buffers {
                next = self.rings[RECEIVE].take();
            }
        }
        self.rings[RECEIVE].publish();
        self.frame(FRAME + HEADER, length.saturating_sub(HEADER));
    }

    /// What came from outside.
    fn frame(&mut self, at: u64, length: u64) {
        let ours = (12..14).all(|offset| read::<u8>(at + offset) == NET_FRAME_HEADER[offset as usize]);
        if !ours || length < NET_DATA + 16 {
            report::increment(NET_OTHERS_OFFSET);
            return;
        }
        let word = |index: u64| read_unaligned(at + NET_DATA + 8 * index);
        let (number, acknowledged) = (word(0), word(1));
        let words = net_words(number);
        let whole = length >= NET_DATA + 8 * words
            && (0..words).all(|index| word(index) == net_word(NET_FROM_HOST, number, acknowledged, index));
        if !whole {
            report::increment(NET_CORRUPT_OFFSET);
        } else if number <= self.received {
            report::increment(NET_REPEATED_OFFSET);
        } else {
            let lost = number - self.received - 1;
            report::write(NET_LOST_OFFSET, report::read(NET_LOST_OFFSET) + lost);
            self.received = number;
            self.acknowledged = self.acknowledged.max(acknowledged.min(self.sent));
            report::write(NET_RECEIVED_OFFSET, number);
        }
    }
}

fn read_unaligned(at: u64) -> u64 {
    // SAFETY: RAM that only the device and this file use.
    unsafe { (at as *const u64).read_unaligned() }
}

fn write_unaligned(at: u64, value: u64) {
    // SAFETY: as in `read_unaligned`.
    unsafe { (at as *mut u64).write_unaligned(value) }
}
