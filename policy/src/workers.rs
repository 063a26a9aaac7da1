//! Which binaries may run as a worker: the digests in the policy, and those in its drop-in directory.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::digest::{Digest, DigestError};
use crate::policy::Policy;
use crate::trusted::{self, TrustError};

/// The longest drop-in file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// The most drop-in files that are read.
const MAX_FILES: usize = 4096;

/// The digests of all binaries that may run as a worker, with where each came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerAllowList(BTreeMap<Digest, Source>);

/// Where a digest came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The policy itself.
    Policy,
    /// A line of a drop-in file.
    DropIn {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The name that `sha256sum` printed beside it, if any.
        name: Option<String>,
    },
    /// It lies beside the broker.
    BesideBroker,
}

/// The allow-list cannot be read. A list that is read in part would allow less, and an operator who wonders why
/// deserves the reason, so nothing is skipped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllowListError {
    /// A file or the directory is not to be trusted.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A line is no digest.
    #[error("{}:{line}: {source}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What it is instead.
        source: DigestError,
    },
    /// The directory cannot be listed.
    #[error("cannot list {}: {source}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Too many files.
    #[error("{} has more than {MAX_FILES} files", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

impl WorkerAllowList {
    /// The digests that `policy` allows. `beside_broker` is the digest of the binary that lies beside the broker's
    /// own; it counts only when the policy says so. A drop-in directory that does not exist allows nothing.
    ///
    /// # Errors
    ///
    /// When the directory or a file in it (other than hidden ones) does not belong to root or the caller, or others
    /// may write it, or a line that is neither empty nor a `#` comment is no digest.
    pub fn load(policy: &Policy, beside_broker: Option<Digest>) -> Result<Self, AllowListError> {
        let mut list = Self::default();
        if let Some(directory) = &policy.workers.directory {
            list.read_directory(directory)?;
        }
        if policy.workers.beside_broker {
            list.0
                .extend(beside_broker.map(|digest| (digest, Source::BesideBroker)));
        }
        list.0.extend(
            policy
                .workers
                .digests
                .iter()
                .map(|digest| (*digest, Source::Policy)),
        );
        Ok(list)
    }

    /// Whether a binary with this digest may run as a worker.
    #[must_use]
    pub fn permits(&self, digest: &Digest) -> bool {
        self.0.contains_key(digest)
    }

    /// Why it may.
    #[must_use]
    pub fn source(&self, digest: &Digest) -> Option<&Source> {
        self.0.get(digest)
    }

    /// All digests, with where each came from.
    pub fn iter(&self) -> impl Iterator<Item = (&Digest, &Source)> {
        self.0.iter()
    }

    fn read_directory(&mut self, path: &Path) -> Result<(), AllowListError> {
        let list_error = |error: rustix::io::Errno| AllowListError::List {
            path: path.to_owned(),
            source: error.into(),
        };
        let Some(directory) = trusted::directory(path)? else {
            return Ok(());
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&directory).map_err(list_error)? {
            let entry = entry.map_err(list_error)?;
            let name = entry.file_name().to_bytes();
            if !name.starts_with(b".") {
                names.push(path.join(std::ffi::OsStr::from_bytes(name)));
            }
            if names.len() > MAX_FILES {
                return Err(AllowListError::TooMany {
                    path: path.to_owned(),
                });
            }
        }
        names.sort();
        names.iter().try_for_each(|file| self.read_file(file))
    }

    fn read_file(&mut self, path: &Path) -> Result<(), AllowListError> {
        let text = trusted::read(path, MAX_FILE)?;
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (digest, name) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let digest = digest
                .parse::<Digest>()
                .map_err(|source| AllowListError::Line {
                    path: path.to_owned(),
                    line: index + 1,
                    source,
                })?;
            // sha256sum marks a file that it read in binary mode with an asterisk.
            let name = name.trim_start().trim_start_matches('*');
            let name = (!name.is_empty()).then(|| name.to_owned());
            self.0.insert(
                digest,
                Source::DropIn {
                    path: path.to_owned(),
                    line: index + 1,
                    name,
                },
            );
        }
        Ok(())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy => f.write_str("the policy"),
            Self::BesideBroker => f.write_str("it lies beside the broker"),
            Self::DropIn {
                path,
                line,
                name: None,
            } => write!(f, "{}:{line}", path.display()),
            Self::DropIn {
                path,
                line,
                name: Some(name),
            } => write!(f, "{}:{line} ({name})", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn policy(directory: &Path, beside: bool) -> Policy {
        let mut policy = Policy::builtin().unwrap();
        policy.workers.directory = Some(directory.to_owned());
        policy.workers.beside_broker = beside;
        policy
    }

    #[test]
    fn only_what_is_listed_may_run() {
        let directory = tempfile::tempdir().unwrap();
        let (listed, bare, beside, other) = (
            Digest::of(b"1"),
            Digest::of(b"2"),
            Digest::of(b"3"),
            Digest::of(b"4"),
        );
        let text = format!("# release 1\n\n{listed}  baton-worker\n{bare}\n");
        std::fs::write(directory.path().join("release"), text).unwrap();
        std::fs::write(directory.path().join(".hidden"), "not a digest").unwrap();

        let list = WorkerAllowList::load(&policy(directory.path(), true), Some(beside)).unwrap();
        assert!(
            list.permits(&listed)
                && list.permits(&bare)
                && list.permits(&beside)
                && !list.permits(&other)
        );
        assert!(
            matches!(list.source(&listed), Some(Source::DropIn { line: 3, name: Some(name), .. }) if name == "baton-worker")
        );

        let list = WorkerAllowList::load(&policy(directory.path(), false), Some(beside)).unwrap();
        assert!(!list.permits(&beside));
    }

    #[test]
    fn a_missing_directory_allows_nothing() {
        let list = WorkerAllowList::load(&policy(Path::new("/nonexistent/workers.d"), false), None)
            .unwrap();
        assert_eq!(list, WorkerAllowList::default());
    }

    #[test]
    fn what_others_can_write_or_what_is_no_digest_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("release");
        std::fs::write(&path, "abc  baton-worker\n").unwrap();
        let load = || WorkerAllowList::load(&policy(directory.path(), false), None);
        assert!(matches!(load(), Err(AllowListError::Line { line: 1, .. })));

        std::fs::write(&path, Digest::of(b"").to_string()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o664)).unwrap();
        assert!(matches!(
            load(),
            Err(AllowListError::Trust(TrustError::Mode { .. }))
        ));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load().is_ok());
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            load(),
            Err(AllowListError::Trust(TrustError::Mode { .. }))
        ));
    }
}
