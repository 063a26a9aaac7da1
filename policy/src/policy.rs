//! The policy as types: what a worker may hold and do, with nothing left to interpret.
//!
//! A [`Policy`] exists only as a whole file that parsed: every table present, every name known, every rule with
//! its reason. It opens nothing and applies nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::capabilities::Capabilities;
use crate::condition::Conjunction;
use crate::descriptors::Grant;
use crate::digest::Digest;
use crate::parse::{self, PolicyError};
use crate::rlimits::{Limit, Resource, Rlimits};
use crate::signature::SigningKey;
use crate::syscalls::Syscall;

/// The file that [`Policy::builtin`] parses.
pub const BUILTIN: &str = include_str!("../default.toml");

/// The file that [`Policy::front`] parses.
pub const FRONT: &str = include_str!("../front.toml");

/// The JSON Schema of policy files, for editors.
pub const JSON_SCHEMA: &str = include_str!("../policy.schema.json");

/// The version of the file format that this crate reads.
pub const SCHEMA: u32 = 1;

/// What a worker may hold and do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its own name, for people.
    pub name: String,
    /// Where it was read from.
    pub origin: String,
    /// The SHA-256 of its text.
    pub digest: Digest,
    /// Which binaries may run as a worker.
    pub workers: Workers,
    /// Builds to which an upgrade may widen what a worker may do.
    pub approvals: Vec<Approval>,
    /// The host ids that workers run under.
    pub ids: Ids,
    /// Who may ask the broker for what, besides root and the broker's user.
    pub access: crate::access::Access,
    /// Namespaces that are the worker's own.
    pub namespaces: BTreeSet<Namespace>,
    /// Threads beyond the vCPUs.
    pub threads: Threads,
    /// Limits of the VM's cgroup.
    pub cgroup: crate::cgroup::CgroupPolicy,
    /// What a VM may cost its host's disks and network.
    pub io: crate::io::IoPolicy,
    /// Resource limits, without the number of tasks (see [`Policy::rlimits`]).
    pub rlimits: Rlimits,
    /// Capabilities that a worker keeps.
    pub capabilities: Capabilities,
    /// Landlock.
    pub landlock: LandlockPolicy,
    /// Descriptors that may be handed out, by name, in the order of the file.
    pub descriptors: Vec<Grant>,
    /// What happens at a violation, by role.
    pub roles: BTreeMap<Role, RolePolicy>,
    /// Calls that are answered with an error in [`Role::Build`].
    pub refusals: Vec<Refusal>,
    /// Calls that are let through, in the order of the file.
    pub rules: Vec<Rule>,
    /// Why its workers' filters report calls instead of denying them, if they do ([`crate::learn`]).
    pub learn: Option<String>,
}

/// Which binaries may run as a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workers {
    /// These.
    pub digests: Vec<Digest>,
    /// And those that the files in this directory list.
    pub directory: Option<PathBuf>,
    /// And the one that lies beside the broker's own binary.
    pub beside_broker: bool,
    /// And those that one of these has signed.
    pub keys: Vec<SigningKey>,
}

/// A build to which an upgrade may widen what a worker may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// The build.
    pub worker: Digest,
    /// The reason.
    pub why: String,
}

/// Host user and group ids for workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The first of the range. Never 0.
    pub first: NonZeroU32,
    /// How many. `first + count` does not pass 2^32 - 1, which is no id.
    pub count: NonZeroU32,
    /// Whether a broker that cannot change ids may run workers under its own.
    pub unprivileged_broker: bool,
}

/// A kind of namespace (`namespaces(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// `user`
    User,
    /// `pid`
    Pid,
    /// `net`
    Net,
    /// `mnt`
    Mount,
    /// `ipc`
    Ipc,
    /// `uts`
    Uts,
    /// `cgroup`
    Cgroup,
}

/// Tasks of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads {
    /// How many beyond one per vCPU.
    pub headroom: NonZeroU32,
}

/// What Landlock has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LandlockPolicy {
    /// The least ABI that the kernel must know. At least 6, the first that scopes signals and abstract sockets.
    pub floor_abi: u32,
}

/// What a thread is for, and so which filter it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The whole process, from before its exec until a thread takes a filter of another role on top.
    Build,
    /// The main thread.
    Control,
    /// A thread that runs one vCPU.
    Vcpu,
    /// A thread of the I/O pool.
    Io,
}

/// What is said of a role besides its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolePolicy {
    /// What happens at a call that no rule lets through.
    pub violation: Violation,
    /// What the role is, for people.
    pub why: String,
}

