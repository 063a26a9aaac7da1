//! From the driver to the tap (5.1.6.2).

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use super::BATCH;
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

/// When a tap that took no packet is tried again. It has no end of room unless somebody limited it (TUNSETSNDBUF).
const RETRY: Duration = Duration::from_millis(1);

/// The transmitting half of a pair.
pub(super) struct Transmitter {
    shared: Arc<Shared>,
    pair: u16,
}

impl Transmitter {
    pub(super) fn new(shared: Arc<Shared>, pair: u16) -> Self {
        Self { shared, pair }
    }

    pub(super) fn serve(&self, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let before = queue.position();
        let next = self.packets(queue, stop)?;
        if queue.position().1 != before.1 {
            queue.interrupt()?;
        }
        Ok(next)
    }

    fn packets(&self, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        queue.ignore()?;
        for _ in 0..BATCH {
            if stop.requested() {
                return Ok(Next::Wait);
            }
            let wait = lock(&self.shared.sent).wait_ns();
            if wait > 0 {
                return Ok(Next::At(Instant::now() + Duration::from_nanos(wait)));
            }
            if !queue.take(&mut chain)? {
                return Ok(Next::Wait);
            }
            let packet = &chain.readable;
            if packet.len() < HEADER {
                let (queue, what) = (queue.index(), "a header");
                return Err(Broken::Request { queue, what });
            }
            let tap = self.shared.taps.get(usize::from(self.pair));
            if let Some(tap) = tap.filter(|_| packet.len() <= MAX_PACKET) {
                match guest_io::send(tap.as_fd(), packet) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        queue.put_back();
                        return Ok(Next::At(Instant::now() + RETRY));
                    }
                    // Whatever else the tap does not take is lost, as on a wire.
                    _ => {}
                }
            }
            lock(&self.shared.sent).take(packet.len() - HEADER);
            queue.complete(chain.head, 0)?;
        }
        Ok(Next::Again)
    }
}
