//! What the service manager is told: after a transfer, that another process is the service's main one, so that the old broker's
//! end is not the service's (sd_notify(3), `MAINPID=`).
//!
//! Nothing is said where no manager listens, and nothing that it sends is read.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::net::AddressFamily;
use rustix::net::SendFlags;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use crate::refusal::Doing;
use crate::refusal::Result;

/// Where it listens (sd_notify(3)): a path, or after `@` an abstract name.
const VARIABLE: &str = "NOTIFY_SOCKET";

const CANNOT: &str = "cannot tell the service manager of the new broker";

/// The service manager, where there is one.
#[derive(Debug)]
pub(crate) struct Manager(Option<OwnedFd>);

impl Manager {
    /// Connects to it: in its domain, the broker reaches no abstract socket any more.
    pub(crate) fn connect() -> Result<Self> {
        let Some(place) = std::env::var_os(VARIABLE).filter(|place| !place.is_empty()) else {
            return Ok(Self(None));
        };
        let address = match place.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name),
            None => SocketAddrUnix::new(place.as_bytes()),
        };
        let address = address.doing(CANNOT)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
            .doing(CANNOT)?;
        // Who left the variable behind need not listen any more.
        let connected = rustix::net::connect(&socket, &address);
        Ok(Self(connected.is_ok().then_some(socket)))
    }

    /// Says which process the service is from now on.
    pub(crate) fn main_process(&self, process: u32) -> Result<()> {
        let Some(socket) = &self.0 else {
            return Ok(());
        };
        let text = format!("MAINPID={process}\n");
        rustix::net::send(socket, text.as_bytes(), SendFlags::NOSIGNAL).doing(CANNOT)?;
        Ok(())
    }
}
