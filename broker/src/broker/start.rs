//! A start: everything that the VM file names is opened, and the first worker is brought to run its guest.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use baton_audit::AuditLog;
use baton_audit::Limits;
use baton_audit::shape::Subject;
use baton_ipc::Channel;
use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::StartReport;
use baton_ipc::control::Started;
use baton_ipc::control::Step;
use baton_ipc::control::VmState;
use baton_ipc::descriptor;
use baton_ipc::worker::Filters;
use baton_ipc::worker::MAX_IO_THREADS;
use baton_ipc::worker::WorkerConfig;
use baton_ipc::worker::WorkerStatus;
use baton_policy::Compiled;
use baton_policy::Policy;
use baton_policy::Role;
use rustix::fs::OFlags;
use serde_json::json;

use super::Broker;
use super::Options;
use crate::clients::Clients;
use crate::clients::events::Told;
use crate::clients::front::Front;
use crate::devices::balloon::BalloonNews;
use crate::devices::console::Console;
use crate::devices::console::Port;
use crate::devices::resources;
use crate::devices::resources::Resources;
use crate::devices::vfio;
use crate::notify::Manager;
use crate::own::Own;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;
use crate::transfer::channel_socket::Doors;
use crate::transfer::incoming::Incoming;
use crate::upgrade::deadlines::Deadlines;
use crate::vm_file::VmFile;
use crate::worker::Phase;
use crate::worker::cgroup::Cgroup;
use crate::worker::ids::VmIds;
use crate::worker::launch::Begun;
use crate::worker::launch::Program;
use crate::worker::launcher::Launcher;
use crate::worker::nascent::Advance;
use crate::worker::proof::Prover;

