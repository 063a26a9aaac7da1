//! From the tap to the driver (5.1.6.3, 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use super::BATCH;
use super::F_GUEST_CSUM;
use super::F_GUEST_TSO4;
use super::F_GUEST_TSO6;
use super::F_MRG_RXBUF;
use super::HEADER;
use super::MAX_PACKET;
use super::Shared;
use super::lock;
use crate::devices::virtio::Next;
use crate::devices::virtio::guest_io;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::seat::Stop;

/// Flag of a header: the checksum is not complete.
const NEEDS_CSUM: u8 = 1;
/// Types of segmentation.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Where in the header the number of buffers is.
const NUM_BUFFERS: usize = 10;
/// How long a driver may leave less room than the largest packet takes, before packets are read that may not fit.
pub(super) const GRACE: Duration = Duration::from_millis(1);

/// When a tap that cannot be read is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// The receiving half of a pair.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    pair: u16,
    /// Where the end of a packet goes that is too long.
    overflow: Vec<u8>,
    /// There is room for a packet, and none in the tap.
    waits: bool,
    /// How long it waits for more room, while there is less than there should be.
    short_until: Option<Instant>,
}

/// Requests that were taken, and no packet is in yet.
#[derive(Default)]
struct Room {
    held: VecDeque<Chain>,
    /// Bytes in them.
    length: usize,
    /// Emptied, for reuse.
    spare: Vec<Chain>,
    used: Vec<(u16, u32)>,
}

/// What came out of a tap.
enum Read {
    Packet(usize),
    Nothing,
    /// The tap's interface was taken away: poll(2) would not wait for it.
    Failed,
}

impl Receiver {
    pub(super) fn new(shared: Arc<Shared>, pair: u16) -> Self {
        Self {
            shared,
            pair,
            overflow: vec![0; MAX_PACKET],
            waits: false,
            short_until: None,
        }
    }

    /// Waits for no packet.
    pub(super) fn rest(&mut self) {
        self.waits = false;
    }

    /// Whether it waits for a packet.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    pub(super) fn serve(&mut self, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let before = queue.position();
        let mut room = Room::default();
        let outcome = self.packets(queue, stop, &mut room);
        // What no packet came for is not taken.
        for _ in room.held {
            queue.put_back();
        }
        let next = outcome?;
        if queue.position().1 != before.1 {
            queue.interrupt()?;
        }
        Ok(next)
    }

    fn packets(
        &mut self,
        queue: &mut Virtqueue,
        stop: &Stop,
        room: &mut Room,
    ) -> Result<Next, Broken> {
        if self.shared.taps_of(self.pair).next().is_none() {
            return Ok(Next::Wait);
        }
        queue.ignore()?;
        for _ in 0..BATCH {
            if stop.requested() {
                return Ok(Next::Wait);
            }
            let wait = lock(&self.shared.received).wait_ns();
            if wait > 0 {
                return Ok(Next::At(Instant::now() + Duration::from_nanos(wait)));
            }
            let mergeable = self.shared.has(F_MRG_RXBUF);
            let enough = if mergeable { self.shared.room() } else { 1 };
            if room.grow(queue, enough)? {
                self.short_until = None;
            } else {
                // More comes when the driver has done with what it has got back.
                let now = Instant::now();
                let empty = room.held.is_empty();
                let until = (!empty).then(|| *self.short_until.get_or_insert(now + GRACE));
                if until.is_none_or(|until| now < until) {
                    if queue.listen()? {
                        queue.ignore()?;
                        continue;
                    }
                    return Ok(until.map_or(Next::Wait, Next::At));
                }
            }
            match self.read(room) {
                Read::Packet(length) => {
                    lock(&self.shared.received).take(length.saturating_sub(HEADER));
                    let fits = (HEADER..=room.length).contains(&length);
                    if fits && self.takes(room) {
                        room.complete(queue, length)?;
                    }
                }
                Read::Nothing => {
                    self.waits = true;
                    return Ok(Next::Wait);
                }
                Read::Failed => return Ok(Next::At(Instant::now() + RETRY)),
            }
        }
        Ok(Next::Again)
    }

    /// Reads the next packet into the room that there is.
    fn read(&mut self, room: &Room) -> Read {
        let mut outcome = Read::Nothing;
        for tap in self.shared.taps_of(self.pair) {
            let pieces = room.held.iter().flat_map(|chain| chain.writable.pieces());
            match guest_io::receive(tap.as_fd(), pieces, &mut self.overflow) {
                Ok(length) => return Read::Packet(length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => outcome = Read::Failed,
            }
        }
        outcome
    }

    /// Whether the driver takes a packet with the header that was read. Only one from before the taps were told what it
    /// takes can be another.
    fn takes(&self, room: &Room) -> bool {
        let first = room.held.front();
        let Some([flags, gso, ..]) = first.and_then(|chain| chain.writable.head::<HEADER>()) else {
            return false;
        };
        let segments = match gso {
            GSO_NONE => true,
            GSO_TCPV4 => self.shared.has(F_GUEST_TSO4),
            GSO_TCPV6 => self.shared.has(F_GUEST_TSO6),
            _ => false,
        };
        if self.shared.has(F_GUEST_CSUM) {
            return segments;
        }
        // Without it a header has no flags (5.1.6.4.1).
        if let Some(first) = first {
            first.writable.copy_in(&[0]);
        }
        segments && flags & NEEDS_CSUM == 0
    }
}

impl Room {
    /// Takes requests until there is room for so many bytes. Whether there is.
    fn grow(&mut self, queue: &mut Virtqueue, enough: usize) -> Result<bool, Broken> {
        while self.length < enough {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain)? {
                self.spare.push(chain);
                return Ok(false);
            }
            let length = chain.writable.len();
            if length < HEADER {
                let (queue, what) = (queue.index(), "room for a header");
                return Err(Broken::Request { queue, what });
            }
            self.length += length;
            self.held.push_back(chain);
        }
        Ok(true)
    }

    /// Gives the packet of that length, which fits, to the driver, in as many requests as it takes.
    fn complete(&mut self, queue: &mut Virtqueue, length: usize) -> Result<(), Broken> {
        let mut left = length;
        self.used.clear();
        for chain in &self.held {
            let part = left.min(chain.writable.len());
            self.used
                .push((chain.head, u32::try_from(part).unwrap_or(u32::MAX)));
            left -= part;
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.held.front() {
            let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
            let place = first.writable.range(NUM_BUFFERS, 2);
            place.copy_in(&count.to_le_bytes());
        }
        for chain in self.held.drain(..self.used.len()) {
            self.length -= chain.writable.len();
            self.spare.push(chain);
        }
        queue.complete_all(&self.used)
    }
}
