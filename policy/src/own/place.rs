//! Where the broker may do what to files once it has started: the places of `broker.toml`, and the Landlock domain of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use landlock::{AccessFs, BitFlags};
use serde::Deserialize;

use super::{OwnPolicy, OwnPolicyError};
use crate::landlock::{LandlockError, LandlockStatus, denied};

/// A place of the broker's, which stands for one path or a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// `/proc`, and what cgroup2's root says of its controllers.
    Records,
    /// `/dev/null`.
    Null,
    /// The directory that VMs have theirs in.
    RunDirectory,
    /// The VM's.
    VmDirectory,
    /// That of the audit logs.
    AuditDirectory,
    /// Those that VMs' cgroups are in.
    Cgroups,
    /// That of the locks of ids.
    IdLocks,
    /// The one that the VM's policy is in.
    Policy,
    /// The policy's `workers.directory`.
    AllowList,
    /// Those that the broker's program is in, and the VM's worker.
    Programs,
    /// Those that the VM's images are in, and those that the policy's descriptor `disk` has patterns of.
    Disks,
    /// Those that the policy's descriptor `state` has patterns of.
    StateFiles,
    /// The one that the VM's vsock socket is in.
    Vsock,
    /// Those that channels of a transfer come in at.
    Channels,
}

/// What may be done to files in a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlaceAccess {
    /// Reading files, listing directories.
    Read,
    /// Writing and truncating files.
    Write,
    /// Commands to devices that are opened (ioctl(2)).
    Devices,
    /// Making regular files.
    MakeFiles,
    /// Binding sockets.
    MakeSockets,
    /// Making symbolic links.
    MakeLinks,
    /// Making directories.
    MakeDirectories,
    /// Removing what is no directory.
    RemoveFiles,
    /// Removing directories.
    RemoveDirectories,
}

/// A rule of `broker.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaceRule {
    /// Where.
    pub name: Place,
    /// What.
    pub access: Vec<PlaceAccess>,
    /// What for.
    pub why: String,
}

/// The paths that places stand for. A place that has none is no place.
pub type Places = BTreeMap<Place, Vec<PathBuf>>;

/// The domain that a broker is in.
#[derive(Clone, Debug)]
pub struct Domain {
    /// What the kernel enforces.
    pub status: LandlockStatus,
    floor: u32,
    allowed: Vec<(PathBuf, BitFlags<AccessFs>)>,
    /// A process outside.
    outside: u32,
}

impl PlaceAccess {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Write => AccessFs::WriteFile | AccessFs::Truncate,
            Self::Devices => AccessFs::IoctlDev.into(),
            Self::MakeFiles => AccessFs::MakeReg.into(),
            Self::MakeSockets => AccessFs::MakeSock.into(),
            Self::MakeLinks => AccessFs::MakeSym.into(),
            Self::MakeDirectories => AccessFs::MakeDir.into(),
            Self::RemoveFiles => AccessFs::RemoveFile.into(),
            Self::RemoveDirectories => AccessFs::RemoveDir.into(),
        }
    }
}

impl OwnPolicy {
    /// Puts the calling thread into the domain of these places, and attempts what it denies, since the kernel shows a domain to
    /// nobody. `outside` is a process of this user's that is not in it.
    ///
    /// To be called before the filter is on: the attempts take calls that it refuses.
    ///
    /// # Errors
    ///
    /// When the kernel does not enforce the domain.
    pub fn restrict(&self, places: &Places, outside: u32) -> Result<Domain, LandlockError> {
        let mut allowed = Vec::new();
        for rule in &self.places {
            let rights = rule.access.iter().map(|one| one.rights()).collect();
            let paths = places.get(&rule.name).into_iter().flatten();
            let paths = paths.filter(|path| path.exists());
            allowed.extend(paths.map(|path| (path.clone(), rights)));
        }
        let domain = Domain {
            status: crate::landlock::restrict_to(self.floor_abi, &allowed)?,
            floor: self.floor_abi,
            allowed,
            outside,
        };
        crate::landlock::attempt_port(self.floor_abi)?;
        domain.attempt()?;
        Ok(domain)
    }
}

impl Domain {
    /// Attempts what the domain denies, under a filter, too: to list the root directory and to write to a file of `/proc`, unless
    /// a place is there, and to examine a process outside.
    ///
    /// # Errors
    ///
    /// When one of them was not denied.
    pub fn attempt(&self) -> Result<(), LandlockError> {
        let is_allowed = |path: &str, right: AccessFs| {
            let mut with_right = self.allowed.iter().filter(|one| one.1.contains(right));
            with_right.any(|(place, _)| Path::new(path).starts_with(place))
        };
        if !is_allowed("/", AccessFs::ReadDir) {
            let listed = fs::read_dir("/");
            denied(self.floor, "a directory could be listed", &listed)?;
        }
        // Its own name, which nothing is written to.
        const FILE: &str = "/proc/self/comm";
        if !is_allowed(FILE, AccessFs::WriteFile) {
            let opened = OpenOptions::new().write(true).open(FILE);
            denied(self.floor, "a file could be opened for writing", &opened)?;
        }
        let looked = fs::metadata(format!("/proc/{}/ns/net", self.outside));
        denied(self.floor, "another process could be examined", &looked)
    }

    /// How many paths the broker has something below, of those that were there when it started.
    #[must_use]
    pub fn places(&self) -> usize {
        self.allowed.len()
    }
}

/// Each place once, with a right and a reason.
pub(super) fn check(rules: &[PlaceRule]) -> Result<(), OwnPolicyError> {
    let mut seen = BTreeSet::new();
    for rule in rules {
        let sound = !rule.access.is_empty() && !rule.why.trim().is_empty();
        if !sound || !seen.insert(rule.name) {
            return Err(OwnPolicyError::Place(rule.name));
        }
    }
    Ok(())
}