impl Broker {
    /// Opens everything that the VM file names, and launches the first worker.
    pub(crate) fn start(options: Options, launcher: Rc<Launcher>, began: Instant) -> Result<Self> {
        let vm = VmFile::load(&options.vm_file)?;
        if options.detach && matches!(vm.console, crate::vm_file::Console::Stdio) {
            return Err(refusal(
                Exit::Usage,
                "a detached VM cannot have its console on standard input and output",
                "choose another console.kind, or run it without --detach",
            ));
        }
        let other = options
            .successor_of
            .as_ref()
            .filter(|name| *name != vm.name.as_str());
        if let Some(name) = other {
            return Err(unfit(
                format_args!(
                    "{} describes {} by now, not {name}",
                    options.vm_file.display(),
                    vm.name.as_str()
                ),
                "give the VM its name again there",
            ));
        }
        if options.incoming.is_some() || options.restore.is_some() {
            vfio::check_stays(&vm)?;
        }
        let signals = Signals::new()?;
        let directory = match options.incoming {
            None => VmDirectory::claim(&options.run_dir, &vm.name)?,
            Some(_) => VmDirectory::claim_beside(&options.run_dir, &vm.name)?,
        };
        let mut log = open_log(&directory, &vm, options.log)?;
        let lessons = options.learn.as_deref().map(open_lessons).transpose()?;
        let rules = crate::rules::load(&vm, options.learn.is_some())?;
        let ids = VmIds::claim(&rules.policy)?;
        let cgroup = make_cgroup(&vm, &rules.policy)?;
        log.write("vm-start", &json!({
            "vm_file": options.vm_file, "policy": rules.policy.name, "policy_digest": rules.policy.digest.to_string(),
            "learns": rules.policy.learn, "uid": ids.ids.uid, "cgroup": cgroup.as_ref().map(Cgroup::path), "found": directory.notes,
        }))
        .recorded()?;
        // Before anybody is heard: from now on it makes no socket elsewhere.
        let granted = rules.policy.grant("main");
        let addresses = granted.iter().flat_map(|grant| grant.addresses.iter());
        let taps = rules.policy.grant(descriptor::NET);
        let taps = taps.map_or(&[][..], |grant| &grant.paths);
        launcher.permit(addresses.copied(), taps)?;
        let mut incoming = options
            .incoming
            .as_ref()
            .map(|channels| {
                let doors = Doors {
                    directory: &directory,
                    policy: &rules.policy,
                    launcher: &launcher,
                };
                Incoming::listen(channels, doors)
            })
            .transpose()?;
        for (port, kind) in Port::of(&vm) {
            resources::check_console(port, kind, &rules.policy, &mut log)?;
            if let Some(incoming) = &mut incoming {
                incoming.open_console(port, kind, &rules.policy)?;
            }
        }
        // First, because it takes its time by itself: a refusal of what follows ends it again.
        let begun = match (&incoming, &options.restore) {
            (None, None) => Some(Begun::start(
                &launcher,
                Program::Worker,
                ids.ids,
                cgroup.as_ref(),
            )?),
            _ => None,
        };
        let mut resources = Resources::default();
        let mut consoles = Vec::new();
        let mut vsock = None;
        if incoming.is_none() {
            resources = resources::open(&vm, &rules.policy, &mut log, options.restore.is_some())?;
            for (port, kind) in Port::of(&vm) {
                let (opened, end) = Console::open(port, kind, directory.path(), &rules.policy)?;
                let key = DescriptorKey::new(descriptor::CONSOLE, port.id())
                    .doing("cannot name a descriptor")?;
                let found = Description::of(DescriptorKind::Stream, end.as_fd())
                    .doing("cannot examine the console")?;
                resources::check_grant(&rules.policy, &key, &found, None)?;
                resources
                    .registry
                    .save(key, DescriptorKind::Stream, end)
                    .doing("cannot hold the console")?;
                consoles.push(opened);
            }
            vsock = resources::listen_vsock(vm.vsock.as_ref(), &rules.policy, &mut log)?;
        }
        let Resources {
            registry,
            virtio,
            vfio,
            claims,
        } = resources;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .doing("cannot choose an identity for the VM")?;
        let deadlines = Deadlines::new(vm.memory.size.0, options.slowness);
        let clients = Clients::listen(&directory.socket(), &rules.policy)?;
        if rules.policy.access.is_open() {
            directory.let_through()?;
        }
        let prover = Prover::new(deadlines.reading(), Rc::clone(&launcher));
        let front = Front::listen(&directory.qmp_socket())?;
        // Everything that the VM file names is open.
        let manager = Manager::connect()?;
        let places = crate::own::places(&vm, &options, &rules.policy, &directory)?;
        let own = Own::settle(&places, launcher.pid())?;
        let mut broker = Self {
            deadlines,
            id: VmId(id),
            state: if incoming.is_some() || options.restore.is_some() {
                VmState::Incoming
            } else {
                VmState::Starting
            },
            worker: None,
            rules: Rc::new(rules),
            upgrade: None,
            retired: Vec::new(),
            registry,
            virtio,
            vfio,
            claims,
            remains: Vec::new(),
            ids,
            cgroup,
            prover,
            own,
            asked_by: None,
            lessons,
            manager,
            launcher,
            clients,
            front,
            last_upgrade: None,
            last_cancelled: false,
            told: Told::default(),
            consoles,
            vsock,
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
            panicked: false,
            nodes: Vec::new(),
            netdevs: Vec::new(),
            devices: Vec::new(),
            resizing: None,
            news: BalloonNews::default(),
            has_log: incoming.is_none(),
            restoring: None,
            boot: boot_id()?,
            incoming,
            linger: None,
            end: None,
            options,
            vm,
            log,
        };
        let Some(begun) = begun else {
            let restore = broker.options.restore.clone();
            if let Some(file) = restore.and_then(|restore| restore.file) {
                broker.begin_restore(&file, None)?;
            }
            return Ok(broker);
        };
        let prepared =
            crate::rules::worker_binary(&broker.vm, &broker.options, &broker.rules.policy, None)
                .and_then(|(binary, declared)| {
                    let config = broker.config(1, StartMode::None, &broker.rules.compiled)?;
                    Ok((binary, declared, config))
                });
        let (binary, declared, config) = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                // Before the broker goes, and its cgroup with it: one that somebody is in stays.
                drop(begun);
                return Err(refusal);
            }
        };
        broker.declare(declared);
        broker.first = Some(broker.launch_begun(begun, binary, config, &broker.rules)?);
        Ok(broker)
    }

    pub(super) fn first_worker(&mut self) -> Result<()> {
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
            crate::worker::nascent::NascentFault::Launch(refusal) => refusal,
            fault => failed(&fault),
        })? {
            Advance::Waiting if late => return Err(failed(&"the first worker took too long")),
            Advance::Waiting => {}
            Advance::Greeted => {
                self.confirm_fresh(&nascent, &Rc::clone(&self.rules))?;
                let (generation, mode, _) = self.beginning();
                let file = self.take_state_file();
                let bound = match &file {
                    None => self.deadlines.of(Step::Build),
                    Some(_) => self.deadlines.file(),
                };
                nascent.configure(file).map_err(|fault| failed(&fault))?;
                self.record_grants(generation, mode)?;
                nascent
                    .hand_over(&self.registry, bound)
                    .map_err(|fault| failed(&fault))?;
            }
            Advance::Listening(times) => {
                let (generation, mode, order) = self.beginning();
                self.log
                    .write(
                        "ready",
                        &json!({"generation": generation, "mode": mode, "times": times}),
                    )
                    .recorded()?;
                let mut worker = nascent.into_worker()?;
                self.confirm_settled(&worker, &Rc::clone(&self.rules))?;
                worker.phase = Phase::Released;
                // Should this process die right after the order, this is how the guest's worker is found.
                self.worker = Some(worker);
                self.publish()?;
                self.let_out()?;
                let worker = self.worker.as_ref().ok_or_else(|| failed(&"it is gone"))?;
                let told = worker.order(&order).map_err(|fault| failed(&fault));
                self.start_by = Some(Instant::now() + self.deadlines.of(Step::Build));
                return told;
            }
        }
        self.first = Some(nascent);
        Ok(())
    }

    /// The first worker runs the guest.
    pub(super) fn started(&mut self) -> Result<()> {
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        worker.phase = Phase::Running;
        let (generation, mode, _) = self.beginning();
        self.state = VmState::Running;
        self.start_by = None;
        self.log.note(
            "running",
            &json!({"generation": generation, "mode": mode, "start_us": crate::upgrade::phase_clock::micros(self.began.elapsed())}),
        );
        self.restored();
        self.say_started();
        Ok(())
    }

    /// Tells whoever started this broker that the guest runs.
    pub(crate) fn say_started(&mut self) {
        let Some(worker) = &self.worker else {
            return;
        };
        let started = Started {
            name: self.vm.name.as_str().to_owned(),
            broker_pid: rustix::process::getpid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            worker_pid: worker.process.pid.unsigned_abs(),
            generation: worker.generation,
            directory: self.directory.path().display().to_string(),
            start_us: crate::upgrade::phase_clock::micros(self.began.elapsed()),
            notes: self.directory.notes.clone(),
        };
        self.release_standard_error();
        if let Some(starter) = &self.starter {
            // Whoever started it may be gone already; the VM runs.
            let _ = starter.send(&StartReport::Started(started));
        }
    }

    /// In the background, lets go of what a failure could be said on until now.
    pub(crate) fn release_standard_error(&self) {
        if self.options.detach && !self.options.log {
            // Whoever reads it to its end need not wait for the VM's.
            if let Err(refusal) = crate::leave_standard_error() {
                complain(&refusal);
            }
        }
    }

    /// The log of the place that this broker has now, whose chain it goes on with.
    pub(crate) fn open_own_log(&self) -> Result<AuditLog> {
        open_log(&self.directory, &self.vm, self.options.log)
    }

    pub(super) fn fail_start(&mut self, refusal: &Refusal) {
        let _ = self
            .log
            .write_synced("failed", &json!({"reason": refusal.reason}));
        if matches!(self.state, VmState::Starting | VmState::Incoming) {
            report_failure(self.starter.as_ref(), refusal);
        }
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
            backing: self.vm.memory.backing(),
            boot: self.boot,
            cmdline: self.vm.boot.cmdline.0.clone(),
            initrd: self.vm.boot.initrd.is_some(),
            filters: Filters {
                control: filter(Role::Control)?,
                vcpu: filter(Role::Vcpu)?,
                io: filter(Role::Io)?,
            },
            virtio: self.virtio.clone(),
            vfio: self.vfio.clone(),
            io_threads: self.io_threads(),
            drain_ms: u32::try_from(self.deadlines.drain().as_millis()).unwrap_or(u32::MAX),
            on_panic: self.vm.on_panic,
            removable: self.vm.removable(),
        })
    }

    /// How many I/O threads a worker has: one a queue of the VM file's devices, within bounds. Devices that come later share them:
    /// a worker has as many as its predecessor, whatever has come and gone.
    pub(crate) fn io_threads(&self) -> u8 {
        let removable = self.vm.removable();
        let fixed = self
            .virtio
            .iter()
            .filter(|one| removable & 1 << one.slot == 0);
        let queues: u32 = fixed.map(|one| one.device.queues()).sum();
        u8::try_from(queues)
            .unwrap_or(MAX_IO_THREADS)
            .clamp(1, MAX_IO_THREADS)
    }
}

