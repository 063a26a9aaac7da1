//! A connection to a VM's broker: connect, check its version, ask, and wait for the one final reply.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Address;
use baton_ipc::Channel;
use baton_ipc::ChannelError;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::SocketError;
use baton_ipc::control::AuditReport;
use baton_ipc::control::Exit;
use baton_ipc::control::LogHead;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::SOCKET;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmStatus;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::sockopt::Timeout;

use crate::failure::failure;
use crate::failure::unfit;
use crate::signals::Signals;

/// How long a broker may take for anything but an upgrade. It serves nobody else while a guest is paused, which lasts at
/// most 300 ms, and an audit reads a few hundred files.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to become of a VM's worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan<'a> {
    pub(crate) dry_run: bool,
    /// Why the new worker may do more than the old one.
    pub(crate) approve: Option<&'a str>,
    /// The new one, when it is not the VM's.
    pub(crate) worker: Option<&'a WorkerFile>,
}

/// A worker's binary that this user has opened, and its signature if one lies beside it.
#[derive(Debug)]
pub(crate) struct WorkerFile {
    pub(crate) binary: OwnedFd,
    pub(crate) signature: Option<OwnedFd>,
}

/// A connection to one broker.
#[derive(Debug)]
pub(crate) struct Client {
    channel: Channel<Request, Reply>,
    vm: String,
}

/// Whether a VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It has.
    Yes,
    /// Not within the time.
    NotYet,
    /// A signal came first.
    Interrupted,
}

/// What came while waiting.
enum Event {
    Reply(Reply, Vec<OwnedFd>),
    Interrupted,
    HungUp,
}

