//! The first virtio disk of the machine, driven by the first vCPU through ECAM, its BAR and one virtqueue (virtio 1.2,
//! chapters 2, 4.1 and 5.2): numbered, checksummed blocks are written, read back and compared, for ever.
//!
//! Work is divided into lanes. Each has one request under way, and blocks of its own, so what a block must hold does not
//! depend on the order in which requests end. Each request is framed in another way: header, data and status in three
//! descriptors, in seven odd pieces, or behind an indirect table.
//!
//! Touches the registers of PCI devices, and RAM between the report and the image.

use core::sync::atomic::{Ordering, fence};

use crate::interrupts;
use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio block device.
const BLOCK_DEVICE: u32 = 0x1042_1af4;
/// MSI-X's enable bit.
const MSIX_ENABLE: u32 = 1 << 31;
/// Vector of the disk's interrupt (`interrupts`), and where a message for the first vCPU goes (Intel SDM volume 3A, 11.11).
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// Features: indirect descriptors and flush; version 1 in the second word.
const FEATURES: [u32; 2] = [1 << 28 | 1 << 9, 1];

/// Rings and buffers, between the report and the image.
const DESCRIPTORS: u64 = 0x11_0000;
const AVAILABLE: u64 = 0x11_2000;
const USED: u64 = 0x11_3000;
const LANES_AT: u64 = 0x12_0000;
/// A lane's memory: header, status and indirect table in its first page, data in the second.
const LANE_BYTES: u64 = 0x2000;
const HEADER_AT: u64 = 0;
const STATUS_AT: u64 = 0x40;
const TABLE_AT: u64 = 0x80;
const DATA_AT: u64 = 0x1000;
/// Descriptors of the queue, and of a lane.
const QUEUE: u16 = 256;
const LANE_DESCRIPTORS: u16 = QUEUE / DISK_LANES as u16;
/// Request types, and a status that no device writes.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const UNWRITTEN: u8 = 0xee;
/// Each so many writes, a lane flushes.
const FLUSH_EACH: u64 = 16;
/// Sectors of a block.
const SECTORS: u64 = DISK_BLOCK / 512;

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    Nothing,
    Writing,
    Flushing,
    Reading,
}

#[derive(Clone, Copy)]
struct Lane {
    doing: Doing,
    /// Number of the block that it writes or reads, from 1.
    number: u64,
}

pub struct Disk {
    function: Function,
    /// Configuration interrupts that were looked at.
    changes: u64,
    common: u64,
    notify: u64,
    nonce: u64,
    lanes: [Lane; DISK_LANES],
    /// Blocks that a lane has.
    blocks: u64,
    next_available: u16,
    next_used: u16,
    requests: u64,
    turns: u64,
    working: bool,
}

fn lane_at(lane: usize) -> u64 {
    LANES_AT + lane as u64 * LANE_BYTES
}

fn fail(state: u64) -> Option<Disk> {
    report::write(DISK_STATE_OFFSET, state);
    None
}

impl Disk {
    /// The disk, set up, if the command line asks for it.
    pub fn new(options: &Options, nonce: u64) -> Option<Self> {
        if !options.disk {
            return None;
        }
        match Function::find(BLOCK_DEVICE) {
            Some(function) => Self::on(function, options.disk_irq, nonce),
            None => fail(DRIVER_ABSENT),
        }
    }

    /// The disk of that PCI device number, set up, if there is one.
    pub fn at(slot: u64, options: &Options, nonce: u64) -> Option<Self> {
        Self::on(Function::at(slot, BLOCK_DEVICE)?, options.disk_irq, nonce)
    }

