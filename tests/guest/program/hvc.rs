//! The virtio console of the machine, driven by the first vCPU (virtio 1.2, 5.3): sends back whatever is typed.
//!
//! A buffer is always in one of the two queues: it is received into, and what it holds is sent from it, whole, in odd pieces, or
//! by an indirect table, in turn.
//!
//! Touches the registers of PCI devices, and RAM between the socket device's buffers and the image.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio console.
const CONSOLE_DEVICE: u32 = 0x1043_1af4;
/// Features: descriptors in tables of their own; version 1 in the second word.
const FEATURES: [u32; 2] = [1 << 28, 1];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Rings, then buffers, then each buffer's table.
const RINGS: u64 = 0x1f_0000;
const BUFFERS: u64 = RINGS + 2 * RING_STEP;
const BUFFER: u64 = 0x200;
const TABLES: u64 = BUFFERS + COUNT as u64 * BUFFER;
const TABLE: u64 = 0x40;
/// Buffers, and the most descriptors that each takes in a queue.
const COUNT: u16 = 16;
const PIECES: u16 = 4;

pub struct Hvc {
    common: u64,
    receive: Ring,
    transmit: Ring,
    turns: u64,
}

fn fail(state: u64) -> Option<Hvc> {
    report::write(HVC_STATE_OFFSET, state);
    None
}

impl Hvc {
    /// The device, set up, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        if !options.hvc {
            return None;
        }
        let Some(function) = Function::find(CONSOLE_DEVICE) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let ring = |queue: u16| Ring::new(&function, queue, RINGS + u64::from(queue) * RING_STEP);
        let (Some(receive), Some(transmit)) = (ring(RECEIVE), ring(TRANSMIT)) else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        report::write(HVC_STATE_OFFSET, DRIVER_WORKING);
        let mut hvc = Self {
            common: function.common,
            receive,
            transmit,
            turns: 0,
        };
        for buffer in 0..COUNT {
            hvc.listen(buffer);
        }
        Some(hvc)
    }

    /// Gives the device a buffer to receive into, of any of several lengths.
    fn listen(&mut self, buffer: u16) {
        let length = 1 + (self.turns * 37 + u64::from(buffer) * 11) % BUFFER;
        let at = self.receive.descriptor(buffer);
        descriptor(at, address(buffer), length as u32, WRITE, 0);
        self.receive.offer(buffer);
        self.receive.publish();
    }

    /// Sends what was received into it.
    fn answer(&mut self, buffer: u16, length: u32) {
        let from = address(buffer);
        let (head, third) = (buffer * PIECES, length / 3);
        let own = self.transmit.descriptor(head);
        let table = TABLES + u64::from(buffer) * TABLE;
        match (length, self.turns % 3) {
            (0..3, _) | (_, 0) => descriptor(own, from, length, 0, 0),
            (_, 1) => pieces(own, head, from, length, third),
            _ => {
                pieces(table, 0, from, length, third);
                descriptor(own, table, 3 * 16, INDIRECT, 0);
            }
        }
        self.transmit.offer(head);
        self.transmit.publish();
    }

    pub fn step(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        while let Some((head, _)) = self.transmit.take() {
            let buffer = head / u32::from(PIECES);
            if buffer >= u32::from(COUNT) {
                report::increment(HVC_WRONG_OFFSET);
                continue;
            }
            self.listen(buffer as u16);
        }
        if let Some((buffer, length)) = self.receive.take() {
            if buffer >= u32::from(COUNT) || length == 0 || u64::from(length) > BUFFER {
                report::increment(HVC_WRONG_OFFSET);
                return;
            }
            report::write(HVC_ECHOED_OFFSET, report::read(HVC_ECHOED_OFFSET) + u64::from(length));
            self.answer(buffer as u16, length);
        }
        if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(HVC_STATE_OFFSET, DRIVER_BROKEN);
        }
    }
}

fn address(buffer: u16) -> u64 {
    BUFFERS + u64::from(buffer) * BUFFER
}

/// Three descriptors, of which the second is a byte shorter than the first, from number `first` of the table at `at`.
fn pieces(at: u64, first: u16, from: u64, length: u32, third: u32) {
    let second = third.saturating_sub(1).max(1);
    let rest = length - third - second;
    descriptor(at, from, third, NEXT, first + 1);
    descriptor(at + 16, from + u64::from(third), second, NEXT, first + 2);
    descriptor(at + 32, from + u64::from(third + second), rest, 0, 0);
}
