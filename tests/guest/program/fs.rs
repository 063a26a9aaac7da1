//! The first virtio file system of the machine, driven by the first vCPU (virtio 1.2, 5.11; include/uapi/linux/fuse.h): makes
//! the file `guest` in its root, and writes numbered, checksummed records into it, for ever.
//!
//! As with the disk, work is divided into lanes, each with one request under way, and places of its own.
//!
//! Touches the registers of PCI devices, and RAM from [`FS_ADDRESS`] on.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio file system.
const FS_DEVICE: u32 = 0x105a_1af4;
/// Features: version 1 in the second word.
const FEATURES: [u32; 2] = [0, 1];
/// The queue for what may not wait, which nothing here uses, and the first one for requests.
const HIGH_PRIORITY: u16 = 0;
const REQUESTS: u16 = 1;
/// Where a lane has its request and its reply.
const LANES_AT: u64 = FS_ADDRESS + 2 * RING_STEP;
const LANE_BYTES: u64 = 0x1000;
const REPLY_AT: u64 = 0x800;
/// Bytes of a request's header, and of a reply's; where in it its error is.
const IN_HEADER: u64 = 40;
const OUT_HEADER: u64 = 16;
const ERROR_AT: u64 = 4;
/// Operations, and the number of the root directory.
const FUSE_WRITE: u32 = 16;
const FUSE_INIT: u32 = 26;
const FUSE_CREATE: u32 = 35;
const ROOT: u64 = 1;
/// Version 7.31: before there were more flags.
const VERSION: [u32; 2] = [7, 31];
/// Bytes of the replies to them, without the header: `fuse_init_out`; `fuse_entry_out` and `fuse_open_out`; `fuse_write_out`.
const INIT_OUT: u32 = 64;
const ENTRY_OUT: u64 = 128;
const CREATE_OUT: u32 = 128 + 16;
const WRITE_OUT: u32 = 8;
/// Bytes of `fuse_write_in`.
const WRITE_IN: u64 = 40;
/// O_RDWR, and a regular file that its owner may read and write.
const READ_WRITE: u32 = 2;
const MODE: u32 = 0o100_600;

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    Nothing,
    Initializing,
    Creating,
    Writing,
}

pub struct Fs {
    common: u64,
    ring: Ring,
    nonce: u64,
    lanes: [(Doing, u64); FS_LANES],
    node: u64,
    handle: u64,
    turns: u64,
    working: bool,
}

fn fail(state: u64) -> Option<Fs> {
    report::write(FS_STATE_OFFSET, state);
    None
}

fn lane_at(lane: usize) -> u64 {
    LANES_AT + lane as u64 * LANE_BYTES
}

impl Fs {
    /// The file system, set up, if the command line asks for it.
    pub fn new(options: &Options, nonce: u64) -> Option<Self> {
        if !options.fs {
            return None;
        }
        let Some(function) = Function::find(FS_DEVICE) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let rings = (
            Ring::new(&function, HIGH_PRIORITY, FS_ADDRESS),
            Ring::new(&function, REQUESTS, FS_ADDRESS + RING_STEP),
        );
        let (Some(_), Some(ring)) = rings else {
            return fail(DRIVER_REFUSED);
        };
        function.go();
        let mut fs = Self {
            common: function.common,
            ring,
            nonce,
            lanes: [(Doing::Nothing, 0); FS_LANES],
            node: 0,
            handle: 0,
            turns: 0,
            working: true,
        };
        let body = lane_at(0) + IN_HEADER;
        for (at, word) in (body..).step_by(4).zip([VERSION[0], VERSION[1], 0, 0]) {
            write(at, word);
        }
        fs.ask(0, Doing::Initializing, FUSE_INIT, 0, 16, INIT_OUT);
        Some(fs)
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64) {
        if command == COMMAND_FS_REST {
            self.working = false;
        }
    }

