//! One connection: a socket of the host, a port at each end, and what is under way between them.
//!
//! Credit (5.10.6.3): each side says how much room it has in all and how much of that it has made free since the
//! beginning, and the other never has more under way. What the guest sends goes into the socket at once; only what the
//! socket does not take is kept here, at most [`VSOCK_CREDIT`]. What the host sends stays in the socket until the guest
//! has room and a buffer for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_ipc::worker::VSOCK_CREDIT;
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::packet::NO_RECEIVE;
use super::packet::NO_SEND;
use super::packet::Operation;
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::guest_io;

/// The two ports by which a connection is known, the guest's first.
pub(super) type Ports = (u32, u32);

/// How far a connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest has asked for it; the broker was asked by this ticket.
    Asked(u32),
    /// As before, but the guest does not want it any more; only the answer is awaited.
    Abandoned(u32),
    /// A program of the host wants it; the guest has not answered.
    Offered,
    /// Both sides have it.
    Open,
}

/// A socket of the host.
#[derive(Clone, Debug)]
pub(super) struct Socket {
    /// Its name among the broker's.
    pub(super) id: u32,
    pub(super) fd: Arc<OwnedFd>,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stage: Stage,
    /// None before the broker has answered.
    pub(super) socket: Option<Socket>,
    /// From the guest, and not yet taken by the socket.
    pub(super) held: VecDeque<u8>,
    /// Bytes of the guest that the socket took, since the beginning, modulo 2^32; and as the guest was last told.
    pub(super) freed: u32,
    pub(super) told: u32,
    /// Bytes that the guest was sent, modulo 2^32; what it has room for, and has made free.
    pub(super) sent: u32,
    pub(super) guest_room: u32,
    pub(super) guest_freed: u32,
    /// The guest will not send, not receive any more.
    pub(super) guest_sent_all: bool,
    pub(super) guest_deaf: bool,
    /// So is the host's program.
    pub(super) host_sent_all: bool,
    pub(super) host_deaf: bool,
    /// The socket was told that nothing more comes.
    pub(super) ended: bool,
    /// Packets that the guest is owed.
    pub(super) owed: Owed,
    /// The socket has something, as far as is known.
    pub(super) readable: bool,
}

/// Packets without data that the guest is owed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owed {
    /// The first of a connection that the host begins.
    pub(super) request: bool,
    /// The answer to one that the guest begins.
    pub(super) response: bool,
    pub(super) credit: bool,
    pub(super) shutdown: bool,
}

/// What came of writing to the socket.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Bytes(usize),
    /// It takes no more for now.
    Full,
    /// It never takes any more.
    Never,
}

