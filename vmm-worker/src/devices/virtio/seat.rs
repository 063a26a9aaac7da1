//! Where a backend and its virtqueues sit while nobody serves them, and how they are stopped.
//!
//! The invariants:
//!
//! 1. The occupant is in the seat, or one I/O thread has it. A thread takes it only while the seat is running, and puts
//!    it back whatever comes of it.
//! 2. `stop` is set before `running` is cleared, and a backend looks at it before each request. So after
//!    [`Seat::stop`], and once the occupant is back, no request is under way and none begins.
//! 3. Nothing here waits but [`Seat::wait_until`], which only the control thread calls.
//! 4. A backend whose queues another process serves is asked, after [`Seat::stop`], to have that process stop; until it has,
//!    the seat is leaving, and nobody but its I/O thread has the occupant.

use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFlags;

use super::Backend;
use super::Next;
use super::Wait;
use super::interrupts::Interrupts;
use super::queue::Virtqueue;
use crate::devices::DeviceId;
use crate::devices::Trigger;
use crate::diagnostics::log;

/// Whether a backend is to stop. Looked at before each request, and within long ones.
#[derive(Debug, Default)]
pub struct Stop {
    requested: AtomicBool,
    /// For tests: at which look from now on it is requested; 0: at none.
    #[cfg(test)]
    at_look: std::sync::atomic::AtomicUsize,
}

impl Stop {
    /// Whether it is.
    #[must_use]
    pub fn requested(&self) -> bool {
        #[cfg(test)]
        if self.at_look.load(Ordering::SeqCst) > 0
            && self.at_look.fetch_sub(1, Ordering::SeqCst) == 1
        {
            self.requested.store(true, Ordering::SeqCst);
        }
        self.requested.load(Ordering::SeqCst)
    }

    /// A request to stop, or none, for tests of backends.
    #[must_use]
    pub fn new(requested: bool) -> Self {
        let stop = Self::default();
        stop.requested.store(requested, Ordering::SeqCst);
        stop
    }
}

/// A backend with its queues.
pub struct Occupant {
    /// The queues, none before the driver is ready.
    pub queues: Vec<Virtqueue>,
    backend: Box<dyn Backend>,
}

struct State {
    occupant: Option<Occupant>,
    running: bool,
    /// Another process has not stopped serving its queues.
    leaving: bool,
    /// When it is to be served without a notification.
    due: Option<Instant>,
}

/// A seat.
pub struct Seat {
    state: Mutex<State>,
    returned: Condvar,
    stop: Stop,
    /// Whose it is.
    device: DeviceId,
    interrupts: Arc<Interrupts>,
    /// Another process serves its queues.
    elsewhere: bool,
    /// Tells the I/O thread to look at its seats again.
    wake: Arc<dyn Trigger>,
    /// A driver that breaks its queues again and again is written about once.
    complained: AtomicBool,
}

impl Seat {
    /// A seat for a `backend` of `device`, which fails by `interrupts`; `wake` wakes the I/O thread that serves it.
    #[must_use]
    pub fn new(
        device: DeviceId,
        backend: Box<dyn Backend>,
        interrupts: Arc<Interrupts>,
        wake: Arc<dyn Trigger>,
    ) -> Self {
        Self {
            elsewhere: backend.elsewhere(),
            state: Mutex::new(State {
                occupant: Some(Occupant {
                    queues: Vec::new(),
                    backend,
                }),
                running: false,
                leaving: false,
                due: None,
            }),
            returned: Condvar::new(),
            stop: Stop::default(),
            device,
            interrupts,
            wake,
            complained: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets it be served, at once for the first time: notifications may have come while it was not.
    pub fn run(&self) {
        let mut state = self.state();
        state.running = true;
        state.leaving = false;
        state.due = Some(Instant::now());
        self.stop.requested.store(false, Ordering::SeqCst);
        drop(state);
        self.wake.trigger();
    }

    /// Has it served soon, if it runs, and asked again for its sources.
    pub fn nudge(&self) {
        let mut state = self.state();
        if state.running {
            state.due = Some(Instant::now());
            drop(state);
            self.wake.trigger();
        }
    }

    /// Asks it to be served no further. Whether it was to be.
    pub fn stop(&self) -> bool {
        self.stop.requested.store(true, Ordering::SeqCst);
        let mut state = self.state();
        let ran = std::mem::take(&mut state.running);
        if ran && self.elsewhere {
            state.leaving = true;
            state.due = Some(Instant::now());
            drop(state);
            self.wake.trigger();
        }
        ran
    }

    /// Has it asked to stop in the middle of what it serves next: when its backend looks for the `look`th time.
    #[cfg(test)]
    pub(crate) fn stop_at_look(&self, look: usize) {
        self.stop.at_look.store(look, Ordering::SeqCst);
    }

    /// Waits until nobody serves it. Whether that came in time.
    #[must_use]
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .returned
            .wait_timeout_while(self.state(), left, |state| !state.stands_still())
            .unwrap_or_else(PoisonError::into_inner);
        state.stands_still()
    }

    /// What is waited for outside of this process.
    #[must_use]
    pub fn delay(&self) -> Option<&'static str> {
        self.state().occupant.as_ref()?.backend.delay()
    }

