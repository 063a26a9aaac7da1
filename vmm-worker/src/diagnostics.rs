//! Lines of text for the broker's log, through the pipe that is descriptor 2.
//!
//! The control thread writes here, and an I/O thread once a device; whole lines, and only when the pipe has room: a broker that does not read loses
//! lines, it does not stop the guest.

use std::fmt;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

/// The longest line, in bytes: what a pipe takes in one piece (PIPE_BUF, pipe(7)).
const MAX_LINE: usize = 4096;

/// Writes one line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let mut line = format!("worker: {text}").replace('\n', " ");
    if line.len() >= MAX_LINE {
        let end = (0..MAX_LINE)
            .rev()
            .find(|end| line.is_char_boundary(*end))
            .unwrap_or(0);
        line.truncate(end);
    }
    line.push('\n');
    let stderr = std::io::stderr();
    let mut poll = [PollFd::new(&stderr, PollFlags::OUT)];
    let ready = rustix::event::poll(
        &mut poll,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    );
    if ready.is_ok_and(|count| count > 0) {
        // Nobody is left to be told that this failed.
        let _ = rustix::io::write(&stderr, line.as_bytes());
    }
}

/// Writes one formatted line to the diagnostics pipe.
macro_rules! log {
    ($($argument:tt)*) => { crate::diagnostics::line(format_args!($($argument)*)) };
}

pub(crate) use log;
