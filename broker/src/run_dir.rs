//! The run directory: one directory a VM, which says to everybody else that the VM exists.
//!
//! `DIR/NAME/` holds `lock` (flock(2), held by the broker for the VM's life), `state.json`, `control.sock` and `qmp.sock`;
//! `DIR/.audit/NAME.jsonl` outlives the VM. A broker that waits for the guest of another has `DIR/NAME.incoming/`, and its
//! log beside, until the two directories exchange their names.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::control::CPR_SOCKET;
use baton_ipc::control::Exit;
use baton_ipc::control::MAIN_SOCKET;
use baton_ipc::control::QMP_SOCKET;
use baton_ipc::control::Refusal;
use baton_ipc::control::SOCKET;
use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FlockOperation;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::RenameFlags;
use serde::Deserialize;
use serde::Serialize;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::vm_file::Name;
use crate::worker::process::ProcessId;

/// What `state.json` tells those who find no broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateFile {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) broker: BrokerProcess,
    pub(crate) worker_pid: i32,
    pub(crate) worker_start: u64,
    /// During an upgrade, from before the pause: whoever may run the guest if the broker dies after the commit.
    #[serde(default)]
    pub(crate) successor: Option<Successor>,
    pub(crate) generation: u32,
    pub(crate) ram_bytes: u64,
    pub(crate) cgroup: Option<PathBuf>,
}

/// A worker that may have been told to commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Successor {
    pub(crate) pid: i32,
    pub(crate) start: u64,
}

/// The broker's part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BrokerProcess {
    pub(crate) broker_pid: i32,
    pub(crate) broker_start: u64,
}

impl StateFile {
    /// Who runs the guest without a broker, and as which generation.
    fn orphan(&self) -> Option<(i32, u32)> {
        let worker = ProcessId {
            pid: self.worker_pid,
            start: self.worker_start,
        };
        let successor = self.successor.map(|Successor { pid, start }| {
            (ProcessId { pid, start }, self.generation.saturating_add(1))
        });
        std::iter::once((worker, self.generation))
            .chain(successor)
            .find(|(process, _)| process.is_alive())
            .map(|(process, generation)| (process.pid, generation))
    }
}

/// A VM's directory, owned by this broker until it is dropped, which removes it.
#[derive(Debug)]
pub(crate) struct VmDirectory {
    path: PathBuf,
    audit: PathBuf,
    run_dir: PathBuf,
    name: String,
    /// The directory itself, wherever its name has gone.
    handle: OwnedFd,
    /// What was found of an earlier broker.
    pub(crate) notes: Vec<String>,
    _lock: File,
}

impl VmDirectory {
    /// Takes the name.
    ///
    /// Refuses when the directory or the run directory is somebody else's or open to others, when another broker has the
    /// name, and when an orphaned worker still runs under it.
    pub(crate) fn claim(run_dir: &Path, name: &Name) -> Result<Self> {
        let running = refusal(
            Exit::Unfit,
            format_args!("a VM named {} is running already", name.as_str()),
            format_args!(
                "`baton status {0}` shows it; `baton stop {0}` ends it",
                name.as_str()
            ),
        );
        Self::claim_as(run_dir, name, name.as_str(), running)
    }

    /// Takes a place beside the name, to wait there for its guest.
    ///
    /// Refuses as [`VmDirectory::claim`] does.
    pub(crate) fn claim_beside(run_dir: &Path, name: &Name) -> Result<Self> {
        let place = incoming(name.as_str());
        let waiting = refusal(
            Exit::Unfit,
            format_args!("a broker waits for {} already", name.as_str()),
            format_args!("`baton stop --force {place}` ends it"),
        );
        Self::claim_as(run_dir, name, &place, waiting)
    }

