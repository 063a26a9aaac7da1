//! The virtio socket device of the machine, driven by the first vCPU: connects to a port of the host, takes every
//! connection that comes, and sends back on each what came on it.
//!
//! Each connection has a ring of its own for what it has to send back, so that it holds no buffer of the device.
//!
//! Touches the registers of PCI devices, and RAM between the network's buffers and the image.

use crate::layout::*;
use crate::options::Options;
use crate::report;
use crate::virtio::*;

/// Vendor and device id of a modern virtio socket device.
const VSOCK_DEVICE: u32 = 0x1053_1af4;
/// Features: none of its own; version 1 in the second word.
const FEATURES: [u32; 2] = [0, 1];
/// Bytes of a header, and the host's context id.
const HEADER: u64 = 44;
const HOST: u64 = 2;
/// Operations, and flags of a shutdown.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const NO_SEND: u32 = 2;

/// Echoes, transmit buffers, rings and receive buffers.
const ECHOES: u64 = 0x1a_0000;
const ECHO: u64 = 0x2000;
const TRANSMIT_BUFFERS: u64 = 0x1c_0000;
const TRANSMIT_BUFFER: u64 = 0x800;
const TRANSMITS: u16 = 32;
const RINGS: u64 = 0x1d_0000;
const RECEIVE_BUFFERS: u64 = 0x1e_0000;
const RECEIVE_BUFFER: u64 = 0x400;
const RECEIVES: u16 = 64;
/// As many as have room for their echoes. More than the host's programs have open: what a test has closed stays open for as long
/// as a child that it has forked meanwhile has not executed anything.
const CONNECTIONS: usize = 16;
/// The port that it connects from.
const OWN_PORT: u32 = 1000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Free,
    Asked,
    Open,
}

#[derive(Clone, Copy)]
struct Connection {
    stage: Stage,
    own: u32,
    theirs: u32,
    /// The packet that it owes besides data; 0 for none.
    owes: u16,
    /// The other side sends no more; with nothing left to echo, it ends.
    ends: bool,
    /// Bytes that came, that were sent back, and how many the host was told of.
    came: u32,
    gone: u32,
    told: u32,
    /// The host's room, and what it has made free.
    room: u32,
    freed: u32,
}

const FREE: Connection = Connection {
    stage: Stage::Free,
    own: 0,
    theirs: 0,
    owes: 0,
    ends: false,
    came: 0,
    gone: 0,
    told: 0,
    room: 0,
    freed: 0,
};

pub struct Vsock {
    common: u64,
    cid: u64,
    receive: Ring,
    transmit: Ring,
    /// Transmit buffers that are free, one a bit.
    free: u32,
    connections: [Connection; CONNECTIONS],
    /// A refusal that somebody is owed: own port, theirs.
    refusal: Option<(u32, u32)>,
    port: u32,
    turns: u64,
}

fn fail(state: u64) -> Option<Vsock> {
    report::write(VSOCK_STATE_OFFSET, state);
    None
}

impl Vsock {
    /// The device, set up, if the command line asks for it.
    pub fn new(options: &Options) -> Option<Self> {
        let port = options.vsock?;
        let Some(function) = Function::find(VSOCK_DEVICE) else {
            return fail(DRIVER_ABSENT);
        };
        if !function.agree(FEATURES) {
            return fail(DRIVER_REFUSED);
        }
        let ring = |queue: u16| Ring::new(&function, queue, RINGS + u64::from(queue) * RING_STEP);
        let (Some(mut receive), Some(transmit)) = (ring(0), ring(1)) else {
            return fail(DRIVER_REFUSED);
        };
        for buffer in 0..RECEIVES {
            let address = RECEIVE_BUFFERS + u64::from(buffer) * RECEIVE_BUFFER;
            let at = receive.descriptor(buffer);
            descriptor(at, address, RECEIVE_BUFFER as u32, WRITE, 0);
            receive.offer(buffer);
        }
        function.go();
        receive.publish();
        report::write(VSOCK_STATE_OFFSET, DRIVER_WORKING);
        let mut vsock = Self {
            common: function.common,
            cid: read(function.device),
            receive,
            transmit,
            free: u32::MAX,
            connections: [FREE; CONNECTIONS],
            refusal: None,
            port: port as u32,
            turns: 0,
        };
        vsock.connect();
        Some(vsock)
    }

    /// One of `layout`'s commands.
    pub fn obey(&mut self, command: u64) {
        if command == COMMAND_VSOCK_CONNECT {
            self.connect();
        }
    }

    fn connect(&mut self) {
        if self.port == 0 || self.find(OWN_PORT, self.port).is_some() {
            return;
        }
        if let Some(connection) = self.connections.iter_mut().find(|one| one.stage == Stage::Free) {
            *connection = Connection {
                stage: Stage::Asked,
                own: OWN_PORT,
                theirs: self.port,
                owes: REQUEST,
                ..FREE
            };
        }
    }

    fn find(&mut self, own: u32, theirs: u32) -> Option<usize> {
        self.connections
            .iter()
            .position(|one| one.stage != Stage::Free && (one.own, one.theirs) == (own, theirs))
    }