impl Client {
    /// Connects to the broker of VM `vm` in `directory`. The outer error says that nobody listens, or why that cannot be
    /// found out; the inner one that whoever does is no broker of ours.
    pub(crate) fn connect(vm: &str, directory: &Path) -> Result<Result<Self, Refusal>, Errno> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // A full backlog of a broker that hangs must not hang us.
        rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        // Through the directory's descriptor: a socket's address has 108 bytes (unix(7)), a path may have more.
        let directory = rustix::fs::open(
            directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let address = {
            use std::os::fd::AsRawFd;
            SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))?
        };
        rustix::net::connect(&socket, &address)?;
        Ok(Self::greet(vm, FdSocket::from(socket)))
    }

    fn greet(vm: &str, socket: FdSocket) -> Result<Self, Refusal> {
        let mut client = Self {
            channel: Channel::new(socket),
            vm: vm.to_owned(),
        };
        match client.wait(Some(PATIENCE), None)? {
            Event::Reply(Reply::Hello { protocol, .. }, _) if protocol == PROTOCOL => Ok(client),
            Event::Reply(Reply::Hello { protocol, build }, _) => Err(unfit(
                format!(
                    "the broker of {vm} ({}) speaks version {protocol}, this program version {PROTOCOL}",
                    crate::output::printable(&build)
                ),
                "use the `baton` that started this VM",
            )),
            Event::Reply(Reply::Refused(refusal), _) => Err(refusal),
            Event::HungUp => Err(client.gone()),
            Event::Reply(..) | Event::Interrupted => Err(client.unexpected()),
        }
    }

    /// Something that is done or refused.
    pub(crate) fn order(&mut self, request: &Request) -> Result<(), Refusal> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    /// Asks the VM to end, by its power button or at once. The answer is the end: see [`Client::ended`].
    pub(crate) fn begin_stop(&self, force: bool) -> Result<(), Refusal> {
        self.send(&Request::Stop { force }, &[])
    }

    /// Waits for the end that was asked for: until the broker has hung up.
    pub(crate) fn ended(
        &mut self,
        patience: Duration,
        signals: Option<&Signals>,
    ) -> Result<Ended, Refusal> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wait_or_time_out(Some(left), signals)? {
                // The worker is dead by then, and the broker clears up.
                Some(Event::Reply(Reply::Done, _)) => {}
                Some(Event::HungUp) => return Ok(Ended::Yes),
                Some(Event::Interrupted) => return Ok(Ended::Interrupted),
                Some(Event::Reply(Reply::Refused(refusal), _)) => return Err(refusal),
                Some(Event::Reply(..)) => return Err(self.unexpected()),
                None => return Ok(Ended::NotYet),
            }
        }
    }

    /// How the VM is.
    pub(crate) fn status(&mut self) -> Result<VmStatus, Refusal> {
        match self.ask(&Request::Status)? {
            (Reply::Status(status), _) => Ok(*status),
            _ => Err(self.unexpected()),
        }
    }

    /// The kernel's records against the policy.
    pub(crate) fn audit(&mut self) -> Result<AuditReport, Refusal> {
        match self.ask(&Request::Audit)? {
            (Reply::Audit(report), _) => Ok(*report),
            _ => Err(self.unexpected()),
        }
    }

    /// Where the audit log's chain stands.
    pub(crate) fn log_head(&mut self) -> Result<LogHead, Refusal> {
        match self.ask(&Request::LogHead)? {
            (Reply::LogHead(head), _) => Ok(head),
            _ => Err(self.unexpected()),
        }
    }

    /// One end of the serial console's stream.
    pub(crate) fn console(&mut self) -> Result<OwnedFd, Refusal> {
        self.attach(&Request::Console)
    }

    /// One end of the virtio console's stream.
    pub(crate) fn virtio_console(&mut self) -> Result<OwnedFd, Refusal> {
        self.attach(&Request::VirtioConsole)
    }

    fn attach(&mut self, request: &Request) -> Result<OwnedFd, Refusal> {
        match self.ask(request)? {
            (Reply::Console, descriptors) => {
                let [stream] =
                    <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| self.unexpected())?;
                Ok(stream)
            }
            _ => Err(self.unexpected()),
        }
    }

    /// Replaces the worker. `progress` hears of every step. When a signal comes, `interrupted` is called, once per signal;
    /// the upgrade's outcome is waited for all the same.
    pub(crate) fn upgrade(
        &mut self,
        plan: &Plan<'_>,
        signals: Option<&Signals>,
        progress: &mut dyn FnMut(Option<Step>),
        interrupted: &mut dyn FnMut(),
    ) -> Result<UpgradeOutcome, Refusal> {
        let dry_run = plan.dry_run;
        let request = match plan.approve {
            None => Request::Upgrade { dry_run },
            Some(why) => Request::ApprovedUpgrade {
                dry_run,
                why: why.to_owned(),
            },
        };
        let files = plan.worker.map(|worker| {
            let signature = worker.signature.as_ref().map(AsFd::as_fd);
            std::iter::once(worker.binary.as_fd()).chain(signature)
        });
        let files: Vec<BorrowedFd<'_>> = files.into_iter().flatten().collect();
        self.send(&request, &files)?;
        self.outcome(signals, progress, interrupted)
    }

    /// Hands the guest to the broker that waits at these two addresses; otherwise as [`Client::upgrade`].
    pub(crate) fn transfer(
        &mut self,
        main: Address,
        cpr: Address,
        signals: &Signals,
        progress: &mut dyn FnMut(Option<Step>),
        interrupted: &mut dyn FnMut(),
    ) -> Result<UpgradeOutcome, Refusal> {
        let request = Request::Transfer {
            main,
            cpr,
            hold: false,
            follow: true,
        };
        self.send(&request, &[])?;
        self.outcome(Some(signals), progress, interrupted)
    }

    fn outcome(
        &mut self,
        signals: Option<&Signals>,
        progress: &mut dyn FnMut(Option<Step>),
        interrupted: &mut dyn FnMut(),
    ) -> Result<UpgradeOutcome, Refusal> {
        loop {
            // Redrawn a few times a second, to show that this program is alive.
            match self.wait_or_time_out(Some(Duration::from_millis(100)), signals)? {
                None => progress(None),
                Some(Event::Reply(Reply::Progress(step), _)) => progress(Some(step)),
                Some(Event::Reply(Reply::Upgrade(outcome), _)) => return Ok(*outcome),
                Some(Event::Reply(Reply::Refused(refusal), _)) => return Err(refusal),
                Some(Event::Interrupted) => interrupted(),
                Some(Event::HungUp) => {
                    return Err(unfit(
                        format!("the broker of {} ended during the upgrade", self.vm),
                        format!("see what became of the guest: baton status {}", self.vm),
                    ));
                }
                Some(Event::Reply(..)) => return Err(self.unexpected()),
            }
        }
    }

    fn ask(&mut self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        self.send(request, &[])?;
        match self.wait(Some(PATIENCE), None)? {
            Event::Reply(Reply::Refused(refusal), _) => Err(refusal),
            Event::Reply(reply, descriptors) => Ok((reply, descriptors)),
            Event::HungUp => Err(self.gone()),
            Event::Interrupted => Err(self.unexpected()),
        }
    }

    fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), Refusal> {
        self.channel
            .send_with(request, descriptors)
            .map_err(|error| self.broken(&error))
    }

    fn wait(
        &mut self,
        patience: Option<Duration>,
        signals: Option<&Signals>,
    ) -> Result<Event, Refusal> {
        self.wait_or_time_out(patience, signals)?.ok_or_else(|| {
            failure(
                Exit::Busy,
                format!("the broker of {} does not answer", self.vm),
                "it may be stopped, or the host overloaded: try again, then look at the broker's log",
            )
        })
    }

    /// The next event, or none within `patience`.
    fn wait_or_time_out(
        &mut self,
        patience: Option<Duration>,
        signals: Option<&Signals>,
    ) -> Result<Option<Event>, Refusal> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        loop {
            match self.channel.receive() {
                Ok(Received::Message(reply, descriptors)) => {
                    return Ok(Some(Event::Reply(reply, descriptors)));
                }
                Ok(Received::HungUp) => return Ok(Some(Event::HungUp)),
                Ok(Received::Empty) => {}
                Err(error) => return Err(self.broken(&error)),
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let left = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut sources = vec![PollFd::new(&self.channel, PollFlags::IN)];
            sources.extend(signals.map(|signals| PollFd::new(signals, PollFlags::IN)));
            match rustix::event::poll(&mut sources, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(unfit(format!("poll: {error}"), "")),
            }
            if signals.is_some_and(Signals::came) {
                return Ok(Some(Event::Interrupted));
            }
        }
    }

    fn gone(&self) -> Refusal {
        unfit(
            format!("the broker of {} hung up", self.vm),
            format!("see what is left: baton status {}", self.vm),
        )
    }

    fn unexpected(&self) -> Refusal {
        unfit(
            format!("the broker of {} gave an answer that does not fit", self.vm),
            "use the `baton` that started this VM",
        )
    }

    fn broken(&self, error: &ChannelError) -> Refusal {
        match error {
            ChannelError::Socket(SocketError::HungUp) => self.gone(),
            error => unfit(
                format!("cannot talk to the broker of {}: {error}", self.vm),
                "",
            ),
        }
    }
}