    fn claim_as(run_dir: &Path, name: &Name, place: &str, taken: Refusal) -> Result<Self> {
        private_directory(run_dir)?;
        let audit = run_dir.join(".audit");
        private_directory(&audit)?;
        let path = run_dir.join(place);
        private_directory(&path)?;
        let handle = open_directory(&path)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .doing(format_args!("cannot lock {}", path.display()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| taken)?;
        // The name's last holder may have removed the file between the open and the lock.
        let same = fs::metadata(path.join("lock")).is_ok_and(|there| {
            lock.metadata()
                .is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()))
        });
        if !same {
            return Err(crate::refusal::busy(format_args!(
                "a VM named {} is just ending",
                name.as_str()
            )));
        }
        let mut directory = Self {
            audit: audit.join(format!("{place}.jsonl")),
            path,
            run_dir: run_dir.to_owned(),
            name: name.as_str().to_owned(),
            handle,
            notes: Vec::new(),
            _lock: lock,
        };
        match directory.clear_remains(name) {
            Ok(()) => Ok(directory),
            Err(refusal) => {
                // The orphan's directory stays: it is how people find it.
                directory.path = PathBuf::new();
                Err(refusal)
            }
        }
    }

    /// Device and inode, by which another broker finds it.
    pub(crate) fn identity(&self) -> (u64, u64) {
        rustix::fs::fstat(&self.handle).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino))
    }

    /// Where a broker waits for this VM.
    fn beside(&self) -> PathBuf {
        self.run_dir.join(incoming(&self.name))
    }

    /// Whether that is this directory, or the one in which a broker waits for this VM.
    pub(crate) fn is_this_or_beside(&self, path: &Path) -> bool {
        path == self.path || path == self.beside()
    }

    /// Whether the directory of this identity waits beside this one.
    pub(crate) fn is_beside(&self, identity: (u64, u64)) -> bool {
        identity_of(&self.beside()) == Some(identity)
    }

    /// Lets the directory that waits beside this one have the name, in one step: whoever connects finds one or the other. What
    /// is left of this one is removed.
    pub(crate) fn give_way(&mut self) -> Result<()> {
        let beside = self.beside();
        exchange(&self.path, &beside)?;
        self.path = beside;
        self.remove();
        Ok(())
    }

    /// The cgroup of the worker that the broker has whose name this one waits for, as that broker has published it.
    pub(crate) fn cgroup_of_named(&self) -> Vec<PathBuf> {
        let state = self.run_dir.join(&self.name).join("state.json");
        let text = fs::read_to_string(state).unwrap_or_default();
        let state: Option<StateFile> = serde_json::from_str(&text).ok();
        let cgroup = state.and_then(|state| state.cgroup);
        cgroup.map_or_else(Vec::new, |cgroup| {
            crate::worker::cgroup::everywhere(&cgroup)
        })
    }

    /// Has the name from now on, and goes on with its audit log: taken, unless it was given already.
    pub(crate) fn take_name(&mut self) -> Result<()> {
        let named = self.run_dir.join(&self.name);
        if identity_of(&named) != Some(self.identity()) {
            exchange(&self.path, &named)?;
            // Whoever had the name is dead: its lock is gone, and its guest runs here.
            if let Ok(handle) = open_directory(&self.path) {
                remove_files(&handle);
                let _ = fs::remove_dir(&self.path);
            }
        }
        self.path = named;
        self.audit = self
            .run_dir
            .join(".audit")
            .join(format!("{}.jsonl", self.name));
        Ok(())
    }

    /// Removes it, if what is there is still this one.
    fn remove(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        remove_files(&self.handle);
        if identity_of(&self.path) == Some(self.identity()) {
            let _ = fs::remove_dir(&self.path);
        }
        self.path = PathBuf::new();
    }

    fn clear_remains(&mut self, name: &Name) -> Result<()> {
        let state = self.path.join("state.json");
        // A broker that died as it started has left a socket, and no state yet.
        let text = match fs::read_to_string(&state) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            // What cannot be read may name a worker that runs.
            Err(error) => return Err(error).doing(format_args!("cannot read {}", state.display())),
        };
        if let Some(text) = text {
            let found: StateFile = serde_json::from_str(&text).map_err(|e| {
                unfit(
                    format_args!("{} does not say who ran this VM: {e}", state.display()),
                    "make sure that no baton-worker of it runs, and remove that directory",
                )
            })?;
            if let Some((worker, generation)) = found.orphan() {
                return Err(unfit(
                    format_args!(
                        "{} runs orphaned: its broker (process {}) is dead, its worker (process {}, generation {}) runs on",
                        name.as_str(),
                        found.broker.broker_pid,
                        worker,
                        generation,
                    ),
                    format_args!("`baton stop --force {}` ends it", name.as_str()),
                ));
            }
            if let Some(cgroup) = &found.cgroup {
                crate::worker::cgroup::remove_when_empty(crate::worker::cgroup::everywhere(cgroup));
            }
            self.notes.push(format!(
                "cleared what a dead broker (process {}) had left of {}, whose worker is dead too",
                found.broker.broker_pid,
                name.as_str()
            ));
        }
        for stale in [
            "state.json",
            "state.new",
            SOCKET,
            QMP_SOCKET,
            CPR_SOCKET,
            MAIN_SOCKET,
            "console.pty",
            "virtio-console.pty",
        ] {
            let _ = fs::remove_file(self.path.join(stale));
        }
        Ok(())
    }

    /// Lets others through to the control socket, and to nothing else: they can pass, not list, and every file here is the
    /// broker's alone.
    pub(crate) fn let_through(&self) -> Result<()> {
        let run_dir = self.path.parent().unwrap_or(Path::new("/"));
        for directory in [run_dir, &self.path] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o711)).doing(
                format_args!("cannot let others through {}", directory.display()),
            )?;
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// This directory, and the one that has the VM's name now: what a dead broker leaves in there is removed by who takes it.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let mut places = vec![self.path.clone(), self.run_dir.join(&self.name)];
        places.dedup();
        places
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.path.join(QMP_SOCKET)
    }

    pub(crate) fn audit_log(&self) -> &Path {
        &self.audit
    }

    /// Replaces `state.json` whole.
    pub(crate) fn publish(&self, state: &StateFile) -> Result<()> {
        let text = serde_json::to_vec_pretty(state).doing("cannot write state.json")?;
        let new = self.path.join("state.new");
        let mut options = OpenOptions::new();
        options.create(true).truncate(true).write(true).mode(0o600);
        options
            .open(&new)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&new, self.path.join("state.json")))
            .doing(format_args!("cannot write {}", new.display()))
    }
}

