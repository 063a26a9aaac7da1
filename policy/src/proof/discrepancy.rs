//! What can be found when a worker is held against its policy.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::capabilities::Capabilities;
use crate::descriptors::GrantError;
use crate::policy::{Namespace, Role};

/// One thing that is not as declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The thread, when it is about one.
    pub tid: Option<u32>,
    /// What.
    pub what: Discrepancy,
}

/// What is not as declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Discrepancy {
    /// No thread at all: the worker is gone.
    Gone,
    /// More than the one thread that a fresh worker has.
    NotSingleThreaded {
        /// How many.
        threads: u32,
    },
    /// The number of threads that the kernel counts is not the number that were listed.
    ThreadsMissed {
        /// As the kernel counts.
        counted: u32,
        /// How many records there were.
        listed: u32,
    },
    /// An exec could gain privileges.
    NewPrivileges,
    /// Not under seccomp filters.
    SeccompMode {
        /// 0 none, 1 strict.
        mode: u32,
    },
    /// The wrong number of filters.
    FilterCount {
        /// How many.
        found: u32,
        /// How many were declared.
        expected: u32,
    },
    /// A filter that is not the declared one.
    Filter {
        /// Which, from 0, of those that the broker's process did not have.
        index: u32,
        /// What it should be.
        expected: Role,
    },
    /// A settled thread whose last filter is that of no role.
    NoRole,
    /// Not as many threads of a role as there should be.
    RoleCount {
        /// The role.
        role: Role,
        /// How many.
        found: u32,
        /// How many were declared.
        expected: u32,
    },
    /// More than one thread that claims to be the kernel's own.
    UserWorkers {
        /// How many.
        found: u32,
    },
    /// A capability beyond those to keep.
    Capability {
        /// In which set.
        set: CapabilitySetName,
        /// Which.
        extra: Capabilities,
    },
    /// Another user or group.
    Id {
        /// `uid` or `gid`.
        kind: String,
        /// Real, effective, saved, file-system.
        found: [u32; 4],
        /// What all four should be.
        expected: u32,
    },
    /// Supplementary groups.
    Groups {
        /// Which.
        found: Vec<u32>,
    },
    /// Somebody traces it.
    Traced {
        /// Who.
        by: u32,
    },
    /// A kernel thread, or not of the process it was listed under.
    Foreign,
    /// A namespace is the broker's.
    SharedNamespace {
        /// Which.
        namespace: Namespace,
    },
    /// A namespace could not be read.
    UnknownNamespace {
        /// Which.
        namespace: Namespace,
    },
    /// Not pid 1 of a pid namespace of its own.
    NotInit {
        /// Its numbers, from the broker's namespace inwards.
        ns_pids: Vec<u32>,
    },
    /// A resource limit that is higher than declared.
    Limit {
        /// Which.
        resource: String,
        /// Soft and hard.
        found: String,
        /// What both may be at most.
        expected: String,
    },
    /// Memory that may be executed and should not be.
    Memory {
        /// Which, and why not.
        what: String,
    },
    /// A descriptor that the policy does not grant.
    Descriptor {
        /// Why not.
        reason: String,
    },
    /// Something else that the broker found.
    Other {
        /// In words.
        what: String,
    },
}

/// One of a thread's capability sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CapabilitySetName {
    /// Inheritable
    Inheritable,
    /// Permitted
    Permitted,
    /// Effective
    Effective,
    /// Bounding
    Bounding,
    /// Ambient
    Ambient,
}

