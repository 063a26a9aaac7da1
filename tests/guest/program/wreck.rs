//! Virtio devices that nothing else here drives, driven as no driver should: registers at random, rings anywhere and moved while
//! they are in use, chains with loops, lengths that overflow, buffers where there is no RAM, notifications by the hundred, and
//! resets in the middle of it.
//!
//! Touches the registers of PCI devices, and RAM from [`WRECK_ADDRESS`] on. No address that a device is given lies
//! in RAM before it: what a device then did there would be this program's own doing. Nor is a balloon among them, which takes any
//! number for that of a page, and frees it.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor of virtio's devices, and what a device id begins with, to which its type is added (4.1.2).
const VENDOR: u32 = 0x1af4;
const MODERN: u32 = 0x1040;
const NET: u32 = 1;
const BLOCK: u32 = 2;
const BALLOON: u32 = 5;
const TYPES: u32 = 0x40;
/// The most devices that are driven.
const MOST: usize = 8;
/// Rings of each device: descriptors, available ring and used ring of each of its first queues, then buffers.
const SIZE: u16 = 16;
const QUEUES: u16 = 3;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const QUEUE: u64 = 0x1000;
const DEVICE: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4000;
/// Where no RAM is: in front of the registers of PCI devices.
const HOLE: u64 = 0xd000_0000;
/// A status that a driver has reached in the end (2.1).
const READY: u8 = 15;

struct Victim {
    function: Function,
    rings: u64,
    bar: u32,
    next: [u16; QUEUES as usize],
}

pub struct Wreck {
    victims: [Option<Victim>; MOST],
    chance: u64,
    resting: bool,
    stacked: bool,
}

impl Wreck {
    /// All devices but those that the command line has for something else, if it asks for that.
    pub fn new(options: &Options, nonce: u64) -> Option<Self> {
        if !options.wreck {
            return None;
        }
        let (mut disk, mut net) = (options.disk, options.net);
        let mut spared = |slot: u64| {
            let id = read::<u32>(ECAM + (slot << 15));
            let kind = (id >> 16).wrapping_sub(MODERN);
            if id & 0xffff != VENDOR || kind >= TYPES || kind == BALLOON {
                return true;
            }
            // The first of each is driven.
            (kind == BLOCK && core::mem::take(&mut disk)) || (kind == NET && core::mem::take(&mut net))
        };
        let mut slots = (0..SLOTS).filter(|slot| !spared(*slot));
        let mut rings = WRECK_ADDRESS;
        let victims = core::array::from_fn(|_| {
            let slot = slots.next()?;
            let function = Function::at(slot, read(ECAM + (slot << 15)))?;
            let own = rings;
            rings += DEVICE;
            report::increment(WRECK_DEVICES_OFFSET);
            Some(Victim {
                bar: read(function.function + BAR0),
                function,
                rings: own,
                next: [0; QUEUES as usize],
            })
        });
        if options.stack {
            let place = victims[0].as_ref().map_or(0, |first| first.bar);
            for victim in victims.iter().flatten() {
                write(victim.function.function + BAR0, place);
                write(victim.function.function + COMMAND, ENABLE_DEVICE);
            }
        }
        report::write(WRECK_STATE_OFFSET, DRIVER_WORKING);
        Some(Self {
            victims,
            chance: nonce | 1,
            resting: false,
            stacked: options.stack,
        })
    }

    pub fn obey(&mut self, command: u64) {
        self.resting |= command == COMMAND_WRECK_REST;
    }

    pub fn step(&mut self) {
        if self.stacked {
            return;
        }
        if self.resting {
            return self.rest();
        }
        let chance = &mut self.chance;
        let index = random(chance) as usize % MOST;
        if let Some(victim) = &mut self.victims[index] {
            victim.suffer(chance);
            report::increment(WRECK_TURNS_OFFSET);
        }
    }

    /// Drives all as they should be.
    fn rest(&mut self) {
        let mut well = 0;
        for victim in self.victims.iter_mut().flatten() {
            if victim.status() == READY {
                well += 1;
            } else {
                victim.bring_up();
            }
        }
        report::write(WRECK_WELL_OFFSET, well);
        report::write(WRECK_STATE_OFFSET, DRIVER_RESTING);
    }
}

/// Xorshift: never 0.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 8
}

impl Victim {
    fn status(&self) -> u8 {
        read(self.function.common + STATUS)
    }

    fn select(&self, queue: u16) {
        write(self.function.common + QUEUE_SELECT, queue);
    }

    /// All that a driver does until it is ready, unless the last reset is not over yet.
    fn bring_up(&mut self) {
        let common = self.function.common;
        write(common + STATUS, 0_u8);
        if self.status() != 0 {
            return;
        }
        write(common + STATUS, 3_u8);
        for select in 0..2_u32 {
            write(common + DEVICE_FEATURE_SELECT, select);
            let features: u32 = read(common + DEVICE_FEATURE);
            write(common + DRIVER_FEATURE_SELECT, select);
            write(common + DRIVER_FEATURE, features);
        }
        write(common + STATUS, 11_u8);
        for queue in 0..QUEUES {
            self.select(queue);
            if read::<u16>(common + QUEUE_SIZE) == 0 {
                continue;
            }
            let at = self.queue(queue);
            for word in (at..at + QUEUE).step_by(8) {
                write(word, 0_u64);
            }
            write(common + QUEUE_SIZE, SIZE);
            self.function.enable_queue([at, at + AVAILABLE, at + USED]);
        }
        self.next = [0; QUEUES as usize];
        write(common + STATUS, READY);
    }

