//! vhost-user, the front end's half: what is asked of a process that implements a device, and its replies, which are hostile.
//! (QEMU, docs/interop/vhost-user.rst; names in capitals are its.)
//!
//! Nothing here waits: the socket does not block, so a request that the backend's queue has no room for is
//! [`VhostUserError::Full`], and a reply that has not come whole is `None`. How long to wait for one is the caller's to say.
//!
//! Guest RAM is announced with user addresses that are guest-physical ones, and rings are where the guest says: so nothing that
//! a backend was told depends on the address space of the process that told it, and a new worker need not tell it again.
//!
//! rust-vmm's crate `vhost` has a front end too. It reads until a reply is there, whatever the socket's timeout, so that a
//! backend that does not answer holds its caller for ever; and it maps guest memory, which a broker must not be able to.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use thiserror::Error;

use crate::worker::RamRegion;

/// Bit of a device's features (VHOST_USER_F_PROTOCOL_FEATURES): there are protocol features, and rings begin disabled.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature: GET_QUEUE_NUM (VHOST_USER_PROTOCOL_F_MQ).
pub const PROTOCOL_MQ: u64 = 1 << 0;
/// Protocol feature: GET_CONFIG (VHOST_USER_PROTOCOL_F_CONFIG).
pub const PROTOCOL_CONFIG: u64 = 1 << 9;

/// The longest device configuration that is asked for, in bytes.
pub const MAX_CONFIG: usize = 256;
/// The most regions of memory that every backend takes (VHOST_MEMORY_BASELINE_NREGIONS).
pub const MAX_REGIONS: usize = 8;

/// Bytes before each message's payload: request, flags, the payload's length; 32 bits each.
const HEADER: usize = 12;
/// Bytes before the configuration in a message that has it: offset, length, flags.
const CONFIG_HEADER: usize = 12;
/// The longest payload of a reply.
const MAX_PAYLOAD: usize = CONFIG_HEADER + MAX_CONFIG;
/// Flags: version 1, and that it is a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;

/// What went wrong with a backend. Nothing more is to be said to it then.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum VhostUserError {
    /// It has closed the connection, or is dead.
    #[error("it has hung up")]
    HungUp,
    /// It does not read what it is asked.
    #[error("it does not read its requests")]
    Full,
    /// The system call failed.
    #[error("{call}: {errno}")]
    Io {
        /// Which.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// A header that no reply has.
    #[error("a reply to request {request} with flags {flags:#x} and {length} bytes")]
    Header {
        /// The request that it names.
        request: u32,
        /// Its flags.
        flags: u32,
        /// The length of its payload.
        length: u32,
    },
    /// A reply to something else.
    #[error("a reply to request {found}, where one to {expected} belongs")]
    Other {
        /// What was asked.
        expected: u32,
        /// What was answered.
        found: u32,
    },
    /// A reply of another length.
    #[error("a reply to request {request} of {length} bytes")]
    Length {
        /// What was asked.
        request: u32,
        /// Bytes of its payload.
        length: usize,
    },
    /// A value that cannot be.
    #[error("a reply to request {request} with {field} {value}")]
    Value {
        /// What was asked.
        request: u32,
        /// Which field.
        field: &'static str,
        /// What it is.
        value: u64,
    },
    /// Bytes that nobody asked for.
    #[error("{0} bytes that nobody asked for")]
    Unasked(usize),
}

/// Where a ring is, guest-physical, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// What a front end asks. `queue` is a virtqueue's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the requests by their names in the specification"
)]
pub enum Request<'a> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    /// With a descriptor for each region, whose first byte is the region's.
    SetMemTable(&'a [RamRegion]),
    SetVringNum {
        queue: u16,
        size: u16,
    },
    SetVringAddr {
        queue: u16,
        place: RingPlace,
    },
    SetVringBase {
        queue: u16,
        next_available: u16,
    },
    GetVringBase {
        queue: u16,
    },
    /// With the eventfd. Starts the ring.
    SetVringKick {
        queue: u16,
    },
    /// With the eventfd.
    SetVringCall {
        queue: u16,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        queue: u16,
        enable: bool,
    },
    /// So many bytes from the first.
    GetConfig {
        length: u16,
    },
}

