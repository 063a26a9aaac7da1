//! Where a client may have a migration's Unix sockets: in the VM's own directory, or beside it where the other broker waits, or
//! where a pattern of policy's grant for that channel says. The directory is opened once, without symbolic links, and held: what is
//! bound or connected to lies there, whatever becomes of the path meanwhile.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use baton_policy::Policy;
use rustix::fs::CWD;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::ResolveFlags;
use rustix::io::Errno;

use crate::client_path;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::run_dir::VmDirectory;

/// A channel, by the name of its grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Main,
    Cpr,
}

impl Which {
    pub(crate) fn grant(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Cpr => "cpr",
        }
    }
}

/// A name in a directory that is held.
#[derive(Debug)]
pub(crate) struct Place {
    directory: OwnedFd,
    name: OsString,
}

/// Why a place cannot be had.
#[derive(Debug)]
pub(crate) struct Unreachable(pub(crate) Errno);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Errno::AGAIN => f.write_str("nobody accepts there, and its backlog is full"),
            error => f.write_str(&client_path::words(error)),
        }
    }
}

impl From<Errno> for Unreachable {
    fn from(error: Errno) -> Self {
        Self(error)
    }
}

impl Place {
    /// The place that `path` names, if policy lets it be there. A relative path is one in the VM's own directory.
    pub(crate) fn of(
        path: &str,
        which: Which,
        own: &VmDirectory,
        policy: &Policy,
    ) -> Result<std::result::Result<Self, Unreachable>> {
        let plain: PathBuf = own.path().join(path).components().collect();
        let odd = plain
            .components()
            .any(|part| matches!(part, Component::ParentDir | Component::CurDir));
        let (parent, name) = (plain.parent(), plain.file_name());
        let ours = parent.is_some_and(|parent| own.is_this_or_beside(parent));
        let grant = policy.grant(which.grant());
        if odd || !(ours || grant.is_some_and(|grant| grant.permits_path(&plain))) {
            let which = which.grant();
            return Err(refused(
                format_args!("policy {} grants no {which} channel at {path}", policy.name),
                format_args!(
                    "a pattern of its descriptor `{which}` has to match the path, which may have no `..` in it"
                ),
            ));
        }
        let (Some(parent), Some(name)) = (parent, name) else {
            return Ok(Err(Errno::ISDIR.into()));
        };
        // What leads to the VM's own is the operator's choice.
        let resolve = if ours {
            ResolveFlags::NO_MAGICLINKS
        } else {
            ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat2(CWD, parent, flags, Mode::empty(), resolve);
        Ok(directory.map_err(Unreachable::from).map(|directory| Self {
            directory,
            name: name.to_owned(),
        }))
    }

    /// The name.
    pub(crate) fn name(&self) -> &Path {
        Path::new(&self.name)
    }

    /// A path that leads there, and nowhere else while this is held.
    pub(crate) fn door(&self) -> PathBuf {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        Path::new(&directory).join(&self.name)
    }

    /// What lies there, held; no symbolic link.
    pub(crate) fn hold(&self) -> std::result::Result<OwnedFd, Unreachable> {
        client_path::open(&self.directory, self.name(), OFlags::PATH).map_err(Unreachable::from)
    }

    /// The directory and the name.
    pub(crate) fn into_parts(self) -> (OwnedFd, OsString) {
        (self.directory, self.name)
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}