impl Discrepancy {
    /// A stable name of what is violated, and what was declared, for reports.
    #[must_use]
    pub fn rule(&self) -> (&'static str, String) {
        let (rule, declared) = match self {
            Self::Gone => ("alive", "a running worker"),
            Self::NotSingleThreaded { .. }
            | Self::ThreadsMissed { .. }
            | Self::UserWorkers { .. } => (
                "threads",
                "a control thread, one per vCPU, one of the kernel's own",
            ),
            Self::Foreign => ("threads", "threads of the worker"),
            Self::NewPrivileges => ("no-new-privs", "no_new_privs is set"),
            Self::SeccompMode { .. } => ("seccomp-mode", "mode 2 (filter)"),
            Self::FilterCount { expected, .. } => {
                return ("seccomp-filter", format!("{expected} filters"));
            }
            Self::Filter { expected, .. } => {
                return (
                    "seccomp-filter",
                    format!("the policy's filter of {expected}, byte for byte"),
                );
            }
            Self::NoRole => (
                "seccomp-filter",
                "the policy's filter of one role, byte for byte",
            ),
            Self::RoleCount { role, expected, .. } => {
                return ("roles", format!("{expected} threads of role {role}"));
            }
            Self::Capability { .. } => ("capabilities", "those that the policy keeps"),
            Self::Id { kind, expected, .. } => return ("ids", format!("{kind} {expected}")),
            Self::Groups { .. } => ("groups", "no supplementary group"),
            Self::Traced { .. } => ("tracer", "nobody traces it"),
            Self::SharedNamespace { namespace } | Self::UnknownNamespace { namespace } => {
                return ("namespaces", format!("a {namespace} namespace of its own"));
            }
            Self::NotInit { .. } => ("namespaces", "pid 1 of a pid namespace of its own"),
            Self::Limit {
                resource, expected, ..
            } => return ("rlimits", format!("{resource} {expected}")),
            Self::Memory { .. } => (
                "memory",
                "executable is the worker's binary alone, and nothing that is writable",
            ),
            Self::Descriptor { .. } => ("descriptor", "a grant of the policy"),
            Self::Other { .. } => ("process", "as the broker has made it"),
        };
        (rule, declared.to_owned())
    }
}

impl From<GrantError> for Discrepancy {
    fn from(error: GrantError) -> Self {
        Self::Descriptor {
            reason: error.to_string(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tid) = self.tid {
            write!(f, "thread {tid}: ")?;
        }
        self.what.fmt(f)
    }
}

impl fmt::Display for CapabilitySetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Inheritable => "inheritable",
            Self::Permitted => "permitted",
            Self::Effective => "effective",
            Self::Bounding => "bounding",
            Self::Ambient => "ambient",
        })
    }
}

impl fmt::Display for Discrepancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the worker is gone"),
            Self::NotSingleThreaded { threads } => {
                write!(f, "a fresh worker has {threads} threads")
            }
            Self::ThreadsMissed { counted, listed } => write!(
                f,
                "the kernel counts {counted} threads, {listed} were listed"
            ),
            Self::NewPrivileges => f.write_str("no_new_privs is not set"),
            Self::SeccompMode { mode } => write!(f, "seccomp mode {mode}, not 2 (filter)"),
            Self::FilterCount { found, expected } => {
                write!(f, "{found} filters, {expected} declared")
            }
            Self::Filter { index, expected } => {
                write!(f, "filter {index} is not the declared one of {expected}")
            }
            Self::NoRole => f.write_str("its last filter is that of no role"),
            Self::RoleCount {
                role,
                found,
                expected,
            } => write!(f, "{found} threads of role {role}, {expected} declared"),
            Self::UserWorkers { found } => {
                write!(f, "{found} threads of the kernel's own, one declared")
            }
            Self::Capability { set, extra } => write!(f, "the {set} set has {extra}"),
            Self::Id {
                kind,
                found,
                expected,
            } => write!(f, "its {kind}s are {found:?}, not all {expected}"),
            Self::Groups { found } => write!(f, "it is in the groups {found:?}"),
            Self::Traced { by } => write!(f, "process {by} traces it"),
            Self::Foreign => f.write_str("it is no thread of the worker"),
            Self::SharedNamespace { namespace } => {
                write!(f, "it shares the broker's {namespace} namespace")
            }
            Self::UnknownNamespace { namespace } => {
                write!(f, "its {namespace} namespace could not be read")
            }
            Self::NotInit { ns_pids } => write!(
                f,
                "it is not pid 1 of a pid namespace of its own: {ns_pids:?}"
            ),
            Self::Limit {
                resource,
                found,
                expected,
            } => {
                write!(f, "the limit {resource} is {found}, {expected} declared")
            }
            Self::Memory { what } => f.write_str(what),
            Self::Descriptor { reason } => f.write_str(reason),
            Self::Other { what } => f.write_str(what),
        }
    }
}
