//! A device that another process implements, by vhost-user: a disk (5.2) or a file system (5.11).
//!
//! ```text
//!   driver ── notifies (eventfd) ──► backend's process ── used rings ──► guest RAM
//!                                        │ ▲
//!                     call (eventfd) ◄───┘ └─── connection: made by the broker, requests of this worker
//!                          │
//!   vector ◄── I/O thread ─┘
//! ```
//!
//! The broker has made the connection, agreed on the protocol and announced guest RAM, once for all workers. What is left to a
//! worker is to start the rings, and to stop them before it hands the guest on: the next one starts them where they
//! stopped. The eventfds by which the backend interrupts are each worker's own.
//!
//! ```text
//! Stopped ── driver ready, resume: SET_VRING_*, SET_VRING_ENABLE ──► Started
//!    ▲                                                                  │ park, reset: all requests are given back, then
//!    └── every reply ── Stopping ◄── GET_VRING_BASE of each queue ──────┘
//! ```
//!
//! A park that is called off while it is stopping goes on to its end, and starts the rings again. Rings are asked to stop only
//! when nothing is under way in them: the specification has a backend finish that before it answers, but libvhost-user does
//! not, and ends the connection when it completes a request of a ring that was stopped.
//!
//! A backend that hangs up or says what it was not asked is dead for good: the device needs a reset, which does not help.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::vhost_user::F_PROTOCOL_FEATURES;
use baton_ipc::vhost_user::Replies;
use baton_ipc::vhost_user::Request;
use baton_ipc::vhost_user::VhostUserError;
use baton_ipc::worker::VhostUserConfig;
use baton_ipc::worker::VhostUserKind;
use rustix::event::EventfdFlags;
use rustix::event::PollFlags;

use super::Backend;
use super::F_EVENT_IDX;
use super::F_INDIRECT_DESC;
use super::F_VERSION_1;
use super::Identity;
use super::Next;
use super::VirtioDevice;
use super::Wait;
use super::queue::Broken;
use super::queue::Virtqueue;
use super::seat::Stop;
use crate::devices::DeviceKind;
use crate::devices::state::StateError;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Features of rings that there can be.
const RING_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX;
/// How often it is looked whether requests were given back: a driver need not want an interrupt for each.
const LOOK: Duration = Duration::from_micros(200);

/// What a driver finds. Both are of PCI's class mass storage, other.
#[must_use]
pub fn identity(kind: VhostUserKind) -> Identity {
    let (kind, virtio_type) = match kind {
        VhostUserKind::Blk => (DeviceKind::VHOST_USER_BLK, 2),
        VhostUserKind::Fs => (DeviceKind::VHOST_USER_FS, 26),
    };
    Identity {
        kind,
        virtio_type,
        pci_class: 0x01_8000,
    }
}

/// The half that the driver configures.
pub struct VhostUser {
    identity: Identity,
    features: u64,
    queues: u16,
    config: Vec<u8>,
    /// What the driver has accepted.
    accepted: Arc<AtomicU64>,
    connection: Arc<OwnedFd>,
    calls: Vec<Arc<OwnedFd>>,
}

impl VhostUser {
    /// The device that is behind `connection`, a socket that does not block, as the broker has found it.
    ///
    /// # Errors
    ///
    /// That of eventfd(2).
    pub fn new(connection: OwnedFd, config: &VhostUserConfig) -> io::Result<Self> {
        let VhostUserConfig {
            kind,
            queues,
            features,
            config,
        } = config;
        let call = |_| {
            let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
            rustix::event::eventfd(0, flags).map(Arc::new)
        };
        Ok(Self {
            identity: identity(*kind),
            features: *features,
            queues: (*queues).into(),
            config: config.clone(),
            accepted: Arc::new(AtomicU64::new(0)),
            connection: Arc::new(connection),
            calls: (0..*queues).map(call).collect::<Result<_, _>>()?,
        })
    }
}

impl VirtioDevice for VhostUser {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn features(&self) -> u64 {
        self.features & !(RING_FEATURES | F_VERSION_1)
    }

