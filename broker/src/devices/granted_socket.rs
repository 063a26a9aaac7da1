//! Connecting to a unix socket of the host for a guest, if policy grants the place that its path leads to.

use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;

use baton_policy::Policy;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use thiserror::Error;

/// Why there is no connection.
#[derive(Debug, Error)]
pub(crate) enum NotConnected {
    /// Nothing is there, or nobody.
    #[error(transparent)]
    Failed(#[from] std::io::Error),
    /// Policy does not grant the place.
    #[error("policy {policy} does not grant {}", place.display())]
    Denied { policy: String, place: PathBuf },
}

impl From<Errno> for NotConnected {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno.into())
    }
}

/// Connects, without waiting, to whoever listens where `path` leads, if `policy` grants that place under `descriptor`. The
/// connection does not block. Says where that is, too.
pub(crate) fn connect(
    path: &Path,
    policy: &Policy,
    descriptor: &str,
) -> Result<(OwnedFd, PathBuf), NotConnected> {
    // What the name leads to is held, so that what policy is asked about is what is connected to.
    let held = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let door = format!("/proc/self/fd/{}", held.as_raw_fd());
    let place = std::fs::read_link(&door)?;
    let granted = policy.grant(descriptor);
    if !granted.is_some_and(|grant| grant.permits_path(&place)) {
        return Err(NotConnected::Denied {
            policy: policy.name.clone(),
            place,
        });
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // It is not waited for: one whose queue is full refuses (unix(7): EAGAIN).
    rustix::net::connect(&socket, &SocketAddrUnix::new(door)?)?;
    Ok((socket, place))
}
