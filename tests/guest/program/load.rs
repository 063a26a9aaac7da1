//! I/O as fast as it goes, for benchmarks: the first disk or the first network interface, driven by the first vCPU without
//! interrupts. It looks at nothing but the status of each request; `disk` and `net` are the ones that check.
//!
//! Touches the registers of PCI devices, and RAM beyond [`LOAD_ADDRESS`].

use crate::heartbeat::tsc;
use crate::layout::*;
use crate::options::{Load as Wish, Options};
use crate::report;
use crate::virtio::*;

const BLOCK_DEVICE: u32 = 0x1042_1af4;
const NET_DEVICE: u32 = 0x1041_1af4;
/// Version 1, in the second word.
const FEATURES: [u32; 2] = [0, 1];
/// Bytes of a network packet's header.
const NET_HEADER: u64 = 12;
/// Request types of a disk; a status that no device writes.
const IN: u32 = 0;
const OUT: u32 = 1;
const UNWRITTEN: u8 = 0xee;
const SECTOR: u64 = 512;
/// Two rings, then headers and statuses, then data.
const HEADERS: u64 = LOAD_ADDRESS + 2 * RING_STEP;
const DATA: u64 = LOAD_ADDRESS + (1 << 20);
/// Descriptors of a request: header, data, status.
const PARTS: u16 = 3;
/// Packets under way each way, a descriptor each.
const PACKETS: u16 = 256;
/// The room of a packet that is received.
const PACKET_ROOM: u64 = 2048;
/// To everybody, from an address that nobody has, of a protocol for experiments.
const FRAME: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 0x42, 0x88, 0xb6];

enum Device {
    Disk,
    Sender,
    Receiver,
}

pub struct Load {
    device: Device,
    ring: Ring,
    bytes: u64,
    write: bool,
    random: bool,
    /// Requests of `bytes` that the disk has room for, and which is next.
    places: u64,
    next: u64,
    state: u64,
    done: u64,
}

fn fail(state: u64) -> Option<Load> {
    report::write(LOAD_STATE_OFFSET, state);
    None
}

impl Load {
    /// The device, set up and given as much to do as it takes, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        let load = match &options.load {
            Wish { bytes: 0, .. } => return None,
            load => load,
        };
        let (id, queue) = match (load.send, load.receive) {
            (true, _) => (NET_DEVICE, 1),
            (_, true) => (NET_DEVICE, 0),
            _ => (BLOCK_DEVICE, 0),
        };
        let Some(function) = Function::find(id) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let Some(ring) = Ring::new(&function, queue, LOAD_ADDRESS) else {
            return fail(DRIVER_REFUSED);
        };
        ring.refuse_interrupts();
        function.go();
        let mut made = Self {
            device: match (load.send, load.receive) {
                (true, _) => Device::Sender,
                (_, true) => Device::Receiver,
                _ => Device::Disk,
            },
            ring,
            bytes: load.bytes,
            write: load.write,
            random: load.random,
            places: 0,
            next: 0,
            state: tsc() | 1,
            done: 0,
        };
        let under_way = if let Device::Disk = made.device {
            made.places = function.config_word(0) * SECTOR / load.bytes;
            let depth = (load.depth as u16).clamp(1, 256 / PARTS);
            if made.places < u64::from(depth) {
                return fail(DRIVER_REFUSED);
            }
            depth
        } else {
            PACKETS
        };
        for number in 0..under_way {
            made.prepare(number);
            made.submit(number);
        }
        made.ring.publish();
        report::write(LOAD_STATE_OFFSET, DRIVER_WORKING);
        Some(made)
    }

    /// Takes what was done, and gives the device as much again.
    pub fn step(&mut self) {
        let before = self.done;
        while let Some((head, _)) = self.ring.take() {
            let number = match self.device {
                Device::Disk => head as u16 / PARTS,
                Device::Sender | Device::Receiver => head as u16,
            };
            if let Device::Disk = self.device {
                let status = Self::header(number) + 16;
                if read::<u8>(status) != 0 {
                    report::increment(LOAD_ERRORS_OFFSET);
                }
                write(status, UNWRITTEN);
            }
            self.done += 1;
            self.submit(number);
        }
        if self.done != before {
            self.ring.publish();
            report::write(LOAD_DONE_OFFSET, self.done);
        }
    }

    fn header(number: u16) -> u64 {
        HEADERS + 64 * u64::from(number)
    }

    /// What stays the same in every request of that number.
    fn prepare(&mut self, number: u16) {
        match self.device {
            Device::Disk => {
                let head = PARTS * number;
                let (header, data) = (
                    Self::header(number),
                    DATA + u64::from(number) * self.bytes,
                );
                write(header, if self.write { OUT } else { IN });
                write(header + 4, 0_u32);
                write(header + 16, UNWRITTEN);
                let flags = NEXT | if self.write { 0 } else { WRITE };
                let at = |part| self.ring.descriptor(head + part);
                descriptor(at(0), header, 16, NEXT, head + 1);
                descriptor(at(1), data, self.bytes as u32, flags, head + 2);
                descriptor(at(2), header + 16, 1, WRITE, 0);
            }
            Device::Sender => {
                let at = DATA + u64::from(number) * PACKET_ROOM;
                for offset in (0..PACKET_ROOM).step_by(8) {
                    write(at + offset, 0_u64);
                }
                for (offset, byte) in (NET_HEADER..).zip(FRAME) {
                    write(at + offset, byte);
                }
                let length = (NET_HEADER + self.bytes) as u32;
                descriptor(self.ring.descriptor(number), at, length, 0, 0);
            }
            Device::Receiver => {
                let at = DATA + u64::from(number) * PACKET_ROOM;
                let length = PACKET_ROOM as u32;
                descriptor(self.ring.descriptor(number), at, length, WRITE, 0);
            }
        }
    }

    fn submit(&mut self, number: u16) {
        if let Device::Disk = self.device {
            let place = if self.random {
                // Xorshift (Marsaglia, 2003).
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.state % self.places
            } else {
                self.next += 1;
                self.next % self.places
            };
            let sector = place * (self.bytes / SECTOR);
            write(Self::header(number) + 8, sector);
            self.ring.offer(PARTS * number);
        } else {
            self.ring.offer(number);
        }
    }
}