    fn ring_features(&self) -> u64 {
        self.features & RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let elsewhere = Elsewhere {
            connection: Arc::clone(&self.connection),
            calls: self.calls.clone(),
            accepted: Arc::clone(&self.accepted),
            replies: Replies::default(),
            rings: Rings::Stopped,
        };
        vec![((0..self.queues).collect(), Box::new(elsewhere))]
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn activate(&mut self, features: u64) {
        self.accepted.store(features, Ordering::SeqCst);
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<Vec<u8>, StateError> {
        // How far the rings are is the transport's to say; what the device is, the broker tells each worker.
        let Self {
            identity: _,
            features: _,
            queues: _,
            config: _,
            accepted: _,
            connection: _,
            calls: _,
        } = self;
        Ok(Vec::new())
    }

    fn load(&mut self, state: &[u8], features: Option<u64>) -> Result<(), StateError> {
        if !state.is_empty() {
            return Err(StateError::Trailing(state.len()));
        }
        if let Some(features) = features {
            self.activate(features);
        }
        Ok(())
    }
}

/// How far the rings are.
#[derive(Debug)]
enum Rings {
    Stopped,
    Started {
        /// Requests without a notification were given one, since rings are to stop.
        urged: bool,
    },
    /// All were asked to stop, and so many have.
    Stopping(usize),
    /// Why the backend is no use any more.
    Dead(VhostUserError),
}

/// The half that works: this thread talks to the process that does.
struct Elsewhere {
    connection: Arc<OwnedFd>,
    /// By which the backend interrupts, one a queue.
    calls: Vec<Arc<OwnedFd>>,
    accepted: Arc<AtomicU64>,
    replies: Replies,
    rings: Rings,
}

fn kick(queue: &Virtqueue) {
    // Only a counter at its end refuses, and then the backend has enough to read.
    let _ = rustix::io::write(&**queue.kick(), &1_u64.to_ne_bytes());
}

impl Elsewhere {
    fn ask(&self, request: Request<'_>, fd: Option<&OwnedFd>) -> Result<(), VhostUserError> {
        let fds: Vec<_> = fd.into_iter().map(|fd| fd.as_fd()).collect();
        request.send(&*self.connection, &fds)
    }

    /// Lets the backend serve the queues from where they are.
    fn start(&mut self, queues: &[Virtqueue]) -> Result<(), VhostUserError> {
        let accepted = self.accepted.load(Ordering::SeqCst) | F_PROTOCOL_FEATURES;
        self.ask(Request::SetFeatures(accepted), None)?;
        for ring in queues {
            let queue = ring.index();
            let ((size, place), (next_available, _)) = (ring.place(), ring.position());
            let call = self.calls.get(usize::from(queue)).map(|call| &**call);
            self.ask(Request::SetVringNum { queue, size }, None)?;
            self.ask(
                Request::SetVringBase {
                    queue,
                    next_available,
                },
                None,
            )?;
            self.ask(Request::SetVringAddr { queue, place }, None)?;
            self.ask(Request::SetVringCall { queue }, call)?;
            self.ask(Request::SetVringKick { queue }, Some(ring.kick()))?;
            self.ask(
                Request::SetVringEnable {
                    queue,
                    enable: true,
                },
                None,
            )?;
            // What was notified before may have been heard by nobody who could serve it.
            kick(ring);
        }
        self.rings = Rings::Started { urged: false };
        Ok(())
    }

    /// Interrupts the driver where the backend did.
    fn hear_calls(&self, queues: &[Virtqueue]) {
        for queue in queues {
            let call = self.calls.get(usize::from(queue.index()));
            if call.is_some_and(|call| rustix::io::read(&**call, &mut [0; 8]).is_ok()) {
                queue.signal();
            }
        }
    }

    /// Takes the replies of rings that were asked to stop; whether all have.
    fn hear_bases(&mut self, queues: &mut [Virtqueue]) -> Result<bool, VhostUserError> {
        while let Rings::Stopping(stopped) = self.rings {
            let Some(queue) = queues.get_mut(stopped) else {
                self.rings = Rings::Stopped;
                break;
            };
            let Some(reply) = self.replies.receive(&*self.connection)? else {
                return Ok(false);
            };
            queue.served(reply.vring_base(queue.index())?);
            self.rings = Rings::Stopping(stopped + 1);
        }
        Ok(true)
    }

    fn work(&mut self, queues: &mut [Virtqueue]) -> Result<(), VhostUserError> {
        if let Rings::Dead(why) = &self.rings {
            return Err(why.clone());
        }
        self.hear_calls(queues);
        if !self.hear_bases(queues)? {
            // Called off: they start again when they have stopped.
            return Ok(());
        }
        if matches!(self.rings, Rings::Stopped) {
            self.start(queues)?;
        }
        self.replies.expect_none(&*self.connection)
    }

    /// Whether nothing is under way. What is there without a notification gets one, so that it will be given back.
    fn rests(&mut self, queues: &[Virtqueue]) -> bool {
        let urge = matches!(self.rings, Rings::Started { urged: false });
        self.rings = Rings::Started { urged: true };
        let busy = queues.iter().filter(|queue| queue.outstanding() > 0);
        let busy = busy.inspect(|queue| {
            if urge {
                kick(queue);
            }
        });
        busy.count() == 0
    }

    fn stop(&mut self, queues: &mut [Virtqueue]) -> Result<Option<Next>, VhostUserError> {
        self.hear_calls(queues);
        if matches!(self.rings, Rings::Started { .. }) {
            self.replies.expect_none(&*self.connection)?;
            if !self.rests(queues) {
                return Ok(Some(Next::At(Instant::now() + LOOK)));
            }
            for queue in &*queues {
                let queue = queue.index();
                self.ask(Request::GetVringBase { queue }, None)?;
            }
            self.rings = Rings::Stopping(0);
        }
        if !self.hear_bases(queues)? {
            return Ok(Some(Next::Wait));
        }
        // What it interrupted for last.
        self.hear_calls(queues);
        Ok(None)
    }

    /// After this nothing more is said to the backend.
    fn bury<T>(&mut self, outcome: Result<T, VhostUserError>) -> Result<T, Broken> {
        outcome.map_err(|why| {
            self.rings = Rings::Dead(why.clone());
            why.into()
        })
    }
}

impl Backend for Elsewhere {
    fn serve(&mut self, queues: &mut [Virtqueue], _: &Stop) -> Result<Next, Broken> {
        let outcome = self.work(queues);
        self.bury(outcome).map(|()| Next::Wait)
    }

    fn waits(&self) -> Vec<Wait> {
        let calls = self.calls.iter().map(Arc::clone);
        let all = calls.chain([Arc::clone(&self.connection)]);
        all.map(|fd| (fd, PollFlags::IN)).collect()
    }

    fn elsewhere(&self) -> bool {
        true
    }

    fn leave(&mut self, queues: &mut [Virtqueue]) -> Result<Option<Next>, Broken> {
        if let Rings::Dead(_) = self.rings {
            return Ok(None);
        }
        let outcome = self.stop(queues);
        self.bury(outcome)
    }

    fn delay(&self) -> Option<&'static str> {
        match self.rings {
            Rings::Started { .. } => Some("the vhost-user backend has not finished its requests"),
            Rings::Stopping(_) => Some("the vhost-user backend has not stopped its rings"),
            Rings::Stopped | Rings::Dead(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
