//! A VM, run the way people run it.

use std::ffi::OsStr;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Stdio;

use baton_guest::CommandLine;
use baton_guest::StatusLog;
use serde_json::Value;

use crate::Answer;
use crate::AuditLog;
use crate::Binaries;
use crate::Ram;
use crate::Residue;
use crate::Site;
use crate::Upgrade;
use crate::Witness;
use crate::audit_log::OVERLOADED;
use crate::recording;
use crate::until;

/// What a VM is to be like.
#[derive(Clone, Debug)]
pub struct Builder {
    binaries: Binaries,
    memory: String,
    cpus: usize,
    line: Option<CommandLine>,
    faults: Option<String>,
    variables: Vec<(String, String)>,
    slowness: u32,
    allowed: Vec<PathBuf>,
    disks: Vec<(String, u64, String)>,
    devices: Vec<(String, PathBuf)>,
    nets: Vec<(String, String)>,
    vsock: bool,
    balloon: bool,
    memory_lines: String,
    tables: String,
    policy: Option<String>,
    on_panic: &'static str,
}

impl Builder {
    /// A VM of 64 MiB and one vCPU whose guest counts, prints and walks some of its memory.
    #[must_use]
    pub fn new(binaries: Binaries) -> Self {
        Self {
            binaries,
            memory: "64M".into(),
            cpus: 1,
            line: None,
            faults: None,
            variables: Vec::new(),
            slowness: 10,
            allowed: Vec::new(),
            disks: Vec::new(),
            devices: Vec::new(),
            nets: Vec::new(),
            vsock: false,
            balloon: false,
            memory_lines: String::new(),
            tables: String::new(),
            policy: None,
            on_panic: "pause",
        }
    }

    /// One of the release build.
    #[must_use]
    pub fn release() -> Self {
        Self::new(Binaries::release())
    }

    /// One of the build with fail points, in which these happen (`BATON_FAIL` of the broker).
    #[must_use]
    pub fn faulty(faults: &str) -> Self {
        let mut builder = Self::new(Binaries::with_fail_points());
        builder.faults = Some(faults.to_owned());
        builder
    }