    fn queue(&self, queue: u16) -> u64 {
        self.rings + QUEUE * u64::from(queue)
    }

    /// Some place that a device may be given.
    fn place(&self, chance: &mut u64) -> u64 {
        let any = random(chance);
        match any % 8 {
            0 => HOLE + (any >> 8) % 0x1000_0000,
            1 => u64::MAX - (any >> 8) % 0x100,
            2 => 1 << 63 | any,
            _ => self.rings + BUFFERS + (any >> 8) % (DEVICE - BUFFERS),
        }
    }

    fn suffer(&mut self, chance: &mut u64) {
        let any = random(chance);
        let (common, queue) = (self.function.common, (any >> 32) as u16 % QUEUES);
        match any % 16 {
            0 => self.bring_up(),
            1 => {
                // Below the registers that say where rings are.
                let at = common + (any >> 8) % 0x20;
                match any >> 16 & 3 {
                    0 => write(at & !1, random(chance) as u16),
                    1 => write(at & !3, random(chance) as u32),
                    _ => write(at, random(chance) as u8),
                }
            }
            2 => {
                self.select(queue);
                let (register, place) = (QUEUE_RINGS[(any >> 8) as usize % 3], self.place(chance));
                write(common + register, place as u32);
                write(common + register + 4, (place >> 32) as u32);
            }
            3 => write(self.function.device + (any >> 8) % 64, random(chance) as u8),
            4 => self.configure(chance),
            5 => {
                self.select(queue);
                let notify = self.function.notified_at();
                for _ in 0..256 {
                    write(notify, queue);
                }
            }
            6 => {
                self.offer(queue, chance);
                write(common + STATUS, 0_u8);
            }
            7 => write(common + STATUS, random(chance) as u8),
            _ => self.offer(queue, chance),
        }
        if self.status() & NEEDS_RESET != 0 {
            report::increment(WRECK_BROKEN_OFFSET);
            self.bring_up();
        }
    }

    /// Configuration space at random, but for where it is and whether its interrupts go anywhere.
    fn configure(&self, chance: &mut u64) {
        let (any, function) = (random(chance), self.function.function);
        match any % 4 {
            0 => write(function + COMMAND, (any >> 8) as u16),
            1 => write(function + BAR0 + (any >> 8) % 6 * 4, u32::MAX),
            2 => write(self.function.msix + 2, (any >> 8) as u16 & 0x4000),
            _ => write(function + 0x3c, any as u8),
        }
        write(function + BAR0, self.bar);
        write(function + COMMAND, ENABLE_DEVICE);
    }

    /// A chain that a device may like, or none.
    fn offer(&mut self, queue: u16, chance: &mut u64) {
        let (at, any) = (self.queue(queue), random(chance));
        let count = 1 + any as u16 % 4;
        let header = self.rings + BUFFERS;
        // What a disk is asked, and a packet's or a command's first words.
        write(header, (any >> 8) as u32 % 16);
        write(header + 4, 0_u32);
        write(header + 8, (any >> 16) % 0x4000);
        for number in 0..count {
            let any = random(chance);
            let last = number + 1 == count;
            let place = match number {
                0 if any & 0x10 == 0 => header,
                _ => self.place(chance),
            };
            let length = match any >> 8 & 7 {
                0 => u32::MAX - (any >> 32) as u32 % 16,
                1 => 0,
                2 => 1,
                3 => 16,
                _ => (any >> 32) as u32 % 0x1000,
            };
            let mut flags = if last { 0 } else { NEXT };
            if number > 0 {
                flags |= WRITE;
            }
            let mut next = number + 1;
            match any >> 16 & 31 {
                0 => flags = (any >> 40) as u16,
                // It follows itself, or one before it, or one that is none.
                1 => (flags, next) = (flags | NEXT, (any >> 40) as u16 % (2 * SIZE)),
                // A table that is in itself.
                2 => {
                    descriptor(at + 16 * u64::from(number), at, 256, INDIRECT, 0);
                    continue;
                }
                _ => {}
            }
            descriptor(at + 16 * u64::from(number), place, length, flags, next);
        }
        let next = &mut self.next[usize::from(queue)];
        let entry = u64::from(*next % SIZE);
        let head = if any >> 48 & 31 == 0 { (any >> 53) as u16 } else { 0 };
        write(at + AVAILABLE + 4 + 2 * entry, head);
        *next = match any >> 40 & 31 {
            0 => (any >> 20) as u16,
            _ => next.wrapping_add(1),
        };
        write(at + AVAILABLE + 2, *next);
        self.select(queue);
        write(self.function.notified_at(), queue);
    }
}
