//! One end of the main channel. Nothing here blocks past a deadline, whatever the other worker does.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use thiserror::Error;

/// Bytes read at once: more than the state of a guest with eight vCPUs.
const BUFFER: usize = 128 << 10;

/// Why the main channel fails.
#[derive(Debug, Error)]
pub(crate) enum MainError {
    /// A system call failed.
    #[error("main channel: {call}: {source}")]
    Io {
        /// Which.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The other worker does not read.
    #[error("main channel: {left} of {length} bytes were not taken within {timeout:?}")]
    Stalled {
        /// Bytes left.
        left: usize,
        /// Bytes in all.
        length: usize,
        /// How long it had.
        timeout: Duration,
    },
}

fn io(call: &'static str, source: Errno) -> MainError {
    MainError::Io {
        call,
        source: source.into(),
    }
}

/// A stream socket to the other worker.
pub(crate) struct MainChannel {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl MainChannel {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
        }
    }

    /// Sends all of `bytes`, or as much as the other side takes within `timeout`.
    ///
    /// # Errors
    ///
    /// [`MainError`].
    pub(crate) fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<(), MainError> {
        let begun = Instant::now();
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::net::send(
                &self.socket,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = timeout.saturating_sub(begun.elapsed());
                    if left.is_zero() {
                        return Err(MainError::Stalled {
                            left: rest.len(),
                            length: bytes.len(),
                            timeout,
                        });
                    }
                    self.wait_writable(left)?;
                }
                Err(e) => return Err(io("send", e)),
            }
        }
        Ok(())
    }

    fn wait_writable(&self, timeout: Duration) -> Result<(), MainError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        match rustix::event::poll(
            &mut [PollFd::new(&self.socket, PollFlags::OUT)],
            Some(&timeout),
        ) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(io("poll", e)),
        }
    }

    /// Receives what is there: `None` when the other side has closed, no bytes when there are none now.
    ///
    /// # Errors
    ///
    /// [`MainError::Io`].
    pub(crate) fn receive(&mut self) -> Result<Option<&[u8]>, MainError> {
        self.buffer.resize(BUFFER, 0);
        loop {
            match rustix::net::recv(
                &self.socket,
                self.buffer.as_mut_slice(),
                RecvFlags::DONTWAIT,
            ) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(None),
                Ok((_, count)) => return Ok(Some(self.buffer.get(..count).unwrap_or_default())),
                Err(Errno::AGAIN) => return Ok(Some(&[])),
                Err(Errno::INTR) => {}
                Err(e) => return Err(io("recv", e)),
            }
        }
    }
}

/// Makes the system calls of this module, which fail: `no_socket` is none. What counts is that the filter lets them.
///
/// # Errors
///
/// [`MainError::Io`] when they fail for another reason than that.
pub(crate) fn rehearse(no_socket: BorrowedFd<'_>) -> Result<(), MainError> {
    let not_a_socket = |call, outcome| match outcome {
        Err(Errno::NOTSOCK) => Ok(()),
        Err(e) => Err(io(call, e)),
        Ok(_) => Err(io(call, Errno::ISCONN)),
    };
    let sent = rustix::net::send(no_socket, &[], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    not_a_socket("send", sent)?;
    let received = rustix::net::recv(no_socket, &mut [0_u8; 1][..], RecvFlags::DONTWAIT);
    not_a_socket("recv", received.map(|(_, count)| count))
}

impl AsFd for MainChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_read_is_a_stall_and_one_that_is_gone_an_end() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut a, mut b) = (MainChannel::new(a.into()), MainChannel::new(b.into()));
        assert_eq!(b.receive().unwrap(), Some(&[][..]));
        a.send(b"state", Duration::ZERO).unwrap();
        assert_eq!(b.receive().unwrap(), Some(&b"state"[..]));
        let large = vec![0; 8 << 20];
        let stalled = a.send(&large, Duration::from_millis(20)).unwrap_err();
        assert!(
            matches!(stalled, MainError::Stalled { length, left, .. } if length == large.len() && left > 0)
        );
        drop(a);
        while b.receive().unwrap().is_some_and(|bytes| !bytes.is_empty()) {}
        assert_eq!(b.receive().unwrap(), None);
        assert!(matches!(
            b.send(b"anyone?", Duration::ZERO),
            Err(MainError::Io { call: "send", .. })
        ));
    }
}
