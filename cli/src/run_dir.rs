//! The directory that holds one directory per VM, and what such a directory says about its VM.
//!
//! A VM's directory holds the broker's control socket and `state.json`, which the broker rewrites with each generation.
//! When nobody listens on the socket, `state.json` tells a VM whose worker runs on without its broker (an orphan) from
//! a directory that was merely left behind.

use std::fs;
use std::io;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use baton_ipc::control::Exit;
use baton_ipc::control::QMP_SOCKET;
use baton_ipc::control::Refusal;
use baton_ipc::control::SOCKET;
use baton_ipc::control::VmState;
use rustix::fs::FlockOperation;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::Value;
use serde_json::json;

use crate::client::Client;
use crate::failure::unfit;
use crate::process::Process;

/// The run dir of root (file-hierarchy(7)).
const ROOT: &str = "/run/baton";

/// What the broker writes for the time when it is dead.
const STATE: &str = "state.json";

/// Held by the broker, flock(2), for the VM's life.
const LOCK: &str = "lock";

/// More than any state file has, in bytes.
const STATE_MAX: u64 = 64 * 1024;

/// How long a killed worker may take to give its memory back.
const TEARDOWN: Duration = Duration::from_secs(30);

/// The directory of all VMs.
#[derive(Debug)]
pub(crate) struct RunDir(PathBuf);

/// The directory of one VM, which need not exist.
#[derive(Debug)]
pub(crate) struct VmDirectory {
    name: String,
    path: PathBuf,
    run_dir: PathBuf,
}

/// What a VM's directory holds.
#[derive(Debug)]
pub(crate) enum Found {
    /// A broker that answers.
    Broker(Client),
    /// A worker whose broker is dead.
    Orphan(Orphan),
    /// Neither: the VM has ended, its directory is still there.
    Stale,
    /// No such directory.
    Absent,
}

/// `state.json`. Written by the broker; fields that a later broker adds are let be.
#[derive(Clone, Debug, Deserialize)]
struct State {
    name: String,
    broker_pid: u32,
    broker_start: u64,
    worker_pid: u32,
    worker_start: u64,
    /// During an upgrade: whoever may run the guest if the broker dies after the commit.
    #[serde(default)]
    successor: Option<Successor>,
    generation: u32,
    ram_bytes: u64,
    cgroup: Option<PathBuf>,
}

/// A worker that may have been told to commit.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Successor {
    pid: u32,
    start: u64,
}

/// A worker that runs its guest without a broker.
#[derive(Debug)]
pub(crate) struct Orphan {
    state: State,
    /// The worker, and during an upgrade its successor: each that is alive. The broker's death decides which runs the guest.
    workers: Vec<Process>,
}

impl RunDir {
    /// The one asked for, else the user's own.
    pub(crate) fn resolve(asked: Option<&Path>) -> Result<Self, Refusal> {
        if let Some(path) = asked {
            return std::path::absolute(path)
                .map(Self)
                .map_err(|error| crate::failure::file("use the run dir", path, &error));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Self(PathBuf::from(ROOT)));
        }
        std::env::var_os("XDG_RUNTIME_DIR")
            .filter(|value| !value.is_empty())
            .map(|base| Self(PathBuf::from(base).join("baton")))
            .ok_or_else(|| {
                unfit(
                    "XDG_RUNTIME_DIR is not set, so there is no default run dir",
                    "log in through a session manager, or pass --run-dir DIR",
                )
            })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The directory of the VM `name`.
    pub(crate) fn vm(&self, name: &str) -> Result<VmDirectory, Refusal> {
        // What is a good name is the broker's to say; here it must only stay inside the run dir.
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(crate::failure::failure(
                Exit::Usage,
                format!("{name:?} is no VM's name"),
                "give the name from the VM's description, as `baton list` prints it",
            ));
        }
        Ok(VmDirectory {
            name: name.to_owned(),
            path: self.0.join(name),
            run_dir: self.0.clone(),
        })
    }

    /// All VMs' directories, by name. A run dir that does not exist has none.
    pub(crate) fn all(&self) -> Result<Vec<VmDirectory>, Refusal> {
        let failed = |error: &io::Error| crate::failure::file("read the run dir", &self.0, error);
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| failed(&error))?;
            let directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            match entry.file_name().into_string() {
                Ok(name) if directory && !name.starts_with('.') => names.push(name),
                _ => {}
            }
        }
        names.sort();
        names.iter().map(|name| self.vm(name)).collect()
    }
}

