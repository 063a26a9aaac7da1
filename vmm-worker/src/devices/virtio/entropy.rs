//! The entropy device (5.4): one queue, whose buffers are filled with random bytes of the host's kernel.

use super::Backend;
use super::Identity;
use super::Next;
use super::VirtioDevice;
use super::queue::Broken;
use super::queue::Chain;
use super::queue::Virtqueue;
use super::seat::Stop;
use crate::devices::DeviceKind;
use crate::devices::state::StateError;

/// Of no class of PCI's.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::ENTROPY,
    virtio_type: 4,
    pci_class: 0xFF_0000,
};
/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 64;
/// The most that one buffer is filled with, in bytes: getrandom(2) gives as many whole, and a driver asks again.
const PORTION: usize = 256;
/// Requests that are served before others of the same thread get their turn.
const BATCH: usize = 16;

/// The entropy device. It knows nothing from one request to the next.
#[derive(Debug, Default)]
pub struct Entropy;

struct Source;

impl Backend for Source {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        let Some(queue) = queues.first_mut() else {
            return Ok(Next::Wait);
        };
        let mut chain = Chain::default();
        for _ in 0..BATCH {
            if stop.requested() {
                return Ok(Next::Wait);
            }
            if !queue.pop(&mut chain)? {
                if queue.listen()? {
                    continue;
                }
                return Ok(Next::Wait);
            }
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(Broken::Request {
                    queue: queue.index(),
                    what: "a buffer that is only written",
                });
            }
            let mut bytes = [0; PORTION];
            // Without randomness the driver gets nothing, rather than something that is none.
            let count =
                rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::NONBLOCK)
                    .unwrap_or(0);
            let written = chain
                .writable
                .copy_in(bytes.get(..count).unwrap_or_default());
            queue.complete(chain.head, u32::try_from(written).unwrap_or(0))?;
            queue.interrupt()?;
        }
        Ok(Next::Again)
    }
}

impl VirtioDevice for Entropy {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        vec![(vec![0], Box::new(Source))]
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self = self;
        Ok(Vec::new())
    }

    fn load(&mut self, state: &[u8], _features: Option<u64>) -> Result<(), StateError> {
        match state {
            [] => Ok(()),
            _ => Err(StateError::Trailing(state.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_ipc::StartMode;
    use proptest::prelude::*;

    use super::*;
    use crate::devices::Device as _;
    use crate::devices::virtio::NEEDS_RESET;
    use crate::devices::virtio::test_driver::*;

    fn rig() -> Rig {
        let mut rig = Rig::new(Box::new(Entropy));
        rig.bring_up();
        rig
    }

    #[test]
    fn buffers_are_filled_and_no_two_alike() {
        let mut rig = rig();
        let mut seen = Vec::new();
        for round in 1..=20 {
            rig.offer(0, &[(BUFFERS, 3, WRITE), (BUFFERS + 0x100, 61, WRITE)]);
            rig.serve();
            assert_eq!((rig.used(0), rig.last_used(0).1), (round, 64));
            let bytes = [rig.get(BUFFERS, 3), rig.get(BUFFERS + 0x100, 61)].concat();
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
        // No more than a portion, and nothing beyond it.
        rig.offer(0, &[(BUFFERS + 0x1000, 0x1000, WRITE)]);
        rig.serve();
        assert_eq!(rig.last_used(0).1, 256);
        assert_eq!(rig.get(BUFFERS + 0x1100, 0xF00), [0; 0xF00]);
    }

    #[test]
    fn a_buffer_to_read_from_breaks_the_queue() {
        for parts in [
            &[(BUFFERS, 8, 0)][..],
            &[(BUFFERS, 8, 0), (BUFFERS, 8, WRITE)],
        ] {
            let mut rig = rig();
            rig.offer(0, parts);
            rig.serve();
            assert_ne!(rig.status() & NEEDS_RESET, 0);
            rig.bring_up();
            rig.offer(0, &[(BUFFERS, 8, WRITE)]);
            rig.serve();
            assert_eq!(rig.used(0), 1);
        }
    }

    #[test]
    fn a_state_with_bytes_of_its_own_is_refused() {
        assert_eq!(Entropy.load(&[0], None), Err(StateError::Trailing(1)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever comes, nothing panics, every state that is saved can be loaded, and a driver that behaves is served.
        #[test]
        fn hostile_drivers_harm_nobody_but_themselves(
            actions in prop::collection::vec((0..4_u8, 0..0x8000_u64, any::<u64>()), 1..60)
        ) {
            let mut rig = rig();
            for (kind, at, value) in actions {
                match kind {
                    0 => rig.write(at, value, 4),
                    1 => rig.put(RINGS + at % 0x3000, &value.to_le_bytes()),
                    2 => {
                        rig.offer(0, &[(value % (2 * RAM), u32::try_from(at).unwrap(), WRITE)]);
                        rig.serve();
                    }
                    _ => {
                        rig.transport.park(StartMode::CprTransfer).unwrap();
                        let section = rig.transport.save(StartMode::CprTransfer).unwrap();
                        let mut fresh = Rig::on(Box::new(Entropy), rig.ram);
                        fresh.transport.load(StartMode::CprTransfer, &section).unwrap();
                        rig.transport.resume(StartMode::CprTransfer).unwrap();
                    }
                }
            }
            rig.bring_up();
            rig.offer(0, &[(BUFFERS, 8, WRITE)]);
            rig.serve();
            prop_assert_eq!(rig.used(0), 1);
        }
    }
}
