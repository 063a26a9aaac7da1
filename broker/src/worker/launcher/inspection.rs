//! Reading the filters of a thread, which is stopped for that long.

use std::time::Duration;
use std::time::Instant;

use baton_policy::Program;
use baton_policy::kernel;
use nix::sys::ptrace;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// How long a thread's stop is waited for without sleeping. Where a processor is free it takes some microseconds.
const SPIN: Duration = Duration::from_micros(50);

/// More filters than any thread has: all of them together take at most 32768 instructions, and each counts as at least five
/// (MAX_INSNS_PER_PATH, kernel/seccomp.c).
const MAX_FILTERS: u32 = 6553;

/// Threads under inspection.
#[derive(Debug, Default)]
pub(super) struct Inspection {
    /// Those that did not stop in time to be read, and have to be let go when they do.
    held: Vec<i32>,
}

impl Inspection {
    /// Whether there are threads that have not stopped yet.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Lets go of threads that have stopped by now. One that has died is gone only when its tracer has reaped it.
    pub(super) fn let_go(&mut self) {
        self.held.retain(|&tid| {
            let pid = Pid::from_raw(tid);
            match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => true,
                Ok(WaitStatus::Stopped(_, signal)) => ptrace::detach(pid, signal).is_err(),
                Ok(WaitStatus::PtraceEvent(..)) => ptrace::detach(pid, None).is_err(),
                Ok(_) | Err(_) => false,
            }
        });
    }

    /// All filters of a thread, and for how long it stood still, at the most: from the last look that found it going on.
    pub(super) fn filters(
        &mut self,
        tid: u32,
        count: u32,
        within: Duration,
    ) -> Result<(Vec<Program>, Duration), String> {
        if count > MAX_FILTERS {
            return Err(format!("no thread has {count} filters"));
        }
        let tid = i32::try_from(tid).map_err(|e| e.to_string())?;
        let by = Instant::now() + within;
        // Of an earlier reading: it is let go of first, and one thread is not traced twice.
        while self.held.contains(&tid) {
            if Instant::now() >= by {
                return Err("it has not stopped since it was to be read before".to_owned());
            }
            std::thread::sleep(Duration::from_micros(20));
            self.let_go();
        }
        read(tid, count, by).map_err(|(held, what)| {
            self.held.extend(held.then_some(tid));
            what
        })
    }
}

/// `Err(true, …)`: it is still to be let go of.
fn read(tid: i32, count: u32, by: Instant) -> Result<(Vec<Program>, Duration), (bool, String)> {
    let pid = Pid::from_raw(tid);
    let failed =
        |held: bool, what: &str, e: &dyn std::fmt::Display| (held, format!("cannot {what}: {e}"));
    ptrace::seize(pid, ptrace::Options::empty()).map_err(|e| failed(false, "trace it", &e))?;
    ptrace::interrupt(pid).map_err(|e| failed(true, "stop it", &e))?;
    let began = Instant::now();
    let mut went_on = began;
    let signal = loop {
        let look = Instant::now();
        match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if look >= by => {
                return Err(failed(true, "stop it", &"it does not stop"));
            }
            // From its stop on it waits for this thread, which does not yield to others therefore: they would have the processor
            // for a slice each.
            Ok(WaitStatus::StillAlive) => {
                went_on = look;
                if look.duration_since(began) < SPIN {
                    std::hint::spin_loop();
                } else {
                    std::thread::sleep(Duration::from_micros(20));
                }
            }
            // It was about to take a signal, which it gets when it is let go.
            Ok(WaitStatus::Stopped(_, signal)) => break Some(signal),
            Ok(WaitStatus::PtraceEvent(..)) => break None,
            Ok(other) => return Err(failed(false, "stop it", &format_args!("{other:?}"))),
            Err(e) => return Err(failed(true, "stop it", &e)),
        }
    };
    let read = (0..count)
        .map(|index| kernel::seccomp_get_filter(tid, index))
        .collect::<Result<_, _>>()
        .map_err(|e| failed(false, "read its filters", &e));
    ptrace::detach(pid, signal).map_err(|e| failed(true, "let go of it", &e))?;
    Ok((read?, went_on.elapsed()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_thread_that_did_not_stop_in_time_is_read_once_it_does() {
        // Whoever calls posix_spawn(3) cannot be stopped before the child has executed; this one waits for a FIFO first.
        let program = "import os, sys
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])
sys.stdin.read()";
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut child = Command::new("python3")
            .args(["-c", program])
            .arg(&fifo)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = format!("/proc/{0}/task/{0}", child.id());
        let of_it = |file: &str| std::fs::read_to_string(format!("{process}/{file}")).unwrap();
        let patience = Instant::now() + Duration::from_secs(20);
        while of_it("children").is_empty() || !of_it("stat").contains(") D ") {
            assert!(Instant::now() < patience, "it does not spawn");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut inspection = Inspection::default();
        let mut read = |within| {
            let read = inspection.filters(child.id(), 0, within);
            (read.map(|(filters, _)| filters.len()), inspection.holds())
        };
        let short = Duration::from_millis(20);
        let (found, held) = read(short);
        assert!(held && found.unwrap_err().contains("does not stop"));
        let (found, held) = read(short);
        assert!(held && found.unwrap_err().contains("has not stopped"));
        drop(File::options().write(true).open(&fifo).unwrap());
        assert_eq!(read(Duration::from_secs(20)), (Ok(0), false));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
