//! S6 to S10: the guest stands still, and this function is the only thing that the broker does.
//!
//! ```text
//!           park ► old: parked, saved ► SIGSTOP old, confirmed ─┐
//!                                     new: loaded ──────────────┴► ceded ► old's queue, commit ► new: running
//!   any failure before "commit":  fence new, kill it, old: rollback + SIGCONT
//!   any failure after it:         fence new, drain its socket: "running" there → it is the VM; absent → as above
//! ```
//!
//! The operator may still cancel before "commit": a request that waits is looked for whenever nothing else happens, and once
//! more when all else is ready.
//!
//! Who may run the guest is decided by what the kernel has queued, never by a timer alone: a message that arrived before the
//! fence was confirmed was sent by a worker that may have run; without one, and with the fence, it never can.
//!
//! The old worker is not asked whether it stands still: it is stopped by the kernel before the new one is told to run. It
//! cannot acknowledge `ceded` then, and need not: the order lies in its queue, which it reads before it sees the broker's
//! death, whichever comes first.

use std::time::Duration;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::StateDigest;
use baton_ipc::control::Step;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_ipc::worker::VsockReport;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::time::Timespec;

use crate::fail_point;
use crate::upgrade::deadlines::Deadlines;
use crate::upgrade::phase_clock::PhaseClock;
use crate::upgrade::phase_clock::micros;
use crate::worker::Fence;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::WorkerFault;

/// What is known of a pause.
#[derive(Debug, Default)]
pub(crate) struct PauseFacts {
    /// "Park" sent to "running" (or "resumed") received, in microseconds, by the broker's clock.
    pub(crate) pause_us: u64,
    /// The workers' own measure, first exit to last first run, no longer than the broker saw.
    pub(crate) blackout_us: u64,
    /// Bytes of the state stream, as the old worker says.
    pub(crate) state_bytes: u64,
    /// The stream's digest, on which both agree.
    pub(crate) digest: Option<StateDigest>,
    /// Guest events that came meanwhile.
    pub(crate) events: Vec<GuestEvent>,
    /// The guest had panicked, and its worker has stopped it because of that.
    pub(crate) halted: bool,
    /// What was said of the guest's vsock meanwhile.
    pub(crate) vsock: Vec<VsockReport>,
    /// The last that was said of its balloon: pages that are in it.
    pub(crate) balloon: Option<u32>,
}

/// How a pause ended.
#[derive(Debug)]
pub(crate) enum PauseEnd {
    /// The new worker runs the guest.
    Committed,
    /// The old worker runs the guest.
    RolledBack(String),
    /// Nobody does.
    Lost(String),
}

impl PauseFacts {
    /// Keeps what is for later; `false` when it is too much.
    fn note(&mut self, report: &Report) -> bool {
        match report {
            Report::Guest(event) if self.events.len() < MAX_EVENTS => {
                self.events.push(event.clone());
            }
            Report::Vsock(said) => {
                if self.vsock.len() >= MAX_SAID {
                    return false;
                }
                self.vsock.push(*said);
            }
            Report::Balloon { pages } => self.balloon = Some(*pages),
            _ => {}
        }
        true
    }
}

/// The most messages besides the protocol's own that a pause takes.
const MAX_MESSAGES: u32 = 64;
/// The most guest events that are kept until the pause is over.
const MAX_EVENTS: usize = 8;
/// The most that an honest worker has to say of its vsock: twice of each connection, before and after.
const MAX_SAID: usize = 4 * MAX_VSOCK_CONNECTIONS as usize;

fn cannot(who: &str, step: &str, reason: &str) -> String {
    format!(
        "the {who} worker cannot {}: {}",
        quoted(step),
        quoted(reason)
    )
}

fn unexpected(report: &Report) -> String {
    format!("the new worker said {}", quoted(&format!("{report:?}")))
}

