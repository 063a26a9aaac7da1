//! The broker of one VM: one thread, one loop, everything that it holds in one value.
//!
//! The loop waits for readiness and then asks every source; none of them blocks. The one exception is the pause of an
//! upgrade, in which nothing else is served (see `pause`).

mod reports;
mod start;
mod status;

pub(crate) use self::start::report_failure;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_audit::AuditLog;
use baton_ipc::Channel;
use baton_ipc::Registry;
use baton_ipc::VmId;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Reply;
use baton_ipc::control::StartReport;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;
use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::WorkerStatus;
use baton_policy::Compiled;
use baton_policy::Policy;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::time::Timespec;
use serde_json::json;

use crate::clients::Awaiting;
use crate::clients::Clients;
use crate::clients::events::Told;
use crate::clients::front::Front;
use crate::devices::balloon::BalloonNews;
use crate::devices::console::Console;
use crate::devices::console::Port;
use crate::devices::hotplug::Device;
use crate::devices::netdevs::Netdev;
use crate::devices::nodes::Node;
use crate::devices::resizing::Resizing;
use crate::devices::vsock::Vsock;
use crate::notify::Manager;
use crate::own::Own;
use crate::reboot::restoring::Restore;
use crate::reboot::restoring::Restoring;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;
use crate::transfer::incoming::Channels;
use crate::transfer::incoming::Incoming;
use crate::upgrade::Upgrade;
use crate::upgrade::deadlines::Deadlines;
use crate::vm_file::VmFile;
use crate::worker::Worker;
use crate::worker::cgroup::Cgroup;
use crate::worker::ids::VmIds;
use crate::worker::launcher::Launcher;
use crate::worker::nascent::Nascent;
use crate::worker::proof::Prover;

/// How many messages of one worker are taken before everybody else is looked after again.
pub(crate) const MESSAGES: u32 = 32;

/// What `baton run` has asked for.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) vm_file: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) worker: Option<PathBuf>,
    pub(crate) detach: bool,
    /// It waits for the guest of this VM, and as long as that has not come ends with whoever started it.
    pub(crate) successor_of: Option<String>,
    pub(crate) log: bool,
    pub(crate) slowness: u32,
    /// Wait for another broker's guest.
    pub(crate) incoming: Option<Channels>,
    /// Take the guest out of a file.
    pub(crate) restore: Option<Restore>,
    /// Where it is written down what its workers call.
    pub(crate) learn: Option<PathBuf>,
}

/// What a worker's privileges come from: a policy as it was read for that worker.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) policy: Policy,
    pub(crate) compiled: Compiled,
    /// What the worker's build declares that it needs; none before there is one, and of the QMP front.
    pub(crate) declared: Option<Policy>,
}

