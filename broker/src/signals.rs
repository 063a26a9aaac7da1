//! The signals that the broker takes, as a descriptor of its loop.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SfdFlags;
use nix::sys::signalfd::SignalFd;

use crate::refusal::Doing;
use crate::refusal::Result;

/// SIGCHLD wakes the loop; SIGTERM and SIGINT end the VM. (std gives children an empty signal mask again.)
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    pub(crate) fn new() -> Result<Self> {
        let set: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT]
            .into_iter()
            .collect();
        set.thread_block().doing("cannot block signals")?;
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map(Self)
            .doing("cannot receive signals")
    }

    /// Takes what is pending.
    pub(crate) fn take(&self) -> Taken {
        let mut taken = Taken::default();
        while let Ok(Some(signal)) = self.0.read_signal() {
            match i32::try_from(signal.ssi_signo).ok() {
                Some(number) if number == Signal::SIGCHLD as i32 => taken.child = true,
                _ => taken.end = true,
            }
        }
        taken
    }
}

/// What was signalled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Taken {
    /// Something became of a child.
    pub(crate) child: bool,
    /// Somebody wants the broker to end.
    pub(crate) end: bool,
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
