//! All connections of a guest, what the driver sends and is sent, and what is left to the control thread.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::ops::Bound;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::VSOCK_CREDIT;
use baton_ipc::worker::VsockOrder;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;

use super::connection::Connection;
use super::connection::Ports;
use super::connection::Socket;
use super::connection::Stage;
use super::packet::HEADER;
use super::packet::HOST_CID;
use super::packet::Header;
use super::packet::NO_RECEIVE;
use super::packet::NO_SEND;
use super::packet::Operation;
use super::packet::STREAM;
use crate::devices::virtio::Wait;
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::guest_io;
use crate::devices::virtio::queue::Broken;

/// Refusals that the driver has given no buffers for; with more, it is not listened to (5.10.6.4.1).
pub(super) const MAX_RESETS: usize = 64;
/// The ports that the host's programs have, to the guest: those that no program of the guest is likely to ask for.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

/// A refusal that the guest is owed: to whom it spoke there, of what type, and the ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reset {
    pub(super) cid: u64,
    pub(super) kind: u16,
    pub(super) ports: Ports,
}

/// What only the control thread does.
#[derive(Debug)]
pub(super) enum Deed {
    /// Ask the broker for a port of the host.
    Connect { ticket: u32, port: u32 },
    /// Tell the socket that nothing more comes.
    End(Arc<OwnedFd>),
    /// Close it for both sides, and tell the broker.
    Close(Socket),
}

/// The connections.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) cid: u32,
    pub(super) connections: BTreeMap<Ports, Connection>,
    pub(super) resets: VecDeque<Reset>,
    pub(super) next_ticket: u32,
    pub(super) next_port: u32,
    pub(super) deeds: Vec<Deed>,
    /// Whose turn was last.
    turn: Ports,
    /// The driver has given no buffers to receive into.
    pub(super) starved: bool,
}

impl Table {
    pub(super) fn new(cid: u32) -> Self {
        Self {
            cid,
            connections: BTreeMap::new(),
            resets: VecDeque::new(),
            next_ticket: 0,
            next_port: FIRST_HOST_PORT,
            deeds: Vec::new(),
            turn: (0, 0),
            starved: false,
        }
    }

    fn is_full(&self) -> bool {
        self.connections.len() >= MAX_VSOCK_CONNECTIONS as usize
    }

    /// Obeys the broker.
    pub(super) fn obey(&mut self, order: VsockOrder, fd: Option<OwnedFd>) {
        let socket = |id| {
            fd.map(|fd| Socket {
                id,
                fd: Arc::new(fd),
            })
        };
        match order {
            VsockOrder::Incoming { id, port } => {
                let Some(socket) = socket(id) else { return };
                if self.is_full() {
                    return self.deeds.push(Deed::Close(socket));
                }
                let host_port = self.free_port(port);
                let connection = Connection::new(Stage::Offered, Some(socket));
                self.connections.insert((port, host_port), connection);
            }
            VsockOrder::Connected { ticket, id } => {
                let Some(socket) = socket(id) else { return };
                match self.asked(ticket) {
                    Some((_, connection)) if connection.stage == Stage::Asked(ticket) => {
                        connection.stage = Stage::Open;
                        connection.owed.response = true;
                        connection.socket = Some(socket);
                    }
                    abandoned => {
                        let ports = abandoned.map(|(ports, _)| ports);
                        ports.map(|ports| self.connections.remove(&ports));
                        self.deeds.push(Deed::Close(socket));
                    }
                }
            }
            VsockOrder::Refused { ticket } => {
                let Some((ports, connection)) = self.asked(ticket) else {
                    return;
                };
                let wanted = connection.stage == Stage::Asked(ticket);
                self.connections.remove(&ports);
                if wanted {
                    self.refuse(ports);
                }
            }
            VsockOrder::Held { .. } => {}
        }
    }

    /// The connection that was asked for by this ticket.
    fn asked(&mut self, ticket: u32) -> Option<(Ports, &mut Connection)> {
        let stages = [Stage::Asked(ticket), Stage::Abandoned(ticket)];
        let mut all = self.connections.iter_mut();
        all.find(|(_, connection)| stages.contains(&connection.stage))
            .map(|(ports, connection)| (*ports, connection))
    }

