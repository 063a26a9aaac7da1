//! Reading the kernel's own records of a worker, for comparison with what was declared. Nothing that a worker says of itself
//! is evidence here, and names are not either.

use std::cell::Cell;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use baton_policy::Namespace;
use baton_policy::Program;
use baton_policy::kernel;
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
use nix::sys::ptrace;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::binary::WorkerBinary;
use crate::broker::Rules;
use crate::cgroup::Cgroup;
use crate::ids::HostIds;

/// How long a thread's stop is waited for without sleeping.
const SPIN: Duration = Duration::from_micros(200);

/// What a broker compares its workers with.
#[derive(Debug)]
pub(crate) struct Prover {
    inherited_filters: u32,
    own_namespaces: BTreeMap<Namespace, (u64, u64)>,
    /// The supplementary groups of this process.
    pub(crate) own_groups: Vec<u32>,
    /// Why filters cannot be read back, when they cannot.
    pub(crate) unreadable: Option<String>,
    /// Threads that did not stop in time to be read, and have to be let go when they do.
    held: RefCell<Vec<i32>>,
    /// The longest that a thread stood still in the last reading.
    pub(crate) stood: Cell<Duration>,
    /// How long the reading of all filters of one worker may take. A thread that does not stop by then is a finding.
    reading: Duration,
}

impl Prover {
    /// Reads what this process has, which its children inherit.
    pub(crate) fn new(reading: Duration) -> Self {
        let own = fs::read_to_string("/proc/self/status").ok();
        let status = own.and_then(|text| TaskStatus::parse(&text).ok());
        let inherited_filters = status.as_ref().map_or(0, |status| status.seccomp_filters);
        let unreadable = if !rustix::process::geteuid().is_root() {
            Some(
                "PTRACE_SECCOMP_GET_FILTER needs CAP_SYS_ADMIN in the initial user namespace"
                    .to_owned(),
            )
        } else if status.as_ref().is_none_or(|status| status.seccomp != 0) {
            Some("the broker runs under a seccomp filter of its own".to_owned())
        } else {
            None
        };
        Self {
            inherited_filters,
            own_namespaces: namespaces("self"),
            own_groups: status.map(|status| status.groups).unwrap_or_default(),
            unreadable,
            held: RefCell::new(Vec::new()),
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
        let mut observed = self.observe(pid);
        let mut unread = Vec::new();
        let by = Instant::now() + self.reading;
        self.stood.set(Duration::ZERO);
        if self.unreadable.is_none() {
            for thread in observed
                .threads
                .iter_mut()
                .filter(|thread| !thread.stat.is_user_worker())
            {
                let began = Instant::now();
                let read = filters(thread.status.pid, thread.status.seccomp_filters, by);
                self.stood.set(self.stood.get().max(began.elapsed()));
                match read {
                    Ok(filters) => thread.filters = Some(filters),
                    Err((held, what)) => {
                        let tid = i32::try_from(thread.status.pid).ok().filter(|_| held);
                        self.held.borrow_mut().extend(tid);
                        unread.push(other(Some(thread.status.pid), what));
                    }
                }
            }
        }
        let mut verdict = prove(&declared, &observed);
        if verdict.evidence == Evidence::Counted && self.unreadable.is_none() {
            verdict.findings.extend(unread);
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

    /// Lets go of threads that have stopped by now.
    pub(crate) fn let_go(&self) {
        self.held.borrow_mut().retain(|&tid| {
            let pid = Pid::from_raw(tid);
            match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => true,
                Ok(WaitStatus::Stopped(_, signal)) => ptrace::detach(pid, signal).is_err(),
                Ok(WaitStatus::PtraceEvent(..)) => ptrace::detach(pid, None).is_err(),
                Ok(_) | Err(_) => false,
            }
        });
    }

    /// Whether threads are held that have not stopped yet.
    pub(crate) fn holds(&self) -> bool {
        !self.held.borrow().is_empty()
    }

    fn observe(&self, pid: i32) -> Observed {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        Observed {
            threads: tasks.filter_map(|task| thread(&task.path())).collect(),
            namespaces: namespaces(&pid.to_string()),
            own_namespaces: self.own_namespaces.clone(),
        }
    }
}

/// What a process has to be before it is given anything: what it has to be ever after, and with nothing but its three first
/// descriptors.
pub(crate) fn fresh_process(
    pid: i32,
    binary: &WorkerBinary,
    cgroup: Option<&Cgroup>,
) -> Vec<Finding> {
    let (_, mut findings) = crate::evidence::process(pid, &binary.into(), cgroup, None);
    let mut find = |what: String| findings.push(other(None, what));
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(descriptors) => {
            let mut numbers: Vec<_> = descriptors
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect();
            numbers.sort();
            if numbers != ["0", "1", "2"] {
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

fn namespaces(process: &str) -> BTreeMap<Namespace, (u64, u64)> {
    let identity = |namespace: &Namespace| {
        let metadata =
            fs::metadata(format!("/proc/{process}/ns/{}", namespace.proc_name())).ok()?;
        Some((*namespace, (metadata.dev(), metadata.ino())))
    };
    Namespace::ALL.iter().filter_map(identity).collect()
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

/// Reads all filters of a thread, which is stopped for that long. `Err(true, …)`: it is still to be let go of.
fn filters(tid: u32, count: u32, by: Instant) -> std::result::Result<Vec<Program>, (bool, String)> {
    let raw = i32::try_from(tid).map_err(|e| (false, e.to_string()))?;
    let pid = Pid::from_raw(raw);
    let failed =
        |held: bool, what: &str, e: &dyn std::fmt::Display| (held, format!("cannot {what}: {e}"));
    ptrace::seize(pid, ptrace::Options::empty()).map_err(|e| failed(false, "trace it", &e))?;
    ptrace::interrupt(pid).map_err(|e| failed(true, "stop it", &e))?;
    let began = Instant::now();
    let signal = loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
            // It stops within microseconds where a processor is free, and stands still until this one has gone on.
            Ok(WaitStatus::StillAlive) if began.elapsed() < SPIN => std::thread::yield_now(),
            Ok(WaitStatus::StillAlive) if Instant::now() < by => {
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(WaitStatus::StillAlive) => return Err(failed(true, "stop it", &"it does not stop")),
            // It was about to take a signal, which it gets when it is let go.
            Ok(WaitStatus::Stopped(_, signal)) => break Some(signal),
            Ok(WaitStatus::PtraceEvent(..)) => break None,
            Ok(other) => return Err(failed(false, "stop it", &format_args!("{other:?}"))),
            Err(e) => return Err(failed(true, "stop it", &e)),
        }
    };
    let read = (0..count)
        .map(|index| kernel::seccomp_get_filter(raw, index))
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| failed(false, "read its filters", &e));
    ptrace::detach(pid, signal).map_err(|e| failed(true, "let go of it", &e))?;
    read
}
