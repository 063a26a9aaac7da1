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

    /// Takes what is pending: whether somebody wants the broker to end.
    pub(crate) fn asked_to_end(&self) -> bool {
        let mut end = false;
        while let Ok(Some(signal)) = self.0.read_signal() {
            let number = i32::try_from(signal.ssi_signo);
            end |= number == Ok(Signal::SIGTERM as i32) || number == Ok(Signal::SIGINT as i32);
        }
        end
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
