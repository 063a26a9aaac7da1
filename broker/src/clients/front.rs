//! The QMP front: the confined process that parses what QMP clients write.
//!
//! ```text
//! Idle ── somebody connects ──► Launching ──► Born ── confirmed, told its last filter ──► Serving ── dies ──► Idle
//! ```
//!
//! The broker accepts each connection, since only it sees whose it is (the front's user namespace knows one id), and hands it
//! on together with control connections that carry that user's name. The front has no listening socket and no path; when it
//! dies, its clients' connections die with it, the workers and the guest do not notice, and the next client starts another.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Event;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::Step;
use baton_policy::CgroupLimits;
use baton_policy::Confinement;
use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::proof::Finding;
use baton_policy::proof::Moment;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use serde_json::json;

use crate::broker::Broker;
use crate::broker::Rules;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::worker::binary::Permitted;
use crate::worker::binary::WorkerBinary;
use crate::worker::cgroup::Cgroup;
use crate::worker::ids::HostIds;
use crate::worker::ids::VmIds;
use crate::worker::launch::Begun;
use crate::worker::launch::Launch;
use crate::worker::launch::Launched;
use crate::worker::launch::Program;
use crate::worker::process::ProcessId;
use crate::worker::proof;

/// The most QMP clients at once; more wait in the socket's backlog.
const MAX_QMP_CLIENTS: usize = 16;
/// How long a dead front stays dead: one that dies of each client that it sees does not keep the broker busy.
const RESPITE: Duration = Duration::from_secs(1);
/// How long a front may take to end with its broker.
const FAREWELL: Duration = Duration::from_millis(500);

/// The front, and the socket where its clients come from.
#[derive(Debug)]
pub(crate) struct Front {
    listener: OwnedFd,
    stage: Stage,
    /// Taken with the first launch, and kept: an id and a cgroup of its own.
    place: Option<Place>,
    rest_until: Option<Instant>,
}

#[derive(Debug)]
struct Place {
    rules: Rules,
    ids: VmIds,
    cgroup: Option<Cgroup>,
}

#[derive(Debug)]
enum Stage {
    Idle,
    Launching {
        launch: Box<Launch>,
        binary: WorkerBinary,
        by: Instant,
    },
    Running(Process),
}

/// A front that has been executed.
#[derive(Debug)]
struct Process {
    process: ProcessId,
    pidfd: OwnedFd,
    channel: Channel<Reply, Request>,
    diagnostics: Option<File>,
    ids: HostIds,
    binary: WorkerBinary,
    phase: Phase,
    by: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its first word is `subscribe`.
    Born,
    /// It was told its last filter; its second word is the same.
    Filtered,
    /// It is confirmed, and serves.
    Serving,
}

