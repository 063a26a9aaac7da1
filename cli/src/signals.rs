//! SIGINT, SIGTERM and SIGHUP as something to poll for, so that a command ends by its ordinary ways out.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use baton_ipc::control::Refusal;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SfdFlags;
use nix::sys::signalfd::SignalFd;

use crate::failure::unfit;

/// The signals that ask this process to end.
#[derive(Debug)]
pub(crate) struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Takes them. Before any thread is made: a thread inherits what is blocked. (A child does not: std clears its mask.)
    pub(crate) fn take() -> Result<Self, Refusal> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()
            .and_then(|()| {
                SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            })
            .map(|descriptor| Self { descriptor })
            .map_err(|error| unfit(format!("cannot take signals: {error}"), ""))
    }

    /// Whether one came since the last call.
    pub(crate) fn came(&self) -> bool {
        let mut came = false;
        while let Ok(Some(_)) = self.descriptor.read_signal() {
            came = true;
        }
        came
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
