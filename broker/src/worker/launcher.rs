//! The launcher: the one process beside the broker that has no filter and is in no Landlock domain, because it has to do what a
//! confined process cannot. It starts workers, which must not inherit either; it reads filters back, which the kernel lets only a
//! process do that has none itself (`PTRACE_SECCOMP_GET_FILTER`, ptrace(2)); and it reads the records of /proc that whoever is in
//! a domain has of that domain's processes only.
//!
//! ```text
//! broker                                    launcher (`baton-broker launcher`)
//!   │ starts it, before it confines itself ───►│ keeps what `policy/broker.toml` says of the launcher
//!   │ Begin, with what stage 1 holds ─────────►│ starts stage 1 of a launch from its own binary, and no other
//!   │ Map ────────────────────────────────────►│ writes the id maps of that stage's namespace
//!   │ End ────────────────────────────────────►│ ends that stage; what it has started is the broker's child, a subreaper
//!   │ Filters ────────────────────────────────►│ reads a thread's filters: of the broker, or of a child of the broker
//!   │ Learn ──────────────────────────────────►│ starts what listens to a worker whose policy learns
//!   │ Namespaces, Records ────────────────────►│ reads what /proc has of a child of the broker, and does not judge it
//!   │ Permit, once ───────────────────────────►│ keeps the addresses and taps that policy grants
//!   │ Listen, Connect ────────────────────────►│ makes a TCP socket there: the broker's filter knows no such
//!   │ Tap ────────────────────────────────────►│ opens a tap that is there, for a network interface that comes
//! ```
//!
//! One request at a time, each answered within a bound. No message has a path in it but the patterns of taps. The launcher parses nothing but these
//! words, and nobody but the broker can reach it. If it dies, the guest runs on, and what needs it is refused: the broker,
//! confined by then, cannot start another.

mod inspection;
mod process;
mod records;
mod tap;
mod tcp;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Refusal;
use baton_policy::Namespace;
use baton_policy::PathPattern;
use baton_policy::Program;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::process::PTracer;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use rustix::time::Timespec;
use serde::Deserialize;
use serde::Serialize;

pub(crate) use self::process::run;
pub(crate) use self::records::DescriptorRecord;
pub(crate) use self::records::Identity;
pub(crate) use self::records::Records;
pub(crate) use self::records::namespaces;

use crate::devices::taps::OpenTap;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Interface;
use crate::worker::ids::HostIds;

/// How long an answer may take beyond what was asked for takes by itself. It is ready within a millisecond.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most addresses that policy can have granted.
const MAX_ADDRESSES: usize = 64;
/// The most patterns of taps.
const MAX_PATTERNS: usize = 64;

/// A socket, or why there is none.
pub(crate) type Made = std::result::Result<OwnedFd, String>;

/// What the broker asks for.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// To start stage 1 of a launch under these ids, with the two descriptors that come along: its standard input, and its
    /// output and errors.
    Begin(HostIds),
    /// To write the id maps of the namespace that this stage 1 has made.
    Map(u32),
    /// To end this stage 1, which is known no more afterwards.
    End(u32),
    /// To read the filters of a thread, of which it has `count`.
    Filters {
        tid: u32,
        count: u32,
        within: Duration,
    },
    /// To start what listens to this process, with the file that it writes to.
    Learn(u32),
    /// To read which namespaces a process is in.
    Namespaces(u32),
    /// To read what else /proc shows of it.
    Records(u32),
    /// To make TCP sockets at these addresses, and open taps whose places in sysfs match these patterns, and never others: heard
    /// once, before the broker has heard anybody.
    Permit {
        addresses: Vec<IpAddr>,
        taps: Vec<String>,
    },
    /// To listen there.
    Listen(SocketAddr),
    /// To connect there.
    Connect(SocketAddr),
    /// To open so many queues of a tap, for the network interface of this id.
    Tap { id: String, tap: String, pairs: u8 },
}

/// What the launcher answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Stage 1 runs, as this process.
    Begun(u32),
    /// It is done.
    Done,
    /// One filter; more messages follow.
    Filter(Program),
    /// All filters were told. The thread stood still for so long.
    Read(Duration),
    /// The namespaces of a process, as far as they could be read.
    Namespaces(BTreeMap<Namespace, Identity>),
    /// A part of its records; more messages follow, and at the end `Done`.
    Part(Vec<u8>),
    /// A socket, which comes with this.
    Socket,
    /// There is none, and why.
    NoSocket(String),
    /// A tap of this MTU, in bytes. What keeps it from other VMs comes with this, and its queues with `Queues`.
    Tap { mtu: u16 },
    /// The queues of a tap.
    Queues,
    /// There is none, and why.
    NoTap(Refusal),
    /// It could not be done.
    Failed(String),
}