impl Connection {
    pub(super) fn new(stage: Stage, socket: Option<Socket>) -> Self {
        Self {
            owed: Owed {
                request: stage == Stage::Offered,
                ..Owed::default()
            },
            stage,
            socket,
            held: VecDeque::new(),
            freed: 0,
            told: 0,
            sent: 0,
            guest_room: 0,
            guest_freed: 0,
            guest_sent_all: false,
            guest_deaf: false,
            host_sent_all: false,
            host_deaf: false,
            ended: false,
            readable: true,
        }
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_freed);
        self.guest_room.saturating_sub(under_way)
    }

    /// What the guest says about itself in every packet.
    pub(super) fn note_credit(&mut self, room: u32, freed: u32) {
        (self.guest_room, self.guest_freed) = (room, freed);
    }

    /// Whether data of the host could go to the guest.
    pub(super) fn wants_data(&self) -> bool {
        self.stage == Stage::Open && !self.host_sent_all && !self.guest_deaf && self.credit() > 0
    }

    /// The next packet that is owed.
    pub(super) fn next_owed(&self) -> Option<Operation> {
        let Owed {
            request,
            response,
            credit,
            shutdown,
        } = self.owed;
        match () {
            () if request => Some(Operation::Request),
            () if response => Some(Operation::Response),
            () if shutdown => Some(Operation::Shutdown),
            () if credit => Some(Operation::CreditUpdate),
            () => None,
        }
    }

    /// The packet goes out: what it is owed no more.
    pub(super) fn paid(&mut self, operation: Operation) {
        match operation {
            Operation::Request => self.owed.request = false,
            Operation::Response => self.owed.response = false,
            Operation::Shutdown => self.owed.shutdown = false,
            _ => {}
        }
        // Every packet tells of credit.
        self.owed.credit = false;
        self.told = self.freed;
    }

    /// The flags of a shutdown: what the host does not do any more.
    pub(super) fn host_ends(&self) -> u32 {
        let deaf = if self.host_deaf { NO_RECEIVE } else { 0 };
        let mute = if self.host_sent_all { NO_SEND } else { 0 };
        deaf | mute
    }

    /// Bytes of the guest leave for the socket, which takes them or drops them.
    fn free(&mut self, bytes: usize) {
        self.freed = self
            .freed
            .wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.freed.wrapping_sub(self.told) >= VSOCK_CREDIT / 2 {
            self.owed.credit = true;
        }
    }

    /// Takes data of the guest; `false` when it is more than it may send.
    pub(super) fn take(&mut self, data: &Buffers) -> bool {
        let room = (VSOCK_CREDIT as usize).saturating_sub(self.held.len());
        if data.len() > room {
            return false;
        }
        if self.host_deaf {
            self.free(data.len());
            return true;
        }
        let mut done = 0;
        while self.held.is_empty() && done < data.len() {
            let rest = data.range(done, data.len());
            let taken = match &self.socket {
                Some(socket) => taken(guest_io::send(socket.fd.as_fd(), &rest)),
                None => Taken::Never,
            };
            match taken {
                Taken::Bytes(count) => {
                    done += count;
                    self.free(count);
                }
                Taken::Full => break,
                Taken::Never => {
                    self.free(data.len() - done);
                    self.deafen();
                    return true;
                }
            }
        }
        let mut rest = vec![0; data.len() - done];
        data.range(done, rest.len()).copy_out(&mut rest);
        self.held.extend(rest);
        true
    }

    /// Gives the socket what is kept for it, and its end when there is no more to come.
    pub(super) fn flush(&mut self) {
        while !self.held.is_empty() {
            let (first, _) = self.held.as_slices();
            let taken = match &self.socket {
                Some(socket) => taken(
                    rustix::io::retry_on_intr(|| rustix::io::write(&*socket.fd, first))
                        .map_err(io::Error::from),
                ),
                None => Taken::Never,
            };
            match taken {
                Taken::Bytes(count) => {
                    self.held.drain(..count.min(self.held.len()));
                    self.free(count);
                }
                Taken::Full => return,
                Taken::Never => {
                    self.free(self.held.len());
                    self.held.clear();
                    self.deafen();
                }
            }
        }
    }

    /// Whether the socket is to be told that nothing more comes.
    pub(super) fn ends_now(&self) -> bool {
        self.guest_sent_all && self.held.is_empty() && !self.ended && self.stage == Stage::Open
    }

    /// Whether nobody has anything to do with it any more.
    pub(super) fn is_over(&self) -> bool {
        self.guest_sent_all && self.guest_deaf && self.held.is_empty()
    }

    /// The host's program reads no more.
    fn deafen(&mut self) {
        if !self.host_deaf {
            self.host_deaf = true;
            self.owed.shutdown = true;
        }
    }

    /// The host's program writes no more.
    pub(super) fn host_is_done(&mut self) {
        if !self.host_sent_all {
            self.host_sent_all = true;
            self.owed.shutdown = true;
        }
    }

    /// Events to wait for, if any. poll(2) reports a hang-up whether asked or not.
    pub(super) fn events(&self, buffers: bool) -> Option<PollFlags> {
        self.socket.as_ref()?;
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, self.wants_data() && buffers);
        events.set(PollFlags::OUT, !self.held.is_empty());
        let watches = match self.stage {
            Stage::Offered => true,
            // Whether it only sends no more, or is gone.
            Stage::Open => self.host_sent_all && !self.host_deaf,
            Stage::Asked(_) | Stage::Abandoned(_) => false,
        };
        (watches || !events.is_empty()).then_some(events)
    }

    /// The socket's events are these.
    pub(super) fn note_events(&mut self, events: PollFlags) {
        let gone = events.intersects(PollFlags::HUP | PollFlags::ERR);
        self.readable = events.contains(PollFlags::IN) || gone;
        // With a hang-up, nobody reads at the other end either. What is there to read is read first.
        if gone && self.host_sent_all {
            self.deafen();
        }
    }
}

fn taken(outcome: io::Result<usize>) -> Taken {
    match outcome {
        Ok(0) => Taken::Full,
        Ok(count) => Taken::Bytes(count),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::AGAIN) => Taken::Full,
            _ => Taken::Never,
        },
    }
}
