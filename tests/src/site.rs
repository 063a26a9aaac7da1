//! A directory of its own for one test's VMs, with the programs under test, and the proof that nothing is left.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use serde_json::Value;
use tempfile::TempDir;

use crate::Answer;
use crate::Binaries;
use crate::processes;
use crate::recording;

/// Where brokers make their VMs' cgroups: version 2's place, and version 1's.
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup/baton", "/sys/fs/cgroup/pids/baton"];

/// Where the same cgroups are besides, in version 1.
const BESIDES: [&str; 2] = ["/sys/fs/cgroup/memory/baton", "/sys/fs/cgroup/cpu/baton"];

/// One test's place.
#[derive(Debug)]
pub struct Site {
    directory: TempDir,
    binaries: Binaries,
    /// A name for VMs that no other test has.
    pub name: String,
    environment: Vec<(String, String)>,
    commands: AtomicU32,
}

impl Site {
    /// Makes it. Every deadline of the brokers started here is `slowness` times the ordinary one: a test says what has to
    /// happen, not how fast this machine is today.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    #[must_use]
    pub fn new(binaries: Binaries, slowness: u32) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("baton-e2e-")
            .tempdir()
            .expect("a temporary directory");
        fs::write(directory.path().join("guest.elf"), baton_guest::ELF).unwrap();
        let wrapper = directory.path().join("broker");
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = serve ]; then\n    set -- \"$@\" --slow-host {slowness}{}\nfi\nexec {} \"$@\"\n",
            recording::argument(),
            binaries.broker().display()
        );
        fs::write(&wrapper, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&wrapper, mode).unwrap();
        Self {
            environment: vec![("BATON_BROKER".into(), wrapper.display().to_string())],
            directory,
            binaries,
            name: format!("e2e-{}", std::process::id()),
            commands: AtomicU32::new(0),
        }
    }

    /// Sets a variable for every command that is run here.
    pub fn environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.into(), value.into()));
    }

    /// The programs.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// A path in this place.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// Writes a file.
    ///
    /// # Panics
    ///
    /// When that fails.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Writes a policy that is the built-in one, but allows workers by a directory of digests of its own: that of the
    /// worker beside the broker, and these binaries'.
    ///
    /// # Panics
    ///
    /// When that fails.
    pub fn write_policy(&self, allowed: &[&Path]) -> PathBuf {
        let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policy/default.toml");
        let text = fs::read_to_string(builtin).unwrap();
        let directory = self.path("workers.d");
        fs::create_dir_all(&directory).unwrap();
        for (number, binary) in allowed.iter().enumerate() {
            let line = format!("{}  worker-{number}\n", sha256(binary));
            fs::write(directory.join(format!("worker-{number}")), line).unwrap();
        }
        let builtin = "\"/etc/baton/workers.d\"";
        assert!(
            text.contains(builtin),
            "the built-in policy names another directory"
        );
        let text = text.replace(builtin, &format!("{:?}", directory.display().to_string()));
        self.write("policy.toml", text)
    }

    /// The command, ready to be given arguments.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.binaries.baton());
        command
            .arg("--run-dir")
            .arg(self.run_dir())
            .arg("--json")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// Runs `baton --json` with these arguments.
    ///
    /// # Panics
    ///
    /// When the program cannot be executed.
    pub fn baton<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Answer {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let errors = self.path(&format!("stderr-{number}"));
        // A file, not a pipe: a broker that is started keeps this open.
        let output = self
            .command()
            .args(arguments)
            .stderr(fs::File::create(&errors).unwrap())
            .output()
            .expect("baton can be executed");
        Answer::new(&output, fs::read_to_string(&errors).unwrap())
    }

    /// Runs `baton run --detach` on a VM file of this place.
    pub fn run(&self, file: &str) -> Answer {
        self.baton([
            OsStr::new("run"),
            OsStr::new("--detach"),
            self.path(file).as_os_str(),
        ])
    }

    /// A VM's published state.
    #[must_use]
    pub fn state(&self, vm: &str) -> Option<Value> {
        let text = fs::read(self.run_dir().join(vm).join("state.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// The cgroups of this place's VMs.
    #[must_use]
    pub fn cgroups(&self) -> Vec<PathBuf> {
        self.cgroups_below(&CGROUPS)
    }

    fn cgroups_below(&self, parents: &[&str]) -> Vec<PathBuf> {
        let below = parents
            .iter()
            .filter_map(|parent| fs::read_dir(parent).ok());
        below
            .flat_map(|entries| entries.flatten())
            .filter(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                // NAME-PID of the broker.
                name.strip_prefix(self.name.as_str())
                    .is_some_and(|rest| rest.starts_with('-'))
            })
            .map(|entry| entry.path())
            .collect()
    }

    /// The workers of this place's VMs that are not dead, whoever still knows them.
    #[must_use]
    pub fn workers(&self) -> Vec<i32> {
        let cgroups = self.cgroups();
        cgroups
            .iter()
            .flat_map(|cgroup| processes::in_cgroup(cgroup))
            .collect()
    }

    /// The brokers of this place's VMs that are not dead.
    #[must_use]
    pub fn brokers(&self) -> Vec<i32> {
        let run_dir = self.run_dir();
        let run_dir = run_dir.as_os_str().as_encoded_bytes();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid: &i32| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                line.split(|byte| *byte == 0).any(|word| word == run_dir)
            })
            .filter(|pid| processes::is_alive(*pid))
            .collect()
    }

    /// What is left here of VMs, in words.
    fn remains(&self) -> Vec<String> {
        let run_dir = self.run_dir();
        let files = fs::read_dir(run_dir).into_iter().flatten().flatten();
        let files = files
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != ".audit")
            .map(|name| format!("directory {name}"));
        let besides = self.cgroups_below(&BESIDES);
        let cgroups = self.cgroups().into_iter().chain(besides);
        files
            .chain(cgroups.map(|path| format!("cgroup {}", path.display())))
            .chain(self.workers().iter().map(|pid| format!("worker {pid}")))
            .chain(self.brokers().iter().map(|pid| format!("broker {pid}")))
            .collect()
    }

    /// No VM of this place has left anything but its audit log.
    ///
    /// # Panics
    ///
    /// When something stays.
    pub fn assert_nothing_left(&self) {
        let mut remains = Vec::new();
        for _ in 0..2000 {
            remains = self.remains();
            if remains.is_empty() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("left behind: {remains:?}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Only a failing test has anything left here.
        let mut cgroups = self.cgroups();
        cgroups.extend(self.cgroups_below(&BESIDES));
        for pid in self.brokers().into_iter().chain(self.workers()) {
            processes::kill_process(pid);
        }
        for _ in 0..400 {
            if cgroups
                .iter()
                .all(|path| fs::remove_dir(path).is_ok() || !path.exists())
            {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// SHA-256 of a file, in hex.
pub(crate) fn sha256(path: &Path) -> String {
    use sha2::Digest;
    format!("{:x}", sha2::Sha256::digest(fs::read(path).unwrap()))
}