/// The filters of a thread, in the order in which they were installed.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) filters: Vec<Program>,
    /// For how long the thread stood still.
    pub(crate) stood: Duration,
}

/// The broker's end.
#[derive(Debug)]
pub(crate) struct Launcher {
    pid: u32,
    pidfd: OwnedFd,
    patience: Duration,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    channel: Channel<Ask, Answer>,
    /// Why it is asked nothing any more.
    lost: Option<String>,
}

impl Launcher {
    /// Starts it, from this process's own binary.
    pub(crate) fn start(slowness: u32) -> Result<Rc<Self>> {
        let (ours, theirs) = FdSocket::pair().doing("cannot make the launcher's socket")?;
        let child = Command::new("/proc/self/exe")
            .arg("launcher")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .doing("cannot start the launcher")?;
        let pid = child.id();
        let number = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| unfit("the launcher is an impossible process", ""))?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())
            .doing("cannot hold the launcher's process")?;
        // Where only ancestors may trace (Yama), it may still read this process's filter. EINVAL: there is no Yama.
        let _ = rustix::process::set_ptracer(PTracer::ProcessID(number));
        Ok(Rc::new(Self {
            pid,
            pidfd,
            patience: PATIENCE * slowness,
            state: RefCell::new(State {
                channel: Channel::new(ours),
                lost: None,
            }),
        }))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has died since this was asked last.
    pub(crate) fn has_died(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let gone = matches!(
            rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options),
            Ok(Some(_))
        );
        if gone {
            let _ = self.lose("it has died".to_owned());
        }
        gone
    }

    /// Starts stage 1 of a launch.
    pub(crate) fn begin(&self, ids: HostIds, standard: [BorrowedFd<'_>; 2]) -> Result<u32> {
        match self.ask(&Ask::Begin(ids), &standard, Duration::ZERO)? {
            Answer::Begun(stage1) => Ok(stage1),
            other => Err(self.out_of_turn(&other)),
        }
    }

    /// Writes the id maps of the namespace that stage 1 has made.
    pub(crate) fn map(&self, stage1: u32) -> Result<()> {
        self.done(&Ask::Map(stage1))
    }

    /// Ends stage 1.
    pub(crate) fn end(&self, stage1: u32) -> Result<()> {
        self.done(&Ask::End(stage1))
    }

    /// Has somebody listen to a learning process that is the broker's child.
    pub(crate) fn learn(&self, pid: u32, file: BorrowedFd<'_>) -> Result<()> {
        match self.ask(&Ask::Learn(pid), &[file], Duration::ZERO)? {
            Answer::Done => Ok(()),
            other => Err(self.out_of_turn(&other)),
        }
    }

    /// The filters of a thread, which is stopped for as long as they are read.
    pub(crate) fn filters(&self, tid: u32, count: u32, within: Duration) -> Result<Reading> {
        let mut filters = Vec::new();
        let mut answer = self.ask(&Ask::Filters { tid, count, within }, &[], within)?;
        loop {
            match answer {
                Answer::Filter(filter) => filters.push(filter),
                Answer::Read(stood) => return Ok(Reading { filters, stood }),
                other => return Err(self.out_of_turn(&other)),
            }
            answer = self.answer(within)?;
        }
    }

    /// The namespaces of a process that is the broker's child.
    pub(crate) fn namespaces(&self, pid: u32) -> Result<BTreeMap<Namespace, Identity>> {
        match self.ask(&Ask::Namespaces(pid), &[], Duration::ZERO)? {
            Answer::Namespaces(namespaces) => Ok(namespaces),
            other => Err(self.out_of_turn(&other)),
        }
    }

    /// What /proc has of a process that is the broker's child.
    pub(crate) fn records(&self, pid: u32) -> Result<Records> {
        let mut bytes = Vec::new();
        let mut answer = self.ask(&Ask::Records(pid), &[], Duration::ZERO)?;
        loop {
            match answer {
                Answer::Part(part) if bytes.len() <= records::MAX => bytes.extend(part),
                Answer::Done => break,
                other => return Err(self.out_of_turn(&other)),
            }
            answer = self.answer(Duration::ZERO)?;
        }
        baton_ipc::decode(&bytes).map_err(|error| self.lose(error.to_string()))
    }

    /// Has TCP sockets made at these addresses, taps opened of these places, and no others.
    pub(crate) fn permit(
        &self,
        addresses: impl IntoIterator<Item = IpAddr>,
        taps: &[PathPattern],
    ) -> Result<()> {
        let addresses = addresses.into_iter().take(MAX_ADDRESSES).collect();
        let taps = taps.iter().take(MAX_PATTERNS);
        let taps = taps.map(|pattern| pattern.as_str().to_owned()).collect();
        self.done(&Ask::Permit { addresses, taps })
    }

    /// A tap that is there.
    pub(crate) fn tap(&self, id: &Label, tap: &Interface, pairs: u8) -> Result<OpenTap> {
        let (id, tap) = (id.0.clone(), tap.0.clone());
        self.send(&Ask::Tap { id, tap, pairs }, &[])?;
        let (mtu, claim) = match self.answer_with(Duration::ZERO)? {
            (Answer::Tap { mtu }, claim) => (mtu, claim.into_iter().next()),
            (Answer::NoTap(refusal), _) => return Err(refusal),
            (other, _) => return Err(self.out_of_turn(&other)),
        };
        match (claim, self.answer_with(Duration::ZERO)?) {
            (Some(claim), (Answer::Queues, queues)) if queues.len() == usize::from(pairs) => {
                Ok(OpenTap { queues, mtu, claim })
            }
            (_, (other, _)) => Err(self.out_of_turn(&other)),
        }
    }

    /// A socket that listens there, or why there is none.
    pub(crate) fn listen(&self, address: SocketAddr) -> Result<Made> {
        self.socket(&Ask::Listen(address))
    }

    /// A socket that is connected there, or why there is none.
    pub(crate) fn connect(&self, address: SocketAddr) -> Result<Made> {
        self.socket(&Ask::Connect(address))
    }

    fn socket(&self, ask: &Ask) -> Result<Made> {
        self.send(ask, &[])?;
        let (answer, descriptors) = self.answer_with(tcp::CONNECTING)?;
        match (answer, descriptors.into_iter().next()) {
            (Answer::Socket, Some(socket)) => Ok(Ok(socket)),
            (Answer::NoSocket(why), None) => Ok(Err(why)),
            (other, _) => Err(self.out_of_turn(&other)),
        }
    }

    fn done(&self, ask: &Ask) -> Result<()> {
        match self.ask(ask, &[], Duration::ZERO)? {
            Answer::Done => Ok(()),
            other => Err(self.out_of_turn(&other)),
        }
    }

    fn ask(&self, ask: &Ask, descriptors: &[BorrowedFd<'_>], within: Duration) -> Result<Answer> {
        self.send(ask, descriptors)?;
        self.answer(within)
    }

    fn send(&self, ask: &Ask, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        if let Some(why) = &self.state.borrow().lost {
            return Err(gone(why));
        }
        let sent = self.state.borrow().channel.send_with(ask, descriptors);
        sent.map_err(|error| self.lose(error.to_string()))
    }

    fn answer(&self, within: Duration) -> Result<Answer> {
        self.answer_with(within).map(|(answer, _)| answer)
    }

    fn answer_with(&self, within: Duration) -> Result<(Answer, Vec<OwnedFd>)> {
        let deadline = Instant::now() + within + self.patience;
        loop {
            let received = self.state.borrow_mut().channel.receive();
            match received.map_err(|error| self.lose(error.to_string()))? {
                Received::Message(Answer::Failed(reason), _) => {
                    return Err(unfit(reason, "`baton doctor` says what this host lacks"));
                }
                Received::Message(answer, descriptors) => return Ok((answer, descriptors)),
                Received::HungUp => return Err(self.lose("it has died".to_owned())),
                Received::Empty => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.lose("it did not answer in time".to_owned()));
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let state = self.state.borrow();
            let mut fds = [PollFd::new(&state.channel, PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
    }

    fn out_of_turn(&self, answer: &Answer) -> Refusal {
        self.lose(format!("it answered something else: {answer:?}"))
    }

    /// From now on it is asked nothing: an answer that comes too late would be taken for another's.
    fn lose(&self, why: String) -> Refusal {
        let refusal = gone(&why);
        self.state.borrow_mut().lost.get_or_insert(why);
        refusal
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

fn gone(why: &str) -> Refusal {
    unfit(
        format_args!("this broker's launcher is gone: {why}"),
        "the guest runs on; hand it to another broker (docs/qmp.md) to upgrade or to audit it",
    )
}
