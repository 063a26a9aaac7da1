//! Somebody who listens to a guest's serial port.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::Duration;
use std::time::Instant;

use baton_tests::Vm;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

/// When who has not been hung up on is taken for one who never will be.
const STAYS: Duration = Duration::from_secs(2);

/// Dropped, it leaves.
pub(crate) struct Listener {
    stream: OwnedFd,
    child: Option<Child>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // The only error is that it has ended.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

impl Listener {
    /// Connects to the socket that QEMU has for it.
    pub(crate) fn at(socket: &Path) -> Self {
        Self {
            stream: UnixStream::connect(socket).unwrap().into(),
            child: None,
        }
    }

    /// `baton console`.
    pub(crate) fn of(vm: &Vm) -> Self {
        let mut child = vm.at_console(&[]);
        let mut listener = Self {
            stream: child.stdout.take().unwrap().into(),
            child: Some(child),
        };
        assert!(!listener.is_over(Duration::MAX), "the guest prints nothing");
        listener
    }

    /// Whether it is hung up on.
    pub(crate) fn is_hung_up_on(&mut self) -> bool {
        let deadline = Instant::now() + STAYS;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_over(left) {
                return !left.is_zero();
            }
        }
    }

    /// Hears the next of it, if that comes soon enough; whether that was the end.
    fn is_over(&mut self, within: Duration) -> bool {
        let timeout = Timespec::try_from(within).ok();
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
        let ready = rustix::event::poll(&mut polled, timeout.as_ref()).unwrap();
        ready > 0 && rustix::io::read(&self.stream, &mut [0; 4096]) == Ok(0)
    }
}