    /// With this variable in the environment of everything that is started for it.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With this much RAM.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn cpus(mut self, count: usize) -> Self {
        self.cpus = count;
        self
    }

    /// With this command line (`cpus=` is added).
    #[must_use]
    pub fn line(mut self, line: CommandLine) -> Self {
        self.line = Some(line);
        self
    }

    /// With deadlines that many times the ordinary ones.
    #[must_use]
    pub fn slowness(mut self, times: u32) -> Self {
        self.slowness = times;
        self
    }

    /// Under a policy of this text.
    #[must_use]
    pub fn policy(mut self, text: &str) -> Self {
        self.policy = Some(text.to_owned());
        self
    }

    /// Under a policy that also allows this worker.
    #[must_use]
    pub fn allow(mut self, worker: &Path) -> Self {
        self.allowed.push(worker.to_owned());
        self
    }

    /// With a blank disk of so many MiB, the file `ID.img`, and these further lines of its table.
    #[must_use]
    pub fn disk(mut self, id: &str, mib: u64, lines: &str) -> Self {
        self.disks.push((id.to_owned(), mib, lines.to_owned()));
        self
    }

    /// With a disk that is there already.
    #[must_use]
    pub fn disk_at(mut self, id: &str, path: &Path) -> Self {
        self.devices.push((id.to_owned(), path.to_owned()));
        self
    }

    /// With a network interface on this tap, and these further lines of its table.
    #[must_use]
    pub fn net(mut self, tap: &str, lines: &str) -> Self {
        self.nets.push((tap.to_owned(), lines.to_owned()));
        self
    }

    /// With a socket device, at the host's end the socket `v`.
    #[must_use]
    pub fn vsock(mut self) -> Self {
        self.vsock = true;
        self
    }

    /// With these further lines of `[memory]`.
    #[must_use]
    pub fn memory_lines(mut self, lines: &str) -> Self {
        lines.clone_into(&mut self.memory_lines);
        self
    }

    /// With these further tables in its VM file.
    #[must_use]
    pub fn tables(mut self, tables: &str) -> Self {
        self.tables.push_str(tables);
        self
    }

    /// With a balloon.
    #[must_use]
    pub fn balloon(mut self) -> Self {
        self.balloon = true;
        self
    }

    /// With this following a panic of its guest's.
    #[must_use]
    pub fn on_panic(mut self, action: &'static str) -> Self {
        self.on_panic = action;
        self
    }

    /// Starts it, and waits until its guest counts.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn start(self) -> Vm {
        self.start_in(|_| {})
    }

    /// Starts it in a place that was prepared before.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn start_in(self, prepare: impl FnOnce(&Site)) -> Vm {
        let vm = self.begin(prepare);
        until("the guest counts", || {
            let report = vm.ram.report().ok()?;
            let counts = |slot: &baton_guest::Slot| slot.running && slot.sequence > 0;
            report.slots.iter().all(counts).then_some(())
        });
        vm
    }

    /// Starts one whose RAM nobody but its worker sees.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn start_unseen(self) -> Vm {
        self.begin(|_| {})
    }

    fn begin(self, prepare: impl FnOnce(&Site)) -> Vm {
        let mut site = Site::new(self.binaries, self.slowness);
        prepare(&site);
        if let Some(faults) = &self.faults {
            site.environment("BATON_FAIL", faults);
        }
        for (name, value) in &self.variables {
            site.environment(name, value);
        }
        let policy = if recording::is_on() {
            let text = self.policy.as_deref().unwrap_or(baton_policy::BUILTIN);
            let text = recording::learning(text);
            site.write("policy.toml", text).display().to_string()
        } else if let Some(text) = &self.policy {
            site.write("policy.toml", text).display().to_string()
        } else if self.allowed.is_empty() {
            "default".to_owned()
        } else {
            let allowed: Vec<_> = self.allowed.iter().map(PathBuf::as_path).collect();
            site.write_policy(&allowed).display().to_string()
        };
        let line = self
            .line
            .unwrap_or_else(|| {
                CommandLine::new()
                    .walk_bytes(4 << 20)
                    .console()
                    .period_ms(20)
            })
            .cpus(self.cpus);
        let mut file = format!(
            "schema = 1\nname = \"{}\"\npolicy = \"{policy}\"\non_panic = \"{}\"\n[cpus]\ncount = {}\n[memory]\nsize = \"{}\"\nballoon = {}\n{}\n\
             [boot]\nkernel = \"guest.elf\"\ncmdline = \"{line}\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n",
            site.name, self.on_panic, self.cpus, self.memory, self.balloon, self.memory_lines
        );
        for (id, mib, lines) in &self.disks {
            let image = std::fs::File::create(site.path(&format!("{id}.img"))).unwrap();
            image.set_len(mib << 20).unwrap();
            file.push_str(&format!(
                "[[disk]]\nid = \"{id}\"\npath = \"{id}.img\"\n{lines}\n"
            ));
        }
        for (id, path) in &self.devices {
            file.push_str(&format!("[[disk]]\nid = \"{id}\"\npath = {path:?}\n"));
        }
        for (index, (tap, lines)) in self.nets.iter().enumerate() {
            file.push_str(&format!(
                "[[net]]\nid = \"net{index}\"\ntap = \"{tap}\"\nmac = \"52:54:00:00:00:0{index}\"\n{lines}\n"
            ));
        }
        if self.vsock {
            file.push_str("[vsock]\ncid = 3\nsocket = \"v\"\n");
        }
        file.push_str(&self.tables);
        site.write("vm.toml", file);
        let started = site.run("vm.toml").expect(0).json();
        let broker = pid(&started, "broker_pid");
        let ram = Ram::of(broker).unwrap_or_else(|| panic!("broker {broker} holds no guest RAM"));
        let cgroups = site.cgroups();
        Vm {
            ram,
            broker,
            cgroup: cgroups.first().expect("a VM has a cgroup").clone(),
            site,
        }
    }
}

fn pid(document: &Value, field: &str) -> i32 {
    let pid = document.get(field).and_then(Value::as_i64);
    pid.and_then(|pid| i32::try_from(pid).ok())
        .unwrap_or_else(|| panic!("no {field} in {document}"))
}

/// A running VM. Dropped at a test's end, it is ended by force, and has to leave nothing.
#[derive(Debug)]
pub struct Vm {
    /// The guest's RAM.
    pub ram: Ram,
    /// The broker's process.
    pub broker: i32,
    /// The workers' cgroup.
    pub cgroup: PathBuf,
    /// Where it lives.
    pub site: Site,
}

