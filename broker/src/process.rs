//! What /proc says of a process, as far as the broker acts on it. Everything here is the kernel's own record.

use std::fs;

/// A process that is told apart from a later one with the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot (proc_pid_stat(5)).
    pub(crate) start: u64,
}

/// `PF_EXITING` (include/linux/sched.h): the task is shutting down, and never runs user or guest code again.
const PF_EXITING: u64 = 0x4;

impl ProcessId {
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let start = stat_field(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, 22)?;
        Some(Self { pid, start })
    }

    pub(crate) fn of_self() -> Option<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Whether this very process still runs: it is there, and has not begun to exit.
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self) && !is_exiting(self.pid)
    }
}

/// Whether every thread of a process has begun to exit (or there is none): from then on none of them returns to user
/// mode or enters a guest, though the process may take long to be gone, since its memory is torn down first.
pub(crate) fn is_exiting(pid: i32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    tasks.flatten().all(|task| {
        fs::read_to_string(task.path().join("stat"))
            .ok()
            .is_none_or(|stat| stat_field(&stat, 9).is_none_or(|flags| flags & PF_EXITING != 0))
    })
}

/// A numeric field of a stat line, counted from 1 as proc_pid_stat(5) does; 3 is the first after the name, which ends at
/// the last `)` whatever it contains.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(number.checked_sub(3)?)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_successor_is_another() {
        let me = ProcessId::of_self().unwrap();
        assert!(me.is_alive());
        let other = ProcessId { start: me.start + 1, ..me };
        assert!(!other.is_alive());
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

    #[test]
    fn a_name_cannot_forge_fields() {
        let stat = "42 (evil) 1 2) S 1 42 42 0 -1 4194304 0";
        assert_eq!(stat_field(stat, 9), Some(0x40_0000));
    }
}