impl VmDirectory {
    /// The VM's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What is there.
    pub(crate) fn look(&self) -> Result<Found, Refusal> {
        match Client::connect(&self.name, &self.path) {
            Ok(client) => Ok(Found::Broker(client?)),
            Err(Errno::NOENT | Errno::CONNREFUSED) if !self.path.is_dir() => Ok(Found::Absent),
            // Between these two a broker may have ended in good order, or have just begun: neither is an orphan.
            Err(Errno::NOENT | Errno::CONNREFUSED) => {
                Ok(self.orphan().map_or(Found::Stale, Found::Orphan))
            }
            Err(error) => Err(unfit(
                format!(
                    "cannot connect to {}: {error}",
                    self.path.join(SOCKET).display()
                ),
                match error {
                    Errno::ACCESS | Errno::PERM => {
                        "run as root, or as the user who started this VM"
                    }
                    _ => "",
                },
            )),
        }
    }

    /// The VM's broker, or why there is none and what to do.
    pub(crate) fn broker(&self) -> Result<Client, Refusal> {
        match self.look()? {
            Found::Broker(client) => Ok(client),
            Found::Orphan(orphan) => Err(orphan.refusal()),
            Found::Stale => Err(self.stale()),
            Found::Absent => Err(self.absent()),
        }
    }

    /// A connection to its QMP socket.
    pub(crate) fn qmp(&self) -> io::Result<UnixStream> {
        // Through the directory's descriptor: a socket's address has 108 bytes (unix(7)), a path may have more.
        let directory = rustix::fs::open(
            &self.path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        UnixStream::connect(format!(
            "/proc/self/fd/{}/{QMP_SOCKET}",
            directory.as_raw_fd()
        ))
    }

    /// The VM has ended.
    pub(crate) fn stale(&self) -> Refusal {
        unfit(
            format!(
                "{} has ended: neither its broker nor its worker runs",
                self.name
            ),
            format!(
                "start it again with `baton run`, or remove what it left: rm -r {}",
                self.path.display()
            ),
        )
    }

    /// No such VM.
    pub(crate) fn absent(&self) -> Refusal {
        let here = RunDir(self.run_dir.clone())
            .all()
            .unwrap_or_default()
            .iter()
            .map(|vm| vm.name.clone())
            .collect::<Vec<_>>();
        let remedy = if here.is_empty() {
            "start one with `baton run VM.toml`, or pass the --run-dir that it was started with"
                .to_owned()
        } else {
            format!("here: {}", here.join(", "))
        };
        unfit(
            format!("no VM {:?} in {}", self.name, self.run_dir.display()),
            remedy,
        )
    }

    fn orphan(&self) -> Option<Orphan> {
        let mut text = Vec::new();
        let file = fs::File::open(self.path.join(STATE)).ok()?;
        file.take(STATE_MAX).read_to_end(&mut text).ok()?;
        let mut state: State = serde_json::from_slice(&text).ok()?;
        // A broker that lives but does not listen yet, or any more, still holds its worker.
        if Process::find(state.broker_pid, state.broker_start).is_some() {
            return None;
        }
        let worker = Process::find(state.worker_pid, state.worker_start);
        let successor = state
            .successor
            .and_then(|Successor { pid, start }| Some((pid, Process::find(pid, start)?)));
        if let (None, Some((pid, _))) = (&worker, &successor) {
            state.worker_pid = *pid;
            state.generation = state.generation.saturating_add(1);
        }
        let workers: Vec<Process> = worker
            .into_iter()
            .chain(successor.map(|(_, process)| process))
            .collect();
        (!workers.is_empty()).then_some(Orphan { state, workers })
    }

    /// Kills the orphan and removes what its broker kept here; the broker's log stays, and the directory with it.
    pub(crate) fn end(&self, orphan: &Orphan) -> Result<(), Refusal> {
        // The lock that a broker holds for its VM's life, so that no new one begins under this name meanwhile.
        let path = self.path.join(LOCK);
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| crate::failure::file("lock", &path, &error))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            crate::failure::failure(
                Exit::Busy,
                format!("a broker is starting under the name {}", self.name),
                format!("look again: baton status {}", self.name),
            )
        })?;
        orphan.kill()?;
        if let Some(cgroup) = &orphan.state.cgroup {
            // Empty now, unless somebody else uses it. Version 1 has one of the name in other hierarchies too.
            remove_cgroup(cgroup);
            if let Ok(name) = cgroup.strip_prefix("/sys/fs/cgroup/pids") {
                for hierarchy in ["memory", "cpu"] {
                    remove_cgroup(&Path::new("/sys/fs/cgroup").join(hierarchy).join(name));
                }
            }
        }
        self.remove()
            .map_err(|error| crate::failure::file("remove", &self.path, &error))
    }

    fn remove(&self) -> io::Result<()> {
        for name in [
            SOCKET,
            QMP_SOCKET,
            STATE,
            "state.new",
            "console.pty",
            "virtio-console.pty",
            LOCK,
        ] {
            match fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            other => other,
        }
    }
}

