//! The virtio balloon of the machine, driven by the first vCPU: on command it fills memory of its own, and on command it says
//! that it does not use it. As the device wants, it puts pages of the same memory into the balloon, or takes them back.
//!
//! Touches the registers of PCI devices, and RAM from [`BALLOON_ADDRESS`] on.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio balloon.
const BALLOON_DEVICE: u32 = 0x1045_1af4;
/// Features: free page reporting; version 1 in the second word.
const FEATURES: [u32; 2] = [1 << 5, 1];
/// The queue to report by: those for statistics and hints are not there.
const REPORT: u16 = 2;
const RING: u64 = 0x1d_8000;
/// Parts that are reported at once.
const PARTS: u16 = 4;
/// The other queues, where they and their numbers are, and the most pages of one request.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const NUMBERS: u64 = BALLOON_RINGS + 2 * RING_STEP;
const BATCH: u32 = 256;
/// Pages that it can give up.
const PAGES: u32 = (BALLOON_BYTES / 4096) as u32;
/// Device configuration: pages that are wanted, and pages that are in it.
const WANTED: u64 = 0;
const ACTUAL: u64 = 4;
/// Turns from one look at what is wanted to the next: each is an exit.
const LOOK: u32 = 512;

pub struct Balloon {
    ring: Ring,
    /// To inflate, and to deflate.
    pages: [Ring; 2],
    config: u64,
    /// Pages in it, and pages of the request in flight, which is one of inflating or not.
    actual: u32,
    moving: Option<(bool, u32)>,
    turns: u32,
}

fn fail(state: u64) -> Option<Balloon> {
    report::write(BALLOON_STATE_OFFSET, state);
    None
}

impl Balloon {
    /// The balloon, set up, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        if !options.balloon {
            return None;
        }
        let Some(function) = Function::find(BALLOON_DEVICE) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let rings = (
            Ring::new(&function, REPORT, RING),
            Ring::new(&function, INFLATE, BALLOON_RINGS),
            Ring::new(&function, DEFLATE, BALLOON_RINGS + RING_STEP),
        );
        let (Some(ring), Some(inflate), Some(deflate)) = rings else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        report::write(BALLOON_STATE_OFFSET, DRIVER_WORKING);
        Some(Self {
            ring,
            pages: [inflate, deflate],
            config: function.device,
            actual: 0,
            moving: None,
            turns: 0,
        })
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64) {
        match command {
            COMMAND_BALLOON_FILL => {
                for at in (BALLOON_ADDRESS..BALLOON_ADDRESS + BALLOON_BYTES).step_by(4096) {
                    write(at, at);
                }
                report::increment(BALLOON_FILLED_OFFSET);
            }
            COMMAND_BALLOON_REPORT => {
                let length = BALLOON_BYTES / u64::from(PARTS);
                for part in 0..PARTS {
                    let last = part + 1 == PARTS;
                    let flags = if last { WRITE } else { WRITE | NEXT };
                    let at = BALLOON_ADDRESS + u64::from(part) * length;
                    let next = (part + 1) % PARTS;
                    descriptor(self.ring.descriptor(part), at, length as u32, flags, next);
                }
                self.ring.offer(0);
                self.ring.publish();
            }
            _ => {}
        }
    }

    /// Puts pages in, or takes them back, until there are as many as are wanted; the last ones in are the first out.
    fn balance(&mut self) {
        let [inflate, deflate] = &mut self.pages;
        if let Some((inflating, count)) = self.moving {
            let ring = if inflating { inflate } else { deflate };
            if ring.take().is_some() {
                self.moving = None;
                self.actual = if inflating {
                    self.actual + count
                } else {
                    self.actual - count
                };
                write(self.config + ACTUAL, self.actual);
            }
            return;
        }
        self.turns += 1;
        if self.turns < LOOK {
            return;
        }
        let wanted = read::<u32>(self.config + WANTED).min(PAGES);
        if wanted == self.actual {
            self.turns = 0;
            return;
        }
        let inflating = wanted > self.actual;
        let count = wanted.abs_diff(self.actual).min(BATCH);
        let first = if inflating {
            self.actual
        } else {
            self.actual - count
        };
        for index in 0..count {
            let number = (BALLOON_ADDRESS >> 12) as u32 + first + index;
            write(NUMBERS + 4 * u64::from(index), number);
        }
        let ring = if inflating { inflate } else { deflate };
        descriptor(ring.descriptor(0), NUMBERS, 4 * count, 0, 0);
        ring.offer(0);
        ring.publish();
        self.moving = Some((inflating, count));
    }

    /// Takes a report back that the device has dealt with, and goes on with the pages.
    pub fn step(&mut self) {
        self.balance();
        if self.ring.take().is_some() {
            report::increment(BALLOON_REPORTED_OFFSET);
        }
    }
}
