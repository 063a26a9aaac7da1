//! Reading the kernel's own records of a worker, for comparison with what was declared. Nothing that a worker says of itself
//! is evidence here, and names are not either.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::binary::WorkerBinary;
use crate::broker::Rules;
use crate::cgroup::Cgroup;
use crate::worker::Worker;

/// What a broker compares its workers with.
#[derive(Debug)]
pub(crate) struct Prover {
    inherited_filters: u32,
    own_namespaces: BTreeMap<Namespace, (u64, u64)>,
    /// Why filters cannot be read back, when they cannot.
    pub(crate) unreadable: Option<String>,
}

impl Prover {
    /// Reads what this process has, which its children inherit.
    pub(crate) fn new() -> Self {
        let own = fs::read_to_string("/proc/self/status").ok();
        let status = own.and_then(|text| TaskStatus::parse(&text).ok());
        let inherited_filters = status.as_ref().map_or(0, |status| status.seccomp_filters);
        let unreadable = if !rustix::process::geteuid().is_root() {
            Some(
                "PTRACE_SECCOMP_GET_FILTER needs CAP_SYS_ADMIN in the initial user namespace"
                    .to_owned(),
            )
        } else if status.is_none_or(|status| status.seccomp != 0) {
            Some("the broker runs under a seccomp filter of its own".to_owned())
        } else {
            None
        };
        Self {
            inherited_filters,
            own_namespaces: namespaces("self"),
            unreadable,
        }
    }

    /// Compares a worker's threads with the policy. The threads are stopped for as long as their filters are read.
    pub(crate) fn threads(&self, rules: &Rules, worker: &Worker, moment: Moment) -> Verdict {
        let policy = &rules.policy;
        let declared = Declared {
            compiled: &rules.compiled,
            inherited_filters: self.inherited_filters,
            keep: policy.capabilities,
            uid: worker.ids.uid,
            gid: worker.ids.gid,
            namespaces: &policy.namespaces,
            moment,
        };
        let mut observed = self.observe(worker.process.pid);
        let mut unread = Vec::new();
        if self.unreadable.is_none() {
            for thread in observed
                .threads
                .iter_mut()
                .filter(|thread| !thread.stat.is_user_worker())
            {
                match filters(thread.status.pid, thread.status.seccomp_filters) {
                    Ok(filters) => thread.filters = Some(filters),
                    Err(what) => unread.push(other(Some(thread.status.pid), what)),
                }
            }
        }
        let mut verdict = prove(&declared, &observed);
        if verdict.evidence == Evidence::Counted && self.unreadable.is_none() {
            verdict.findings.extend(unread);
        }
        verdict
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

/// What the process as a whole has to be, besides its threads: the checked binary, in an empty root, in the VM's cgroup, with
/// nothing but its three first descriptors.
pub(crate) fn fresh_process(
    worker: &Worker,
    binary: &WorkerBinary,
    cgroup: Option<&Cgroup>,
) -> Vec<Finding> {
    let proc = format!("/proc/{}", worker.process.pid);
    let mut findings = Vec::new();
    let mut find = |what: String| findings.push(other(None, what));
    let exe = fs::metadata(format!("{proc}/exe"))
        .ok()
        .map(|exe| (exe.dev(), exe.ino()));
    if exe.is_none() || exe != binary.identity() {
        find(format!(
            "it executes {exe:?}, not the checked copy {:?}",
            binary.identity()
        ));
    }
    match fs::read_dir(format!("{proc}/root/")) {
        Ok(entries) => {
            for entry in entries.flatten() {
                find(format!("its root holds {:?}", entry.file_name()));
            }
        }
        Err(e) => find(format!("its root cannot be listed: {e}")),
    }
    match fs::read_to_string(format!("{proc}/mountinfo")) {
        Ok(mounts) if mounts.lines().count() == 1 && mounts.contains(" - tmpfs ") => {}
        Ok(mounts) => find(format!(
            "it has {} mounts, not the one empty root",
            mounts.lines().count()
        )),
        Err(e) => find(format!("its mounts cannot be read: {e}")),
    }
    if let Some(cgroup) = cgroup {
        if !cgroup.holds(worker.process.pid) {
            find(format!("it is not in {}", cgroup.path().display()));
        }
    }
    match fs::read_dir(format!("{proc}/fd")) {
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

fn other(tid: Option<u32>, what: String) -> Finding {
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

/// Reads all filters of a thread, which is stopped for that long.
fn filters(tid: u32, count: u32) -> std::result::Result<Vec<Program>, String> {
    let raw = i32::try_from(tid).map_err(|e| e.to_string())?;
    let pid = Pid::from_raw(raw);
    let failed = |what: &str, e: &dyn std::fmt::Display| format!("cannot {what}: {e}");
    ptrace::seize(pid, ptrace::Options::empty()).map_err(|e| failed("trace it", &e))?;
    let read = ptrace::interrupt(pid)
        .and_then(|()| waitpid(pid, Some(WaitPidFlag::__WALL)))
        .map_err(|e| failed("stop it", &e))
        .and_then(|_| {
            (0..count)
                .map(|index| kernel::seccomp_get_filter(raw, index))
                .collect::<std::result::Result<_, _>>()
                .map_err(|e| failed("read its filters", &e))
        });
    let detached = ptrace::detach(pid, None).map_err(|e| failed("let go of it", &e));
    let read = read?;
    detached.map(|()| read)
}