    /// A port for a program of the host that no other has towards this port of the guest.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let port = self.next_port;
            let next = port.wrapping_add(1);
            self.next_port = if next >> 30 == 1 {
                next
            } else {
                FIRST_HOST_PORT
            };
            if !self.connections.contains_key(&(guest, port)) {
                return port;
            }
        }
    }

    fn refuse(&mut self, ports: Ports) {
        self.resets.push_back(Reset {
            cid: HOST_CID,
            kind: STREAM,
            ports,
        });
    }

    /// Forgets a connection; one that the broker still has to answer for is kept until it does.
    fn remove(&mut self, ports: Ports) {
        let Some(mut connection) = self.connections.remove(&ports) else {
            return;
        };
        if let Stage::Asked(ticket) | Stage::Abandoned(ticket) = connection.stage {
            connection.stage = Stage::Abandoned(ticket);
            self.connections.insert(ports, connection);
        } else if let Some(socket) = connection.socket {
            self.deeds.push(Deed::Close(socket));
        }
    }

    /// The driver has forgotten everything.
    pub(super) fn clear(&mut self) {
        let all: Vec<Ports> = self.connections.keys().copied().collect();
        all.into_iter().for_each(|ports| self.remove(ports));
        self.resets.clear();
        self.starved = false;
    }

    /// Whether the driver is to be listened to.
    pub(super) fn listens(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// A packet of the driver.
    pub(super) fn packet(&mut self, queue: u16, packet: &Buffers) -> Result<(), Broken> {
        let Some(header) = packet.head::<HEADER>() else {
            let what = "a header";
            return Err(Broken::Request { queue, what });
        };
        let header = Header::parse(&header);
        let (cid, port) = header.source;
        let ports = (port, header.destination.1);
        if cid != u64::from(self.cid) {
            // Nobody to answer.
            return Ok(());
        }
        if header.destination.0 != HOST_CID || header.kind != STREAM {
            if header.operation != Operation::Reset {
                self.resets.push_back(Reset {
                    cid: header.destination.0,
                    kind: header.kind,
                    ports,
                });
            }
            return Ok(());
        }
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let data = packet.range(HEADER, length);
        if data.len() != length || !self.hear(&header, ports, &data) {
            self.remove(ports);
            if header.operation != Operation::Reset {
                self.refuse(ports);
            }
        }
        Ok(())
    }

    /// Hears a packet for a connection, or for a new one; `false` when there is none, or it must not go on.
    fn hear(&mut self, header: &Header, ports: Ports, data: &Buffers) -> bool {
        let full = self.is_full();
        let Some(connection) = self.connections.get_mut(&ports) else {
            if header.operation != Operation::Request || full {
                return false;
            }
            let ticket = self.next_ticket;
            self.next_ticket = ticket.wrapping_add(1);
            let mut connection = Connection::new(Stage::Asked(ticket), None);
            connection.note_credit(header.room, header.freed);
            self.connections.insert(ports, connection);
            let port = ports.1;
            self.deeds.push(Deed::Connect { ticket, port });
            return true;
        };
        connection.note_credit(header.room, header.freed);
        match (&connection.stage, header.operation) {
            (Stage::Offered, Operation::Response) if !connection.owed.request => {
                connection.stage = Stage::Open;
                greet(connection, ports.1)
            }
            (Stage::Open, Operation::Data) => !connection.guest_sent_all && connection.take(data),
            (Stage::Open, Operation::CreditUpdate) => true,
            (Stage::Open, Operation::CreditRequest) => {
                connection.owed.credit = true;
                true
            }
            (Stage::Open, Operation::Shutdown) => {
                connection.guest_deaf |= header.flags & NO_RECEIVE != 0;
                connection.guest_sent_all |= header.flags & NO_SEND != 0;
                self.end_or_finish(ports);
                true
            }
            _ => false,
        }
    }

    /// Passes the guest's end on, or ends the connection with both.
    fn end_or_finish(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if connection.is_over() {
            self.remove(ports);
            self.refuse(ports);
        } else if connection.ends_now() {
            connection.ended = true;
            let socket = connection.socket.as_ref();
            let end = socket.map(|socket| Deed::End(Arc::clone(&socket.fd)));
            self.deeds.extend(end);
        }
    }

    /// What to wait for.
    pub(super) fn waits(&self) -> Vec<Wait> {
        let all = self.connections.values();
        all.filter_map(|connection| {
            let events = connection.events(!self.starved)?;
            Some((Arc::clone(&connection.socket.as_ref()?.fd), events))
        })
        .collect()
    }

    /// Looks at every socket that is waited for, and gives it what is kept for it.
    pub(super) fn look(&mut self) {
        self.starved = false;
        let waited: Vec<(Ports, Wait)> = self
            .connections
            .iter()
            .filter_map(|(ports, connection)| {
                let events = connection.events(true)?;
                Some((
                    *ports,
                    (Arc::clone(&connection.socket.as_ref()?.fd), events),
                ))
            })
            .collect();
        let mut sources: Vec<PollFd<'_>> = waited
            .iter()
            .map(|(_, (fd, events))| PollFd::new(fd, *events))
            .collect();
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if rustix::event::poll(&mut sources, Some(&now)).is_err() {
            return;
        }
        for ((ports, _), source) in waited.iter().zip(&sources) {
            let events = source.revents();
            let Some(connection) = self.connections.get_mut(ports) else {
                continue;
            };
            connection.note_events(events);
            let gone = events.intersects(PollFlags::HUP | PollFlags::ERR);
            if connection.stage == Stage::Offered && gone {
                let told = !connection.owed.request;
                self.remove(*ports);
                if told {
                    self.refuse(*ports);
                }
                continue;
            }
            connection.flush();
            self.end_or_finish(*ports);
        }
    }

    /// The connection after the last one that has something for the driver.
    fn next(&self) -> Option<Ports> {
        let after = (Bound::Excluded(self.turn), Bound::Unbounded);
        let before = (Bound::Unbounded, Bound::Included(self.turn));
        let has = |connection: &Connection| {
            connection.next_owed().is_some() || (connection.wants_data() && connection.readable)
        };
        self.connections
            .range(after)
            .chain(self.connections.range(before))
            .find(|(_, connection)| has(connection))
            .map(|(ports, _)| *ports)
    }

    /// Whether there may be something for the driver.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || self.next().is_some()
    }

    /// Puts the next packet for the driver into `room`, and how long it is; `None` when there is none.
    pub(super) fn fill(&mut self, queue: u16, room: &Buffers) -> Result<Option<u32>, Broken> {
        if room.len() <= HEADER {
            let what = "room for a packet";
            return Err(Broken::Request { queue, what });
        }
        if let Some(Reset { cid, kind, ports }) = self.resets.pop_front() {
            let mut header = self.header(ports, Operation::Reset, 0);
            (header.source.0, header.kind) = (cid, kind);
            return Ok(Some(put(room, &header)));
        }
        while let Some(ports) = self.next() {
            self.turn = ports;
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            if let Some(operation) = connection.next_owed() {
                connection.paid(operation);
                let header = self.header(ports, operation, 0);
                return Ok(Some(put(room, &header)));
            }
            let most = usize::try_from(connection.credit()).unwrap_or(usize::MAX);
            let into = room.range(HEADER, most);
            let Some(socket) = &connection.socket else {
                connection.readable = false;
                continue;
            };
            match guest_io::read(socket.fd.as_fd(), &into).map_err(errno) {
                Ok(0) => connection.host_is_done(),
                Ok(count) => {
                    let count = u32::try_from(count).unwrap_or(0);
                    connection.sent = connection.sent.wrapping_add(count);
                    connection.paid(Operation::Data);
                    let header = self.header(ports, Operation::Data, count);
                    return Ok(Some(put(room, &header).saturating_add(count)));
                }
                Err(Errno::AGAIN) => connection.readable = false,
                Err(_) => connection.host_is_done(),
            }
        }
        Ok(None)
    }

    fn header(&self, (guest, host): Ports, operation: Operation, length: u32) -> Header {
        let connection = self.connections.get(&(guest, host));
        Header {
            source: (HOST_CID, host),
            destination: (self.cid.into(), guest),
            length,
            kind: STREAM,
            operation,
            flags: match operation {
                Operation::Shutdown => connection.map_or(0, Connection::host_ends),
                _ => 0,
            },
            room: VSOCK_CREDIT,
            freed: connection.map_or(0, |connection| connection.freed),
        }
    }
}

/// Tells a program of the host that it has its connection, and which port it is to the guest.
fn greet(connection: &Connection, port: u32) -> bool {
    let line = format!("OK {port}\n");
    let written = connection
        .socket
        .as_ref()
        .map(|socket| rustix::io::write(&*socket.fd, line.as_bytes()));
    // Nothing was written there before, so there is room for all of it, or nobody there.
    matches!(written, Some(Ok(count)) if count == line.len())
}

fn put(room: &Buffers, header: &Header) -> u32 {
    u32::try_from(room.copy_in(&header.bytes())).unwrap_or(0)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