impl Front {
    /// Listens in the VM's directory.
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .doing("cannot make the QMP socket")?;
        let address = SocketAddrUnix::new(path).map_err(|_| {
            unfit(
                format_args!("the QMP socket's path {} is too long", path.display()),
                "choose a shorter --run-dir or name",
            )
        })?;
        rustix::net::bind(&listener, &address)
            .and_then(|()| rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR))
            .and_then(|()| rustix::net::listen(&listener, 16))
            .doing(format_args!("cannot listen on {}", path.display()))?;
        Ok(Self {
            listener,
            stage: Stage::Idle,
            place: None,
            rest_until: None,
        })
    }

    /// What to poll for reading. `clients` is how many QMP clients there are.
    pub(crate) fn sources(&self, clients: usize) -> Vec<BorrowedFd<'_>> {
        let mut sources = Vec::with_capacity(4);
        let rested = self
            .rest_until
            .is_none_or(|rest_until| Instant::now() >= rest_until);
        let takes_clients = match &self.stage {
            Stage::Idle => rested,
            Stage::Launching { launch, .. } => {
                sources.push(launch.as_fd());
                false
            }
            Stage::Running(front) => {
                sources.push(front.channel.as_fd());
                sources.push(front.pidfd.as_fd());
                sources.extend(front.diagnostics.as_ref().map(AsFd::as_fd));
                rested && front.phase == Phase::Serving && clients < MAX_QMP_CLIENTS
            }
        };
        if takes_clients {
            sources.push(self.listener.as_fd());
        }
        sources
    }

    /// When to look again, whatever happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let rest = self
            .rest_until
            .filter(|rest_until| *rest_until > Instant::now());
        match &self.stage {
            Stage::Launching { by, .. } => Some(*by),
            Stage::Running(front) if front.phase != Phase::Serving => Some(front.by),
            Stage::Idle | Stage::Running(_) => rest,
        }
    }

    /// Its processes, which are not strangers.
    pub(crate) fn processes(&self) -> Vec<i32> {
        match &self.stage {
            Stage::Idle | Stage::Launching { .. } => Vec::new(),
            Stage::Running(front) => vec![front.process.pid],
        }
    }

    /// Lets it read what it was told last and end, within a bound.
    pub(crate) fn end(&mut self) {
        if let Stage::Running(front) = std::mem::replace(&mut self.stage, Stage::Idle) {
            // What was sent before is read first.
            let _ = rustix::net::shutdown(&front.channel, rustix::net::Shutdown::Write);
            let deadline = Instant::now() + FAREWELL;
            while Instant::now() < deadline && !reap(&front.pidfd) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.place = None;
    }

    fn someone_waits(&self) -> bool {
        use rustix::event::PollFd;
        use rustix::event::PollFlags;
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))
            .is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill(&self.pidfd);
    }
}

/// Ends it, and waits a moment for it to be gone: one that takes longer is reaped as a stranger.
fn kill(pidfd: &OwnedFd) {
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    let deadline = Instant::now() + FAREWELL;
    while !reap(pidfd) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a dying process ended; a moment is given to it, since its socket closes before it is gone.
fn last_words(pidfd: &OwnedFd) -> String {
    for _ in 0..20 {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options) {
            Ok(Some(status)) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("exit status {code}"),
                    (_, Some(signal)) => format!("signal {signal}"),
                    _ => "no status".to_owned(),
                };
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => break,
        }
    }
    "no status".to_owned()
}

/// Whether it is gone.
fn reap(pidfd: &OwnedFd) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    !matches!(
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options),
        Ok(None)
    )
}

impl Broker {
    /// Goes on with the front. Whatever is wrong with it costs its clients, and nobody else.
    pub(crate) fn advance_front(&mut self) {
        let failed = match self.step_front() {
            Ok(()) => return,
            Err(refusal) => refusal,
        };
        self.front_says();
        self.log
            .note("front-failed", &json!({"reason": quoted(&failed.reason)}));
        self.front.stage = Stage::Idle;
        self.front.rest_until = Some(Instant::now() + RESPITE);
        self.clients.forget_qmp();
    }

    fn step_front(&mut self) -> Result<()> {
        self.front_says();
        match &mut self.front.stage {
            Stage::Idle => {
                let rests = self
                    .front
                    .rest_until
                    .is_some_and(|rest_until| Instant::now() < rest_until);
                if rests || !self.front.someone_waits() {
                    return Ok(());
                }
                self.launch_front()
            }
            Stage::Launching { launch, by, .. } => {
                let late = Instant::now() > *by;
                match launch.advance()? {
                    Some(launched) => self.front_is_born(launched),
                    None if late => Err(unfit("it took too long to start", "")),
                    None => Ok(()),
                }
            }
            Stage::Running(_) => self.hear_front(),
        }
    }