    fn on(function: Function, irq: bool, nonce: u64) -> Option<Self> {
        for lane in 0..DISK_LANES {
            report::write(disk_lane_offset(lane), 0);
        }
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let Function { common, msix, .. } = function;
        if irq {
            let table = function.msix_table();
            let vectors = [interrupts::DISK_VECTOR, interrupts::DISK_CHANGE_VECTOR];
            for (entry, vector) in (0..).zip(vectors) {
                for (at, value) in (0..).zip([MESSAGE_ADDRESS, 0, vector, 0]) {
                    write(table + 16 * entry + 4 * at, value);
                }
            }
            write(common + CONFIG_VECTOR, 1_u16);
            write(msix, read::<u32>(msix) | MSIX_ENABLE);
        }
        write(common + QUEUE_SELECT, 0_u16);
        write(common + QUEUE_SIZE, QUEUE);
        if irq {
            write(common + QUEUE_VECTOR, 0_u16);
        }
        for at in (DESCRIPTORS..LANES_AT).step_by(8) {
            write(at, 0_u64);
        }
        let notify = function.enable_queue([DESCRIPTORS, AVAILABLE, USED]);
        function.go();
        let capacity = function.config_word(0);
        let blocks = (capacity / SECTORS / DISK_LANES as u64).min(DISK_LANE_BLOCKS);
        if blocks == 0 || read::<u16>(common + QUEUE_SIZE) != QUEUE {
            return fail(DRIVER_REFUSED);
        }
        report::write(DISK_BYTES_OFFSET, capacity * 512);
        report::write(DISK_BLOCK_SIZE_OFFSET, block_size(&function));
        report::write(DISK_LANE_BLOCKS_OFFSET, blocks);
        report::write(DISK_STATE_OFFSET, DRIVER_WORKING);
        Some(Self {
            function,
            changes: interrupts::disk_changes(),
            common,
            notify,
            nonce,
            lanes: [Lane {
                doing: Doing::Nothing,
                number: 0,
            }; DISK_LANES],
            blocks,
            next_available: 0,
            next_used: 0,
            requests: 0,
            turns: 0,
            working: true,
        })
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64) {
        match command {
            COMMAND_DISK_REST => self.working = false,
            COMMAND_DISK_WORK => {
                self.working = true;
                report::write(DISK_STATE_OFFSET, DRIVER_WORKING);
            }
            _ => {}
        }
    }

    /// Its PCI device number.
    pub fn slot(&self) -> u64 {
        self.function.slot
    }

    /// Begins nothing any more; whether nothing is under way.
    pub fn rest(&mut self) -> bool {
        self.working = false;
        self.lanes.iter().all(|lane| lane.doing == Doing::Nothing)
    }

    /// Lets it be.
    pub fn leave(&self) {
        self.function.reset();
        report::write(DISK_STATE_OFFSET, DRIVER_ABSENT);
        report::write(DISK_FLYING_OFFSET, 0);
    }