impl Request<'_> {
    /// Its number (VHOST_USER_*).
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::GetFeatures => 1,
            Self::SetFeatures(_) => 2,
            Self::SetOwner => 3,
            Self::SetMemTable(_) => 5,
            Self::SetVringNum { .. } => 8,
            Self::SetVringAddr { .. } => 9,
            Self::SetVringBase { .. } => 10,
            Self::GetVringBase { .. } => 11,
            Self::SetVringKick { .. } => 12,
            Self::SetVringCall { .. } => 13,
            Self::GetProtocolFeatures => 15,
            Self::SetProtocolFeatures(_) => 16,
            Self::GetQueueNum => 17,
            Self::SetVringEnable { .. } => 18,
            Self::GetConfig { .. } => 24,
        }
    }

    fn payload(&self) -> Vec<u8> {
        let pair =
            |queue: u16, value: u32| [u32::from(queue), value].map(u32::to_le_bytes).concat();
        match *self {
            Self::GetFeatures | Self::SetOwner | Self::GetProtocolFeatures | Self::GetQueueNum => {
                Vec::new()
            }
            Self::SetFeatures(bits) | Self::SetProtocolFeatures(bits) => {
                bits.to_le_bytes().to_vec()
            }
            Self::SetMemTable(regions) => {
                let count = u64::try_from(regions.len()).unwrap_or(u64::MAX);
                let words = regions.iter().flat_map(|region| {
                    let RamRegion { address, size } = *region;
                    // Guest-physical address, size, user address, offset in the descriptor's file.
                    [address, size, address, 0]
                });
                // A count of 32 bits, and 32 bits of nothing.
                std::iter::once(count)
                    .chain(words)
                    .flat_map(u64::to_le_bytes)
                    .collect()
            }
            Self::SetVringNum { queue, size } => pair(queue, size.into()),
            Self::SetVringBase {
                queue,
                next_available,
            } => pair(queue, next_available.into()),
            Self::GetVringBase { queue } => pair(queue, 0),
            Self::SetVringEnable { queue, enable } => pair(queue, enable.into()),
            Self::SetVringAddr { queue, place } => {
                let RingPlace {
                    descriptors,
                    available,
                    used,
                } = place;
                // Queue and flags of 32 bits each; the last is where writes would be logged.
                [queue.into(), descriptors, used, available, 0]
                    .map(u64::to_le_bytes)
                    .concat()
            }
            Self::SetVringKick { queue } | Self::SetVringCall { queue } => {
                u64::from(queue).to_le_bytes().to_vec()
            }
            Self::GetConfig { length } => {
                let mut payload = [0, u32::from(length), 0].map(u32::to_le_bytes).concat();
                payload.resize(CONFIG_HEADER + usize::from(length), 0);
                payload
            }
        }
    }

    /// Sends it, with the descriptors that belong to it, to a socket that does not block.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::HungUp`], [`VhostUserError::Full`], [`VhostUserError::Io`].
    pub fn send(&self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> Result<(), VhostUserError> {
        let payload = self.payload();
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut message = [self.number(), VERSION, length]
            .map(u32::to_le_bytes)
            .concat();
        message.extend(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(VhostUserError::Full);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            return match rustix::net::sendmsg(
                &socket,
                &[IoSlice::new(&message)],
                &mut control,
                flags,
            ) {
                Ok(sent) if sent == message.len() => Ok(()),
                // What is left of it would need a place to wait in: the queue holds hundreds of requests.
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => Err(VhostUserError::Full),
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(VhostUserError::HungUp),
                Err(errno) => Err(VhostUserError::Io {
                    call: "sendmsg",
                    errno,
                }),
            };
        }
    }
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    request: u32,
    payload: Vec<u8>,
}

impl Reply {
    fn expect<const N: usize>(&self, request: &Request<'_>) -> Result<[u8; N], VhostUserError> {
        self.answers(request)?;
        <[u8; N]>::try_from(&*self.payload).map_err(|_| VhostUserError::Length {
            request: self.request,
            length: self.payload.len(),
        })
    }

    fn answers(&self, request: &Request<'_>) -> Result<(), VhostUserError> {
        let expected = request.number();
        if self.request == expected {
            Ok(())
        } else {
            Err(VhostUserError::Other {
                expected,
                found: self.request,
            })
        }
    }

    /// The number that answers GET_FEATURES, GET_PROTOCOL_FEATURES or GET_QUEUE_NUM.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Other`], [`VhostUserError::Length`].
    pub fn number(&self, request: &Request<'_>) -> Result<u64, VhostUserError> {
        self.expect(request).map(u64::from_le_bytes)
    }

    /// The next entry of the available ring, which answers GET_VRING_BASE of this queue.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Other`], [`VhostUserError::Length`], [`VhostUserError::Value`].
    pub fn vring_base(&self, queue: u16) -> Result<u16, VhostUserError> {
        let [q0, q1, q2, q3, n0, n1, n2, n3] = self.expect(&Request::GetVringBase { queue })?;
        let wrong = |field, value: u32| VhostUserError::Value {
            request: self.request,
            field,
            value: value.into(),
        };
        let found = u32::from_le_bytes([q0, q1, q2, q3]);
        if found != u32::from(queue) {
            return Err(wrong("queue", found));
        }
        let next = u32::from_le_bytes([n0, n1, n2, n3]);
        u16::try_from(next).map_err(|_| wrong("index", next))
    }

