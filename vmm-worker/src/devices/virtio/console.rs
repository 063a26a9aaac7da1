//! The console device (5.3), of one port: a stream socket, whose other end the broker relays as it does the serial port's.
//!
//! No byte is held here. What the driver writes goes from its buffers into the socket, and is completed when all of it is
//! there; what was typed goes from the socket into the driver's buffers, and is completed before anything else is done. So
//! there is nothing to save of either but how much of the buffer at the head of the ring the socket has taken.
//!
//! Linux's driver waits for its output to be completed with interrupts off (`drivers/char/virtio_console.c`:
//! `__send_to_port`). A socket that takes nothing is waited for, so that none of it is lost to a reader that is slow; but no
//! longer than [`PATIENCE`], after which output is dropped, and counted, until the socket takes some again.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use serde::Deserialize;
use serde::Serialize;

use super::Backend;
use super::Identity;
use super::Next;
use super::VirtioDevice;
use super::Wait;
use super::buffers::Buffers;
use super::queue::Broken;
use super::queue::Chain;
use super::queue::Virtqueue;
use super::seat::Stop;
use crate::devices::DeviceKind;
use crate::devices::state;
use crate::devices::state::StateError;

/// Of PCI's class simple communication controllers, of none of its kinds, as other VMMs have it.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::CONSOLE,
    virtio_type: 3,
    pci_class: 0x07_8000,
};
/// Descriptors of the queues to receive and to transmit (5.3.2: those of port 0).
const QUEUE_SIZES: [u16; 2] = [64; 2];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Bytes that are copied at once.
const PORTION: usize = 4096;
/// Portions, of all requests together, that are served before others of the same thread get their turn.
const BATCH: usize = 16;
/// How long a socket that takes nothing is waited for: a reader that is busy has taken some by then, and no kernel takes it for
/// a lockup (Linux: 20 s).
const PATIENCE: Duration = Duration::from_millis(250);

/// What both halves, and the control thread, know.
#[derive(Debug, Default)]
struct Figures {
    /// Bytes of the request at the head of the transmit queue that need not be sent any more.
    gone: AtomicU64,
    /// Bytes that were dropped since the VM's start.
    dropped: AtomicU64,
}

/// The control thread's end.
#[derive(Debug)]
pub struct Link(Arc<Figures>);

impl Link {
    /// How many bytes of output were dropped, since the VM's start, because nobody took them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::SeqCst)
    }
}

/// The half that the driver configures.
#[derive(Debug)]
pub struct Console {
    figures: Arc<Figures>,
    socket: Arc<OwnedFd>,
}

impl Console {
    /// A console on this stream socket, which does not block, and the control thread's end of it.
    #[must_use]
    pub fn new(socket: OwnedFd) -> (Self, Link) {
        let figures = Arc::default();
        let link = Link(Arc::clone(&figures));
        let socket = Arc::new(socket);
        (Self { figures, socket }, link)
    }
}

/// Version 1, in the transport's section.
#[derive(Debug, Serialize, Deserialize)]
struct SavedConsole {
    gone: u64,
    dropped: u64,
}

/// The half that works.
struct Relay {
    figures: Arc<Figures>,
    socket: Arc<OwnedFd>,
    /// The driver has given buffers to receive into.
    listens: bool,
    /// Since when the socket takes nothing, while there is something for it.
    stuck: Option<Instant>,
    /// The other side has closed, or broke: nothing comes, and what is written is dropped.
    closed: bool,
}

/// What became of a portion.
enum Sent {
    Bytes(usize),
    NotNow,
    Never,
}

impl Relay {
    fn send(&self, bytes: &[u8]) -> Sent {
        match rustix::io::retry_on_intr(|| rustix::io::write(&*self.socket, bytes)) {
            Ok(count) => Sent::Bytes(count),
            Err(Errno::AGAIN) => Sent::NotNow,
            Err(_) => Sent::Never,
        }
    }

    /// Whether the socket has been waited for long enough.
    fn gave_up(&self) -> bool {
        self.closed || self.stuck.is_some_and(|since| since.elapsed() >= PATIENCE)
    }