    /// Does something with the occupant of a stopped seat; nothing while it is still being served.
    pub fn with<T>(&self, f: impl FnOnce(&mut Occupant) -> T) -> Option<T> {
        let mut state = self.state();
        if state.running || !state.stands_still() {
            return None;
        }
        state.occupant.as_mut().map(f)
    }

    /// Drops the occupant of a stopped seat, for good.
    pub fn clear(&self) {
        self.state().occupant = None;
    }

    /// The I/O thread's side: what to wait for. `None` while there is nothing.
    pub fn awaited(&self, waits: &mut Vec<Wait>) -> Option<Duration> {
        let state = self.state();
        let active = state.running || state.leaving;
        let occupant = state.occupant.as_ref().filter(|_| active)?;
        let heard = occupant.queues.iter().filter(|_| !self.elsewhere);
        waits.extend(heard.map(|queue| (Arc::clone(queue.kick()), PollFlags::IN)));
        waits.extend(occupant.backend.waits());
        Some(state.due.map_or(Duration::MAX, |due| {
            due.saturating_duration_since(Instant::now())
        }))
    }

    /// The I/O thread's side: serves the backend, if it may.
    pub fn serve(&self) {
        let mut state = self.state();
        let leaving = state.leaving;
        if !state.running && !leaving {
            return;
        }
        let Some(mut occupant) = state.occupant.take() else {
            return;
        };
        state.due = None;
        drop(state);

        // Whatever was notified is served now. Not before the occupant is taken: a seat that is stopped leaves
        // notifications to the next worker.
        for queue in occupant.queues.iter().filter(|_| !self.elsewhere) {
            let _ = rustix::io::read(&**queue.kick(), &mut [0; 8]);
        }
        let outcome = if leaving {
            occupant.backend.leave(&mut occupant.queues)
        } else {
            let served = occupant.backend.serve(&mut occupant.queues, &self.stop);
            served.map(Some)
        };

        let mut state = self.state();
        state.occupant = Some(occupant);
        // It may have been nudged meanwhile.
        let nudged = state.due;
        let due = |due: Instant| Some(nudged.map_or(due, |nudged| nudged.min(due)));
        match outcome {
            Ok(None) => state.leaving = false,
            Ok(Some(Next::Wait)) => {}
            Ok(Some(Next::Again)) => state.due = due(Instant::now()),
            Ok(Some(Next::At(at))) => state.due = due(at),
            Err(broken) => {
                state.running = false;
                state.leaving = false;
                if !self.complained.swap(true, Ordering::SeqCst) {
                    log!("{}: {broken}; the device needs a reset", self.device);
                }
                self.interrupts.fail();
            }
        }
        drop(state);
        self.returned.notify_all();
    }
}

impl State {
    /// Nobody serves it, here or elsewhere.
    fn stands_still(&self) -> bool {
        self.occupant.is_some() && !self.leaving
    }
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("Seat")
            .field("running", &state.running)
            .field("served", &state.occupant.is_none())
            .finish()
    }
}
