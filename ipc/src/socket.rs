//! The framed, descriptor-passing socket that every control path of one VM runs over.
//!
//! One [`FdSocket`] is one end of an `AF_UNIX` `SOCK_SEQPACKET` connection (unix(7)): message boundaries are kept, end of
//! file is seen, and at most [`MAX_DESCRIPTORS`] descriptors travel with a message. The contract:
//!
//! * descriptors go out borrowed and come in owned, always close-on-exec;
//! * a message or control data that did not fit is an error, and closes every descriptor that came with it. The kernel
//!   also truncates control data when the receiver has no free descriptor slot (EMFILE) or a security module refuses;
//! * nothing here blocks: both ends are made non-blocking, and "not now" is a value ([`Received::Empty`]) or
//!   [`SocketError::Full`].
//!
//! Sending is sendfd's; receiving is rustix's, since sendfd's receive neither sets close-on-exec nor shows truncation.

use std::io;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::ReturnFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use sendfd::SendWithFd;
use thiserror::Error;

/// The longest message, in bytes. A quarter of the default send buffer (net.core.wmem_default, 212,992), so that a few
/// always fit.
pub const MAX_MESSAGE: usize = 48 * 1024;

/// The most descriptors in one message; the kernel's own limit is 253 (SCM_MAX_FD, include/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 8;

/// Why a message could not be sent or received.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The system call failed.
    #[error("{call}: {source}")]
    Io {
        /// The call that failed.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The peer has closed its end.
    #[error("the peer has hung up")]
    HungUp,
    /// The peer does not read: its queue is full.
    #[error("the peer's queue is full")]
    Full,
    /// A message to send is empty or longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes cannot be sent (1 to {MAX_MESSAGE})")]
    Length(usize),
    /// More descriptors to send than [`MAX_DESCRIPTORS`].
    #[error("{0} descriptors cannot be sent in one message (at most {MAX_DESCRIPTORS})")]
    Descriptors(usize),
    /// The peer sent more bytes than a message may have; all descriptors that came with it are closed.
    #[error("the peer's message is longer than {MAX_MESSAGE} bytes")]
    Truncated,
    /// The control data did not fit, or this process has no free descriptor slots; what did come is closed.
    #[error(
        "descriptors were lost on the way: more than {MAX_DESCRIPTORS} were sent, or this process is at its limit of open files"
    )]
    DescriptorsTruncated,
    /// A message carried no bytes but descriptors, or descriptors where none are expected.
    #[error("{0} unexpected descriptors came with a message")]
    Unexpected(usize),
}

impl SocketError {
    fn io(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io {
            call,
            source: source.into(),
        }
    }
}

/// What one receive gave.
#[derive(Debug)]
pub enum Received<M> {
    /// A message and the descriptors that came with it.
    Message(M, Vec<OwnedFd>),
    /// Nothing is queued now.
    Empty,
    /// The peer has closed its end, and everything that it had sent was received.
    HungUp,
}

/// One end of a descriptor-passing connection.
#[derive(Debug)]
pub struct FdSocket {
    // std has no type for SOCK_SEQPACKET; what it does with a datagram socket is right for both.
    socket: UnixDatagram,
}

impl FdSocket {
    /// Makes a connected pair, both ends non-blocking and close-on-exec.
    ///
    /// # Errors
    ///
    /// [`SocketError::Io`] with the error of socketpair(2).
    pub fn pair() -> Result<(Self, Self), SocketError> {
        rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map(|(a, b)| (Self::from(a), Self::from(b)))
        .map_err(|e| SocketError::io("socketpair", e))
    }

    /// Sends one message. On success the kernel has queued all of it, and its own references to the descriptors.
    ///
    /// # Errors
    ///
    /// [`SocketError::Length`] and [`SocketError::Descriptors`] before anything is sent, [`SocketError::Full`] when the
    /// peer does not read, [`SocketError::HungUp`] when it has closed.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        if bytes.is_empty() || bytes.len() > MAX_MESSAGE {
            return Err(SocketError::Length(bytes.len()));
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(SocketError::Descriptors(descriptors.len()));
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        loop {
            match self.socket.send_with_fd(bytes, &raw) {
                Ok(_) => return Ok(()),
                Err(e) => match Errno::from_io_error(&e) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN | Errno::NOBUFS) => return Err(SocketError::Full),
                    Some(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                        return Err(SocketError::HungUp);
                    }
                    _ => return Err(SocketError::io("sendmsg", e)),
                },
            }
        }
    }

    /// The next message, which stays queued, if there is one that `buffer` has room for.
    #[must_use]
    pub fn peek<'a>(&self, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, length) = rustix::net::recv(&self.socket, &mut *buffer, flags).ok()?;
        buffer.get(..length)
    }

    /// Receives one message into `buffer`, which gets exactly its bytes.
    ///
    /// # Errors
    ///
    /// [`SocketError::Truncated`] and [`SocketError::DescriptorsTruncated`], all descriptors closed.
    pub fn receive(&self, buffer: &mut Vec<u8>) -> Result<Received<()>, SocketError> {
        buffer.resize(MAX_MESSAGE, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut reset = false;
        let message = loop {
            match rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            ) {
                Ok(message) => break message,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    buffer.clear();
                    return Ok(Received::Empty);
                }
                // The other end was closed with messages from here in it. The kernel says so once, before it gives out what
                // the other end had said, and that may be why it was closed.
                Err(Errno::CONNRESET) if !reset => reset = true,
                Err(Errno::CONNRESET) => {
                    buffer.clear();
                    return Ok(Received::HungUp);
                }
                Err(e) => return Err(SocketError::io("recvmsg", e)),
            }
        };
        // Owned from here on: every return below closes what came.
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(SocketError::DescriptorsTruncated);
        }
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Err(SocketError::Truncated);
        }
        buffer.truncate(message.bytes);
        if message.bytes == 0 {
            // Nobody here sends an empty message, so no bytes means end of file.
            return match descriptors.len() {
                0 => Ok(Received::HungUp),
                n => Err(SocketError::Unexpected(n)),
            };
        }
        Ok(Received::Message((), descriptors))
    }
}