/// The broker.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) options: Options,
    pub(crate) vm: VmFile,
    pub(crate) id: VmId,
    pub(crate) log: AuditLog,
    pub(crate) state: VmState,
    /// The worker that holds the guest.
    pub(crate) worker: Option<Worker>,
    /// What it is held to.
    pub(crate) rules: Rc<Rules>,
    pub(crate) upgrade: Option<Upgrade>,
    /// Killed, and not yet gone.
    pub(crate) retired: Vec<Worker>,
    pub(crate) registry: Registry,
    /// Its virtio devices, whose descriptors are in the registry.
    pub(crate) virtio: Vec<VirtioConfig>,
    /// Its devices that are PCI devices of the host, whose descriptors are in the registry.
    pub(crate) vfio: Vec<VfioConfig>,
    /// What keeps its taps from other VMs, held.
    pub(crate) claims: Vec<OwnedFd>,
    /// Cgroups of a dead broker whose guest has come here, to be removed when their last process is gone.
    pub(crate) remains: Vec<PathBuf>,
    pub(crate) ids: VmIds,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) prover: Prover,
    /// What this process itself is held to.
    pub(crate) own: Own,
    /// Who has asked for the upgrade that is under way.
    pub(crate) asked_by: Option<Actor>,
    /// Open, when the policy learns.
    pub(crate) lessons: Option<File>,
    pub(crate) manager: Manager,
    /// Who starts workers and reads filters.
    pub(crate) launcher: Rc<Launcher>,
    pub(crate) deadlines: Deadlines,
    /// Goes before the clients do: who sees the hang-up finds the name free.
    pub(crate) directory: VmDirectory,
    pub(crate) clients: Clients,
    pub(crate) front: Front,
    pub(crate) last_upgrade: Option<UpgradeOutcome>,
    /// It was aborted because somebody had it cancelled.
    pub(crate) last_cancelled: bool,
    pub(crate) told: Told,
    /// None while another broker has it.
    pub(crate) consoles: Vec<Console>,
    /// The host's side of its vsock.
    pub(crate) vsock: Option<Vsock>,
    signals: Signals,
    pub(crate) first: Option<Nascent>,
    pub(crate) starter: Option<Channel<StartReport, ()>>,
    pub(crate) began: Instant,
    /// A guest of another broker is awaited, or what follows it.
    pub(crate) incoming: Option<Incoming>,
    /// The guest comes out of a file.
    pub(crate) restoring: Option<Restoring>,
    /// The host's boot, by `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot: [u8; 16],
    /// The log is the VM's own: not that of a broker that waits beside it.
    pub(crate) has_log: bool,
    /// The guest is another broker's, and this one stays until then for those who ask.
    pub(crate) linger: Option<Instant>,
    status: WorkerStatus,
    power_off_by: Option<Instant>,
    /// When the first worker has to have said that it runs.
    start_by: Option<Instant>,
    /// A pause was ordered, and the worker has not said what came of it.
    pub(crate) pausing: bool,
    /// The guest stands still at the operator's wish, also while its worker is being replaced.
    pub(crate) paused: bool,
    /// Resets that were ordered and that the worker has not reported; any other is the guest's own.
    pub(crate) resets_asked: u32,
    /// The guest stands still because it has panicked, and nobody has let it go on since.
    pub(crate) panicked: bool,
    /// Disks that were opened while the guest ran.
    pub(crate) nodes: Vec<Node>,
    /// Taps that were opened while the guest ran.
    pub(crate) netdevs: Vec<Netdev>,
    /// Devices that were made of them.
    pub(crate) devices: Vec<Device>,
    /// A disk's other size, which its worker has been told.
    pub(crate) resizing: Option<Resizing>,
    /// Of its balloon.
    pub(crate) news: BalloonNews,
    end: Option<Exit>,
}

impl Broker {
    /// Serves until the VM has ended. `starter` is told how the start went, and in the foreground its end is the VM's.
    pub(crate) fn run(mut self, starter: Option<Channel<StartReport, ()>>) -> Exit {
        self.starter = starter;
        if self.incoming.is_some() || self.awaits_file() {
            self.say_waiting();
        }
        loop {
            self.wait();
            match self.turn() {
                Ok(()) => {}
                Err(refusal) if matches!(self.state, VmState::Starting | VmState::Incoming) => {
                    self.fail_start(&refusal);
                    self.end.get_or_insert(refusal.exit);
                }
                // Whatever it is, the guest does not pay for it.
                Err(refusal) => complain(&refusal),
            }
            if let (Some(_), Some(incoming)) = (self.end, &mut self.incoming) {
                incoming.withdraw("it was told to end");
            }
            if self.incoming.as_ref().is_some_and(Incoming::is_undecided) {
                // Ending now could take a guest that has just begun to run here.
                continue;
            }
            if let Some(exit) = self.end {
                self.farewell(exit);
                return exit;
            }
        }
    }

