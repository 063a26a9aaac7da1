//! One worker process as its broker sees it: what it may say in which phase, and the fence.

pub(crate) mod binary;
pub(crate) mod cgroup;
pub(crate) mod evidence;
pub(crate) mod ids;
pub(crate) mod launch;
pub(crate) mod launcher;
pub(crate) mod learner;
pub(crate) mod nascent;
pub(crate) mod process;
pub(crate) mod proof;
mod starting;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Channel;
use baton_ipc::ChannelError;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_policy::Digest;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use thiserror::Error;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::worker::binary::WorkerBinary;
use crate::worker::ids::HostIds;
use crate::worker::launch::Launched;
use crate::worker::process::ProcessId;
use crate::worker::process::is_exiting;
use crate::worker::process::is_wholly_stopped;

/// How far a worker has come. What it may report depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Started; its first word is `hello`.
    Spawned,
    /// Confirmed; it waits to be configured.
    Confined,
    /// It builds the VM.
    Building,
    /// It has said `ready`, and nobody has told it to go on.
    Ready,
    /// It was told to run the guest: a cold start, or a commit.
    Released,
    /// It runs the guest, or holds it paused at the operator's wish.
    Running,
    /// It was told that its successor comes.
    Transferring,
    /// It was told to park.
    Parking,
    /// It has said `saved`.
    Saved,
    /// It was told that the transfer is off, and has not yet said that it is as before. Until then it may still say what it
    /// had to say before it heard of that.
    RollingBack,
}

use Phase::Building;
use Phase::Confined;
use Phase::Parking;
use Phase::Ready;
use Phase::Released;
use Phase::RollingBack;
use Phase::Running;
use Phase::Saved;
use Phase::Spawned;
use Phase::Transferring;

/// What a report is called, which phases permit it, and how it is recognised. Anything else kills the worker.
type Row = (&'static str, &'static [Phase], fn(&Report) -> bool);

#[rustfmt::skip]
const PERMITTED: &[Row] = &[
    ("hello",     &[Spawned],                                         |r| matches!(r, Report::Hello { .. })),
    ("agreed",    &[Transferring, RollingBack],                       |r| matches!(r, Report::Agreed)),
    ("ready",     &[Building],                                        |r| matches!(r, Report::Ready(_))),
    ("failed",    &[Spawned, Confined, Building, Ready, Transferring, Parking, Saved, RollingBack, Released, Running],
                                                                      |r| matches!(r, Report::Failed { .. })),
    ("parked",    &[Parking, RollingBack],                            |r| matches!(r, Report::Parked { .. })),
    ("saved",     &[Parking, RollingBack],                            |r| matches!(r, Report::Saved { .. })),
    ("loaded",    &[Ready],                                           |r| matches!(r, Report::Loaded { .. })),
    ("running",   &[Released],                                        |r| matches!(r, Report::Running)),
    ("first-run", &[Running],                                         |r| matches!(r, Report::FirstRun { .. })),
    ("resumed",   &[RollingBack, Running],                            |r| matches!(r, Report::Resumed)),
    ("paused",    &[Running, Transferring, RollingBack],              |r| matches!(r, Report::Paused)),
    ("status",    &[Running, Transferring, Parking, RollingBack],     |r| matches!(r, Report::Status(_))),
    ("guest",     &[Running, Transferring, Parking, RollingBack],     |r| matches!(r, Report::Guest(_))),
    ("vsock",     &[Running, Transferring, Parking, RollingBack],     |r| matches!(r, Report::Vsock(_))),
    ("balloon",   &[Running, Transferring, Parking, RollingBack],     |r| matches!(r, Report::Balloon { .. })),
    ("resized",   &[Running],                                         |r| matches!(r, Report::Resized { .. })),
    ("plugged",   &[Running],                                         |r| matches!(r, Report::Plugged { .. })),
    ("ejected",   &[Running, Transferring, Parking, RollingBack],     |r| matches!(r, Report::Ejected { .. })),
    ("unplugged", &[Running],                                         |r| matches!(r, Report::Unplugged { .. })),
    ("violation", &[Spawned, Confined, Building, Ready, Released, Running, Transferring, Parking, Saved, RollingBack],
                                                                      |r| matches!(r, Report::Violation { .. })),
];

