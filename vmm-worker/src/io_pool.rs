//! The I/O threads: a fixed pool, made before the guest runs, that serves the backends of virtio devices.
//!
//! Each backend belongs to one thread. A thread waits for the notifications of all its backends at once, with poll(2), and
//! only for those that are running: before the commit of an upgrade, and while devices are parked, it touches nothing but
//! its own eventfd. Its last filter is on before it serves anything, and every system call that it will make is made once
//! under it.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::vhost_user::Request;
use baton_ipc::vhost_user::VhostUserError;
use baton_policy::Program;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use thiserror::Error;

use crate::devices::Trigger;
use crate::devices::virtio::guest_io;
use crate::devices::virtio::seat::Seat;
use crate::diagnostics::log;
use crate::platform::PlatformError;
use crate::platform::Wake;

/// The stack of an I/O thread, in bytes: requests keep what is large on the heap.
const STACK: usize = 256 << 10;
/// How long a thread may take to put its filter on.
const CONFINE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a thread may take to let go of what is no longer its own.
const FORGET_TIMEOUT: Duration = Duration::from_millis(20);

/// Why the pool does not work.
#[derive(Debug, Error)]
pub(crate) enum PoolError {
    /// A thread could not be made.
    #[error("I/O thread {index}: {source}")]
    Thread {
        /// Which.
        index: usize,
        /// Why not.
        source: io::Error,
    },
    /// A thread's eventfd.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// A filter could not be put on, or is too tight.
    #[error("I/O thread {index}: {reason}")]
    Refused {
        /// Which.
        index: usize,
        /// What it says.
        reason: String,
    },
    /// A thread did not answer.
    #[error("I/O thread {index} did not answer within {CONFINE_TIMEOUT:?}")]
    Silent {
        /// Which.
        index: usize,
    },
}

/// What the control thread and one I/O thread share.
struct Link {
    seats: Mutex<Vec<Arc<Seat>>>,
    confinement: Mutex<Confinement>,
    changed: Condvar,
    wake: Wake,
    /// How often it has looked for something to do.
    turns: Mutex<u64>,
    turned: Condvar,
}

enum Confinement {
    /// Not yet.
    Awaited,
    /// This is the filter.
    Ordered(Program),
    /// It is on, or not, and why.
    Answered(Result<(), String>),
}

/// The pool.
pub(crate) struct IoPool {
    links: Vec<Arc<Link>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IoPool {
    /// Makes `count` threads.
    ///
    /// # Errors
    ///
    /// [`PoolError`].
    pub(crate) fn spawn(count: u8) -> Result<Self, PoolError> {
        let mut links = Vec::new();
        for index in 0..usize::from(count) {
            let link = Arc::new(Link {
                seats: Mutex::new(Vec::new()),
                confinement: Mutex::new(Confinement::Awaited),
                changed: Condvar::new(),
                wake: Wake::new()?,
                turns: Mutex::new(0),
                turned: Condvar::new(),
            });
            let own = Arc::clone(&link);
            std::thread::Builder::new()
                .name(format!("io{index}"))
                .stack_size(STACK)
                .spawn(move || own.live())
                .map_err(|source| PoolError::Thread { index, source })?;
            links.push(link);
        }
        Ok(Self { links })
    }

    fn link(&self, number: usize) -> Option<&Arc<Link>> {
        self.links.get(number.checked_rem(self.links.len())?)
    }

    /// What wakes the thread that serves the seat of this number.
    pub(crate) fn waker(&self, number: usize) -> Arc<dyn Trigger> {
        match self.link(number) {
            Some(link) => {
                let link = Arc::clone(link);
                Arc::new(move || link.wake.trigger())
            }
            None => Arc::new(|| {}),
        }
    }

    /// Takes seats away from their threads, which have let go of all of them when this returns, unless one is busy for longer
    /// than [`FORGET_TIMEOUT`]: it lets go when it is not.
    pub(crate) fn forget<'a>(&self, seats: impl Iterator<Item = &'a Arc<Seat>>) {
        let gone: Vec<&Arc<Seat>> = seats.collect();
        let deadline = Instant::now() + FORGET_TIMEOUT;
        for link in &self.links {
            lock(&link.seats).retain(|seat| !gone.iter().any(|gone| Arc::ptr_eq(seat, gone)));
            let turns = *lock(&link.turns);
            link.wake.trigger();
            let left = deadline.saturating_duration_since(Instant::now());
            let same = |now: &mut u64| *now == turns;
            // Bounded, and of no consequence if it is not long enough.
            let _ = link
                .turned
                .wait_timeout_while(lock(&link.turns), left, same);
        }
    }

    /// Gives a seat to the thread of its number, until it is forgotten.
    pub(crate) fn add(&self, number: usize, seat: Arc<Seat>) {
        if let Some(link) = self.link(number) {
            lock(&link.seats).push(seat);
        }
    }

