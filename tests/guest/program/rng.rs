//! The entropy device of the machine, driven by the first vCPU (virtio 1.2, 5.4): asks for random bytes, for ever, with all of its
//! requests under way, and takes no two answers that are alike.
//!
//! Touches the registers of PCI devices, and RAM between the virtio console's tables and the image.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern entropy device.
const ENTROPY_DEVICE: u32 = 0x1044_1af4;
/// Features: descriptors in tables of their own; version 1 in the second word.
const FEATURES: [u32; 2] = [1 << 28, 1];
/// Rings, then buffers, then each buffer's table.
const RINGS: u64 = 0x1f_b000;
const BUFFERS: u64 = RINGS + RING_STEP;
const BUFFER: u64 = 0x40;
const TABLES: u64 = BUFFERS + COUNT as u64 * BUFFER;
const TABLE: u64 = 0x40;
/// Requests under way, and the descriptors that each takes.
const COUNT: u16 = 16;
const PIECES: u16 = 3;

pub struct Rng {
    common: u64,
    ring: Ring,
    /// The first word of each request's last answer; none while it is not under way.
    last: [Option<u64>; COUNT as usize],
    turns: u64,
}

fn fail(state: u64) -> Option<Rng> {
    report::write(RNG_STATE_OFFSET, state);
    None
}

impl Rng {
    /// The device, set up, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        if !options.rng {
            return None;
        }
        let Some(function) = Function::find(ENTROPY_DEVICE) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let Some(ring) = Ring::new(&function, 0, RINGS) else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        report::write(RNG_STATE_OFFSET, DRIVER_WORKING);
        let mut rng = Self {
            common: function.common,
            ring,
            last: [None; COUNT as usize],
            turns: 0,
        };
        for request in 0..COUNT {
            rng.ask(request, 0);
        }
        Some(rng)
    }

    /// Asks for a buffer full, whole, in three pieces, or by an indirect table, in turn.
    fn ask(&mut self, request: u16, last: u64) {
        self.last[usize::from(request)] = Some(last);
        let (head, at) = (request * PIECES, address(request));
        let own = self.ring.descriptor(head);
        let table = TABLES + u64::from(request) * TABLE;
        let length = BUFFER as u32;
        match self.turns % 3 {
            0 => descriptor(own, at, length, WRITE, 0),
            1 => pieces(own, head, at),
            _ => {
                pieces(table, 0, at);
                descriptor(own, table, u32::from(PIECES) * 16, INDIRECT, 0);
            }
        }
        self.ring.offer(head);
        self.ring.publish();
    }

    pub fn step(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        if let Some((head, written)) = self.ring.take() {
            let request = (head / u32::from(PIECES)) as u16;
            let known = head % u32::from(PIECES) == 0 && request < COUNT;
            let last = if known { self.last[usize::from(request)].take() } else { None };
            let Some(last) = last else {
                report::increment(RNG_WRONG_OFFSET);
                return;
            };
            let (first, end) = (address(request), address(request) + BUFFER);
            let words = || (first..end).step_by(8).map(read::<u64>);
            // Of 2^64 words none comes again before long.
            let fresh = words().all(|word| word != 0 && word != last);
            if u64::from(written) != BUFFER || !fresh {
                report::increment(RNG_WRONG_OFFSET);
            }
            report::increment(RNG_DONE_OFFSET);
            let last = read(first);
            for word in (first..end).step_by(8) {
                write(word, 0_u64);
            }
            self.ask(request, last);
        }
        if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(RNG_STATE_OFFSET, DRIVER_BROKEN);
        }
    }
}

fn address(request: u16) -> u64 {
    BUFFERS + u64::from(request) * BUFFER
}

/// Three descriptors of odd lengths, from number `first` of the table at `at`.
fn pieces(at: u64, first: u16, buffer: u64) {
    let rest = BUFFER as u32 - 8;
    descriptor(at, buffer, 1, WRITE | NEXT, first + 1);
    descriptor(at + 16, buffer + 1, 7, WRITE | NEXT, first + 2);
    descriptor(at + 32, buffer + 8, rest, WRITE, 0);
}