/// What a worker did wrong, or what became of it.
#[derive(Debug, Error)]
pub(crate) enum WorkerFault {
    /// Its process is gone or going.
    #[error("the worker died ({0})")]
    Died(String),
    /// It sent what is no message.
    #[error("the worker sent a malformed message: {0}")]
    Malformed(ChannelError),
    /// It sent descriptors.
    #[error("the worker sent {0} descriptors")]
    Descriptors(usize),
    /// It spoke out of turn.
    #[error("the worker reported `{report}` in phase {phase:?}")]
    OutOfTurn {
        /// What.
        report: &'static str,
        /// When.
        phase: Phase,
    },
    /// It cannot be told anything.
    #[error("the worker does not take orders: {0}")]
    Deaf(ChannelError),
}

/// How a fence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// Every thread is stopped: none runs until SIGCONT.
    Stopped,
    /// Every thread is exiting: none will run again.
    Exiting,
    /// Not confirmed in time.
    Unconfirmed,
}

/// A worker process. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) process: ProcessId,
    pub(crate) phase: Phase,
    pub(crate) generation: u32,
    pub(crate) digest: Digest,
    pub(crate) build: String,
    pub(crate) ids: HostIds,
    /// The checked copy that it executes: device and inode.
    pub(crate) executable: Option<(u64, u64)>,
    /// Its ends of the control socket and of the diagnostics pipe: inodes.
    pub(crate) standard: [u64; 2],
    pidfd: OwnedFd,
    channel: Channel<Order, Report>,
    diagnostics: Option<File>,
    bond: Bond,
    /// It was asked how it is, and has not said anything for as long as it may take.
    pub(crate) silent: bool,
}

/// Whose child a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bond {
    /// This broker's.
    Child,
    /// Another broker's, which has lent it for the pause: waitid(2) does not know it, /proc does.
    Lent,
    /// Another broker's from now on.
    GivenBack,
}

impl Worker {
    /// A worker that another broker has built, and lends until it is clear who runs the guest. `channel` is the other end of
    /// its control socket, which nobody else uses meanwhile.
    pub(crate) fn lent(
        channel: OwnedFd,
        pidfd: OwnedFd,
        generation: u32,
        digest: Digest,
        build: String,
    ) -> Result<Self> {
        let process = crate::worker::process::of_pidfd(pidfd.as_fd())
            .ok_or_else(|| unfit("the other broker's worker is not there", ""))?;
        Ok(Self {
            process,
            phase: Phase::Ready,
            generation,
            digest,
            build,
            ids: HostIds {
                uid: u32::MAX,
                gid: u32::MAX,
            },
            executable: None,
            standard: [0; 2],
            pidfd,
            channel: Channel::new(FdSocket::from(channel)),
            diagnostics: None,
            bond: Bond::Lent,
            silent: false,
        })
    }

    /// Whether it is another broker's child.
    pub(crate) fn is_lent(&self) -> bool {
        self.bond == Bond::Lent
    }

    /// It runs the guest, and is its own broker's again.
    pub(crate) fn give_back(mut self) {
        self.bond = Bond::GivenBack;
    }

    pub(crate) fn new(launched: Launched, generation: u32, binary: &WorkerBinary) -> Result<Self> {
        let pid = rustix::process::Pid::from_raw(launched.pid)
            .ok_or_else(|| unfit("the launcher reported an impossible process", ""))?;
        // The process cannot have been reaped by anybody but this one, so the number is still its own.
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .doing("cannot hold the worker's process")?;
        let process = ProcessId::of(launched.pid)
            .ok_or_else(|| unfit("the worker's process has no record in /proc", ""))?;
        Ok(Self {
            process,
            phase: Phase::Spawned,
            generation,
            digest: binary.digest,
            build: String::new(),
            ids: launched.ids,
            executable: binary.identity(),
            standard: launched.standard,
            pidfd,
            channel: Channel::new(launched.socket),
            diagnostics: Some(File::from(launched.diagnostics)),
            bond: Bond::Child,
            silent: false,
        })
    }

