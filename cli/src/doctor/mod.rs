//! Whether this host can run VMs, and what to do about what it lacks. It only looks, and changes nothing.

mod confinement;
mod elf;
mod kvm;
mod memory;
mod programs;
mod vfio;

use std::path::Path;
use std::path::PathBuf;

use serde::Serialize;

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Level {
    /// As needed.
    Ok,
    /// VMs run, but something is weaker, slower or cannot be used.
    Warn,
    /// No VM runs without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// A stable name, for scripts.
    pub(crate) id: &'static str,
    /// How it is.
    pub(crate) level: Level,
    /// What was found.
    pub(crate) found: String,
    /// What to do about it; empty when it is as needed.
    pub(crate) remedy: String,
}

impl Check {
    fn ok(id: &'static str, found: impl Into<String>) -> Self {
        Self {
            id,
            level: Level::Ok,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn warn(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            id,
            level: Level::Warn,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn missing(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            level: Level::Missing,
            ..Self::warn(id, found, remedy)
        }
    }
}

/// The host's file system, from a directory that tests make up.
#[derive(Debug)]
pub(crate) struct Host {
    directory: PathBuf,
    privileged: bool,
}

impl Host {
    /// This one.
    pub(crate) fn this() -> Self {
        Self {
            directory: PathBuf::from("/"),
            privileged: rustix::process::geteuid().is_root(),
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.join(path.trim_start_matches('/'))
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A small file's text without the white space around it.
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }
}

/// Looks at everything. `worker` is the worker that would run, when it is not the one beside the broker.
pub(crate) fn examine(host: &Host, worker: Option<&Path>) -> Vec<Check> {
    let mut checks = kvm::examine(host);
    checks.extend(confinement::examine(host));
    checks.extend(memory::examine(host));
    checks.extend(vfio::examine(host));
    checks.extend(programs::examine(worker));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host of these files.
    pub(super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let host = Host {
            directory: directory.path().to_owned(),
            privileged: true,
        };
        (directory, host)
    }

    pub(super) fn level(checks: &[Check], id: &str) -> Level {
        let mut found = checks.iter().filter(|check| check.id == id);
        let check = found.next().unwrap_or_else(|| panic!("no check {id}"));
        assert!(found.next().is_none(), "{id} twice");
        check.level
    }

    #[test]
    fn whatever_is_not_as_needed_has_a_remedy() {
        let (_directory, empty) = host(&[]);
        for host in [Host::this(), empty] {
            for check in examine(&host, None) {
                assert_eq!(
                    check.remedy.is_empty(),
                    check.level == Level::Ok,
                    "{check:?}"
                );
            }
        }
    }
}