    /// The bytes that answer GET_CONFIG with this length.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Other`], [`VhostUserError::Length`].
    pub fn config(self, length: u16) -> Result<Vec<u8>, VhostUserError> {
        self.answers(&Request::GetConfig { length })?;
        match self.payload.get(CONFIG_HEADER..) {
            Some(config) if config.len() == usize::from(length) => Ok(config.to_vec()),
            _ => Err(VhostUserError::Length {
                request: self.request,
                length: self.payload.len(),
            }),
        }
    }
}

/// What has come of replies that are not whole yet.
#[derive(Debug, Default)]
pub struct Replies {
    received: Vec<u8>,
}

impl Replies {
    /// The next reply, if it has come whole, from a socket that does not block. Descriptors that come with one are closed by
    /// the kernel: no reply that is asked for has any.
    ///
    /// # Errors
    ///
    /// [`VhostUserError`]; what follows cannot be told apart then.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Option<Reply>, VhostUserError> {
        loop {
            if let Some(reply) = self.take()? {
                return Ok(Some(reply));
            }
            let mut buffer = [0; HEADER + MAX_PAYLOAD];
            // Never more than one message: what nobody asked for stays where it is seen.
            let room = HEADER + MAX_PAYLOAD - self.received.len();
            let into = buffer.get_mut(..room).unwrap_or_default();
            match rustix::io::read(&socket, into) {
                Ok(0) => return Err(VhostUserError::HungUp),
                Ok(count) => self.received.extend(buffer.iter().take(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => return Err(VhostUserError::HungUp),
                Err(errno) => {
                    return Err(VhostUserError::Io {
                        call: "read",
                        errno,
                    });
                }
            }
        }
    }

    fn take(&mut self) -> Result<Option<Reply>, VhostUserError> {
        let Some((header, rest)) = self.received.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [r0, r1, r2, r3, f0, f1, f2, f3, l0, l1, l2, l3] = *header;
        let request = u32::from_le_bytes([r0, r1, r2, r3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let fits = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_PAYLOAD);
        let Some(whole) = fits.filter(|_| flags == VERSION | REPLY) else {
            return Err(VhostUserError::Header {
                request,
                flags,
                length,
            });
        };
        let Some(payload) = rest.get(..whole) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.received.drain(..HEADER + whole);
        Ok(Some(Reply { request, payload }))
    }

    /// Checks that nothing has come, from a backend that was asked nothing.
    ///
    /// # Errors
    ///
    /// [`VhostUserError::Unasked`], [`VhostUserError::HungUp`], [`VhostUserError::Io`].
    pub fn expect_none(&mut self, socket: impl AsFd) -> Result<(), VhostUserError> {
        match self.receive(socket) {
            Ok(None) if self.received.is_empty() => Ok(()),
            Ok(None) => Err(VhostUserError::Unasked(self.received.len())),
            Ok(Some(reply)) => Err(VhostUserError::Unasked(HEADER + reply.payload.len())),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::net::AddressFamily;
    use rustix::net::RecvAncillaryBuffer;
    use rustix::net::RecvAncillaryMessage;
    use rustix::net::RecvFlags;
    use rustix::net::SocketFlags;
    use rustix::net::SocketType;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        let mut bytes = [request, flags, length].map(u32::to_le_bytes).concat();
        bytes.extend(payload);
        bytes
    }

    /// What `request` is on the wire, and how many descriptors came with it.
    fn wire(request: Request<'_>, fds: &[BorrowedFd<'_>]) -> (Vec<u8>, usize) {
        let (ours, theirs) = pair();
        request.send(&ours, fds).unwrap();
        let mut bytes = [0; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = rustix::net::recvmsg(&theirs, &mut slices, &mut control, flags)
            .unwrap()
            .bytes;
        let came = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.count(),
            _ => 0,
        });
        let came = came.sum();
        (bytes[..count].to_vec(), came)
    }

    #[test]
    fn memory_is_announced_by_its_guest_physical_addresses() {
        let regions = [
            RamRegion {
                address: 0,
                size: 0x1000,
            },
            RamRegion {
                address: 1 << 32,
                size: 0x2000,
            },
        ];
        let (a, b) = pair();
        let (bytes, fds) = wire(Request::SetMemTable(&regions), &[a.as_fd(), b.as_fd()]);
        let words: [u64; 9] = [2, 0, 0x1000, 0, 0, 1 << 32, 0x2000, 1 << 32, 0];
        assert_eq!(bytes, message(5, 1, &words.map(u64::to_le_bytes).concat()));
        assert_eq!(fds, 2);
    }

    #[test]
    fn rings_are_where_the_guest_says() {
        let place = RingPlace {
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
        };
        let (bytes, _) = wire(Request::SetVringAddr { queue: 3, place }, &[]);
        let words: [u64; 5] = [3, 0x1000, 0x3000, 0x2000, 0];
        assert_eq!(bytes, message(9, 1, &words.map(u64::to_le_bytes).concat()));
        let (bytes, _) = wire(
            Request::SetVringBase {
                queue: 3,
                next_available: 0xFFFE,
            },
            &[],
        );
        assert_eq!(
            bytes,
            message(10, 1, &[3_u32, 0xFFFE].map(u32::to_le_bytes).concat())
        );
        let kick = pair().0;
        let (bytes, fds) = wire(Request::SetVringKick { queue: 3 }, &[kick.as_fd()]);
        assert_eq!((bytes, fds), (message(12, 1, &3_u64.to_le_bytes()), 1));
    }

    #[test]
    fn a_reply_that_comes_byte_by_byte_is_one_reply() {
        let (ours, theirs) = pair();
        let bytes = message(11, 5, &[2_u32, 77].map(u32::to_le_bytes).concat());
        let mut replies = Replies::default();
        for (index, byte) in bytes.iter().enumerate() {
            assert_eq!(replies.receive(&ours).unwrap(), None, "{index}");
            rustix::io::write(&theirs, &[*byte]).unwrap();
        }
        let reply = replies.receive(&ours).unwrap().unwrap();
        assert_eq!(reply.vring_base(2), Ok(77));
        replies.expect_none(&ours).unwrap();
    }

    #[test]
    fn nonsense_is_told_by_what_is_wrong_with_it() {
        let (ours, theirs) = pair();
        type Refused = fn(&VhostUserError) -> bool;
        let refused: [(Vec<u8>, Refused); 4] = [
            (message(11, 1, &[0; 8]), |e| {
                matches!(e, VhostUserError::Header { flags: 1, .. })
            }),
            (message(11, 6, &[0; 8]), |e| {
                matches!(e, VhostUserError::Header { flags: 6, .. })
            }),
            (message(11, 5, &[0; MAX_PAYLOAD + 1]), |e| {
                matches!(e, VhostUserError::Header { length: 269, .. })
            }),
            ([0xFF; 12].to_vec(), |e| {
                matches!(
                    e,
                    VhostUserError::Header {
                        length: u32::MAX,
                        ..
                    }
                )
            }),
        ];
        for (bytes, refused) in refused {
            let (ours, theirs) = pair();
            rustix::io::write(&theirs, &bytes).unwrap();
            let error = Replies::default().receive(&ours).unwrap_err();
            assert!(refused(&error), "{error}");
        }
        let base = |payload: &[u8]| {
            Reply {
                request: 11,
                payload: payload.to_vec(),
            }
            .vring_base(1)
        };
        let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
        assert!(matches!(
            base(&[]),
            Err(VhostUserError::Length { length: 0, .. })
        ));
        assert!(matches!(
            base(&[0; 9]),
            Err(VhostUserError::Length { length: 9, .. })
        ));
        assert!(matches!(
            base(&words([2, 0])),
            Err(VhostUserError::Value {
                field: "queue",
                value: 2,
                ..
            })
        ));
        assert!(matches!(
            base(&words([1, 0x1_0000])),
            Err(VhostUserError::Value {
                field: "index",
                value: 0x1_0000,
                ..
            })
        ));
        let other = Reply {
            request: 1,
            payload: words([1, 0]),
        };
        assert_eq!(
            other.vring_base(1),
            Err(VhostUserError::Other {
                expected: 11,
                found: 1
            })
        );
        let config = |payload: &[u8]| {
            Reply {
                request: 24,
                payload: payload.to_vec(),
            }
            .config(4)
        };
        assert_eq!(config(&[7; 16]), Ok(vec![7; 4]));
        for wrong in [0, 11, 12, 15, 17] {
            assert!(
                matches!(config(&vec![0; wrong]), Err(VhostUserError::Length { .. })),
                "{wrong}"
            );
        }
        rustix::io::write(&theirs, b"?").unwrap();
        assert_eq!(
            Replies::default().expect_none(&ours),
            Err(VhostUserError::Unasked(1))
        );
        drop(theirs);
        assert_eq!(
            Replies::default().expect_none(&ours),
            Err(VhostUserError::HungUp)
        );
        assert_eq!(
            Request::GetFeatures.send(&ours, &[]),
            Err(VhostUserError::HungUp)
        );
    }

    #[test]
    fn a_backend_that_does_not_read_is_not_waited_for() {
        let (ours, _theirs) = pair();
        let sent = (0..100_000)
            .take_while(|_| Request::GetFeatures.send(&ours, &[]).is_ok())
            .count();
        assert!((1..100_000).contains(&sent), "{sent}");
        assert_eq!(
            Request::GetFeatures.send(&ours, &[]),
            Err(VhostUserError::Full)
        );
    }
}