impl Vm {
    /// Runs a command about this VM: `baton --json COMMAND NAME ARGUMENTS`.
    pub fn baton<A: AsRef<OsStr>>(
        &self,
        command: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Answer {
        let mut all = vec![
            OsStr::new(command).to_owned(),
            self.site.name.clone().into(),
        ];
        all.extend(arguments.into_iter().map(|word| word.as_ref().to_owned()));
        self.site.baton(all)
    }

    /// The same, without more arguments.
    pub fn ask(&self, command: &str) -> Answer {
        self.baton::<&str>(command, [])
    }

    /// Somebody at the console, by `baton console`.
    ///
    /// # Panics
    ///
    /// If the program cannot be executed.
    #[must_use]
    pub fn at_console(&self, arguments: &[&str]) -> Child {
        let mut command = self.site.command();
        command.args(["console", &self.site.name]).args(arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        command.spawn().expect("baton console")
    }

    /// `baton status`.
    #[must_use]
    pub fn status(&self) -> Value {
        self.ask("status").expect(0).json()
    }

    /// The state that `baton status` says.
    #[must_use]
    pub fn state(&self) -> String {
        let status = self.status();
        let state = status.get("state").and_then(Value::as_str);
        state.unwrap_or_default().to_owned()
    }

    /// The worker that `baton status` names.
    #[must_use]
    pub fn worker(&self) -> i32 {
        pid(&self.status(), "worker_pid")
    }

    /// `baton upgrade`, to the worker beside the broker; again if the machine was too busy for it.
    pub fn upgrade(&self) -> Upgrade {
        loop {
            let upgrade = self.ask("upgrade").upgrade();
            if !upgrade.reason.contains(OVERLOADED) {
                return upgrade;
            }
        }
    }

    /// `baton upgrade --worker`.
    pub fn upgrade_to(&self, worker: &Path) -> Answer {
        self.baton("upgrade", [OsStr::new("--worker"), worker.as_os_str()])
    }

    /// The console's output so far.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.site.path("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The status lines on the console, every one exactly once and in order.
    ///
    /// # Panics
    ///
    /// When they are not.
    #[must_use]
    pub fn status_lines(&self) -> StatusLog {
        let log = StatusLog::parse(&self.console());
        log.unwrap_or_else(|error| panic!("{error}"))
    }

    /// The audit log, its chain verified.
    #[must_use]
    pub fn audit_log(&self) -> AuditLog {
        let name = format!(".audit/{}.jsonl", self.site.name);
        AuditLog::read(&self.site.run_dir().join(name))
    }

    /// What the guest says, read while every process that may run it is stopped.
    ///
    /// # Panics
    ///
    /// When the guest was disturbed.
    #[must_use]
    pub fn witness(&self) -> Witness {
        let report = crate::until("every worker stands still", || {
            let workers = self.site.workers();
            // One that stands still by its broker's will is not to be woken here.
            let ran: Vec<i32> = workers
                .iter()
                .copied()
                .filter(|worker| !crate::is_stopped(*worker))
                .collect();
            for worker in &ran {
                crate::stop_process(*worker);
            }
            let report = self.ram.report();
            // A broker that let one go on meanwhile, or made another, had the guest run while it was read.
            let stood = workers
                .iter()
                .all(|worker| crate::is_stopped(*worker) || !crate::is_alive(*worker));
            let same = self.site.workers().iter().all(|one| workers.contains(one));
            for worker in &ran {
                crate::continue_process(*worker);
            }
            (stood && same).then_some(report)
        });
        Witness::new(report.expect("the guest reports"))
    }

    /// Waits until every vCPU has gone on from an earlier moment, undisturbed.
    pub fn assert_goes_on(&self, earlier: &Witness) -> Witness {
        until("every vCPU goes on", || {
            let now = self.witness();
            now.goes_on_from(earlier).then_some(now)
        })
    }

    /// The guest stands still: nobody runs it.
    ///
    /// # Panics
    ///
    /// When it goes on.
    pub fn assert_stands_still(&self) {
        let before = self.ram.report().expect("the guest reports");
        std::thread::sleep(std::time::Duration::from_millis(100));
        let after = self.ram.report().expect("the guest reports");
        assert_eq!(before, after, "somebody runs the guest");
    }

    /// Waits until the VM's cgroup holds this worker and nobody else.
    pub fn assert_only_runner(&self, worker: i32) {
        until("one worker is left", || {
            (self.site.workers() == [worker]).then_some(())
        });
    }

    /// An upgrade that has to succeed, on the same guest (I8).
    ///
    /// # Panics
    ///
    /// When it does not, or the guest was disturbed.
    pub fn assert_upgrades(&self) -> Upgrade {
        let (before, generation) = (self.witness(), self.generation());
        let upgrade = self.upgrade();
        assert_eq!(upgrade.outcome, "committed", "{upgrade:?}");
        assert_eq!(upgrade.generation, generation + 1);
        assert_eq!(self.worker(), upgrade.worker_pid);
        self.assert_only_runner(upgrade.worker_pid);
        self.assert_goes_on(&before);
        upgrade
    }

    /// The running generation.
    #[must_use]
    pub fn generation(&self) -> u32 {
        let status = self.status();
        let generation = status.get("generation").and_then(Value::as_u64);
        u32::try_from(generation.unwrap_or_default()).unwrap_or_default()
    }

    /// What the VM has on its host.
    #[must_use]
    pub fn residue(&self) -> Residue {
        Residue::of(
            self.broker,
            self.worker(),
            &self.cgroup,
            &self.site.run_dir(),
        )
    }

    /// Ends it by force.
    pub fn end(&self) -> Answer {
        self.baton("stop", ["--force"])
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The place's own end kills what is left.
            return;
        }
        // A test may have ended it already.
        let ended = self.end();
        assert!(
            matches!(ended.code, Some(0 | 3)),
            "it cannot be ended: {ended:#?}"
        );
        self.site.assert_nothing_left();
    }
}
