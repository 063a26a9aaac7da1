//! Reading the kernel's own records of a worker, for comparison with what was declared. Nothing that a worker says of itself
//! is evidence here, and names are not either.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_policy::Namespace;
use baton_policy::procfs::TaskStat;
use baton_policy::procfs::TaskStatus;
use baton_policy::proof::Declared;
use baton_policy::proof::Discrepancy;
use baton_policy::proof::Evidence;
use baton_policy::proof::Finding;
use baton_policy::proof::Moment;
use baton_policy::proof::Observed;
use baton_policy::proof::ObservedThread;
use baton_policy::proof::Verdict;
use baton_policy::proof::prove;

use crate::broker::Rules;
use crate::refusal::Result;
use crate::worker::binary::WorkerBinary;
use crate::worker::cgroup::Cgroup;
use crate::worker::ids::HostIds;
use crate::worker::launcher::Identity;
use crate::worker::launcher::Launcher;
use crate::worker::launcher::Reading;
use crate::worker::launcher::Records;

/// What a broker compares its workers with.
#[derive(Debug)]
pub(crate) struct Prover {
    /// Filters that this process was started with.
    pub(crate) inherited_filters: u32,
    own_namespaces: BTreeMap<Namespace, Identity>,
    /// The supplementary groups of this process.
    pub(crate) own_groups: Vec<u32>,
    /// Why filters cannot be read back, when they cannot.
    pub(crate) unreadable: Option<String>,
    /// Who reads filters.
    launcher: Rc<Launcher>,
    /// The longest that a thread stood still in the last reading.
    pub(crate) stood: Cell<Duration>,
    /// How long the reading of all filters of one worker may take. A thread that does not stop by then is a finding.
    reading: Duration,
}

impl Prover {
    /// Reads what this process has, which its children inherit.
    pub(crate) fn new(reading: Duration, launcher: Rc<Launcher>) -> Self {
        let own = fs::read_to_string("/proc/self/status").ok();
        let status = own.and_then(|text| TaskStatus::parse(&text).ok());
        let inherited_filters = status.as_ref().map_or(0, |status| status.seccomp_filters);
        let unreadable = if !rustix::process::geteuid().is_root() {
            Some(
                "PTRACE_SECCOMP_GET_FILTER needs CAP_SYS_ADMIN in the initial user namespace"
                    .to_owned(),
            )
        } else if status.as_ref().is_none_or(|status| status.seccomp != 0) {
            Some("the broker was started under a seccomp filter".to_owned())
        } else {
            None
        };
        Self {
            inherited_filters,
            own_namespaces: crate::worker::launcher::namespaces("self"),
            own_groups: status.map(|status| status.groups).unwrap_or_default(),
            unreadable,
            launcher,
            stood: Cell::new(Duration::ZERO),
            reading,
        }
    }

    /// Compares a worker's threads with the policy. The threads are stopped for as long as their filters are read.
    pub(crate) fn threads(&self, rules: &Rules, pid: i32, ids: HostIds, moment: Moment) -> Verdict {
        let policy = &rules.policy;
        let declared = Declared {
            compiled: &rules.compiled,
            inherited_filters: self.inherited_filters,
            keep: policy.capabilities,
            uid: ids.uid,
            gid: ids.gid,
            namespaces: &policy.namespaces,
            moment,
        };
        let mut unread = Vec::new();
        let mut observed = self.observe(pid, &mut unread);
        let by = Instant::now() + self.reading;
        self.stood.set(Duration::ZERO);
        if self.unreadable.is_none() {
            for thread in observed
                .threads
                .iter_mut()
                .filter(|thread| !thread.stat.is_user_worker())
            {
                let (tid, count) = (thread.status.pid, thread.status.seccomp_filters);
                let within = by.saturating_duration_since(Instant::now());
                match self.launcher.filters(tid, count, within) {
                    Ok(Reading { filters, stood }) => {
                        self.stood.set(self.stood.get().max(stood));
                        thread.filters = Some(filters);
                    }
                    Err(refusal) => unread.push(other(Some(tid), refusal.reason)),
                }
            }
        }
        let mut verdict = prove(&declared, &observed);
        if verdict.evidence == Evidence::Counted && self.unreadable.is_none() {
            verdict.findings.append(&mut unread);
        }
        if ids.is_own() {
            // Without privilege nobody can leave a group: the worker has no other than the broker's user has.
            verdict.findings.retain(|finding| match &finding.what {
                Discrepancy::Groups { found } => {
                    !found.iter().all(|group| self.own_groups.contains(group))
                }
                _ => true,
            });
        }
        verdict
    }

    /// What /proc shows of a worker only to whoever may trace it.
    pub(crate) fn records(&self, pid: i32) -> Result<Records> {
        self.launcher.records(pid.unsigned_abs())
    }

    fn observe(&self, pid: i32, unread: &mut Vec<Finding>) -> Observed {
        let namespaces = self.launcher.namespaces(pid.unsigned_abs());
        let namespaces = namespaces.unwrap_or_else(|refusal| {
            unread.push(other(None, refusal.reason));
            BTreeMap::new()
        });
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        let own = |mut thread: ObservedThread| {
            // A thread that did not stop in time for an earlier reading is the launcher's until it does.
            if self.launcher.pid() == thread.status.tracer {
                thread.status.tracer = 0;
            }
            thread
        };
        let threads = tasks.filter_map(|task| thread(&task.path()).map(own));
        Observed {
            threads: threads.collect(),
            namespaces,
            own_namespaces: self.own_namespaces.clone(),
        }
    }
}

/// What a process has to be before it is given anything: what it has to be ever after, and with nothing but its three first
/// descriptors.
pub(crate) fn fresh_process(
    prover: &Prover,
    pid: i32,
    binary: &WorkerBinary,
    cgroup: Option<&Cgroup>,
) -> Vec<Finding> {
    let records = match prover.records(pid) {
        Ok(records) => records,
        Err(refusal) => return vec![other(None, refusal.reason)],
    };
    let executable = binary.into();
    let (_, mut findings) =
        crate::worker::evidence::process(pid, &records, &executable, cgroup, None);
    let mut find = |what: String| findings.push(other(None, what));
    match records.descriptors {
        Ok(descriptors) => {
            let mut numbers: Vec<_> = descriptors.iter().map(|one| one.number).collect();
            numbers.sort_unstable();
            if numbers != [0, 1, 2] {
                let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
                find(format!("it holds descriptors {}", numbers.join(", ")));
            }
        }
        Err(e) => find(format!("its descriptors cannot be listed: {e}")),
    }
    findings
}

/// The threads of a process, by number.
pub(crate) fn threads_of(pid: i32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let mut tids: Vec<u32> = tasks
        .filter_map(|task| task.file_name().to_str().and_then(|name| name.parse().ok()))
        .collect();
    tids.sort_unstable();
    tids
}

pub(crate) fn other(tid: Option<u32>, what: String) -> Finding {
    Finding {
        tid,
        what: Discrepancy::Other { what },
    }
}

fn thread(task: &Path) -> Option<ObservedThread> {
    let read = |file: &str| {
        fs::read(task.join(file))
            .ok()
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    Some(ObservedThread {
        status: TaskStatus::parse(&read("status")?).ok()?,
        stat: TaskStat::parse(&read("stat")?).ok()?,
        filters: None,
    })
}