    fn launch_front(&mut self) -> Result<()> {
        let place = match self.front.place.take() {
            Some(place) => place,
            None => self.front_place()?,
        };
        let place = self.front.place.insert(place);
        let path = crate::rules::beside_broker("baton-qmp")?;
        let file = crate::devices::resources::open_image(&path).map_err(|e| {
            unfit(
                format_args!("cannot open the QMP front {}: {e}", path.display()),
                "install baton-qmp beside baton-broker",
            )
        })?;
        // As the worker beside the broker: whoever could replace it could replace the broker.
        let binary = WorkerBinary::admit(file, |_, _| Ok(Some(Permitted::Listed)))?;
        let confinement = Confinement {
            rlimits: place.rules.policy.rlimits(0, 0),
            keep: place.rules.policy.capabilities,
            landlock_floor: place.rules.policy.landlock.floor_abi,
            filters: place.rules.compiled.build.clone(),
            learn: false,
        };
        let launch = Begun::start(
            &self.launcher,
            Program::Front,
            place.ids.ids,
            place.cgroup.as_ref(),
        )?
        .become_of(binary.as_fd(), confinement, None)?;
        self.log.note(
            "front-launch",
            &json!({"digest": binary.digest.to_string(), "uid": place.ids.ids.uid}),
        );
        self.front.stage = Stage::Launching {
            launch: Box::new(launch),
            binary,
            by: Instant::now() + self.deadlines.of(Step::Spawn),
        };
        Ok(())
    }

    fn front_place(&self) -> Result<Place> {
        let policy = Policy::front().doing("cannot read the front's policy")?;
        let compiled = policy
            .compile()
            .doing("cannot compile the front's policy")?;
        let cgroup = rustix::process::geteuid()
            .is_root()
            .then(|| {
                let name = format!(".qmp-{}", self.vm.name.as_str());
                let me = rustix::process::getpid().as_raw_nonzero().get();
                // The launcher's two stages are in it for a moment.
                let limits = CgroupLimits {
                    tasks: policy.task_limit(0) + 2,
                    ..policy.cgroup_limits(1, 0, 0)
                };
                Cgroup::create(&name, me, limits)
            })
            .transpose()?;
        Ok(Place {
            ids: VmIds::claim(&self.rules.policy)?,
            rules: Rules {
                policy,
                compiled,
                declared: None,
            },
            cgroup,
        })
    }

    fn front_is_born(&mut self, launched: Launched) -> Result<()> {
        let Stage::Launching { binary, .. } = std::mem::replace(&mut self.front.stage, Stage::Idle)
        else {
            return Ok(());
        };
        let gone = || unfit("it died at once", "");
        let pid = rustix::process::Pid::from_raw(launched.pid).ok_or_else(gone)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .doing("cannot hold its process")?;
        let process = ProcessId::of(launched.pid).ok_or_else(gone)?;
        if let Some(place) = &mut self.front.place {
            place.ids.record(&[process])?;
        }
        self.front.stage = Stage::Running(Process {
            process,
            pidfd,
            channel: Channel::new(launched.socket),
            diagnostics: Some(File::from(launched.diagnostics)),
            ids: launched.ids,
            binary,
            phase: Phase::Born,
            by: Instant::now() + self.deadlines.of(Step::Agree),
        });
        Ok(())
    }

    fn hear_front(&mut self) -> Result<()> {
        let Stage::Running(front) = &mut self.front.stage else {
            return Ok(());
        };
        match front.channel.receive().doing("it sent no request")? {
            Received::HungUp => Err(unfit(
                format_args!("it died ({})", last_words(&front.pidfd)),
                "",
            )),
            Received::Empty if front.phase == Phase::Serving => {
                self.accept_qmp();
                Ok(())
            }
            Received::Empty if Instant::now() > front.by => {
                Err(unfit("it took too long to begin", ""))
            }
            Received::Empty => Ok(()),
            Received::Message(Request::Subscribe, descriptors) if descriptors.is_empty() => {
                self.front_goes_on()
            }
            Received::Message(..) => Err(unfit("it asked for what is not its to ask", "")),
        }
    }

