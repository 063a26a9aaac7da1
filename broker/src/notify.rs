//! What the service manager is told: after a transfer, that another process is the service's main one, so that the old broker's
//! end is not the service's (sd_notify(3), `MAINPID=`).
//!
//! Nothing is said where no manager listens, and nothing that it sends is read.

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

/// Says which process the service is from now on.
pub(crate) fn main_process(process: u32) -> Result<()> {
    let Some(place) = std::env::var_os(VARIABLE).filter(|place| !place.is_empty()) else {
        return Ok(());
    };
    let cannot = "cannot tell the service manager of the new broker";
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(place.as_bytes()),
    };
    let address = address.doing(cannot)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
        .doing(cannot)?;
    let text = format!("MAINPID={process}\n");
    rustix::net::sendto(&socket, text.as_bytes(), SendFlags::NOSIGNAL, &address).doing(cannot)?;
    Ok(())
}
