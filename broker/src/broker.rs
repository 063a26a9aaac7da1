//! The broker of one VM: one thread, one loop, everything that it holds in one value.
//!
//! The loop waits for readiness and then asks every source; none of them blocks. The one exception is the pause of an
//! upgrade, in which nothing else is served (see `pause`).

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_audit::AuditLog;
use baton_audit::Limits;
use baton_audit::quoted;
use baton_audit::shape::Subject;
use baton_ipc::Channel;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::StartReport;
use baton_ipc::control::Started;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use baton_ipc::descriptor;
use baton_ipc::worker::Filters;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::MAX_IO_THREADS;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::WorkerConfig;
use baton_ipc::worker::WorkerStatus;
use baton_policy::Compiled;
use baton_policy::Policy;
use baton_policy::Role;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::time::Timespec;
use serde_json::json;

use crate::cgroup::Cgroup;
use crate::clients::Awaiting;
use crate::clients::Clients;
use crate::console::Console;
use crate::deadlines::Deadlines;
use crate::front::Front;
use crate::ids::VmIds;
use crate::launch::Begun;
use crate::launch::Program;
use crate::nascent::Advance;
use crate::nascent::Nascent;
use crate::process::ProcessId;
use crate::proof::Prover;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::resources;
use crate::resources::Resources;
use crate::run_dir::BrokerProcess;
use crate::run_dir::StateFile;
use crate::run_dir::Successor;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;
use crate::upgrade::Upgrade;
use crate::vm_file::VmFile;
use crate::worker::Phase;
use crate::worker::Worker;

/// How many messages of one worker are taken before everybody else is looked after again.
pub(crate) const MESSAGES: u32 = 32;

/// What `baton run` has asked for.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) vm_file: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) worker: Option<PathBuf>,
    pub(crate) detach: bool,
    pub(crate) log: bool,
    pub(crate) slowness: u32,
}

/// What a worker's privileges come from: a policy as it was read for that worker.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) policy: Policy,
    pub(crate) compiled: Compiled,
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
    pub(crate) ids: VmIds,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) prover: Prover,
    pub(crate) deadlines: Deadlines,
    /// Goes before the clients do: who sees the hang-up finds the name free.
    directory: VmDirectory,
    pub(crate) clients: Clients,
    pub(crate) front: Front,
    pub(crate) last_upgrade: Option<UpgradeOutcome>,
    console: Console,
    signals: Signals,
    first: Option<Nascent>,
    starter: Option<Channel<StartReport, ()>>,
    began: Instant,
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
    end: Option<Exit>,
}