struct Pause<'a> {
    old: &'a mut Worker,
    new: &'a mut Worker,
    deadlines: Deadlines,
    clock: &'a mut PhaseClock,
    facts: PauseFacts,
    park_sent: Instant,
    first_exit_ns: u64,
    messages: u32,
    saved: Option<StateDigest>,
    loaded: Option<StateDigest>,
    stop_sent: Option<Instant>,
    standing: Standing,
    /// Whether the operator has cancelled.
    cancelled: &'a mut dyn FnMut() -> bool,
}

/// Whether the guest stands still before and after a pause.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// It does, at the operator's wish.
    pub(crate) stands: bool,
    /// It does from its panic on.
    pub(crate) on_panic: bool,
}

/// What ended a wait.
#[derive(PartialEq, Eq)]
enum Woken {
    ByMessage,
    ByTime,
}

/// Why the pause cannot go on to a commit.
enum Failure {
    /// The new worker is to blame, or the time, or the old one in a way that lets it resume.
    RollBack(String),
    /// The old worker is dead, and its state is not whole on the other side.
    Lost(String),
}

/// Why a pause that the operator cancelled was rolled back.
pub(crate) const CANCELLED: &str = "the operator cancelled it";

/// Takes the guest from one worker to the other, or back; one that stands still stays so. `cancelled` tells whether the operator
/// wants it back, `intent` writes the commit's record.
pub(crate) fn run(
    old: &mut Worker,
    new: &mut Worker,
    deadlines: Deadlines,
    clock: &mut PhaseClock,
    standing: Standing,
    cancelled: &mut dyn FnMut() -> bool,
    intent: impl FnOnce(StateDigest) -> crate::refusal::Result<()>,
) -> (PauseEnd, PauseFacts) {
    let mut pause = Pause {
        old,
        new,
        deadlines,
        clock,
        facts: PauseFacts::default(),
        park_sent: Instant::now(),
        first_exit_ns: 0,
        messages: 0,
        saved: None,
        loaded: None,
        stop_sent: None,
        standing,
        cancelled,
    };
    let end = match pause.until_loaded() {
        Ok(digest) => match intent(digest) {
            Ok(()) => pause.commit(),
            Err(refusal) => pause.roll_back(refusal.reason),
        },
        Err(Failure::RollBack(reason)) => pause.roll_back(reason),
        Err(Failure::Lost(reason)) => pause.lost(reason),
    };
    (end, pause.facts)
}