/// What happens at a call that no rule lets through. The call is not executed either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Violation {
    /// SIGSYS, whose handler reports the call and ends the process (`SECCOMP_RET_TRAP`). A compromised worker can
    /// handle it otherwise, and gains one more call that was not executed.
    Trap,
    /// The process ends at once (`SECCOMP_RET_KILL_PROCESS`). Who called what is in the kernel's log only.
    Kill,
}

/// A call that is answered with an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The call.
    pub call: Syscall,
    /// The error number.
    pub errno: u16,
    /// Its name.
    pub errno_name: String,
    /// The reason.
    pub why: String,
    /// The line of the file, from 1.
    pub line: usize,
}

/// A call that is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What its table is about.
    pub topic: String,
    /// The roles that have it.
    pub roles: BTreeSet<Role>,
    /// The call.
    pub call: Syscall,
    /// The condition as it was written, on one line.
    pub when: Option<String>,
    /// The condition, as alternatives. Empty: any arguments.
    pub alternatives: Vec<Conjunction>,
    /// The reason.
    pub why: String,
    /// The line of the file, from 1.
    pub line: usize,
}

impl Policy {
    /// The built-in policy.
    ///
    /// # Errors
    ///
    /// None that this crate's tests would have let through; it is a `Result` so that no code path panics.
    pub fn builtin() -> Result<Self, PolicyError> {
        Self::parse(BUILTIN, "built-in policy")
    }

    /// What the QMP front may hold and do. It has one thread, whose role is [`Role::Control`].
    ///
    /// # Errors
    ///
    /// As [`Policy::builtin`].
    pub fn front() -> Result<Self, PolicyError> {
        Self::parse(FRONT, "built-in policy of the QMP front")
    }

    /// Reads a policy. `origin` is what errors call the text: its path.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with its line and column, and what to do about it.
    pub fn parse(text: &str, origin: &str) -> Result<Self, PolicyError> {
        parse::policy(text, origin)
    }

    /// Everything that `role` may call, in the order of the file.
    pub fn rules_of(&self, role: Role) -> impl Iterator<Item = &Rule> {
        self.rules
            .iter()
            .filter(move |rule| rule.roles.contains(&role))
    }

    /// The most tasks that a worker with this many vCPUs has: RLIMIT_NPROC and the cgroup's `pids.max`.
    #[must_use]
    pub fn task_limit(&self, vcpus: u32) -> u64 {
        u64::from(vcpus) + u64::from(self.threads.headroom.get())
    }

    /// The resource limits of a worker with this many vCPUs, which has so many bytes of guest RAM pinned for devices of the host.
    #[must_use]
    pub fn rlimits(&self, vcpus: u32, pinned: u64) -> Rlimits {
        let mut limits = self.rlimits.clone();
        limits.set(Resource::Nproc, Limit::At(self.task_limit(vcpus)));
        if let Some(Limit::At(locked)) = limits.get(Resource::Memlock) {
            limits.set(Resource::Memlock, Limit::At(locked.saturating_add(pinned)));
        }
        limits
    }

    /// Why an upgrade to this build may widen what a worker may do, if it may.
    #[must_use]
    pub fn approves(&self, worker: &Digest) -> Option<&str> {
        self.approvals
            .iter()
            .find(|approval| approval.worker == *worker)
            .map(|approval| approval.why.as_str())
    }

    /// What the policy says of the descriptors called `name`.
    #[must_use]
    pub fn grant(&self, name: &str) -> Option<&Grant> {
        self.descriptors.iter().find(|grant| grant.name == name)
    }
}

impl Namespace {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::User,
        Self::Pid,
        Self::Net,
        Self::Mount,
        Self::Ipc,
        Self::Uts,
        Self::Cgroup,
    ];

    /// Its file in `/proc/PID/ns`.
    #[must_use]
    pub const fn proc_name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Mount => "mnt",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
        }
    }
}

impl Ids {
    /// Whether `id` is of the range.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        id >= self.first.get() && id - self.first.get() < self.count.get()
    }

    /// The ids of the range.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.count.get()).filter_map({
            let first = self.first.get();
            move |offset| first.checked_add(offset)
        })
    }
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Build, Self::Control, Self::Vcpu, Self::Io];
    /// Those that a thread takes for itself, on top of [`Role::Build`].
    pub const STEADY: [Self; 3] = [Self::Control, Self::Vcpu, Self::Io];

    /// Its name in the file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.proc_name())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trap => "trap",
            Self::Kill => "kill",
        })
    }
}