    /// Takes a packet that came, and sends one for each connection that has something to send.
    pub fn step(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        while let Some((head, _)) = self.transmit.take() {
            self.free |= 1 << (head % u32::from(TRANSMITS));
        }
        if self.refusal.is_none() {
            if let Some((head, written)) = self.receive.take() {
                let at = RECEIVE_BUFFERS + u64::from(head % u32::from(RECEIVES)) * RECEIVE_BUFFER;
                self.packet(at, u64::from(written));
                self.receive.offer(head as u16);
                self.receive.publish();
            }
        }
        if let Some((own, theirs)) = self.refusal {
            if self.send(&Connection { own, theirs, ..FREE }, RESET, 0, 0) {
                self.refusal = None;
            }
        }
        for index in 0..CONNECTIONS {
            self.advance(index);
        }
        let open = self.connections.iter().filter(|one| one.stage == Stage::Open);
        report::write(VSOCK_OPEN_OFFSET, open.count() as u64);
        if self.turns % 4096 == 0 && read::<u8>(self.common + STATUS) & NEEDS_RESET != 0 {
            report::write(VSOCK_STATE_OFFSET, DRIVER_BROKEN);
        }
    }

    fn packet(&mut self, at: u64, written: u64) {
        let (from, to) = (read::<u64>(at), read::<u64>(at + 8));
        let (theirs, own) = (read::<u32>(at + 16), read::<u32>(at + 20));
        let length = read::<u32>(at + 24);
        let operation = read::<u16>(at + 30);
        let flags = read::<u32>(at + 32);
        let right = from == HOST && to == self.cid && written == HEADER + u64::from(length);
        if !right {
            report::increment(VSOCK_WRONG_OFFSET);
            return;
        }
        let known = self.find(own, theirs);
        if operation == REQUEST && known.is_none() {
            let free = self.connections.iter().position(|one| one.stage == Stage::Free);
            let Some(free) = free else {
                report::increment(VSOCK_TURNED_AWAY_OFFSET);
                self.refusal = Some((own, theirs));
                return;
            };
            self.connections[free] = Connection {
                stage: Stage::Open,
                own,
                theirs,
                owes: RESPONSE,
                room: read(at + 36),
                freed: read(at + 40),
                ..FREE
            };
            return;
        }
        let Some(index) = known else {
            if operation != RESET {
                self.refusal = Some((own, theirs));
            }
            return;
        };
        let connection = &mut self.connections[index];
        (connection.room, connection.freed) = (read(at + 36), read(at + 40));
        match operation {
            RESPONSE if connection.stage == Stage::Asked => connection.stage = Stage::Open,
            DATA => {
                if connection.came.wrapping_sub(connection.gone) + length > ECHO as u32 {
                    // More than it may send.
                    report::increment(VSOCK_WRONG_OFFSET);
                    return;
                }
                for offset in 0..u64::from(length) {
                    let place = (u64::from(connection.came) + offset) % ECHO;
                    let byte = read::<u8>(at + HEADER + offset);
                    write(ECHOES + index as u64 * ECHO + place, byte);
                }
                connection.came = connection.came.wrapping_add(length);
            }
            CREDIT_UPDATE => {}
            CREDIT_REQUEST => connection.owes = CREDIT_UPDATE,
            SHUTDOWN => connection.ends |= flags & NO_SEND != 0,
            RESET => {
                if connection.stage == Stage::Asked {
                    report::increment(VSOCK_REFUSED_OFFSET);
                }
                *connection = FREE;
            }
            _ => report::increment(VSOCK_WRONG_OFFSET),
        }
    }

    fn advance(&mut self, index: usize) {
        let connection = self.connections[index];
        if connection.stage == Stage::Free {
            return;
        }
        if connection.owes != 0 {
            if self.send(&connection, connection.owes, 0, 0) {
                self.connections[index].owes = 0;
                self.connections[index].told = connection.gone;
            }
            return;
        }
        if connection.stage != Stage::Open {
            return;
        }
        let left = connection.came.wrapping_sub(connection.gone);
        let credit = connection
            .room
            .saturating_sub(connection.gone.wrapping_sub(connection.freed));
        let count = left.min(credit).min((TRANSMIT_BUFFER - HEADER) as u32);
        if count > 0 {
            let from = ECHOES + index as u64 * ECHO;
            if self.send(&connection, DATA, from, count) {
                let connection = &mut self.connections[index];
                connection.gone = connection.gone.wrapping_add(count);
                let echoed = report::read(VSOCK_ECHOED_OFFSET) + u64::from(count);
                report::write(VSOCK_ECHOED_OFFSET, echoed);
                // The packet told of what was free before it.
                connection.told = connection.gone.wrapping_sub(count);
            }
        } else if left == 0 && connection.ends {
            if self.send(&connection, RESET, 0, 0) {
                self.connections[index] = FREE;
            }
        } else if connection.gone.wrapping_sub(connection.told) >= ECHO as u32 / 2 {
            self.connections[index].owes = CREDIT_UPDATE;
        }
    }

    /// Sends a packet with `count` bytes of the echo at `from`, if there is a buffer for it.
    fn send(&mut self, connection: &Connection, operation: u16, from: u64, count: u32) -> bool {
        let slot = self.free.trailing_zeros();
        if slot >= u32::from(TRANSMITS) {
            return false;
        }
        self.free &= !(1 << slot);
        let at = TRANSMIT_BUFFERS + u64::from(slot) * TRANSMIT_BUFFER;
        write(at, self.cid);
        write(at + 8, HOST);
        write(at + 16, connection.own);
        write(at + 20, connection.theirs);
        write(at + 24, count);
        write(at + 28, 1_u16);
        write(at + 30, operation);
        write(at + 32, 0_u32);
        write(at + 36, ECHO as u32);
        write(at + 40, connection.gone);
        for offset in 0..u64::from(count) {
            let place = (u64::from(connection.gone) + offset) % ECHO;
            write(at + HEADER + offset, read::<u8>(from + place));
        }
        let descriptor_at = self.transmit.descriptor(slot as u16);
        descriptor(descriptor_at, at, HEADER as u32 + count, 0, 0);
        self.transmit.offer(slot as u16);
        self.transmit.publish();
        true
    }
}
