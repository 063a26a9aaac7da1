//! An upgrade step by step, and the middle of its main channel.

use super::PATIENCE;
use super::vm::Vm;
use super::worker::Worker;
use baton_ipc::StateDigest;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// A main channel's two ends: the old worker's and the new one's.
pub(crate) fn main_channel() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    (a.into(), b.into())
}

/// The middle of a main channel, from which a test can cut, bend or forge what goes over it.
pub(crate) struct Tap {
    old: UnixStream,
    new: UnixStream,
}

impl Tap {
    /// A tap, and the two ends for the workers.
    fn new() -> (Self, OwnedFd, OwnedFd) {
        let ((old, old_end), (new, new_end)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for end in [&old_end, &new_end] {
            end.set_nonblocking(true).unwrap();
        }
        for end in [&old, &new] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (Self { old, new }, old_end.into(), new_end.into())
    }

    fn relay_frame(mut from: &UnixStream, mut to: &UnixStream) {
        let mut length = [0; 4];
        from.read_exact(&mut length).unwrap();
        let mut payload = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
        from.read_exact(&mut payload).unwrap();
        to.write_all(&length).unwrap();
        to.write_all(&payload).unwrap();
    }

    /// The old worker's state stream.
    pub(crate) fn stream(&self, saved: &Saved) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(saved.bytes).unwrap()];
        (&self.old).read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Sends the new worker something.
    pub(crate) fn send(&self, bytes: &[u8]) {
        (&self.new).write_all(bytes).unwrap();
    }
}

/// An upgrade under way, step by step.
pub(crate) struct Upgrade {
    pub(crate) new: Worker,
    pub(crate) generation: u32,
}

/// What the old worker said in the pause.
pub(crate) struct Saved {
    pub(crate) first_exit_ns: u64,
    pub(crate) parked_ns: u64,
    pub(crate) digest: StateDigest,
    pub(crate) bytes: u64,
}

impl Upgrade {
    /// S2 and S3: a new worker that both workers agree on.
    #[track_caller]
    pub(crate) fn agree(vm: &Vm, old: &mut Worker, generation: u32) -> Self {
        let mut upgrade = Self {
            new: Worker::spawn(),
            generation,
        };
        upgrade.new.expect_hello();
        let (old_end, new_end) = main_channel();
        upgrade.new.configure(vm.config(generation), Some(&new_end));
        drop(new_end);
        old.transfer(&old_end);
        drop(old_end);
        old.expect("agreed", |report| {
            if report == Report::Agreed {
                Ok(())
            } else {
                Err(report)
            }
        });
        upgrade
    }

    /// S2 and S3, with a tap in the main channel.
    #[track_caller]
    pub(crate) fn agree_tapped(vm: &Vm, old: &mut Worker, generation: u32) -> (Self, Tap) {
        let mut upgrade = Self {
            new: Worker::spawn(),
            generation,
        };
        upgrade.new.expect_hello();
        let (tap, old_end, new_end) = Tap::new();
        upgrade.new.configure(vm.config(generation), Some(&new_end));
        old.transfer(&old_end);
        drop((old_end, new_end));
        Tap::relay_frame(&tap.new, &tap.old);
        Tap::relay_frame(&tap.old, &tap.new);
        old.expect("agreed", |report| {
            if report == Report::Agreed {
                Ok(())
            } else {
                Err(report)
            }
        });
        (upgrade, tap)
    }

    /// S4 and S5.
    #[track_caller]
    pub(crate) fn build(&mut self, vm: &Vm) -> BuildTimes {
        self.new
            .hand_over(&vm.header(self.generation), &vm.registry());
        self.new.expect_ready()
    }

    /// S6 and S7.
    #[track_caller]
    pub(crate) fn park(old: &mut Worker) -> Saved {
        old.order(&Order::Park);
        let (first_exit_ns, parked_ns) = old.expect("parked", |report| match report {
            Report::Parked {
                first_exit_ns,
                parked_ns,
            } => Ok((first_exit_ns, parked_ns)),
            other => Err(other),
        });
        old.expect("saved", |report| match report {
            Report::Saved { digest, bytes } => Ok(Saved {
                first_exit_ns,
                parked_ns,
                digest,
                bytes,
            }),
            other => Err(other),
        })
    }

    /// S8.
    #[track_caller]
    pub(crate) fn expect_loaded(&mut self) -> StateDigest {
        self.new.expect("loaded", |report| match report {
            Report::Loaded { digest, .. } => Ok(digest),
            other => Err(other),
        })
    }

    /// All of it up to the load, and then back: the new worker dies, and the old one goes on.
    #[track_caller]
    pub(crate) fn roll_back(vm: &Vm, old: &mut Worker, generation: u32) {
        let mut upgrade = Self::agree(vm, old, generation);
        upgrade.build(vm);
        Self::park(old);
        upgrade.expect_loaded();
        upgrade.new.kill();
        old.order(&Order::Rollback);
        old.expect_resumed();
    }

    /// All of it; the old worker is killed. The new one, and the blackout in nanoseconds.
    #[track_caller]
    pub(crate) fn complete(vm: &Vm, mut old: Worker, generation: u32) -> (Worker, u64) {
        let mut upgrade = Self::agree(vm, &mut old, generation);
        upgrade.build(vm);
        let saved = Self::park(&mut old);
        assert_eq!(upgrade.expect_loaded(), saved.digest);
        old.order(&Order::Ceded);
        upgrade.new.order(&Order::Commit);
        let last_run_ns = upgrade.new.expect_running();
        assert!(saved.first_exit_ns <= saved.parked_ns && saved.parked_ns < last_run_ns);
        (upgrade.new, last_run_ns - saved.first_exit_ns)
    }
}