    /// Takes what the device has done, and gives it more to do.
    pub fn step(&mut self) {
        report::write(DISK_INTERRUPTS_OFFSET, interrupts::disk_interrupts());
        let changes = interrupts::disk_changes();
        if changes != self.changes {
            self.changes = changes;
            report::write(DISK_BYTES_OFFSET, self.function.config_word(0) * 512);
            report::write(DISK_BLOCK_SIZE_OFFSET, block_size(&self.function));
            report::write(DISK_CHANGES_OFFSET, changes);
        }
        let used: u16 = read(USED + 2);
        // What the device wrote before it counted is read after.
        fence(Ordering::SeqCst);
        if self.next_used != used {
            let at = USED + 4 + u64::from(self.next_used % QUEUE) * 8;
            self.next_used = self.next_used.wrapping_add(1);
            self.done(read::<u32>(at));
        }
        self.turns = self.turns.wrapping_add(1);
        let mut flying = 0;
        let mut added = false;
        for lane in 0..DISK_LANES {
            if self.lanes[lane].doing != Doing::Nothing {
                flying += 1;
            } else if self.working && !added {
                // One a turn: a turn is short.
                self.begin(lane);
                flying += 1;
                added = true;
            }
        }
        report::write(DISK_FLYING_OFFSET, flying);
        if added {
            fence(Ordering::SeqCst);
            write(AVAILABLE + 2, self.next_available);
            fence(Ordering::SeqCst);
            if read::<u16>(USED) & NO_NOTIFY == 0 {
                write(self.notify, 0_u16);
            }
        }
        if !self.working && flying == 0 {
            report::write(DISK_STATE_OFFSET, DRIVER_RESTING);
        } else if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(DISK_STATE_OFFSET, DRIVER_BROKEN);
        }
    }

    /// Where a lane's block is, in sectors.
    fn sector(&self, lane: usize, number: u64) -> u64 {
        (lane as u64 + DISK_LANES as u64 * (number % self.blocks)) * SECTORS
    }

    fn begin(&mut self, lane: usize) {
        self.lanes[lane].number += 1;
        let number = self.lanes[lane].number;
        let data = lane_at(lane) + DATA_AT;
        for word in 0..DISK_BLOCK / 8 {
            write(data + 8 * word, disk_word(lane as u64, number, self.nonce, word));
        }
        self.submit(lane, Doing::Writing);
    }

    fn submit(&mut self, lane: usize, doing: Doing) {
        self.requests = self.requests.wrapping_add(1);
        self.lanes[lane].doing = doing;
        let at = lane_at(lane);
        let (kind, direction) = match doing {
            Doing::Reading => (IN, WRITE),
            Doing::Flushing => (FLUSH, 0),
            _ => (OUT, 0),
        };
        write(at + HEADER_AT, kind);
        write(at + HEADER_AT + 4, 0_u32);
        let sector = self.sector(lane, self.lanes[lane].number);
        write(at + HEADER_AT + 8, if kind == FLUSH { 0 } else { sector });
        write(at + STATUS_AT, UNWRITTEN);
        let (header, data, status) = (at + HEADER_AT, at + DATA_AT, at + STATUS_AT);
        let head = lane as u16 * LANE_DESCRIPTORS;
        let own = DESCRIPTORS + u64::from(head) * 16;
        let block = DISK_BLOCK as u32;
        let flush = [(header, 16, 0), (status, 1, WRITE)];
        let plain = [(header, 16, 0), (data, block, direction), (status, 1, WRITE)];
        let odd = [
            (header, 7, 0),
            (header + 7, 9, 0),
            (data, 1000, direction),
            (data + 1000, 1, direction),
            (data + 1001, 95, direction),
            (data + 1096, block - 1096, direction),
            (status, 1, WRITE),
        ];
        match (doing, self.requests % 3) {
            (Doing::Flushing, _) => chain(own, head, &flush),
            (_, 0) => chain(own, head, &plain),
            (_, 1) => chain(own, head, &odd),
            _ => {
                chain(at + TABLE_AT, 0, &odd);
                descriptor(own, at + TABLE_AT, odd.len() as u32 * 16, INDIRECT, 0);
            }
        }
        let entry = AVAILABLE + 4 + u64::from(self.next_available % QUEUE) * 2;
        write(entry, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// The device says that it is done with a request.
    fn done(&mut self, head: u32) {
        let lane = (head / u32::from(LANE_DESCRIPTORS)) as usize;
        let known = head % u32::from(LANE_DESCRIPTORS) == 0 && lane < DISK_LANES;
        if !known || self.lanes[lane].doing == Doing::Nothing {
            report::increment(DISK_EXTRA_OFFSET);
            return;
        }
        report::increment(DISK_DONE_OFFSET);
        let Lane { doing, number } = self.lanes[lane];
        if read::<u8>(lane_at(lane) + STATUS_AT) != 0 {
            report::increment(DISK_ERRORS_OFFSET);
        }
        let data = lane_at(lane) + DATA_AT;
        let next = match doing {
            Doing::Writing => {
                report::write(disk_lane_offset(lane), number);
                for word in 0..DISK_BLOCK / 8 {
                    write(data + 8 * word, 0_u64);
                }
                if number % FLUSH_EACH == 0 {
                    Doing::Flushing
                } else {
                    Doing::Reading
                }
            }
            Doing::Flushing => Doing::Reading,
            _ => {
                let right = (0..DISK_BLOCK / 8).all(|word| {
                    read::<u64>(data + 8 * word) == disk_word(lane as u64, number, self.nonce, word)
                });
                if !right {
                    report::increment(DISK_WRONG_OFFSET);
                }
                self.lanes[lane].doing = Doing::Nothing;
                return;
            }
        };
        self.submit(lane, next);
        fence(Ordering::SeqCst);
        write(AVAILABLE + 2, self.next_available);
        fence(Ordering::SeqCst);
        if read::<u16>(USED) & NO_NOTIFY == 0 {
            write(self.notify, 0_u16);
        }
    }
}

/// Writes a chain of descriptors from `at` on, which is number `first` of its table.
fn chain(at: u64, first: u16, parts: &[(u64, u32, u16)]) {
    let last = parts.len() - 1;
    for (index, (address, length, flags)) in parts.iter().enumerate() {
        let more = if index < last { NEXT } else { 0 };
        let next = first + index as u16 + 1;
        descriptor(at + 16 * index as u64, *address, *length, flags | more, next);
    }
}

/// What the disk says that its blocks are, in bytes (5.2.4).
fn block_size(function: &Function) -> u64 {
    function.config_word(20) & 0xFFFF_FFFF
}
