//! A pair of queues and their tap, served by one I/O thread.

use std::sync::Arc;

use rustix::event::PollFlags;

use super::F_MQ;
use super::Shared;
use super::control;
use super::receive::Receiver;
use super::transmit::Transmitter;
use crate::devices::virtio::Backend;
use crate::devices::virtio::Next;
use crate::devices::virtio::Wait;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::seat::Stop;

pub(super) struct Pair {
    shared: Arc<Shared>,
    index: u16,
    receiver: Receiver,
    transmitter: Transmitter,
}

impl Pair {
    pub(super) fn new(shared: Arc<Shared>, index: u16) -> Self {
        Self {
            receiver: Receiver::new(Arc::clone(&shared), index),
            transmitter: Transmitter::new(Arc::clone(&shared), index),
            shared,
            index,
        }
    }
}

impl Backend for Pair {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        self.receiver.rest();
        // A driver that has not accepted several pairs has its commands in queue 2 (5.1.2).
        if self.index == 1 && !self.shared.has(F_MQ) {
            return match queues.first_mut() {
                Some(queue) if queue.index() == 2 => control::serve(&self.shared, queue, stop),
                _ => Ok(Next::Wait),
            };
        }
        self.shared.apply_offloads();
        let mut next = Next::Wait;
        for queue in queues {
            let one = if queue.index() % 2 == 0 {
                self.receiver.serve(queue, stop)?
            } else {
                self.transmitter.serve(queue, stop)?
            };
            next = next.sooner(one);
        }
        Ok(next)
    }

    fn waits(&self) -> Vec<Wait> {
        if !self.receiver.waits() {
            return Vec::new();
        }
        let taps = self.shared.taps_of(self.index);
        taps.map(|tap| (Arc::clone(tap), PollFlags::IN)).collect()
    }
}
