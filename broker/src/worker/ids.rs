//! The host user and group of one VM's workers. No two VMs share one, also across run directories.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::Read;
use std::io::Seek;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use baton_policy::Policy;
use rustix::fs::FlockOperation;
use serde::Deserialize;
use serde::Serialize;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::run_dir::private_directory;
use crate::worker::process::ProcessId;

/// Where root's brokers lock the ids that they use, one file each.
pub(crate) const LOCKS: &str = "/run/baton/.ids";

/// Numeric host ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostIds {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl HostIds {
    /// Whether these are the broker's own ids, as for an ordinary user's broker.
    pub(crate) fn is_own(self) -> bool {
        self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Ids that belong to this VM until this is dropped.
#[derive(Debug)]
pub(crate) struct VmIds {
    pub(crate) ids: HostIds,
    lock: Option<File>,
}

impl VmIds {
    /// Takes ids: from the policy's range, or the broker's own when it is an ordinary user's and policy permits that.
    pub(crate) fn claim(policy: &Policy) -> Result<Self> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if uid.is_root() {
            return Self::claim_in(Path::new(LOCKS), policy.ids.iter());
        }
        if !policy.ids.unprivileged_broker {
            return Err(refused(
                "policy forbids a broker that is not root: its worker would run as the broker's own user",
                "run it as root, or set ids.unprivileged_broker in the policy",
            ));
        }
        Ok(Self {
            ids: HostIds {
                uid: uid.as_raw(),
                gid: gid.as_raw(),
            },
            lock: None,
        })
    }

    fn claim_in(directory: &Path, range: impl Iterator<Item = u32>) -> Result<Self> {
        private_directory(directory)?;
        for id in range {
            let path = directory.join(id.to_string());
            let mut lock = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .doing(format_args!("cannot lock {}", path.display()))?;
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            // The file may have been removed by its last holder between the open and the lock.
            let same = fs::metadata(&path).is_ok_and(|there| is_same_file(&there, &lock));
            if same && !runs_orphaned(&mut lock) {
                return Ok(Self {
                    ids: HostIds { uid: id, gid: id },
                    lock: Some(lock),
                });
            }
        }
        Err(unfit(
            "every host id of the policy's range is in use",
            "widen ids.count in the policy, or end VMs that nobody needs",
        ))
    }

    /// Notes which processes run under the ids, so that they stay taken should one outlive this broker.
    pub(crate) fn record(&mut self, workers: &[ProcessId]) -> Result<()> {
        let Some(lock) = &mut self.lock else {
            return Ok(());
        };
        let text: String = workers
            .iter()
            .map(|worker| format!("{} {}\n", worker.pid, worker.start))
            .collect();
        // The new text before the old one's end goes: a file that was cut short would give an orphan's ids away.
        lock.rewind()
            .and_then(|()| lock.write_all(text.as_bytes()))
            .and_then(|()| lock.set_len(u64::try_from(text.len()).unwrap_or(0)))
            .doing("cannot note the worker in its id's lock")
    }
}

impl Drop for VmIds {
    fn drop(&mut self) {
        if let Some(lock) = &mut self.lock {
            if !runs_orphaned(lock) {
                let _ = fs::remove_file(Path::new(LOCKS).join(self.ids.uid.to_string()));
            }
        }
    }
}

fn is_same_file(there: &fs::Metadata, here: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    here.metadata()
        .is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()))
}

fn runs_orphaned(lock: &mut File) -> bool {
    let mut text = String::new();
    // A worker and its successor, each two numbers of at most 20 digits.
    let read = lock
        .rewind()
        .and_then(|()| lock.take(128).read_to_string(&mut text));
    let holder = |line: &str| {
        let (pid, start) = line.split_once(' ')?;
        Some(ProcessId {
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
        })
    };
    read.is_ok() && text.lines().filter_map(holder).any(ProcessId::is_alive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_vms_get_two_ids_and_an_orphans_is_not_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids");
        let first = VmIds::claim_in(&path, 100..103).unwrap();
        let mut second = VmIds::claim_in(&path, 100..103).unwrap();
        assert_eq!((first.ids.uid, second.ids.uid), (100, 101));
        let gone = ProcessId { pid: 1, start: 1 };
        second
            .record(&[gone, ProcessId::of_self().unwrap()])
            .unwrap();
        drop((first, second));
        let third = VmIds::claim_in(&path, 100..103).unwrap();
        let fourth = VmIds::claim_in(&path, 100..103).unwrap();
        assert_eq!((third.ids.uid, fourth.ids.uid), (100, 102));
        assert!(VmIds::claim_in(&path, 100..103).is_err());
    }
}