impl Broker {
    /// Opens everything that the VM file names, and launches the first worker.
    pub(crate) fn start(options: Options, began: Instant) -> Result<Self> {
        let vm = VmFile::load(&options.vm_file)?;
        if options.detach && matches!(vm.console, crate::vm_file::Console::Stdio) {
            return Err(refusal(
                Exit::Usage,
                "a detached VM cannot have its console on standard input and output",
                "choose another console.kind, or run it without --detach",
            ));
        }
        let signals = Signals::new()?;
        nix::sys::prctl::set_child_subreaper(true).doing("cannot adopt workers")?;
        let directory = VmDirectory::claim(&options.run_dir, &vm.name)?;
        let mut log = open_log(&directory, &vm, options.log)?;
        let rules = crate::rules::load(&vm)?;
        let ids = VmIds::claim(&rules.policy)?;
        let cgroup = make_cgroup(&vm, &rules.policy)?;
        log.write("vm-start", &json!({
            "vm_file": options.vm_file, "policy": rules.policy.name, "policy_digest": rules.policy.digest.to_string(),
            "uid": ids.ids.uid, "cgroup": cgroup.as_ref().map(Cgroup::path), "found": directory.notes,
        }))
        .recorded()?;
        // First, because it takes its time by itself: a refusal of what follows ends it again.
        let begun = Begun::start(Program::Worker, ids.ids, cgroup.as_ref())?;
        let Resources {
            mut registry,
            virtio,
        } = resources::open(&vm, &rules.policy, &mut log)?;
        resources::check_console(&vm.console, &rules.policy, &mut log)?;
        let (console, end) = Console::open(&vm.console, directory.path())?;
        let key = DescriptorKey::new(descriptor::CONSOLE, 0).doing("cannot name a descriptor")?;
        registry
            .save(key, DescriptorKind::Stream, end)
            .doing("cannot hold the console")?;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .doing("cannot choose an identity for the VM")?;
        let deadlines = Deadlines::new(vm.memory.size.0, options.slowness);
        let clients = Clients::listen(&directory.socket(), &rules.policy)?;
        if rules.policy.access.is_open() {
            directory.let_through()?;
        }
        let mut broker = Self {
            deadlines,
            id: VmId(id),
            state: VmState::Starting,
            worker: None,
            rules: Rc::new(rules),
            upgrade: None,
            retired: Vec::new(),
            registry,
            virtio,
            ids,
            cgroup,
            prover: Prover::new(deadlines.reading()),
            clients,
            front: Front::listen(&directory.qmp_socket())?,
            last_upgrade: None,
            console,
            signals,
            directory,
            first: None,
            starter: None,
            began,
            status: WorkerStatus::default(),
            power_off_by: None,
            start_by: None,
            pausing: false,
            paused: false,
            resets_asked: 0,
            end: None,
            options,
            vm,
            log,
        };
        let prepared =
            crate::rules::worker_binary(&broker.vm, &broker.options, &broker.rules.policy, None)
                .and_then(|binary| {
                    Ok((
                        binary,
                        broker.config(1, StartMode::None, &broker.rules.compiled)?,
                    ))
                });
        let (binary, config) = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                // Before the broker goes, and its cgroup with it: one that somebody is in stays.
                drop(begun);
                return Err(refusal);
            }
        };
        broker.first = Some(broker.launch(begun, binary, config, &broker.rules)?);
        Ok(broker)
    }

    /// Serves until the VM has ended. `starter` is told how the start went, and in the foreground its end is the VM's.
    pub(crate) fn run(mut self, starter: Option<Channel<StartReport, ()>>) -> Exit {
        self.starter = starter;
        loop {
            self.wait();
            match self.turn() {
                Ok(()) => {}
                Err(refusal) if self.state == VmState::Starting => {
                    self.fail_start(&refusal);
                    self.end.get_or_insert(refusal.exit);
                }
                // Whatever it is, the guest does not pay for it.
                Err(refusal) => complain(&refusal),
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
        self.console
            .sources()
            .for_each(|(fd, flags)| watch(fd, flags));
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
        if let (Some(starter), false) = (&self.starter, self.options.detach) {
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
            self.front.deadline(),
            self.clients
                .any_waiting()
                .then(|| Instant::now() + Duration::from_millis(100)),
            self.clients.resting(),
            self.prover
                .holds()
                .then(|| Instant::now() + Duration::from_millis(1)),
            (!self.retired.is_empty()).then(|| Instant::now() + Duration::from_millis(100)),
        ];
        let next = deadlines.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    fn turn(&mut self) -> Result<()> {
        let signalled = self.signals.take();
        if signalled.child {
            self.reap_strangers();
        }
        if signalled.end || self.starter_left() {
            self.end = Some(Exit::Done);
            return Ok(());
        }
        self.console.pump();
        self.retired.retain(|worker| worker.reap().is_none());
        self.first_worker()?;
        self.running_worker()?;
        self.advance_upgrade()?;
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
        for id in self.clients.overdue(self.deadlines.order()) {
            let reply = Reply::Refused(unfit(
                "the worker does not answer",
                "`baton stop --force` ends it",
            ));
            self.clients.reply(id, &reply);
        }
        self.prover.let_go();
        if self.start_by.is_some_and(|by| Instant::now() > by) {
            return Err(unfit(
                "the first worker took too long to run its guest",
                "the audit log has what it said",
            ));
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
        };
        let known: Vec<i32> = self
            .worker
            .iter()
            .map(worker)
            .chain(self.retired.iter().map(worker))
            .chain(makings().filter_map(Nascent::worker).map(worker))
            .chain(makings().filter_map(Nascent::stage1))
            .chain(self.front.processes())
            .collect();
        for child in crate::process::children()
            .into_iter()
            .filter(|child| !known.contains(child))
        {
            let child = rustix::process::Pid::from_raw(child);
            let _ = rustix::process::waitpid(child, rustix::process::WaitOptions::NOHANG);
        }
    }

    /// In the foreground, the VM ends with whoever started it.
    fn starter_left(&mut self) -> bool {
        if self.options.detach {
            return false;
        }
        self.starter.as_mut().is_some_and(|starter| {
            matches!(starter.receive(), Ok(baton_ipc::Received::HungUp) | Err(_))
        })
    }

    fn first_worker(&mut self) -> Result<()> {
        let Some(mut nascent) = self.first.take() else {
            return Ok(());
        };
        let late = Instant::now() > nascent.deadline;
        let advance = nascent.advance();
        // After the advance: a worker that has failed has said its last by then.
        let text = nascent.read_diagnostics();
        self.log_diagnostics(&text);
        let failed = |fault: &dyn std::fmt::Display| {
            unfit(fault, "the worker's diagnostics are in the audit log")
        };
        match advance.map_err(|fault| match fault {
            crate::nascent::NascentFault::Launch(refusal) => refusal,
            fault => failed(&fault),
        })? {
            Advance::Waiting if late => return Err(failed(&"the first worker took too long")),
            Advance::Waiting => {}
            Advance::Greeted => {
                self.confirm_fresh(&nascent, &Rc::clone(&self.rules))?;
                nascent.configure(None).map_err(|fault| failed(&fault))?;
                self.record_grants(1, StartMode::None)?;
                let bound = self.deadlines.of(Step::Build);
                nascent
                    .hand_over(&self.registry, bound)
                    .map_err(|fault| failed(&fault))?;
            }
            Advance::Listening(times) => {
                self.log
                    .write(
                        "ready",
                        &json!({"generation": 1, "mode": StartMode::None, "times": times}),
                    )
                    .recorded()?;
                let mut worker = nascent.into_worker()?;
                self.confirm_settled(&worker, &Rc::clone(&self.rules))?;
                worker.phase = Phase::Released;
                // Should this process die right after the order, this is how the guest's worker is found.
                self.worker = Some(worker);
                self.publish()?;
                let worker = self.worker.as_ref().ok_or_else(|| failed(&"it is gone"))?;
                let told = worker.order(&Order::Start).map_err(|fault| failed(&fault));
                self.start_by = Some(Instant::now() + self.deadlines.of(Step::Build));
                return told;
            }
        }
        self.first = Some(nascent);
        Ok(())
    }

    fn running_worker(&mut self) -> Result<()> {
        // Bounded: a worker that talks without end does not keep the loop from its deadlines and its operator.
        for _ in 0..MESSAGES {
            let Some(worker) = &mut self.worker else {
                return Ok(());
            };
            let text = worker.read_diagnostics();
            let heard = worker.hear();
            self.log_diagnostics(&text);
            match heard {
                Ok(None) => break,
                Ok(Some(report)) => self.heard(report)?,
                Err(fault) => {
                    let how = self.worker.as_ref().and_then(Worker::reap);
                    let how =
                        how.map_or_else(|| fault.to_string(), |how| format!("{fault}; {how}"));
                    return self.lose(&how);
                }
            }
        }
        let gone = self.worker.as_ref().and_then(Worker::reap);
        gone.map_or(Ok(()), |how| self.lose(&format!("the worker died ({how})")))
    }

    fn heard(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Running => self.started(),
            Report::FirstRun { .. } => {
                let generation = self.generation();
                self.log
                    .note("first-run", &json!({"generation": generation}));
                Ok(())
            }
            Report::Resumed => {
                self.pausing = false;
                let was = self.worker.as_ref().map(|worker| worker.phase);
                if let Some(worker) = &mut self.worker {
                    worker.phase = Phase::Running;
                }
                // After a rollback it is as before; otherwise an operator has resumed it.
                if was == Some(Phase::Running) && self.state == VmState::Paused {
                    self.state = VmState::Running;
                    self.paused = false;
                    self.happened(Happening::Resumed);
                }
                self.clients.answer(Awaiting::Resumed, &Reply::Done);
                self.upgrade_rolled_back()
            }
            Report::Paused => {
                self.pausing = false;
                self.paused = true;
                self.happened(Happening::Stopped);
                self.clients.answer(Awaiting::Paused, &Reply::Done);
                let aborted = self.upgrade_refused("the guest was paused meanwhile");
                self.state = VmState::Paused;
                aborted
            }
            Report::Status(status) => {
                self.status = status;
                let reply = Reply::Status(Box::new(self.vm_status()));
                self.clients.answer(Awaiting::Status, &reply);
                Ok(())
            }
            Report::Guest(event) => self.guest_event(&event),
            Report::Violation {
                thread,
                syscall,
                address,
            } => {
                let generation = self.generation();
                self.log.note(
                    "violation",
                    &json!({"generation": generation, "thread": thread, "syscall": syscall, "address": address}),
                );
                Ok(())
            }
            Report::Agreed => self.upgrade_agreed(),
            Report::Failed { step, reason } => {
                let (step, reason) = (quoted(&step), quoted(&reason));
                self.log
                    .note("worker-failed", &json!({"step": step, "reason": reason}));
                self.pausing = false;
                if let Some(worker) = self
                    .worker
                    .as_ref()
                    .filter(|worker| worker.phase == Phase::RollingBack)
                {
                    // The guest stands still until it succeeds; its next answer is this one's next try.
                    let _ = worker.order(&Order::Rollback);
                }
                if self.state == VmState::Starting {
                    return Err(unfit(
                        format_args!("the worker cannot {step}: {reason}"),
                        "",
                    ));
                }
                self.upgrade_refused(&format!("the old worker cannot {step}: {reason}"))
            }
            Report::Hello { .. }
            | Report::Ready(_)
            | Report::Parked { .. }
            | Report::Saved { .. }
            | Report::Loaded { .. } => Ok(()),
        }
    }

    /// The first worker runs the guest.
    fn started(&mut self) -> Result<()> {
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        worker.phase = Phase::Running;
        let started = Started {
            name: self.vm.name.as_str().to_owned(),
            broker_pid: rustix::process::getpid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            worker_pid: worker.process.pid.unsigned_abs(),
            generation: worker.generation,
            directory: self.directory.path().display().to_string(),
            start_us: crate::phase_clock::micros(self.began.elapsed()),
            notes: self.directory.notes.clone(),
        };
        self.state = VmState::Running;
        self.start_by = None;
        self.log.note(
            "running",
            &json!({"generation": 1, "mode": StartMode::None, "start_us": started.start_us}),
        );
        if self.options.detach && !self.options.log {
            // Until now a failure could be said there. Whoever reads it to its end need not wait for the VM's.
            if let Err(refusal) = crate::leave_standard_error() {
                complain(&refusal);
            }
        }
        if let Some(starter) = &self.starter {
            // Whoever started it may be gone already; the VM runs.
            let _ = starter.send(&StartReport::Started(started));
        }
        Ok(())
    }

    fn fail_start(&mut self, refusal: &Refusal) {
        let _ = self
            .log
            .write_synced("failed", &json!({"reason": refusal.reason}));
        if self.state == VmState::Starting {
            report_failure(self.starter.as_ref(), refusal);
        }
    }

    pub(crate) fn guest_event(&mut self, event: &GuestEvent) -> Result<()> {
        let event_name = quoted(&format!("{event:?}"));
        self.log.note("guest", &json!({"what": event_name}));
        match event {
            GuestEvent::Reset | GuestEvent::TripleFault => {
                let asked = *event == GuestEvent::Reset && self.resets_asked > 0;
                self.resets_asked -= u32::from(asked);
                self.happened(Happening::Reset { guest: !asked });
                Ok(())
            }
            GuestEvent::Shutdown => {
                self.state = VmState::Stopped;
                self.end = Some(Exit::Done);
                Ok(())
            }
            GuestEvent::Stuck(reason) => {
                self.lose(&format!("KVM cannot go on: {}", quoted(reason)))
            }
        }
    }

    /// Nobody runs the guest any more.
    pub(crate) fn lose(&mut self, reason: &str) -> Result<()> {
        if let Some(worker) = self.worker.take() {
            worker.kill();
            self.retired.push(worker);
        }
        let starting = self.state == VmState::Starting;
        self.state = if starting {
            VmState::Starting
        } else {
            VmState::Lost
        };
        if let Err(refusal) = self.log.write_synced("lost", &json!({"reason": reason})) {
            complain(&refusal);
        }
        self.upgrade_lost(reason)?;
        self.happened(Happening::Lost {
            reason: quoted(reason),
        });
        // How it is, is known: lost.
        let status = Reply::Status(Box::new(self.vm_status()));
        self.clients.answer(Awaiting::Status, &status);
        for awaiting in [Awaiting::Paused, Awaiting::Resumed, Awaiting::End] {
            let reply = Reply::Refused(refusal(
                Exit::Lost,
                format_args!("the VM is lost: {reason}"),
                "",
            ));
            self.clients.answer(awaiting, &reply);
        }
        if starting {
            return Err(refusal(
                Exit::Unfit,
                reason,
                "the worker's diagnostics are in the audit log",
            ));
        }
        if !self.options.detach {
            // A detached VM stays to be asked about; this one's caller sees the exit status.
            self.end = Some(Exit::Lost);
        }
        Ok(())
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
        let _ = self.log.write_synced("vm-end", &json!({"exit": exit}));
        let guest = self.state == VmState::Stopped;
        self.happened(Happening::Ended { guest });
        self.clients.answer(Awaiting::End, &Reply::Done);
        // Before the directory goes: nobody may find a name whose ids and cgroup are still in use.
        self.first = None;
        self.upgrade = None;
        self.retired.clear();
        self.front.end();
    }

    pub(crate) fn generation(&self) -> u32 {
        self.worker.as_ref().map_or(0, |worker| worker.generation)
    }

    /// Writes down who runs what, for those who find no broker.
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.publish_with(None)
    }

    /// The same, with the worker that may run the guest from a commit on.
    pub(crate) fn publish_with(&mut self, successor: Option<ProcessId>) -> Result<()> {
        let Some(worker) = &self.worker else {
            return Ok(());
        };
        let me = ProcessId::of_self()
            .ok_or_else(|| unfit("/proc has no record of this process", "mount /proc"))?;
        let runners: Vec<_> = std::iter::once(worker.process).chain(successor).collect();
        self.ids.record(&runners)?;
        self.directory.publish(&StateFile {
            name: self.vm.name.as_str().to_owned(),
            broker: BrokerProcess {
                broker_pid: me.pid,
                broker_start: me.start,
            },
            worker_pid: worker.process.pid,
            worker_start: worker.process.start,
            successor: successor.map(|ProcessId { pid, start }| Successor { pid, start }),
            generation: worker.generation,
            ram_bytes: self.vm.memory.size.0,
            cgroup: self.cgroup.as_ref().map(|cgroup| cgroup.path().to_owned()),
        })
    }

    pub(crate) fn vm_status(&self) -> VmStatus {
        let worker = self.worker.as_ref();
        VmStatus {
            name: self.vm.name.as_str().to_owned(),
            id: self.id.to_string(),
            state: self.state,
            broker_pid: rustix::process::getpid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            worker_pid: worker.map_or(0, |worker| worker.process.pid.unsigned_abs()),
            generation: self.generation(),
            worker_digest: worker
                .map(|worker| worker.digest.to_string())
                .unwrap_or_default(),
            worker_build: worker
                .map(|worker| worker.build.clone())
                .unwrap_or_default(),
            uptime_s: self.began.elapsed().as_secs(),
            ram_bytes: self.vm.memory.size.0,
            cpus: self.vm.cpus.count.0,
            paused: self.paused,
            disks: self.vm.disks(),
            vcpu_threads: worker.map_or_else(Vec::new, |worker| {
                crate::process::vcpu_threads(worker.process.pid, self.vm.cpus.count.0)
            }),
            tsc_khz: self.status.tsc_khz,
            console_dropped: self.status.console_dropped,
            last_upgrade: self.last_upgrade.clone(),
        }
    }

    pub(crate) fn attach_console(&mut self) -> Result<OwnedFd> {
        self.console.attach()
    }

    pub(crate) fn config(
        &self,
        generation: u32,
        mode: StartMode,
        compiled: &Compiled,
    ) -> Result<WorkerConfig> {
        let filter = |role: Role| {
            let program = compiled.roles.get(&role);
            program
                .map(|program| program.as_bytes().to_vec())
                .ok_or_else(|| unfit(format_args!("the policy has no role {role}"), ""))
        };
        Ok(WorkerConfig {
            vm: self.id,
            generation,
            mode,
            cpus: self.vm.cpus.count.0,
            hide: self.vm.cpus.hide.clone(),
            ram: self.vm.ram(),
            pages: self.vm.memory.pages,
            cmdline: self.vm.boot.cmdline.0.clone(),
            initrd: self.vm.boot.initrd.is_some(),
            filters: Filters {
                control: filter(Role::Control)?,
                vcpu: filter(Role::Vcpu)?,
                io: filter(Role::Io)?,
            },
            virtio: self.virtio.clone(),
            io_threads: self.io_threads(),
            drain_ms: u32::try_from(self.deadlines.drain().as_millis()).unwrap_or(u32::MAX),
        })
    }

    /// How many I/O threads a worker has: one a queue, within bounds, and one for devices that come later.
    pub(crate) fn io_threads(&self) -> u8 {
        let queues: u32 = self.virtio.iter().map(|one| one.device.queues()).sum();
        u8::try_from(queues)
            .unwrap_or(MAX_IO_THREADS)
            .clamp(1, MAX_IO_THREADS)
    }

    pub(crate) fn log_diagnostics(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.is_empty()) {
            self.log.note("worker-says", &json!({"line": quoted(line)}));
        }
    }

    pub(crate) fn record_grants(&mut self, generation: u32, mode: StartMode) -> Result<()> {
        for (key, description, _) in self.registry.iter() {
            self.log.write("grant", &json!({
                "generation": generation, "mode": mode, "descriptor": key.name(), "id": key.id(), "uid": self.ids.ids.uid, "what": description,
            }))
            .recorded()?;
        }
        Ok(())
    }
}

