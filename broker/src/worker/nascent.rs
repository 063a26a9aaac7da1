//! A worker from its launch until it listens: S2 to S5 of an upgrade, and the same way for a VM's first worker.
//!
//! Driven by readiness: nothing here waits, except for a dead worker's exit status.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::cpr;
use baton_ipc::cpr::CprHeader;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::Order;
use baton_ipc::worker::PROTOCOL;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use baton_policy::proof::Finding;
use thiserror::Error;

use crate::broker::MESSAGES;
use crate::refusal::Result;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::WorkerFault;
use crate::worker::binary::WorkerBinary;
use crate::worker::cgroup::Cgroup;
use crate::worker::launch::Launch;
use crate::worker::proof;
use crate::worker::proof::Prover;

/// Where it is.
#[derive(Debug)]
enum Stage {
    /// The launcher works.
    Launching(Box<Launch>),
    /// The worker runs. Its cpr channel is open until it hangs up.
    Building(Box<Worker>, Option<FdSocket>),
    /// Handed on.
    Gone,
}

/// A worker in the making. Dropped, it is killed, and its channels are closed.
#[derive(Debug)]
pub(crate) struct Nascent {
    stage: Stage,
    config: WorkerConfig,
    binary: WorkerBinary,
    ready: Option<BuildTimes>,
    handed_over: bool,
    /// When the step that it is in has to be over.
    pub(crate) deadline: Instant,
}

/// How it came on.
#[derive(Debug)]
pub(crate) enum Advance {
    /// Nothing to do for the caller.
    Waiting,
    /// It has said hello, single-threaded; the caller has to confirm its confinement, then to configure it.
    Greeted,
    /// It has everything, all its threads have their last filters, and it has hung up the cpr channel; the caller has to
    /// confirm its threads.
    Listening(BuildTimes),
}

/// Why it came to nothing. The guest was never paused.
#[derive(Debug, Error)]
pub(crate) enum NascentFault {
    /// The launch failed.
    #[error("{0}")]
    Launch(baton_ipc::control::Refusal),
    /// The worker misbehaved or died.
    #[error("new: {0}")]
    Worker(#[from] WorkerFault),
    /// It speaks another protocol.
    #[error("the new worker (build {build}) speaks protocol {found}, this broker {PROTOCOL}")]
    Protocol {
        /// Its version.
        found: u32,
        /// Its build.
        build: String,
    },
    /// It says why it cannot.
    #[error("the new worker cannot {step}: {reason}")]
    Failed {
        /// In doing what.
        step: String,
        /// Why.
        reason: String,
    },
    /// It hung up without `ready`.
    #[error("the new worker hung up before it was ready ({0})")]
    HungUp(String),
    /// Its descriptors could not be sent.
    #[error("{0}")]
    HandOver(#[from] cpr::CprError),
    /// It wrote to a channel that only it reads.
    #[error("the new worker wrote to its cpr channel")]
    Wrote,
    /// The steps came in an impossible order.
    #[error("the worker is in another step")]
    Step,
}

impl Nascent {
    pub(crate) fn new(
        launch: Launch,
        config: WorkerConfig,
        binary: WorkerBinary,
        bound: Duration,
    ) -> Self {
        Self {
            stage: Stage::Launching(Box::new(launch)),
            config,
            binary,
            ready: None,
            handed_over: false,
            deadline: Instant::now() + bound,
        }
    }

    /// What to poll for reading.
    pub(crate) fn sources(&self) -> Vec<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Launching(launch) => vec![launch.as_fd()],
            Stage::Building(worker, cpr) => {
                let mut sources = vec![worker.control()];
                sources.extend(cpr.as_ref().map(AsFd::as_fd));
                sources.extend(worker.diagnostics());
                sources
            }
            Stage::Gone => Vec::new(),
        }
    }