/// The host's boot, by its random identity, a UUID in text.
fn boot_id() -> Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).doing(format_args!("cannot read {PATH}"))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16)
        .map(u128::to_be_bytes)
        .doing(format_args!("cannot read {PATH}"))
}

/// The VM's audit log, with its copies: standard error where that is asked for, the journal where there is one.
pub(super) fn open_log(directory: &VmDirectory, vm: &VmFile, repeat: bool) -> Result<AuditLog> {
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

/// The file, which has to be there, that observed calls are appended to.
fn open_lessons(path: &Path) -> Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    OpenOptions::new()
        .append(true)
        .custom_flags(flags)
        .open(path)
        .doing(format_args!("cannot open {}", path.display()))
}

/// One cgroup for two workers during an upgrade. An ordinary user's broker has none to make.
pub(super) fn make_cgroup(vm: &VmFile, policy: &Policy) -> Result<Option<Cgroup>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let limits = vm.cgroup_limits(policy);
    let process = rustix::process::getpid().as_raw_nonzero().get();
    Cgroup::create(vm.name.as_str(), process, limits).map(Some)
}

/// Tells whoever started the broker why there is no VM.
pub(crate) fn report_failure(starter: Option<&Channel<StartReport, ()>>, refusal: &Refusal) {
    let told =
        starter.is_some_and(|starter| starter.send(&StartReport::Failed(refusal.clone())).is_ok());
    if !told {
        eprintln!("baton-broker: {refusal}");
    }
}
