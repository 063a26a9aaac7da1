//! What /proc says of a process, as far as the broker acts on it. Everything here is the kernel's own record.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::path::Path;

use baton_policy::procfs::TaskStat;

/// A process that is told apart from a later one with the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot (proc_pid_stat(5)).
    pub(crate) start: u64,
}

impl ProcessId {
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = stat(Path::new(&format!("/proc/{pid}/stat")))?;
        Some(Self {
            pid,
            start: stat.start_time,
        })
    }

    pub(crate) fn of_self() -> Option<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Whether this very process still runs: it is there, and has not begun to exit. In doubt, it does.
    pub(crate) fn is_alive(self) -> bool {
        match fs::read(format!("/proc/{}/stat", self.pid)) {
            Err(error) => !is_absent(&error),
            Ok(text) => {
                parse(&text).is_none_or(|stat| stat.start_time == self.start)
                    && !is_exiting(self.pid)
            }
        }
    }
}

/// Whether every thread of a process has begun to exit (or there is none): from then on none of them returns to user
/// mode or enters a guest, though the process may take long to be gone, since its memory is torn down first.
///
/// Only the kernel's word counts: a record that cannot be read for another reason than its absence is no proof.
pub(crate) fn is_exiting(pid: i32) -> bool {
    let tasks = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) => return is_absent(&error),
    };
    for task in tasks {
        let Ok(task) = task else { return false };
        match fs::read(task.path().join("stat")) {
            Ok(text) => {
                if !parse(&text).is_some_and(|stat| stat.is_exiting()) {
                    return false;
                }
            }
            Err(error) if is_absent(&error) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Whether every thread of a process is stopped (state T of proc_pid_stat(5)) or exiting, twice over the same threads: then no
/// thread has run between the two looks, and none runs until SIGCONT.
pub(crate) fn is_wholly_stopped(pid: i32) -> bool {
    let look = || -> Option<Vec<std::ffi::OsString>> {
        let mut threads = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
            let task = task.ok()?;
            let stat = parse(&fs::read(task.path().join("stat")).ok()?)?;
            if stat.state != 'T' && !stat.is_exiting() {
                return None;
            }
            threads.push(task.file_name());
        }
        Some(threads)
    };
    look().is_some_and(|first| !first.is_empty() && look().as_ref() == Some(&first))
}

/// The process behind a pidfd, unless it has been reaped or is of another pid namespace (field `Pid`, proc_pid_fdinfo(5)).
pub(crate) fn of_pidfd(pidfd: BorrowedFd<'_>) -> Option<ProcessId> {
    let number = || {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
        line.trim().parse::<i32>().ok().filter(|pid| *pid > 0)
    };
    let process = ProcessId::of(number()?)?;
    // Not reaped in between: the record was its own.
    (number() == Some(process.pid)).then_some(process)
}

/// Whether an error of /proc says that the process or the thread is gone.
fn is_absent(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Whether a process is stopped, or is in the kernel and cannot be reached: it will take no orders.
pub(crate) fn is_stopped(pid: i32) -> bool {
    stat(Path::new(&format!("/proc/{pid}/stat"))).is_some_and(|stat| stat.state == 'T')
}

/// Whose child a process is.
#[cfg(feature = "fail-points")]
pub(crate) fn parent(pid: i32) -> Option<i32> {
    let stat = stat(Path::new(&format!("/proc/{pid}/stat")))?;
    i32::try_from(stat.ppid).ok()
}

/// This thread's children, the adopted ones too (/proc/PID/task/TID/children, proc(5)).
pub(crate) fn children() -> Vec<i32> {
    let text = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn stat(path: &Path) -> Option<TaskStat> {
    parse(&fs::read(path).ok()?)
}

fn parse(text: &[u8]) -> Option<TaskStat> {
    // A name is bytes, and hostile ones need not be text.
    TaskStat::parse(&String::from_utf8_lossy(text)).ok()
}

/// The threads of a worker that are called `vcpu0` and so on, in that order.
pub(crate) fn vcpu_threads(pid: i32, count: u8) -> Vec<u32> {
    let tids = crate::worker::proof::threads_of(pid);
    let name = |tid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default()
    };
    let named: Vec<_> = tids.into_iter().map(|tid| (name(&tid), tid)).collect();
    let thread = |index: u8| {
        let name = format!("vcpu{index}");
        named.iter().find(|named| named.0.trim_end() == name)
    };
    (0..count).filter_map(thread).map(|named| named.1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_successor_is_another() {
        let me = ProcessId::of_self().unwrap();
        assert!(me.is_alive());
        let other = ProcessId {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_stopped_process_is_known_by_its_threads_and_by_its_pidfd() {
        use std::os::fd::AsFd;
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let raw = rustix::process::Pid::from_raw(pid).unwrap();
        let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()).unwrap();
        assert_eq!(of_pidfd(pidfd.as_fd()), ProcessId::of(pid));
        assert!(!is_wholly_stopped(pid));
        rustix::process::kill_process(raw, rustix::process::Signal::STOP).unwrap();
        while !is_wholly_stopped(pid) {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_wholly_stopped(pid), "it is gone");
        assert_eq!(of_pidfd(pidfd.as_fd()), None);
    }

    #[test]
    fn a_zombie_is_exiting() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        while !is_exiting(pid) {
            std::thread::yield_now();
        }
        assert!(ProcessId::of(pid).is_some(), "not reaped yet");
        child.wait().unwrap();
        assert!(is_exiting(pid));
    }
}
