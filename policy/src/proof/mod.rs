//! Does the kernel's own record of a worker agree with its policy?
//!
//! The broker gathers (reads `/proc`, has the filters read back where it may) and this module judges, so that the
//! judgement can be tested without a worker. It asks at two moments: before the worker has been given anything
//! ([`Moment::Fresh`]: one thread, under the build phase's filters), and before its guest runs
//! ([`Moment::Settled`]: every thread under the filter of its role). Names are never evidence: a thread is what its
//! filter makes it, and the one thread that no filter could be put on is told by the kernel's flag.

mod discrepancy;
mod memory;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use discrepancy::{CapabilitySetName, Discrepancy, Finding};
pub use memory::{FileIdentity, Memory, memory};

use crate::capabilities::Capabilities;
use crate::compile::Compiled;
use crate::policy::{Namespace, Role};
use crate::procfs::{self, PF_KTHREAD, TaskStat, TaskStatus};
use crate::program::Program;
use crate::rlimits::{Limit, Rlimits};

/// What the policy and the broker declare of one worker.
#[derive(Clone, Debug)]
pub struct Declared<'a> {
    /// The filters.
    pub compiled: &'a Compiled,
    /// How many filters the broker's own process has, which every process that it starts inherits.
    pub inherited_filters: u32,
    /// The capabilities that the policy lets a worker keep.
    pub keep: Capabilities,
    /// The worker's user id as the broker sees it.
    pub uid: u32,
    /// The worker's group id as the broker sees it.
    pub gid: u32,
    /// The namespaces that must be the worker's own.
    pub namespaces: &'a BTreeSet<Namespace>,
    /// When it is asked.
    pub moment: Moment,
}

/// When it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// After the exec, before any descriptor: one thread, under the build phase's filters.
    Fresh,
    /// Before the guest runs, and ever after: every thread under its role's filter.
    Settled {
        /// How many vCPU threads there must be.
        vcpus: u32,
        /// How many I/O threads there must be.
        io: u32,
    },
}

/// What the kernel says of one worker.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Every entry of `/proc/PID/task`.
    pub threads: Vec<ObservedThread>,
    /// The worker's namespaces, by the device and inode of `/proc/PID/ns/*`.
    pub namespaces: BTreeMap<Namespace, (u64, u64)>,
    /// The broker's, likewise.
    pub own_namespaces: BTreeMap<Namespace, (u64, u64)>,
}

/// What the kernel says of one thread.
#[derive(Clone, Debug)]
pub struct ObservedThread {
    /// From `/proc/PID/task/TID/status`.
    pub status: TaskStatus,
    /// From `/proc/PID/task/TID/stat`.
    pub stat: TaskStat,
    /// All filters of the thread, first installed first, when the broker was able to have them read.
    pub filters: Option<Vec<Program>>,
}

/// How far the filters were confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// Mode and number of the filters, from `/proc`. A thread's role is not known then.
    Counted,
    /// Every byte of every filter of every thread.
    Bytes,
}

/// The judgement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Everything that is not as declared. Empty: proven.
    pub findings: Vec<Finding>,
    /// How far the filters were confirmed.
    pub evidence: Evidence,
    /// The role of each thread, by its number; the kernel's own thread is not among them. Empty unless the bytes
    /// of the filters were read.
    pub roles: BTreeMap<u32, Role>,
}

impl Verdict {
    /// Whether everything is as declared.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.findings.is_empty()
    }
}

/// Compares what the kernel says with what was declared.
#[must_use]
pub fn prove(declared: &Declared<'_>, observed: &Observed) -> Verdict {
    let mut judge = Judge {
        declared,
        findings: Vec::new(),
        roles: BTreeMap::new(),
    };
    judge.process(observed);
    for thread in &observed.threads {
        judge.thread(thread);
    }
    let bytes = observed
        .threads
        .iter()
        .filter(|thread| !thread.stat.is_user_worker())
        .all(|one| one.filters.is_some());
    if bytes && !observed.threads.is_empty() {
        judge.count_roles();
    }
    let evidence = if bytes {
        Evidence::Bytes
    } else {
        Evidence::Counted
    };
    Verdict {
        findings: judge.findings,
        evidence,
        roles: judge.roles,
    }
}