    /// Asks for something, whose `bytes` after the header are in the lane already.
    fn ask(&mut self, lane: usize, doing: Doing, operation: u32, node: u64, bytes: u64, reply: u32) {
        self.lanes[lane].0 = doing;
        let at = lane_at(lane);
        let length = (IN_HEADER + bytes) as u32;
        write(at, length);
        write(at + 4, operation);
        write(at + 8, lane as u64 + 1);
        write(at + 16, node);
        // User, group and process: root, and nobody's.
        write(at + 24, 0_u64);
        write(at + 32, 0_u64);
        write(at + REPLY_AT, 0_u64);
        write(at + REPLY_AT + ERROR_AT, u32::MAX);
        let head = lane as u16 * 2;
        descriptor(self.ring.descriptor(head), at, length, NEXT, head + 1);
        let reply = OUT_HEADER as u32 + reply;
        descriptor(self.ring.descriptor(head + 1), at + REPLY_AT, reply, WRITE, 0);
        self.ring.offer(head);
        self.ring.publish();
    }

    fn create(&mut self) {
        let body = lane_at(0) + IN_HEADER;
        for (at, word) in (body..).step_by(4).zip([READ_WRITE, MODE, 0, 0]) {
            write(at, word);
        }
        write(body + 16, u64::from_le_bytes(*b"guest\0\0\0"));
        self.ask(0, Doing::Creating, FUSE_CREATE, ROOT, 16 + 6, CREATE_OUT);
    }

    fn write(&mut self, lane: usize) {
        self.lanes[lane].1 += 1;
        let number = self.lanes[lane].1;
        let body = lane_at(lane) + IN_HEADER;
        let place = fs_place(lane as u64, number) * FS_RECORD;
        // Handle, offset, length, flags, owner of locks, flags.
        for (at, word) in (body..).step_by(8).zip([self.handle, place, FS_RECORD, 0, 0]) {
            write(at, word);
        }
        for word in 0..FS_RECORD / 8 {
            let value = disk_word(lane as u64, number, self.nonce, word);
            write(body + WRITE_IN + 8 * word, value);
        }
        self.ask(lane, Doing::Writing, FUSE_WRITE, self.node, WRITE_IN + FS_RECORD, WRITE_OUT);
    }

    fn done(&mut self, head: u32) {
        let lane = (head / 2) as usize;
        if head % 2 != 0 || lane >= FS_LANES || self.lanes[lane].0 == Doing::Nothing {
            report::increment(FS_ERRORS_OFFSET);
            return;
        }
        let reply = lane_at(lane) + REPLY_AT;
        let (doing, number) = self.lanes[lane];
        self.lanes[lane].0 = Doing::Nothing;
        let right = read::<u32>(reply + ERROR_AT) == 0 && read::<u64>(reply + 8) == lane as u64 + 1;
        if !right {
            report::increment(FS_ERRORS_OFFSET);
            return;
        }
        match doing {
            Doing::Initializing => self.create(),
            Doing::Creating => {
                self.node = read(reply + OUT_HEADER);
                self.handle = read(reply + OUT_HEADER + ENTRY_OUT);
                report::write(FS_STATE_OFFSET, DRIVER_WORKING);
            }
            _ if read::<u32>(reply + OUT_HEADER) != FS_RECORD as u32 => {
                report::increment(FS_ERRORS_OFFSET);
            }
            _ => report::write(fs_lane_offset(lane), number),
        }
    }

    /// Takes what was done, and asks for more.
    pub fn step(&mut self) {
        if let Some((head, _)) = self.ring.take() {
            self.done(head);
        }
        self.turns = self.turns.wrapping_add(1);
        let idle = self.lanes.iter().position(|lane| lane.0 == Doing::Nothing);
        if let (true, true, Some(lane)) = (self.working, self.node != 0, idle) {
            self.write(lane);
        }
        if !self.working && self.lanes.iter().all(|lane| lane.0 == Doing::Nothing) {
            report::write(FS_STATE_OFFSET, DRIVER_RESTING);
        } else if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(FS_STATE_OFFSET, DRIVER_BROKEN);
        }
    }
}
