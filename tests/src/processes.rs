//! Processes of a VM, looked at from outside.

use std::fs;
use std::path::Path;

use rustix::process::Pid;
use rustix::process::Signal;

/// A process's state letter (proc_pid_stat(5)), if it exists.
pub(crate) fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().chars().next()
}

/// Whether a process runs or could run again: it exists and is no zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// All processes in a cgroup that are not dead. A cgroup that is gone has none.
pub(crate) fn in_cgroup(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let pids = text.lines().filter_map(|line| line.parse().ok());
    pids.filter(|pid| is_alive(*pid)).collect()
}

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // The only error for root is that the process is gone.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// SIGKILL.
pub fn kill_process(pid: i32) {
    signal(pid, Signal::KILL);
}

/// SIGSTOP, and waits until every thread of it stands still.
pub fn stop_process(pid: i32) {
    signal(pid, Signal::STOP);
    crate::until("the process is stopped", || {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
            // It is gone.
            return Some(());
        };
        let mut states = tasks.flatten().map(|task| {
            fs::read_to_string(task.path().join("stat"))
                .ok()
                .and_then(|stat| stat.rsplit_once(')')?.1.trim_start().chars().next())
        });
        states
            .all(|state| matches!(state, None | Some('T' | 'Z' | 'X')))
            .then_some(())
    });
}

/// A process and all that it has started (proc_pid_task_children(5)).
#[must_use]
pub fn with_children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let children = tasks.into_iter().flatten().flatten().flat_map(|task| {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let pids: Vec<i32> = text
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect();
        pids
    });
    std::iter::once(pid)
        .chain(children.flat_map(with_children))
        .collect()
}

/// SIGSTOP, without waiting for it to take effect.
pub fn signal_stop(pid: i32) {
    signal(pid, Signal::STOP);
}

/// Whether a process is stopped.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    state(pid) == Some('T')
}

/// SIGCONT.
pub fn continue_process(pid: i32) {
    signal(pid, Signal::CONT);
}