/// The VM's audit log, with its copies: standard error where that is asked for, the journal where there is one.
fn open_log(directory: &VmDirectory, vm: &VmFile, repeat: bool) -> Result<AuditLog> {
    let subject = Subject {
        vm: vm.name.as_str().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        pid: std::process::id(),
    };
    let mut log = AuditLog::open(directory.audit_log(), subject, Limits::default()).recorded()?;
    if repeat {
        log.show_spans();
    }
    log.copy_to_journal(Path::new(baton_audit::journal::SOCKET));
    Ok(log)
}

/// One cgroup for two workers during an upgrade. An ordinary user's broker has none to make.
fn make_cgroup(vm: &VmFile, policy: &Policy) -> Result<Option<Cgroup>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let tasks = policy
        .task_limit(u32::from(vm.cpus.count.0))
        .saturating_mul(2);
    let process = rustix::process::getpid().as_raw_nonzero().get();
    Cgroup::create(vm.name.as_str(), process, tasks).map(Some)
}

/// Tells whoever started the broker why there is no VM.
pub(crate) fn report_failure(starter: Option<&Channel<StartReport, ()>>, refusal: &Refusal) {
    let told =
        starter.is_some_and(|starter| starter.send(&StartReport::Failed(refusal.clone())).is_ok());
    if !told {
        eprintln!("baton-broker: {refusal}");
    }
}