    fn wait(&self) {
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(16);
        let mut watch = |fd, flags| fds.push(PollFd::from_borrowed_fd(fd, flags));
        watch(self.signals.as_fd(), PollFlags::IN);
        self.clients
            .sources()
            .for_each(|fd| watch(fd, PollFlags::IN));
        self.consoles
            .iter()
            .flat_map(Console::sources)
            .for_each(|(fd, flags)| watch(fd, flags));
        self.vsock
            .iter()
            .flat_map(Vsock::sources)
            .for_each(|fd| watch(fd, PollFlags::IN));
        if let Some(outgoing) = self.upgrade.as_ref().and_then(Upgrade::outgoing) {
            watch(outgoing.source(), PollFlags::IN);
        }
        self.incoming
            .iter()
            .flat_map(Incoming::sources)
            .for_each(|fd| watch(fd, PollFlags::IN));
        self.front
            .sources(self.clients.qmp_count())
            .into_iter()
            .for_each(|fd| watch(fd, PollFlags::IN));
        if let Some(worker) = &self.worker {
            watch(worker.control(), PollFlags::IN);
            watch(worker.pidfd(), PollFlags::IN);
            worker
                .diagnostics()
                .into_iter()
                .for_each(|fd| watch(fd, PollFlags::IN));
        }
        let makings = self
            .first
            .iter()
            .chain(self.upgrade.iter().filter_map(Upgrade::nascent));
        for nascent in makings {
            nascent
                .sources()
                .into_iter()
                .for_each(|fd| watch(fd, PollFlags::IN));
        }
        if let (Some(starter), true) = (&self.starter, self.ends_with_starter()) {
            watch(starter.as_fd(), PollFlags::IN);
        }
        let timeout = self.next_look().map(|bound| Timespec {
            tv_sec: i64::try_from(bound.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(bound.subsec_nanos()),
        });
        // An interruption or a failure is a wake-up like any other.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    }

    /// How long until some deadline may have passed.
    fn next_look(&self) -> Option<Duration> {
        let deadlines = [
            self.first.as_ref().map(|nascent| nascent.deadline),
            self.upgrade.as_ref().map(Upgrade::deadline),
            self.power_off_by,
            self.start_by,
            self.linger
                .is_some()
                .then(|| Instant::now() + Duration::from_millis(100)),
            self.incoming.as_ref().and_then(Incoming::deadline),
            self.front.deadline(),
            self.news.due(),
            self.devices.iter().filter_map(Device::due).min(),
            self.clients
                .any_waiting()
                .then(|| Instant::now() + Duration::from_millis(100)),
            self.clients.resting(),
            self.vsock.as_ref().and_then(Vsock::deadline),
            (!self.retired.is_empty()).then(|| Instant::now() + Duration::from_millis(100)),
            (!self.remains.is_empty()).then(|| Instant::now() + Duration::from_millis(20)),
        ];
        let next = deadlines.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    fn turn(&mut self) -> Result<()> {
        let signalled = self.signals.take();
        if signalled.child {
            self.reap_strangers();
            if self.launcher.has_died() {
                self.log.note("launcher-died", &json!({}));
            }
        }
        if signalled.end || self.starter_left() {
            self.end = Some(Exit::Done);
            return Ok(());
        }
        self.consoles.iter_mut().for_each(Console::pump);
        self.retired.retain(|worker| worker.reap().is_none());
        crate::worker::cgroup::remove(&mut self.remains);
        self.first_worker()?;
        self.running_worker()?;
        self.advance_incoming()?;
        self.advance_upgrade()?;
        self.advance_vsock();
        self.advance_balloon();
        self.advance_devices();
        self.clients.begin_turn();
        self.clients.accept(&self.rules.policy);
        self.advance_front();
        while let Some(asked) = self.clients.hear(self.state, &self.rules.policy) {
            self.serve(asked)?;
        }
        for (who, name) in std::mem::take(&mut self.clients.denied) {
            let record =
                json!({"request": name, "reason": "policy does not let this user ask for it"});
            self.log.note_by("request-refused", Some(&who), &record);
        }
        self.answer_overdue();
        if self.start_by.is_some_and(|by| Instant::now() > by) {
            return Err(unfit(
                "the first worker took too long to run its guest",
                "the audit log has what it said",
            ));
        }
        if self
            .linger
            .is_some_and(|by| self.clients.is_empty() || Instant::now() > by)
        {
            self.end = Some(Exit::Done);
        }
        if self.power_off_by.is_some_and(|by| Instant::now() > by) {
            self.log.note("power-off-timeout", &json!({}));
            self.end = Some(Exit::Done);
        }
        Ok(())
    }

    /// Reaps children that belong to nothing: the second stage of a launch that was given up.
    fn reap_strangers(&self) {
        let worker = |worker: &Worker| worker.process.pid;
        let makings = || {
            self.first
                .iter()
                .chain(self.upgrade.iter().filter_map(Upgrade::nascent))
                .chain(self.incoming.iter().filter_map(Incoming::nascent))
        };
        let known: Vec<i32> = self
            .worker
            .iter()
            .map(worker)
            .chain(self.retired.iter().map(worker))
            .chain(
                self.incoming
                    .iter()
                    .filter_map(Incoming::worker)
                    .map(worker),
            )
            .chain(makings().filter_map(Nascent::worker).map(worker))
            .chain(self.front.processes())
            .chain(i32::try_from(self.launcher.pid()))
            .collect();
        for child in crate::worker::process::children()
            .into_iter()
            .filter(|child| !known.contains(child))
        {
            let child = rustix::process::Pid::from_raw(child);
            let _ = rustix::process::waitpid(child, rustix::process::WaitOptions::NOHANG);
        }
    }

    /// In the foreground, the VM ends with whoever started it; elsewhere at most the waiting for its guest.
    fn ends_with_starter(&self) -> bool {
        let undecided = self.incoming.as_ref().is_some_and(Incoming::is_undecided);
        let waits = self.state == VmState::Incoming && !undecided;
        !self.options.detach || (self.options.successor_of.is_some() && waits)
    }

    fn starter_left(&mut self) -> bool {
        if !self.ends_with_starter() {
            return false;
        }
        self.starter.as_mut().is_some_and(|starter| {
            matches!(starter.receive(), Ok(baton_ipc::Received::HungUp) | Err(_))
        })
    }

    /// Ends the VM: at once, or by the power button within a time.
    pub(crate) fn stop(&mut self, force: bool) -> Result<()> {
        match &self.worker {
            Some(worker) if !force && self.state != VmState::Paused => {
                worker
                    .order(&Order::PowerButton)
                    .doing("cannot press the power button")?;
                self.happened(Happening::PowerButton);
                self.power_off_by
                    .get_or_insert(Instant::now() + self.deadlines.power_off());
            }
            _ => self.end = Some(Exit::Done),
        }
        Ok(())
    }

    fn farewell(&mut self, exit: Exit) {
        // Its terminal record, whoever ended the VM.
        if let Err(refusal) = self.upgrade_lost("the VM was ended") {
            complain(&refusal);
        }
        if let Some(worker) = self.worker.take() {
            worker.kill();
            self.retired.push(worker);
        }
        // Who sees the end finds no socket and no connection of the guest's any more.
        self.end_vsock();
        self.vsock = None;
        let _ = self.log.write_synced("vm-end", &json!({"exit": exit}));
        let guest = self.state == VmState::Stopped;
        self.happened(Happening::Ended { guest });
        self.clients.answer(Awaiting::End, &Reply::Done);
        // Before the directory goes: nobody may find a name whose ids and cgroup are still in use.
        self.first = None;
        self.upgrade = None;
        self.incoming = None;
        self.retired.clear();
        crate::worker::cgroup::remove_when_empty(std::mem::take(&mut self.remains));
        self.front.end();
    }

    pub(crate) fn attach_console(&mut self, port: Port) -> Result<OwnedFd> {
        let mut all = self.consoles.iter_mut();
        if let Some(console) = all.find(|console| console.port() == port) {
            return console.attach();
        }
        match Port::of(&self.vm).any(|(found, _)| found == port) {
            true => Err(unfit("another broker has this VM's console", "")),
            false => Err(unfit(
                "this VM has no virtio console",
                "[virtio_console] in its VM file gives it one",
            )),
        }
    }
}
