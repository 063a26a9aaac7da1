//! The driver's commands (5.1.6.5): how many pairs it uses.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::BATCH;
use super::F_MQ;
use super::Shared;
use crate::devices::virtio::Backend;
use crate::devices::virtio::Next;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::seat::Stop;

/// Class and command: the number of pairs (5.1.6.5.5).
const SET_PAIRS: (u8, u8) = (4, 0);
const OK: u8 = 0;
const ERROR: u8 = 1;

/// The queue for commands of an interface with several pairs.
pub(super) struct Control {
    shared: Arc<Shared>,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl Backend for Control {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        match queues.first_mut() {
            Some(queue) => serve(&self.shared, queue, stop),
            None => Ok(Next::Wait),
        }
    }
}

/// Obeys the commands of a queue.
pub(super) fn serve(shared: &Shared, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
    let mut chain = Chain::default();
    for _ in 0..BATCH {
        if stop.requested() {
            return Ok(Next::Wait);
        }
        if !queue.pop(&mut chain)? {
            if !queue.listen()? {
                return Ok(Next::Wait);
            }
            continue;
        }
        if chain.writable.is_empty() {
            let (queue, what) = (queue.index(), "an acknowledgement");
            return Err(Broken::Request { queue, what });
        }
        let answer = if obey(shared, &chain) { OK } else { ERROR };
        chain.writable.copy_in(&[answer]);
        queue.complete(chain.head, 1)?;
        queue.interrupt()?;
    }
    Ok(Next::Again)
}

/// Obeys a command, if it is one.
fn obey(shared: &Shared, chain: &Chain) -> bool {
    let Some([class, command, low, high]) = chain.readable.head() else {
        return false;
    };
    let pairs = u16::from_le_bytes([low, high]);
    let known = (class, command) == SET_PAIRS && shared.has(F_MQ);
    if !known || pairs == 0 || usize::from(pairs) > shared.taps.len() {
        return false;
    }
    shared.pairs.store(pairs, Ordering::SeqCst);
    shared.nudge();
    true
}
