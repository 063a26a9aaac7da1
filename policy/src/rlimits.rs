//! Resource limits (`setrlimit(2)`), soft and hard alike.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// A resource, by its lower-case name without `RLIMIT_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Address space, bytes.
    As,
    /// Core file, bytes.
    Core,
    /// Processor time, seconds.
    Cpu,
    /// Private writable memory, bytes.
    Data,
    /// Size of a file that is written, bytes.
    Fsize,
    /// Locked memory, bytes.
    Memlock,
    /// POSIX message queues, bytes.
    Msgqueue,
    /// Ceiling of the nice value, 20 - nice.
    Nice,
    /// Descriptors.
    Nofile,
    /// Tasks of the user. Not in a policy: it follows from the number of vCPUs.
    Nproc,
    /// Real-time priority.
    Rtprio,
    /// Real-time processor time without a blocking call, microseconds.
    Rttime,
    /// Queued signals.
    Sigpending,
    /// Stack, bytes.
    Stack,
}

/// How much of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Limit {
    /// This much.
    At(u64),
    /// `RLIM_INFINITY`.
    Unlimited,
}

/// A set of limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimits(BTreeMap<Resource, Limit>);

/// A limit that could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the limit {resource} to {limit}")]
pub struct RlimitError {
    /// Which.
    pub resource: Resource,
    /// To what.
    pub limit: Limit,
    /// What the kernel said.
    pub source: io::Error,
}

impl Rlimits {
    /// Sets or replaces one.
    pub fn set(&mut self, resource: Resource, limit: Limit) {
        self.0.insert(resource, limit);
    }

    /// The limit of one resource, if the set has one.
    #[must_use]
    pub fn get(&self, resource: Resource) -> Option<Limit> {
        self.0.get(&resource).copied()
    }

    /// All of them, by resource.
    pub fn iter(&self) -> impl Iterator<Item = (Resource, Limit)> + '_ {
        self.0.iter().map(|(resource, limit)| (*resource, *limit))
    }

    /// Lowers the calling process's limits, soft and hard, to these. A hard limit that is lower already stays, so
    /// the call needs no privilege; a process that then cannot do its work fails where it needs the resource.
    ///
    /// # Errors
    ///
    /// The first limit that the kernel refuses.
    pub fn apply(&self) -> Result<(), RlimitError> {
        for (resource, limit) in self.iter() {
            let kernel = resource.to_rustix();
            let ceiling = rustix::process::getrlimit(kernel).maximum;
            let value = match (limit, ceiling) {
                (Limit::At(wanted), Some(ceiling)) => Some(wanted.min(ceiling)),
                (Limit::At(wanted), None) => Some(wanted),
                (Limit::Unlimited, ceiling) => ceiling,
            };
            let new = rustix::process::Rlimit {
                current: value,
                maximum: value,
            };
            rustix::process::setrlimit(kernel, new).map_err(|error| RlimitError {
                resource,
                limit,
                source: error.into(),
            })?;
        }
        Ok(())
    }
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::As,
        Self::Core,
        Self::Cpu,
        Self::Data,
        Self::Fsize,
        Self::Memlock,
        Self::Msgqueue,
        Self::Nice,
        Self::Nofile,
        Self::Nproc,
        Self::Rtprio,
        Self::Rttime,
        Self::Sigpending,
        Self::Stack,
    ];

    /// Its name in a policy.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::As => "as",
            Self::Core => "core",
            Self::Cpu => "cpu",
            Self::Data => "data",
            Self::Fsize => "fsize",
            Self::Memlock => "memlock",
            Self::Msgqueue => "msgqueue",
            Self::Nice => "nice",
            Self::Nofile => "nofile",
            Self::Nproc => "nproc",
            Self::Rtprio => "rtprio",
            Self::Rttime => "rttime",
            Self::Sigpending => "sigpending",
            Self::Stack => "stack",
        }
    }

    /// The first words of its line in `/proc/PID/limits` (`fs/proc/base.c`, `lnames`).
    #[must_use]
    pub const fn proc_name(self) -> &'static str {
        match self {
            Self::As => "Max address space",
            Self::Core => "Max core file size",
            Self::Cpu => "Max cpu time",
            Self::Data => "Max data size",
            Self::Fsize => "Max file size",
            Self::Memlock => "Max locked memory",
            Self::Msgqueue => "Max msgqueue size",
            Self::Nice => "Max nice priority",
            Self::Nofile => "Max open files",
            Self::Nproc => "Max processes",
            Self::Rtprio => "Max realtime priority",
            Self::Rttime => "Max realtime timeout",
            Self::Sigpending => "Max pending signals",
            Self::Stack => "Max stack size",
        }
    }

    const fn to_rustix(self) -> rustix::process::Resource {
        use rustix::process::Resource as R;
        match self {
            Self::As => R::As,
            Self::Core => R::Core,
            Self::Cpu => R::Cpu,
            Self::Data => R::Data,
            Self::Fsize => R::Fsize,
            Self::Memlock => R::Memlock,
            Self::Msgqueue => R::Msgqueue,
            Self::Nice => R::Nice,
            Self::Nofile => R::Nofile,
            Self::Nproc => R::Nproc,
            Self::Rtprio => R::Rtprio,
            Self::Rttime => R::Rttime,
            Self::Sigpending => R::Sigpending,
            Self::Stack => R::Stack,
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(value) => value.fmt(f),
            Self::Unlimited => f.pad("unlimited"),
        }
    }
}
