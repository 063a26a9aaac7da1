//! What a VM has on its host, as lists that can be compared: nothing may grow over upgrades (I5).

use std::collections::BTreeMap;
use std::path::Path;

/// A moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residue {
    /// What the broker's descriptors lead to, each with how often. Inode numbers are left out: sockets and pipes of
    /// another worker have others.
    pub broker: BTreeMap<String, usize>,
    /// The same of the worker.
    pub worker: BTreeMap<String, usize>,
    /// The broker's children, zombies too.
    pub children: usize,
    /// Processes in the VM's cgroup.
    pub in_cgroup: usize,
    /// Files below the run directory.
    pub files: Vec<String>,
}

impl Residue {
    pub(crate) fn of(broker: i32, worker: i32, cgroup: &Path, run_dir: &Path) -> Self {
        let mut files = Vec::new();
        list(run_dir, &mut files);
        files.sort();
        Self {
            broker: descriptors(broker),
            worker: descriptors(worker),
            children: children(broker),
            in_cgroup: crate::processes::in_cgroup(cgroup).len(),
            files,
        }
    }
}

fn descriptors(pid: i32) -> BTreeMap<String, usize> {
    let mut targets = BTreeMap::new();
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there");
    for entry in entries.flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy();
        let kind = target.split(":[").next().unwrap_or_default();
        *targets.entry(kind.to_owned()).or_default() += 1;
    }
    targets
}

fn children(pid: i32) -> usize {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).expect("the process is there");
    text.split_whitespace().count()
}

fn list(directory: &Path, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        files.push(entry.path().display().to_string());
        if entry.path().is_dir() {
            list(&entry.path(), files);
        }
    }
}