impl Pause<'_> {
    /// Whether the guest stands still, whoever has it.
    fn stands(&self) -> bool {
        self.standing.stands || self.facts.halted
    }

    /// Keeps what is for later; `false` when it is too much.
    fn note(&mut self, report: &Report) -> bool {
        let panicked = matches!(report, Report::Guest(GuestEvent::Panicked));
        self.facts.halted |= panicked && self.standing.on_panic;
        self.facts.note(report)
    }

    fn enter(&mut self, step: Step) {
        self.clock.enter(step);
        fail_point::at(step, self.old, self.new);
    }

    /// S6 to S8: until the state is on the other side and the old worker is stopped.
    fn until_loaded(&mut self) -> Result<StateDigest, Failure> {
        self.enter(Step::Park);
        self.park_sent = Instant::now();
        self.old.phase = Phase::Parking;
        match self.old.order(&Order::Park) {
            Ok(()) => {}
            // It does not read, and so was not told: it runs.
            Err(fault) if !self.old.is_dead() => return Err(Failure::RollBack(fault.to_string())),
            Err(fault) => return Err(Failure::Lost(fault.to_string())),
        }
        loop {
            // A queued message beats an expired timer: look at the clock before the queues, act on it after.
            let expired = self.expired();
            self.hear_old()?;
            self.hear_new()?;
            if let (Some(saved), Some(loaded)) = (self.saved, self.loaded) {
                if saved != loaded {
                    return Err(Failure::RollBack(format!(
                        "{saved} was saved, {loaded} was loaded"
                    )));
                }
                match self.old.fenced() {
                    Fence::Stopped | Fence::Exiting => {
                        self.heed_the_operator()?;
                        self.facts.digest = Some(saved);
                        return Ok(saved);
                    }
                    Fence::Unconfirmed => {}
                }
            }
            if let Some(reason) = expired {
                return Err(Failure::RollBack(reason));
            }
            // With the state loaded, only the confirmation of the stop is missing, and no descriptor tells of that.
            let bound = match self.loaded {
                Some(_) => Duration::from_micros(20),
                None => self.deadlines.watch(),
            };
            if self.wait(bound) == Woken::ByTime {
                self.look_for_the_dying()?;
                if self.loaded.is_none() {
                    self.heed_the_operator()?;
                }
            }
        }
    }

    fn heed_the_operator(&mut self) -> Result<(), Failure> {
        if (self.cancelled)() {
            return Err(Failure::RollBack(CANCELLED.to_owned()));
        }
        Ok(())
    }

    fn hear_old(&mut self) -> Result<(), Failure> {
        loop {
            match self.old.hear() {
                Ok(None) => return Ok(()),
                Ok(Some(Report::Parked { first_exit_ns, .. })) => {
                    self.first_exit_ns = first_exit_ns;
                    self.enter(Step::Save);
                }
                Ok(Some(Report::Saved { digest, bytes })) => {
                    self.saved = Some(digest);
                    self.facts.state_bytes = bytes;
                    self.old.phase = Phase::Saved;
                    self.old.stop();
                    self.stop_sent = Some(Instant::now());
                    self.enter(Step::Load);
                }
                Ok(Some(Report::Failed { step, reason })) => {
                    return Err(Failure::RollBack(cannot("old", &step, &reason)));
                }
                Ok(Some(report)) => {
                    let noted = self.note(&report);
                    if !(noted && matches!(report, Report::Vsock(_))) {
                        self.count_message().map_err(Failure::RollBack)?;
                    }
                }
                // Its death no longer matters once its state is whole on the other side.
                Err(WorkerFault::Died(_)) if self.saved.is_some() => return Ok(()),
                Err(WorkerFault::Died(how)) => return Err(Failure::Lost(how)),
                Err(fault) => return Err(Failure::RollBack(format!("old: {fault}"))),
            }
        }
    }

    fn hear_new(&mut self) -> Result<(), Failure> {
        loop {
            match self.new.hear() {
                Ok(None) => return Ok(()),
                Ok(Some(Report::Loaded { digest, .. })) => {
                    self.count_message().map_err(Failure::RollBack)?;
                    self.loaded = Some(digest);
                }
                Ok(Some(Report::Failed { step, reason })) => {
                    return Err(Failure::RollBack(cannot("new", &step, &reason)));
                }
                Ok(Some(report)) => {
                    return Err(Failure::RollBack(unexpected(&report)));
                }
                Err(fault) => return Err(Failure::RollBack(format!("new: {fault}"))),
            }
        }
    }

    /// No honest pair of workers has this much to say; one that talks without end does not hold the pause up.
    fn count_message(&mut self) -> Result<(), String> {
        self.messages += 1;
        if self.messages > MAX_MESSAGES {
            return Err("a worker floods its control socket".to_owned());
        }
        Ok(())
    }

    /// A process that is being torn down closes its socket only after its memory is gone, which may take 100 ms.
    fn look_for_the_dying(&self) -> Result<(), Failure> {
        if self.new.is_dead() {
            return Err(Failure::RollBack("the new worker died".to_owned()));
        }
        if self.saved.is_none() && self.old.is_dead() {
            return Err(Failure::Lost(
                "the old worker died before its state was saved".to_owned(),
            ));
        }
        Ok(())
    }

    /// The deadline that has passed, in words.
    fn expired(&self) -> Option<String> {
        let step = self.clock.step();
        if self.clock.entered().elapsed() > self.deadlines.of(step) {
            return Some(format!(
                "{step} took longer than {:?}",
                self.deadlines.of(step)
            ));
        }
        if self.park_sent.elapsed() > self.deadlines.pause() {
            return Some(format!(
                "the pause took longer than {:?}",
                self.deadlines.pause()
            ));
        }
        let unconfirmed = self
            .stop_sent
            .is_some_and(|sent| sent.elapsed() > self.deadlines.fence());
        if unconfirmed && self.old.fenced() == Fence::Unconfirmed {
            return Some(format!(
                "the old worker could not be stopped within {:?}",
                self.deadlines.fence()
            ));
        }
        None
    }

    /// Waits until a worker speaks, or it is time to look around.
    fn wait(&self, bound: Duration) -> Woken {
        let mut fds = [
            PollFd::from_borrowed_fd(self.new.control(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.old.control(), PollFlags::IN),
        ];
        // A dead worker's socket is always ready; once the old one's death does not matter, it is not polled.
        let [new, _] = &mut fds;
        let polled = match self.saved {
            Some(_) => std::slice::from_mut(new),
            None => &mut fds[..],
        };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(bound.subsec_nanos()),
        };
        match rustix::event::poll(polled, Some(&timeout)) {
            // An interruption or a failure is a wake-up like any other.
            Ok(0) | Err(_) => Woken::ByTime,
            Ok(_) => Woken::ByMessage,
        }
    }

    /// S9 and S10.
    fn commit(&mut self) -> PauseEnd {
        self.enter(Step::Commit);
        // A dead old worker will not resume; one that is alive must have this in its queue first.
        if let Err(fault) = self.old.order(&Order::Ceded) {
            if !self.old.is_dead() {
                return self.roll_back(format!("the old worker cannot cede: {fault}"));
            }
        }
        self.new.phase = Phase::Released;
        let told = self.new.order(if self.stands() {
            &Order::CommitPaused
        } else {
            &Order::Commit
        });
        self.enter(Step::Run);
        if let Err(fault) = told {
            return self.undecided(fault.to_string());
        }
        loop {
            let expired = self.expired();
            match self.new.hear() {
                Ok(Some(Report::Running)) => return self.running(),
                Ok(Some(Report::Failed { step, reason })) => {
                    return self.undecided(cannot("new", &step, &reason));
                }
                Ok(Some(report)) => {
                    return self.undecided(unexpected(&report));
                }
                Err(fault) => return self.undecided(format!("new: {fault}")),
                Ok(None) => {}
            }
            if let Some(reason) = expired {
                return self.undecided(reason);
            }
            if self.wait(self.deadlines.watch()) == Woken::ByTime && self.new.is_dead() {
                return self.undecided("the new worker died".to_owned());
            }
        }
    }

    /// "Commit" is out and "running" has not come: the fence, and then what is queued, decides.
    fn undecided(&mut self, reason: String) -> PauseEnd {
        let mut fenced = self.new.fence(self.deadlines.fence()) != Fence::Unconfirmed;
        let mut killed = false;
        loop {
            match self.new.hear() {
                Ok(Some(Report::Running)) if killed || self.new.is_dead() => {
                    return self.lost(format!("the new worker died as it began to run: {reason}"));
                }
                Ok(Some(Report::Running)) => {
                    self.new.go_on();
                    return self.running();
                }
                Ok(Some(_)) => {
                    if let Err(flood) = self.count_message() {
                        return self.roll_back(flood);
                    }
                }
                // It could not be stopped. SIGKILL cannot be undone, and no thread returns to a guest with it pending;
                // one more look shows what was said before.
                Ok(None) | Err(_) if !fenced => {
                    self.new.kill();
                    (fenced, killed) = (true, true);
                }
                // Should its own broker die now, the kernel would continue it (the launcher has set its parent-death
                // signal to SIGCONT), with `commit` in its queue. So it dies first, and what it said until then counts.
                Ok(None) | Err(_) if self.new.is_lent() && !killed => {
                    self.new.kill();
                    killed = true;
                    let deadline = Instant::now() + self.deadlines.fence();
                    while !self.new.is_dead() && Instant::now() < deadline {
                        std::thread::sleep(Duration::from_micros(20));
                    }
                }
                Ok(None) | Err(_) => return self.roll_back(reason),
            }
        }
    }

    /// The new worker is the VM.
    fn running(&mut self) -> PauseEnd {
        self.facts.pause_us = micros(self.park_sent.elapsed());
        self.new.phase = Phase::Running;
        if self.stands() {
            // It holds the guest; the first run is the operator's to order.
            return PauseEnd::Committed;
        }
        let deadline = Instant::now() + self.deadlines.of(Step::Run);
        loop {
            let late = Instant::now() > deadline;
            match self.new.hear() {
                Ok(Some(Report::FirstRun { last_run_ns })) => {
                    let seen = micros(self.park_sent.elapsed());
                    let told = last_run_ns.saturating_sub(self.first_exit_ns) / 1_000;
                    self.facts.blackout_us = told.min(seen);
                    break;
                }
                Ok(Some(report)) if !late => drop(self.note(&report)),
                Ok(_) if late => {
                    // It runs, by its word and the queue's; how long it took is then the broker's own measure.
                    self.facts.blackout_us = self.facts.pause_us;
                    break;
                }
                Ok(_) => {}
                Err(fault) => return self.lost(format!("after \"running\": {fault}")),
            }
            if self.wait(self.deadlines.watch()) == Woken::ByTime && self.new.is_dead() {
                return self.lost("the new worker died right after it said \"running\"".to_owned());
            }
        }
        PauseEnd::Committed
    }

    /// The old worker runs the guest again. The new one cannot: it is stopped or exiting, and is killed.
    fn roll_back(&mut self, reason: String) -> PauseEnd {
        if self.new.fence(self.deadlines.fence()) == Fence::Unconfirmed {
            self.new.kill();
        }
        // Only a worker that was told to commit can have run, and `undecided` has looked for its word.
        self.new.kill();
        if self.old.is_dead() {
            return self.lost(format!("{reason}; and the old worker is dead"));
        }
        self.old.phase = Phase::RollingBack;
        if let Err(fault) = self.old.order(&Order::Rollback) {
            return self.lost(format!(
                "{reason}; and the old worker cannot be told: {fault}"
            ));
        }
        self.old.go_on();
        let deadline = Instant::now() + self.deadlines.of(Step::Park);
        loop {
            let late = Instant::now() > deadline;
            match self.old.hear() {
                Ok(Some(Report::Resumed)) => {
                    self.old.phase = Phase::Running;
                    break;
                }
                // What it said before it heard of the rollback.
                Ok(Some(
                    report @ (Report::Guest(_) | Report::Vsock(_) | Report::Balloon { .. }),
                )) if !late => {
                    self.note(&report);
                }
                Ok(_) | Err(WorkerFault::OutOfTurn { .. }) if late => {
                    self.facts.pause_us = micros(self.park_sent.elapsed());
                    return PauseEnd::RolledBack(format!(
                        "{reason}; the old worker was told to go on and has not answered yet"
                    ));
                }
                Ok(Some(_)) | Err(WorkerFault::OutOfTurn { .. }) => {}
                Ok(None) if self.old.is_dead() => {
                    return self.lost(format!("{reason}; and the old worker died"));
                }
                Ok(None) => std::thread::sleep(Duration::from_micros(20)),
                Err(fault) => return self.lost(format!("{reason}; and old: {fault}")),
            }
        }
        self.facts.pause_us = micros(self.park_sent.elapsed());
        if !self.stands() {
            self.facts.blackout_us = self.facts.pause_us;
        }
        PauseEnd::RolledBack(reason)
    }

    fn lost(&mut self, reason: String) -> PauseEnd {
        self.old.kill();
        self.new.kill();
        PauseEnd::Lost(reason)
    }
}
