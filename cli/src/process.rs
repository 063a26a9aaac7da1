//! Whether a process that a file names by pid and start time is still that process, and how it is ended.
//!
//! A pid alone is no identity: it is used again. The start time (field 22 of `/proc/PID/stat`, proc_pid_stat(5), in clock
//! ticks since the host's boot) tells the two apart; a pidfd keeps them apart from there on.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;

/// A process that runs.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// The process `pid`, if it is the one that started at `start` and has not ended.
    pub(crate) fn find(pid: u32, start: u64) -> Option<Self> {
        let raw = i32::try_from(pid).ok()?;
        // The descriptor first: what /proc says after that is of this process or of none.
        let pidfd = rustix::process::pidfd_open(Pid::from_raw(raw)?, PidfdFlags::empty()).ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, started) = parse_stat(&stat)?;
        (started == start && !matches!(state, 'Z' | 'X')).then_some(Self { pidfd })
    }

    /// Kills it, and waits until it has ended.
    pub(crate) fn kill(&self, patience: Duration) -> io::Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL)?;
        let mut ends = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
        match rustix::event::poll(&mut ends, Some(&timeout))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

/// State and start time. The command's name, in parentheses, may hold anything, also parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3.
    let start = fields.nth(22 - 4)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn start_of(pid: u32) -> u64 {
        parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap())
            .unwrap()
            .1
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) R 1 (b)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 10";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_of_the_same_pid_but_another_start_is_not_found() {
        let me = std::process::id();
        let start = start_of(me);
        assert!(Process::find(me, start).is_some());
        assert!(Process::find(me, start + 1).is_none());
        assert!(Process::find(0, 0).is_none());
        assert!(Process::find(u32::MAX, 0).is_none());
    }

    #[test]
    fn a_killed_process_is_seen_to_end() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let start = start_of(child.id());
        let process = Process::find(child.id(), start).unwrap();
        process.kill(Duration::from_secs(5)).unwrap();
        // A zombie until it is waited for, and no longer found.
        assert!(Process::find(child.id(), start).is_none());
        child.wait().unwrap();
    }
}