struct Judge<'a> {
    declared: &'a Declared<'a>,
    findings: Vec<Finding>,
    roles: BTreeMap<u32, Role>,
}

impl Judge<'_> {
    fn find(&mut self, tid: Option<u32>, what: Discrepancy) {
        self.findings.push(Finding { tid, what });
    }

    fn process(&mut self, observed: &Observed) {
        let Some(first) = observed.threads.first() else {
            self.find(None, Discrepancy::Gone);
            return;
        };
        let listed = u32::try_from(observed.threads.len()).unwrap_or(u32::MAX);
        // A thread that exits while the records are read is counted or not; one that is new is what matters.
        for thread in &observed.threads {
            if thread.status.threads > listed {
                self.find(
                    None,
                    Discrepancy::ThreadsMissed {
                        counted: thread.status.threads,
                        listed,
                    },
                );
                break;
            }
        }
        if self.declared.moment == Moment::Fresh && (listed != 1 || first.status.threads != 1) {
            self.find(
                None,
                Discrepancy::NotSingleThreaded {
                    threads: listed.max(first.status.threads),
                },
            );
        }
        let user_workers = observed
            .threads
            .iter()
            .filter(|thread| thread.stat.is_user_worker())
            .count();
        if user_workers > 1 {
            self.find(
                None,
                Discrepancy::UserWorkers {
                    found: u32::try_from(user_workers).unwrap_or(u32::MAX),
                },
            );
        }
        for namespace in self.declared.namespaces {
            match (
                observed.namespaces.get(namespace),
                observed.own_namespaces.get(namespace),
            ) {
                (Some(worker), Some(own)) if worker != own => {}
                (Some(_), Some(_)) => self.find(
                    None,
                    Discrepancy::SharedNamespace {
                        namespace: *namespace,
                    },
                ),
                _ => self.find(
                    None,
                    Discrepancy::UnknownNamespace {
                        namespace: *namespace,
                    },
                ),
            }
        }
        if self.declared.namespaces.contains(&Namespace::Pid) {
            let leader = observed
                .threads
                .iter()
                .find(|thread| thread.status.pid == thread.status.tgid);
            let ns_pids = leader
                .map(|thread| thread.status.ns_pids.clone())
                .unwrap_or_default();
            if ns_pids.len() < 2 || ns_pids.last() != Some(&1) {
                self.find(None, Discrepancy::NotInit { ns_pids });
            }
        }
    }

    fn thread(&mut self, thread: &ObservedThread) {
        let ObservedThread {
            status,
            stat,
            filters,
        } = thread;
        let tid = Some(status.pid);
        if stat.pid != status.pid || stat.flags & PF_KTHREAD != 0 {
            self.find(tid, Discrepancy::Foreign);
        }
        if !status.no_new_privs {
            self.find(tid, Discrepancy::NewPrivileges);
        }
        if status.tracer != 0 {
            self.find(tid, Discrepancy::Traced { by: status.tracer });
        }
        for (kind, found, expected) in [
            ("uid", status.uids, self.declared.uid),
            ("gid", status.gids, self.declared.gid),
        ] {
            if found != [expected; 4] {
                self.find(
                    tid,
                    Discrepancy::Id {
                        kind: kind.to_owned(),
                        found,
                        expected,
                    },
                );
            }
        }
        if !status.groups.is_empty() {
            self.find(
                tid,
                Discrepancy::Groups {
                    found: status.groups.clone(),
                },
            );
        }
        for (set, found) in [
            (CapabilitySetName::Inheritable, status.inheritable),
            (CapabilitySetName::Permitted, status.permitted),
            (CapabilitySetName::Effective, status.effective),
            (CapabilitySetName::Bounding, status.bounding),
            (CapabilitySetName::Ambient, status.ambient),
        ] {
            let extra = found.without(self.declared.keep);
            if !extra.is_empty() {
                self.find(tid, Discrepancy::Capability { set, extra });
            }
        }
        if status.seccomp != 2 {
            self.find(
                tid,
                Discrepancy::SeccompMode {
                    mode: status.seccomp,
                },
            );
        }
        // The kernel's own thread runs no user code. It has whatever filters its maker had at the first KVM_RUN.
        if !stat.is_user_worker() {
            self.filters(status, filters.as_deref());
        }
    }

    fn filters(&mut self, status: &TaskStatus, filters: Option<&[Program]>) {
        let tid = Some(status.pid);
        let inherited = self.declared.inherited_filters;
        let build = &self.declared.compiled.build;
        let settled = self.declared.moment != Moment::Fresh;
        let own = u32::try_from(build.len()).unwrap_or(u32::MAX) + u32::from(settled);
        let expected = inherited.saturating_add(own);
        if status.seccomp_filters != expected {
            self.find(
                tid,
                Discrepancy::FilterCount {
                    found: status.seccomp_filters,
                    expected,
                },
            );
        }
        let Some(filters) = filters else { return };
        let read = u32::try_from(filters.len()).unwrap_or(u32::MAX);
        if read != expected {
            if read != status.seccomp_filters {
                self.find(
                    tid,
                    Discrepancy::FilterCount {
                        found: read,
                        expected,
                    },
                );
            }
            return;
        }
        let (ours, last) = match (filters.get(inherited as usize..), settled) {
            (Some(ours), false) => (ours, None),
            (Some([ours @ .., last]), true) => (ours, Some(last)),
            _ => return,
        };
        for (index, (found, declared)) in (0_u32..).zip(ours.iter().zip(build)) {
            if found != declared {
                self.find(
                    tid,
                    Discrepancy::Filter {
                        index,
                        expected: Role::Build,
                    },
                );
            }
        }
        match last.map(|last| {
            self.declared
                .compiled
                .roles
                .iter()
                .find(|(_, program)| *program == last)
        }) {
            None => drop(self.roles.insert(status.pid, Role::Build)),
            Some(Some((role, _))) => drop(self.roles.insert(status.pid, *role)),
            Some(None) => self.find(tid, Discrepancy::NoRole),
        }
    }

    fn count_roles(&mut self) {
        let Moment::Settled { vcpus, io } = self.declared.moment else {
            return;
        };
        for (role, expected) in [(Role::Control, 1), (Role::Vcpu, vcpus), (Role::Io, io)] {
            let found = self.roles.values().filter(|one| **one == role).count();
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            if found != expected {
                self.find(
                    None,
                    Discrepancy::RoleCount {
                        role,
                        found,
                        expected,
                    },
                );
            }
        }
    }
}

/// Compares the text of `/proc/PID/limits` with the limits that were declared. A limit that is lower than declared
/// is no finding: the broker itself may have been under it.
#[must_use]
pub fn limits(declared: &Rlimits, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (resource, limit) in declared.iter() {
        let found = procfs::limit(text, resource);
        let most = |limit: Limit| match limit {
            Limit::At(most) => most,
            Limit::Unlimited => u64::MAX,
        };
        let within = found
            .is_some_and(|(soft, hard)| most(soft) <= most(limit) && most(hard) <= most(limit));
        if !within {
            let found = found.map_or_else(
                || "not known".to_owned(),
                |(soft, hard)| format!("{soft}, hard {hard}"),
            );
            let what = Discrepancy::Limit {
                resource: resource.name().to_owned(),
                found,
                expected: limit.to_string(),
            };
            findings.push(Finding { tid: None, what });
        }
    }
    findings
}

#[cfg(test)]
mod tests;
