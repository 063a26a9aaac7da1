//! Standard error for a process that must not wait: what nobody takes is dropped.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::OFlags;

/// What a pipe takes whole when poll(2) calls it writable: PIPE_BUF (limits.h, pipe(7)).
const ATOMIC: usize = 4096;

/// Standard error, never waited for.
#[derive(Debug, Default)]
pub struct Echo {
    /// An open file description of its own, so that O_NONBLOCK is nobody else's. There is none where standard error is a
    /// socket, or the file is not this user's to open.
    own: Option<File>,
}

impl Echo {
    /// Takes standard error as it is now.
    #[must_use]
    pub fn new() -> Self {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let own = OpenOptions::new()
            .append(true)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
            .open("/proc/self/fd/2")
            .ok();
        Self { own }
    }

    /// Says something, as far as it is taken now.
    pub fn say(&mut self, bytes: &[u8]) {
        let written = match &mut self.own {
            Some(file) => file.write_all(bytes),
            None => say_shared(bytes),
        };
        // A broken or full standard error is the operator's, and no reason to end.
        let _ = written;
    }
}

/// Piece by piece through the shared description, each only when it is taken at once.
fn say_shared(bytes: &[u8]) -> std::io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut stderr = std::io::stderr();
    for piece in bytes.chunks(ATOMIC) {
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        let ready = rustix::event::poll(&mut fds, Some(&now))?;
        if ready == 0 {
            return Ok(());
        }
        stderr.write_all(piece)?;
    }
    Ok(())
}