/// Removes a cgroup that is empty, or will be in a moment: a killed process leaves it only when its memory is gone.
fn remove_cgroup(path: &Path) {
    for _ in 0..200 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => return,
        }
    }
}

impl Orphan {
    /// What `status` says of it.
    pub(crate) fn document(&self) -> Value {
        let state = &self.state;
        json!({
            "name": state.name,
            "state": VmState::Orphaned,
            "broker_pid": null,
            "worker_pid": state.worker_pid,
            "generation": state.generation,
            "worker_digest": null,
            "uptime_s": null,
            "ram_bytes": state.ram_bytes,
            "last_upgrade": null,
        })
    }

    /// Why nothing but ending it can be asked of it.
    pub(crate) fn refusal(&self) -> Refusal {
        unfit(
            format!(
                "{} is orphaned: its broker (pid {}) is dead, its worker (pid {}) runs on",
                self.state.name, self.state.broker_pid, self.state.worker_pid
            ),
            format!(
                "the guest runs, but cannot be upgraded or asked to shut down from here. Shut it down from inside, or end it: baton stop --force {}",
                self.state.name
            ),
        )
    }

    /// The worker's pid.
    pub(crate) fn worker_pid(&self) -> u32 {
        self.state.worker_pid
    }

    /// Its generation.
    pub(crate) fn generation(&self) -> u32 {
        self.state.generation
    }

    /// Guest RAM, in bytes.
    pub(crate) fn ram_bytes(&self) -> u64 {
        self.state.ram_bytes
    }

    /// Kills all workers that are left. The kernel then ends everything in their pid namespaces.
    fn kill(&self) -> Result<(), Refusal> {
        let killed = self
            .workers
            .iter()
            .map(|worker| worker.kill(TEARDOWN))
            .fold(Ok(()), Result::and);
        killed.map_err(|error| {
            unfit(
                format!("cannot end the worker {}: {error}", self.state.worker_pid),
                match error.kind() {
                    io::ErrorKind::PermissionDenied => "run as root",
                    io::ErrorKind::TimedOut => "it was killed, and still gives its memory back: look again with `baton list`",
                    _ => "",
                },
            )
        })
    }
}