    /// The control socket, for polling.
    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// The process, for polling: readable when it is gone.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// What it prints, for polling, until it has closed that.
    pub(crate) fn diagnostics(&self) -> Option<BorrowedFd<'_>> {
        self.diagnostics.as_ref().map(AsFd::as_fd)
    }

    /// Reads what it has printed, a bounded piece; empty when there is nothing now.
    pub(crate) fn read_diagnostics(&mut self) -> String {
        let mut buffer = [0; 4096];
        match self.diagnostics.as_mut().map(|pipe| pipe.read(&mut buffer)) {
            Some(Ok(0)) => {
                self.diagnostics = None;
                String::new()
            }
            Some(Ok(count)) => {
                String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned()
            }
            Some(Err(_)) | None => String::new(),
        }
    }

    /// Tells it something.
    pub(crate) fn order(&self, order: &Order) -> std::result::Result<(), WorkerFault> {
        self.order_with(order, &[])
    }

    /// Tells it something, and hands it descriptors.
    pub(crate) fn order_with(
        &self,
        order: &Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), WorkerFault> {
        self.channel
            .send_with(order, descriptors)
            .map_err(WorkerFault::Deaf)
    }

    /// The next thing that it said, if it may say that now.
    pub(crate) fn hear(&mut self) -> std::result::Result<Option<Report>, WorkerFault> {
        let received = self.channel.receive();
        if matches!(received, Ok(Received::Message(..))) {
            self.silent = false;
        }
        match received {
            Ok(Received::Empty) => Ok(None),
            Ok(Received::HungUp) => {
                Err(WorkerFault::Died("it closed its control socket".to_owned()))
            }
            Ok(Received::Message(_, descriptors)) if !descriptors.is_empty() => {
                Err(WorkerFault::Descriptors(descriptors.len()))
            }
            Ok(Received::Message(report, _)) => match PERMITTED.iter().find(|row| row.2(&report)) {
                Some((_, phases, _)) if phases.contains(&self.phase) => Ok(Some(report)),
                row => Err(WorkerFault::OutOfTurn {
                    report: row.map_or("unknown", |row| row.0),
                    phase: self.phase,
                }),
            },
            Err(error) => Err(WorkerFault::Malformed(error)),
        }
    }

    /// Whether it will never run again, though its process may take long to be gone.
    pub(crate) fn is_dead(&self) -> bool {
        match self.bond {
            Bond::Child => is_exiting(self.process.pid),
            // Its own broker may have reaped it, and the number be another's by now.
            Bond::Lent | Bond::GivenBack => !self.process.is_alive(),
        }
    }

    fn signal(&self, signal: Signal) {
        // The only error is that the process is gone.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }

    /// Begins the fence: SIGSTOP, which a pid 1 cannot ignore from outside its namespace (pid_namespaces(7)).
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Asks whether the fence holds by now.
    pub(crate) fn fenced(&self) -> Fence {
        if self.bond != Bond::Child {
            return if self.is_dead() {
                Fence::Exiting
            } else if is_wholly_stopped(self.process.pid) {
                Fence::Stopped
            } else {
                Fence::Unconfirmed
            };
        }
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) if status.stopped() => Fence::Stopped,
            _ if self.is_dead() => Fence::Exiting,
            _ => Fence::Unconfirmed,
        }
    }

    /// Stops it, and waits for the confirmation.
    pub(crate) fn fence(&self, bound: Duration) -> Fence {
        self.stop();
        let deadline = Instant::now() + bound;
        loop {
            match self.fenced() {
                Fence::Unconfirmed if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(20));
                }
                fence => return fence,
            }
        }
    }

    /// Ends the fence.
    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it. Its memory may take long to be torn down; nobody waits here.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Reaps it, if it is gone: how it ended, in words.
    pub(crate) fn reap(&self) -> Option<String> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => "no status".to_owned(),
            }),
            Ok(None) => None,
            Err(_) => Some("reaped".to_owned()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.bond == Bond::GivenBack {
            return;
        }
        self.kill();
        // It is being torn down. Waiting here would hold up a guest; a retired worker is kept until it is gone.
        while self.reap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