    /// Puts the last filter on every thread.
    ///
    /// # Errors
    ///
    /// [`PoolError`].
    pub(crate) fn confine(&self, program: &Program) -> Result<(), PoolError> {
        for link in &self.links {
            *lock(&link.confinement) = Confinement::Ordered(program.clone());
            link.changed.notify_all();
        }
        for (index, link) in self.links.iter().enumerate() {
            let unanswered = |state: &mut Confinement| !matches!(state, Confinement::Answered(_));
            let (state, _) = link
                .changed
                .wait_timeout_while(lock(&link.confinement), CONFINE_TIMEOUT, unanswered)
                .unwrap_or_else(PoisonError::into_inner);
            match &*state {
                Confinement::Answered(Ok(())) => {}
                Confinement::Answered(Err(reason)) => {
                    let reason = reason.clone();
                    return Err(PoolError::Refused { index, reason });
                }
                _ => return Err(PoolError::Silent { index }),
            }
        }
        Ok(())
    }
}

impl Link {
    fn live(&self) -> ! {
        let waiting = |state: &mut Confinement| !matches!(state, Confinement::Ordered(_));
        let mut state = self
            .changed
            .wait_while(lock(&self.confinement), waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let outcome = match &*state {
            Confinement::Ordered(program) => program
                .install()
                .map_err(|error| format!("its filter: {error}"))
                .and_then(|()| self.rehearse()),
            _ => Err("no filter came".to_owned()),
        };
        *state = Confinement::Answered(outcome);
        drop(state);
        self.changed.notify_all();
        loop {
            self.turn();
            *lock(&self.turns) += 1;
            self.turned.notify_all();
        }
    }

    /// Makes the system calls of a disk's, a tap's and a backend's requests on an eventfd, which is none of them: what counts is
    /// that the filter lets them.
    fn rehearse(&self) -> Result<(), String> {
        let own = self.wake.as_fd();
        self.wake.trigger();
        self.wake.clear();
        let keep = FallocateFlags::KEEP_SIZE;
        let buffer = &mut [0_u8; 8];
        let refused = [
            rustix::io::pread(own, &mut *buffer, 0).map(drop),
            rustix::io::pwrite(own, &*buffer, 0).map(drop),
            rustix::io::preadv(own, &mut [io::IoSliceMut::new(buffer)], 0).map(drop),
            rustix::io::pwritev(own, &[io::IoSlice::new(&[0; 8])], 0).map(drop),
            rustix::fs::fdatasync(own),
            rustix::fs::fallocate(own, FallocateFlags::PUNCH_HOLE | keep, 0, 512),
            rustix::fs::fallocate(own, FallocateFlags::ZERO_RANGE | keep, 0, 512),
            // Of a tap, whose offloads it does not have; nor are four bytes or this number a counter's.
            guest_io::set_tap_offloads(own, 0)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            rustix::io::readv(own, &mut [io::IoSliceMut::new(&mut [0; 4])]).map(drop),
            rustix::io::writev(own, &[io::IoSlice::new(&[0xFF; 8])]).map(drop),
            // Of a vhost-user connection.
            match Request::GetFeatures.send(own, &[]) {
                Err(VhostUserError::Io { errno, .. }) => Err(errno),
                _ => Ok(()),
            },
        ];
        let told = |outcome: &Result<(), Errno>| {
            matches!(
                outcome,
                Err(Errno::SPIPE | Errno::INVAL | Errno::NODEV | Errno::NOTTY | Errno::NOTSOCK)
            )
        };
        match refused.iter().position(|outcome| !told(outcome)) {
            None => Ok(()),
            Some(call) => Err(format!("rehearsed call {call}: {:?}", refused.get(call))),
        }
    }

    /// Waits for something to do, and does it.
    fn turn(&self) {
        let seats = lock(&self.seats).clone();
        let (mut waits, mut owners) = (Vec::new(), Vec::new());
        let (mut due, mut wait) = (Vec::new(), Duration::MAX);
        for (number, seat) in seats.iter().enumerate() {
            let Some(left) = seat.awaited(&mut waits) else {
                continue;
            };
            owners.resize(waits.len(), number);
            wait = wait.min(left);
            if left.is_zero() {
                due.push(number);
            }
        }
        let timeout = (wait != Duration::MAX).then(|| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        });
        let mut sources = Vec::with_capacity(waits.len() + 1);
        sources.push(PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN));
        sources.extend(waits.iter().map(|(fd, events)| PollFd::new(fd, *events)));
        match rustix::event::poll(&mut sources, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                log!("I/O thread: poll: {error}");
                // Not in a circle as fast as it can.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let mut ready = sources.iter().map(|source| !source.revents().is_empty());
        if ready.next() == Some(true) {
            self.wake.clear();
        }
        due.extend(
            owners
                .iter()
                .zip(ready)
                .filter(|(_, ready)| *ready)
                .map(|(owner, _)| *owner),
        );
        due.sort_unstable();
        due.dedup();
        for number in due {
            if let Some(seat) = seats.get(number) {
                seat.serve();
            }
        }
    }
}
