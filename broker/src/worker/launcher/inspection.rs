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

/// How long a thread's stop is waited for without sleeping.
const SPIN: Duration = Duration::from_micros(200);

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

    /// All filters of a thread, and for how long it stood still.
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
        let began = Instant::now();
        match read(tid, count, began + within) {
            Ok(filters) => Ok((filters, began.elapsed())),
            Err((held, what)) => {
                self.held.extend(held.then_some(tid));
                Err(what)
            }
        }
    }
}

/// `Err(true, …)`: it is still to be let go of.
fn read(tid: i32, count: u32, by: Instant) -> Result<Vec<Program>, (bool, String)> {
    let pid = Pid::from_raw(tid);
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
        .map(|index| kernel::seccomp_get_filter(tid, index))
        .collect::<Result<_, _>>()
        .map_err(|e| failed(false, "read its filters", &e));
    ptrace::detach(pid, signal).map_err(|e| failed(true, "let go of it", &e))?;
    read
}