impl From<OwnedFd> for FdSocket {
    fn from(fd: OwnedFd) -> Self {
        Self {
            socket: UnixDatagram::from(fd),
        }
    }
}

impl From<FdSocket> for OwnedFd {
    fn from(socket: FdSocket) -> Self {
        socket.socket.into()
    }
}

impl AsFd for FdSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use rustix::io::FdFlags;
    use rustix::io::fcntl_getfd;

    use super::*;

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn a_descriptor_arrives_close_on_exec_and_is_the_same_file() {
        let (a, b) = FdSocket::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        a.send(b"x", &[file.as_fd()]).unwrap();
        let mut buffer = Vec::new();
        let Received::Message((), fds) = b.receive(&mut buffer).unwrap() else {
            panic!("no message");
        };
        assert_eq!(buffer, b"x");
        assert_eq!(fds.len(), 1);
        assert!(fcntl_getfd(&fds[0]).unwrap().contains(FdFlags::CLOEXEC));
        let (sent, received) = (
            rustix::fs::fstat(&file).unwrap(),
            rustix::fs::fstat(&fds[0]).unwrap(),
        );
        assert_eq!(
            (sent.st_dev, sent.st_ino),
            (received.st_dev, received.st_ino)
        );
    }

    #[test]
    fn who_closes_with_messages_unread_is_heard_to_the_end() {
        let (a, b) = FdSocket::pair().unwrap();
        a.send(b"never read", &[]).unwrap();
        for word in [b"first", b"final"] {
            b.send(word, &[]).unwrap();
        }
        drop(b);
        let mut buffer = Vec::new();
        for word in [b"first", b"final"] {
            let received = a.receive(&mut buffer).unwrap();
            assert!(matches!(received, Received::Message((), _)), "{received:?}");
            assert_eq!(buffer, word);
        }
        let end = a.receive(&mut buffer).unwrap();
        assert!(matches!(end, Received::HungUp), "{end:?}");
    }

    #[test]
    fn truncated_control_data_closes_all_and_fails() {
        let (a, b) = FdSocket::pair().unwrap();
        let files: Vec<_> = (0..MAX_DESCRIPTORS + 4)
            .map(|_| File::open("/dev/null").unwrap())
            .collect();
        let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let before = open_descriptors();
        a.socket.send_with_fd(b"too many", &raw).unwrap();
        let result = b.receive(&mut Vec::new());
        assert!(
            matches!(result, Err(SocketError::DescriptorsTruncated)),
            "{result:?}"
        );
        assert_eq!(open_descriptors(), before);
    }

    #[test]
    fn a_long_message_is_refused_on_both_sides() {
        let (a, b) = FdSocket::pair().unwrap();
        let long = vec![7; MAX_MESSAGE + 1];
        assert!(matches!(a.send(&long, &[]), Err(SocketError::Length(n)) if n == long.len()));
        assert!(matches!(a.send(&[], &[]), Err(SocketError::Length(0))));
        let file = File::open("/dev/null").unwrap();
        let before = open_descriptors();
        a.socket.send_with_fd(&long, &[file.as_raw_fd()]).unwrap();
        assert!(matches!(
            b.receive(&mut Vec::new()),
            Err(SocketError::Truncated)
        ));
        assert_eq!(open_descriptors(), before);
    }

    #[test]
    fn queued_messages_come_before_the_hang_up() {
        let (a, b) = FdSocket::pair().unwrap();
        let mut buffer = Vec::new();
        assert!(matches!(b.receive(&mut buffer), Ok(Received::Empty)));
        a.send(b"last words", &[]).unwrap();
        drop(a);
        assert!(matches!(
            b.receive(&mut buffer),
            Ok(Received::Message((), _))
        ));
        assert_eq!(buffer, b"last words");
        assert!(matches!(b.receive(&mut buffer), Ok(Received::HungUp)));
        assert!(matches!(b.send(b"anyone?", &[]), Err(SocketError::HungUp)));
    }

    #[test]
    fn a_peer_that_does_not_read_is_full_not_blocking() {
        let (a, _b) = FdSocket::pair().unwrap();
        let message = vec![0; MAX_MESSAGE];
        let sent = (0..64)
            .take_while(|_| a.send(&message, &[]).is_ok())
            .count();
        assert!(sent >= 3, "{sent}");
        assert!(matches!(a.send(&message, &[]), Err(SocketError::Full)));
    }
}