impl Drop for VmDirectory {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The place beside a name.
fn incoming(name: &str) -> String {
    format!("{name}.incoming")
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .doing(format_args!("cannot open {}", path.display()))
}

fn identity_of(path: &Path) -> Option<(u64, u64)> {
    let there = fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}

/// Exchanges two names (RENAME_EXCHANGE, rename(2)).
fn exchange(one: &Path, other: &Path) -> Result<()> {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).doing(format_args!(
        "cannot exchange {} and {}",
        one.display(),
        other.display()
    ))
}

/// Removes what a broker has made in its directory.
fn remove_files(directory: &OwnedFd) {
    for file in [
        "state.json",
        "state.new",
        SOCKET,
        QMP_SOCKET,
        CPR_SOCKET,
        MAIN_SOCKET,
        "console.pty",
        "virtio-console.pty",
        "broker.log",
        "lock",
    ] {
        let _ = rustix::fs::unlinkat(directory, file, AtFlags::empty());
    }
}

/// Makes a directory that only this user can enter, or checks that it is one.
pub(crate) fn private_directory(path: &Path) -> Result<()> {
    let shown = path.display();
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) => {
            return Err(unfit(
                format_args!("cannot make the directory {shown}: {e}"),
                "name another with --run-dir",
            ));
        }
    }
    let metadata = fs::symlink_metadata(path).doing(format_args!("cannot examine {shown}"))?;
    let me = rustix::process::geteuid().as_raw();
    if !metadata.is_dir() || metadata.uid() != me || metadata.mode() & 0o022 != 0 {
        return Err(unfit(
            format_args!(
                "{shown} is not safe to use: it belongs to user {} with mode {:o}",
                metadata.uid(),
                metadata.mode() & 0o7777
            ),
            format_args!(
                "it has to be a directory of user {me} that nobody else can write; name another with --run-dir"
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        Name::try_from("web1".to_owned()).unwrap()
    }

    #[test]
    fn a_name_is_taken_once_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let first = VmDirectory::claim(&run_dir, &name()).unwrap();
        let second = VmDirectory::claim(&run_dir, &name()).unwrap_err();
        assert!(second.reason.contains("running already"), "{second}");
        assert!(first.path().is_dir());
        drop(first);
        assert!(!run_dir.join("web1").exists());
    }

    #[test]
    fn a_name_changes_hands_whole_and_nobody_removes_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        for given in [true, false] {
            let mut old = VmDirectory::claim(&run_dir, &name()).unwrap();
            let mut new = VmDirectory::claim_beside(&run_dir, &name()).unwrap();
            VmDirectory::claim_beside(&run_dir, &name()).unwrap_err();
            fs::write(old.socket(), b"old").unwrap();
            fs::write(new.socket(), b"new").unwrap();
            assert!(old.is_beside(new.identity()) && !old.is_beside(old.identity()));
            if given {
                old.give_way().unwrap();
            }
            new.take_name().unwrap();
            drop(old);
            assert_eq!(fs::read(run_dir.join("web1").join(SOCKET)).unwrap(), b"new");
            assert!(new.audit_log().ends_with("web1.jsonl"));
            assert!(!run_dir.join("web1.incoming").exists());
            drop(new);
            assert!(!run_dir.join("web1").exists());
        }
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = VmDirectory::claim(dir.path(), &name()).unwrap_err();
        assert!(error.reason.contains("not safe"), "{error}");
    }

    #[test]
    fn a_stale_directory_is_cleared_and_an_orphan_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let me = ProcessId::of_self().unwrap();
        let mut state = StateFile {
            name: "web1".into(),
            broker: BrokerProcess {
                broker_pid: 1,
                broker_start: 1,
            },
            worker_pid: me.pid,
            worker_start: me.start + 1,
            successor: None,
            generation: 3,
            ram_bytes: 0,
            cgroup: None,
        };
        let leave_behind = |state: &StateFile| {
            private_directory(&run_dir.join("web1")).unwrap();
            fs::write(
                run_dir.join("web1/state.json"),
                serde_json::to_vec(state).unwrap(),
            )
            .unwrap();
            fs::write(run_dir.join("web1").join(SOCKET), b"").unwrap();
        };
        leave_behind(&state);
        let claimed = VmDirectory::claim(&run_dir, &name()).unwrap();
        assert_eq!(
            claimed.notes.len(),
            1,
            "another process has that number now"
        );
        assert!(!claimed.socket().exists());
        drop(claimed);

        state.worker_start = me.start;
        leave_behind(&state);
        let error = VmDirectory::claim(&run_dir, &name()).unwrap_err();
        assert!(error.reason.contains("orphaned"), "{error}");
        assert!(run_dir.join("web1/state.json").exists());

        state.worker_start += 1;
        state.successor = Some(Successor {
            pid: me.pid,
            start: me.start,
        });
        leave_behind(&state);
        let error = VmDirectory::claim(&run_dir, &name()).unwrap_err();
        assert!(error.reason.contains("generation 4"), "{error}");
    }
}