    /// Its first and its second word.
    fn front_goes_on(&mut self) -> Result<()> {
        let (Stage::Running(front), Some(place)) = (&mut self.front.stage, &self.front.place)
        else {
            return Ok(());
        };
        let pid = front.process.pid;
        let (moment, next) = match front.phase {
            Phase::Born => (Moment::Fresh, Phase::Filtered),
            Phase::Filtered => (Moment::Settled { vcpus: 0, io: 0 }, Phase::Serving),
            Phase::Serving => return Err(unfit("it subscribed twice", "")),
        };
        let verdict = self.prover.threads(&place.rules, pid, front.ids, moment);
        let mut findings: Vec<Finding> = verdict.findings;
        if next == Phase::Filtered {
            let process =
                proof::fresh_process(&self.prover, pid, &front.binary, place.cgroup.as_ref());
            findings.extend(process);
        }
        let findings: Vec<_> = findings.iter().map(ToString::to_string).collect();
        if !findings.is_empty() {
            return Err(unfit(
                format_args!(
                    "it is not confined as its policy says: {}",
                    findings.join("; ")
                ),
                "",
            ));
        }
        front.phase = next;
        let reply = if next == Phase::Filtered {
            let filter = place.rules.compiled.roles.get(&Role::Control);
            let filter = filter.ok_or_else(|| unfit("its policy has no last filter", ""))?;
            Reply::Front {
                protocol: PROTOCOL,
                filter: filter.as_bytes().to_vec(),
            }
        } else {
            Reply::Done
        };
        let mut told = front.channel.send(&reply);
        if next == Phase::Serving {
            // What is under way began before it was there.
            let before = self.told.events().iter();
            let before = before.map(|event| Reply::Event(Box::new(event.clone())));
            for event in before {
                told = told.and_then(|()| front.channel.send(&event));
            }
        }
        let told = told.doing("it does not listen");
        if next == Phase::Serving {
            self.log.note(
                "front-confirmed",
                &json!({"pid": pid, "uid": front.ids.uid}),
            );
        }
        told
    }

    /// Takes everybody who waits at the door, up to the bound, and hands them on.
    fn accept_qmp(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while self.clients.qmp_count() < MAX_QMP_CLIENTS {
            let stream = match rustix::net::accept_with(&self.front.listener, flags) {
                Ok(stream) => stream,
                Err(Errno::AGAIN) => return,
                // No descriptor, no memory: what waits at the door stays ready, and is not asked again at once.
                Err(_) => {
                    self.front.rest_until = Some(Instant::now() + RESPITE);
                    return;
                }
            };
            let Ok(peer) = rustix::net::sockopt::socket_peercred(&stream) else {
                continue;
            };
            let known = peer.uid.is_root() || peer.uid == rustix::process::geteuid();
            let actor = crate::clients::actor(&stream, &peer);
            self.log
                .note_by("qmp-client", Some(&actor), &json!({"admitted": known}));
            if !known {
                continue;
            }
            let (Ok((ask, ask_end)), Ok((oob, oob_end))) = (FdSocket::pair(), FdSocket::pair())
            else {
                self.front.rest_until = Some(Instant::now() + RESPITE);
                return;
            };
            let Stage::Running(front) = &self.front.stage else {
                return;
            };
            let ends = [stream.as_fd(), ask_end.as_fd(), oob_end.as_fd()];
            // One that does not read is dead or as good as that: its hang-up or its next event shows it.
            if front.channel.send_with(&Reply::QmpClient, &ends).is_ok() {
                self.clients.adopt([ask, oob], &actor);
            }
        }
    }

    /// Tells the front of an event. One that does not keep up is killed; its clients come back.
    pub(crate) fn tell_front(&mut self, event: &Event) {
        if let Stage::Running(front) = &self.front.stage {
            let reply = Reply::Event(Box::new(event.clone()));
            if front.phase == Phase::Serving && front.channel.send(&reply).is_err() {
                kill(&front.pidfd);
            }
        }
    }

    /// Puts what it prints into the log.
    fn front_says(&mut self) {
        let mut buffer = [0; 4096];
        let Stage::Running(front) = &mut self.front.stage else {
            return;
        };
        let text = match front
            .diagnostics
            .as_mut()
            .map(|pipe| pipe.read(&mut buffer))
        {
            Some(Ok(0)) => {
                front.diagnostics = None;
                return;
            }
            Some(Ok(count)) => {
                String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned()
            }
            Some(Err(_)) | None => return,
        };
        for line in text.lines().filter(|line| !line.is_empty()) {
            self.log.note("front-says", &json!({"line": quoted(line)}));
        }
    }
}
