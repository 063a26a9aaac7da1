//! The virtio balloon of the machine, driven by the first vCPU, as far as free page reporting goes: on command it fills
//! memory of its own, and on command it says that it does not use it.
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

pub struct Balloon {
    ring: Ring,
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
        let Some(ring) = Ring::new(&function, REPORT, RING) else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        report::write(BALLOON_STATE_OFFSET, DRIVER_WORKING);
        Some(Self { ring })
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

    /// Takes a report back that the device has dealt with.
    pub fn step(&mut self) {
        if self.ring.take().is_some() {
            report::increment(BALLOON_REPORTED_OFFSET);
        }
    }
}