    /// The worker, once it runs.
    pub(crate) fn worker(&self) -> Option<&Worker> {
        match &self.stage {
            Stage::Building(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// The worker, once every descriptor was handed over to it.
    pub(crate) fn heir(&self) -> Option<&Worker> {
        self.worker().filter(|_| self.handed_over)
    }

    /// What the worker has printed.
    pub(crate) fn read_diagnostics(&mut self) -> String {
        match &mut self.stage {
            Stage::Building(worker, _) => worker.read_diagnostics(),
            _ => String::new(),
        }
    }

    /// Goes on with whatever has come.
    pub(crate) fn advance(&mut self) -> std::result::Result<Advance, NascentFault> {
        if let Stage::Launching(launch) = &mut self.stage {
            let launched = launch.advance().map_err(NascentFault::Launch)?;
            let Some(launched) = launched else {
                return Ok(Advance::Waiting);
            };
            let worker = Worker::new(launched, self.config.generation, &self.binary)
                .map_err(NascentFault::Launch)?;
            self.stage = Stage::Building(Box::new(worker), None);
        }
        let Stage::Building(worker, cpr) = &mut self.stage else {
            return Err(NascentFault::Step);
        };
        for _ in 0..MESSAGES {
            match worker.hear() {
                Ok(None) => break,
                Ok(Some(Report::Hello { protocol, build })) => {
                    worker.build = quoted(&build);
                    if protocol != PROTOCOL {
                        return Err(NascentFault::Protocol {
                            found: protocol,
                            build: worker.build.clone(),
                        });
                    }
                    worker.phase = Phase::Confined;
                    return Ok(Advance::Greeted);
                }
                Ok(Some(Report::Ready(times))) => {
                    worker.phase = Phase::Ready;
                    self.ready = Some(times);
                }
                Ok(Some(Report::Failed { step, reason })) => {
                    return Err(failed(&step, &reason));
                }
                Ok(Some(Report::Violation {
                    thread, syscall, ..
                })) => {
                    return Err(NascentFault::Failed {
                        step: "keep to its filter".to_owned(),
                        reason: format!("thread {thread} made system call {syscall}"),
                    });
                }
                Ok(Some(_)) => {
                    return Err(WorkerFault::OutOfTurn {
                        report: "something of a running worker",
                        phase: worker.phase,
                    }
                    .into());
                }
                Err(WorkerFault::Died(how)) => {
                    return Err(WorkerFault::Died(exit_status(worker).unwrap_or(how)).into());
                }
                Err(fault) => return Err(fault.into()),
            }
        }
        let Some(channel) = cpr else {
            return Ok(Advance::Waiting);
        };
        match channel.receive(&mut Vec::new()) {
            Ok(Received::Empty) => Ok(Advance::Waiting),
            Ok(Received::Message(..)) => Err(NascentFault::Wrote),
            Ok(Received::HungUp) | Err(_) => {
                *cpr = None;
                if let Some(times) = self.ready {
                    return Ok(Advance::Listening(times));
                }
                // Its last word came before the hang-up, but perhaps after this looked for it.
                match worker.hear() {
                    Ok(Some(Report::Ready(times))) => {
                        worker.phase = Phase::Ready;
                        self.ready = Some(times);
                        Ok(Advance::Listening(times))
                    }
                    // Says more than its exit status.
                    Ok(Some(Report::Failed { step, reason })) => Err(failed(&step, &reason)),
                    _ => Err(last_word(worker, NascentFault::HungUp)),
                }
            }
        }
    }

    /// Tells the confirmed worker what to build. `main` is its end of the main channel, in an upgrade.
    pub(crate) fn configure(
        &mut self,
        main: Option<OwnedFd>,
    ) -> std::result::Result<(), NascentFault> {
        let Stage::Building(worker, cpr @ None) = &mut self.stage else {
            return Err(NascentFault::Step);
        };
        let (ours, theirs) = FdSocket::pair()
            .map_err(baton_ipc::ChannelError::from)
            .map_err(cpr::CprError::from)?;
        let mut descriptors = vec![theirs.as_fd()];
        descriptors.extend(main.as_ref().map(AsFd::as_fd));
        worker.order_with(
            &Order::Configure(Box::new(self.config.clone())),
            &descriptors,
        )?;
        worker.phase = Phase::Building;
        *cpr = Some(ours);
        Ok(())
    }

    /// Hands every descriptor over.
    pub(crate) fn hand_over(
        &mut self,
        registry: &Registry,
        bound: Duration,
    ) -> std::result::Result<(), NascentFault> {
        let Stage::Building(_, Some(channel)) = &self.stage else {
            return Err(NascentFault::Step);
        };
        let header = CprHeader {
            mode: self.config.mode,
            vm: self.config.vm,
            generation: self.config.generation,
        };
        if let Err(error) = cpr::send(channel, &header, registry) {
            // One that has ended says more of it than the socket does.
            return Err(match self.stage_worker() {
                Some(worker) => last_word(worker, |_| error.into()),
                None => error.into(),
            });
        }
        self.handed_over = true;
        self.deadline = Instant::now() + bound;
        Ok(())
    }

    fn stage_worker(&mut self) -> Option<&mut Worker> {
        match &mut self.stage {
            Stage::Building(worker, _) => Some(worker),
            _ => None,
        }
    }

    /// Compares the process, apart from its threads, with what it has to be before it is given anything.
    pub(crate) fn confirm_process(&self, prover: &Prover, cgroup: Option<&Cgroup>) -> Vec<Finding> {
        self.worker().map_or_else(Vec::new, |worker| {
            proof::fresh_process(prover, worker.process.pid, &self.binary, cgroup)
        })
    }

    /// Arms faults in the worker, for tests.
    #[cfg(feature = "fail-points")]
    pub(crate) fn arm(&self, points: Vec<baton_ipc::FailPoint>) {
        for (worker, point) in self.worker().into_iter().cycle().zip(points) {
            drop(worker.order(&Order::Fail(point)));
        }
    }

    /// Kills it; the process, if there is one yet, for its reaping.
    pub(crate) fn into_dead(mut self) -> Option<Worker> {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Building(worker, _) => {
                worker.kill();
                Some(*worker)
            }
            Stage::Launching(_) | Stage::Gone => None,
        }
    }

    /// The listening worker, out of the making.
    pub(crate) fn into_worker(mut self) -> Result<Worker> {
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Building(worker, None) => Ok(*worker),
            _ => Err(crate::refusal::unfit("the new worker is not there", "")),
        }
    }
}

fn failed(step: &str, reason: &str) -> NascentFault {
    NascentFault::Failed {
        step: quoted(step),
        reason: quoted(reason),
    }
}

/// What a worker that has hung up its cpr channel said of it, perhaps only after that; otherwise what `else_of` makes of its end.
fn last_word(worker: &mut Worker, else_of: impl FnOnce(String) -> NascentFault) -> NascentFault {
    let how = exit_status(worker);
    match worker.hear() {
        Ok(Some(Report::Failed { step, reason })) => failed(&step, &reason),
        _ => else_of(how.unwrap_or_else(|| "it is still there".to_owned())),
    }
}

/// How a dying worker ended; a moment is given to it, since its socket closes before it is gone.
fn exit_status(worker: &Worker) -> Option<String> {
    let deadline = Instant::now() + Duration::from_millis(100);
    loop {
        if let Some(how) = worker.reap() {
            return Some(how);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