    /// Sends what the driver writes, a portion of the request at the head. Whether the request is over.
    fn portion(&mut self, output: &Buffers) -> bool {
        let gone = self.figures.gone.load(Ordering::SeqCst);
        // A driver that has made it shorter meanwhile gets it back.
        let left = (output.len() as u64).saturating_sub(gone);
        let mut bytes = [0; PORTION];
        let from = usize::try_from(gone).unwrap_or(usize::MAX);
        let count = output.range(from, PORTION).copy_out(&mut bytes);
        let portion = bytes.get(..count).unwrap_or_default();
        let sent = if portion.is_empty() {
            Sent::Bytes(0)
        } else {
            self.send(portion)
        };
        let done = match sent {
            Sent::Bytes(count) => {
                self.stuck = None;
                count as u64
            }
            Sent::NotNow => {
                self.stuck.get_or_insert_with(Instant::now);
                0
            }
            Sent::Never => {
                self.closed = true;
                0
            }
        };
        let mut left = left.saturating_sub(done);
        if left > 0 && done == 0 && self.gave_up() {
            self.figures.dropped.fetch_add(left, Ordering::SeqCst);
            left = 0;
        }
        let gone = if left == 0 { 0 } else { gone + done };
        self.figures.gone.store(gone, Ordering::SeqCst);
        left == 0
    }

    fn transmit(&mut self, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        queue.ignore()?;
        let mut next = Next::Again;
        let mut left = BATCH;
        while left > 0 {
            if stop.requested() || !queue.take(&mut chain)? {
                next = Next::Wait;
                break;
            }
            if !chain.writable.is_empty() {
                return Err(Broken::Request {
                    queue: queue.index(),
                    what: "a buffer that is only read",
                });
            }
            let over = loop {
                left = left.saturating_sub(1);
                if self.portion(&chain.readable) {
                    break true;
                }
                if self.stuck.is_some() || stop.requested() || left == 0 {
                    break false;
                }
            };
            if !over {
                queue.put_back();
                next = match self.stuck {
                    Some(since) => Next::At(since + PATIENCE),
                    None => Next::Again,
                };
                break;
            }
            queue.complete(chain.head, 0)?;
        }
        queue.interrupt()?;
        Ok(next)
    }

    fn receive(&mut self, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        queue.ignore()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            self.listens = false;
            if stop.requested() || self.closed || !queue.take(&mut chain)? {
                next = Next::Wait;
                break;
            }
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(Broken::Request {
                    queue: queue.index(),
                    what: "a buffer that is only written",
                });
            }
            let mut bytes = [0; PORTION];
            let room = bytes.get_mut(..chain.writable.len().min(PORTION));
            let room = room.unwrap_or_default();
            match rustix::io::retry_on_intr(|| rustix::io::read(&*self.socket, &mut *room)) {
                Ok(count) if count > 0 => {
                    let written = chain
                        .writable
                        .copy_in(room.get(..count).unwrap_or_default());
                    queue.complete(chain.head, u32::try_from(written).unwrap_or(0))?;
                }
                other => {
                    queue.put_back();
                    self.listens = other == Err(Errno::AGAIN);
                    self.closed = !self.listens;
                    next = Next::Wait;
                    break;
                }
            }
        }
        queue.interrupt()?;
        Ok(next)
    }
}

impl Backend for Relay {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        let mut next = Next::Wait;
        self.listens = false;
        // Queues that the driver does not use are not among them.
        for queue in queues {
            next = next.sooner(match queue.index() {
                RECEIVE => self.receive(queue, stop)?,
                TRANSMIT => self.transmit(queue, stop)?,
                _ => Next::Wait,
            });
        }
        Ok(next)
    }

    /// Without anything to wait for, the socket is left out: poll(2) reports a hang-up whether asked or not.
    fn waits(&self) -> Vec<Wait> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, self.listens);
        events.set(PollFlags::OUT, self.stuck.is_some() && !self.gave_up());
        if self.closed || events.is_empty() {
            return Vec::new();
        }
        vec![(Arc::clone(&self.socket), events)]
    }
}

impl VirtioDevice for Console {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    /// Neither a size, nor several ports, nor emergency writes.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let relay = Relay {
            figures: Arc::clone(&self.figures),
            socket: Arc::clone(&self.socket),
            listens: false,
            stuck: None,
            closed: false,
        };
        vec![(vec![RECEIVE, TRANSMIT], Box::new(relay))]
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        // What was not sent of the driver's last buffer never will be.
        self.figures.gone.store(0, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self { figures, socket: _ } = self;
        let Figures { gone, dropped } = &**figures;
        let saved = SavedConsole {
            gone: gone.load(Ordering::SeqCst),
            dropped: dropped.load(Ordering::SeqCst),
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    fn load(&mut self, state: &[u8], features: Option<u64>) -> Result<(), StateError> {
        let SavedConsole { gone, dropped } = state::parse(state)?;
        if gone != 0 && features.is_none() {
            return Err(StateError::field(
                "gone",
                gone,
                "of a driver that is not ready",
            ));
        }
        self.figures.gone.store(gone, Ordering::SeqCst);
        self.figures.dropped.store(dropped, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
