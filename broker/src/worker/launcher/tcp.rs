//! TCP sockets for the main channel of a transfer, at addresses that policy grants. The broker cannot make any, and a worker gets
//! one that is connected.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::time::Timespec;

use crate::transfer::channel_socket::words;

/// How long a connection may take. Within a host it is there at once, unless nobody accepts.
pub(super) const CONNECTING: Duration = Duration::from_millis(100);

/// How many may have connected before the broker looks at them: anybody on this host can, and says nothing.
const BACKLOG: i32 = 128;

/// Where sockets may be made.
#[derive(Debug, Default)]
pub(super) struct Permitted(Option<Vec<IpAddr>>);

impl Permitted {
    /// Says where, once.
    pub(super) fn set(&mut self, addresses: Vec<IpAddr>) -> Result<(), String> {
        if self.0.is_some() {
            return Err("the addresses were named already".to_owned());
        }
        self.0 = Some(addresses);
        Ok(())
    }

    fn check(&self, address: SocketAddr) -> Result<(), String> {
        let granted = self.0.iter().flatten().any(|one| *one == address.ip());
        match (granted, address.port()) {
            (true, 1..) => Ok(()),
            (true, 0) => Err("port 0 is none".to_owned()),
            (false, _) => Err(format!(
                "policy grants the main channel no TCP at {}",
                address.ip()
            )),
        }
    }

    /// A socket that listens.
    pub(super) fn listen(&self, address: SocketAddr) -> Result<OwnedFd, String> {
        self.check(address)?;
        let listen = || -> Result<OwnedFd, Errno> {
            let socket = socket(address)?;
            // A connection that has ended there is in nobody's way.
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        listen().map_err(words)
    }

    /// A socket that is connected.
    pub(super) fn connect(&self, address: SocketAddr) -> Result<OwnedFd, String> {
        self.check(address)?;
        let connect = || -> Result<OwnedFd, Errno> {
            let socket = socket(address)?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Ok(socket),
                Err(Errno::INPROGRESS) => {}
                Err(e) => return Err(e),
            }
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(CONNECTING.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => Err(Errno::TIMEDOUT),
                Ok(_) => {
                    rustix::net::sockopt::socket_error(&socket)??;
                    Ok(socket)
                }
                Err(e) => Err(e),
            }
        };
        connect().map_err(words)
    }
}

fn socket(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // The state is one piece, and its end must not wait for an acknowledgement (tcp(7)); accepted sockets inherit this.
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_made_where_that_is_granted_once_and_nowhere_else() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let mut permitted = Permitted::default();
        permitted.listen(address).unwrap_err();
        permitted.set(vec![address.ip()]).unwrap();
        permitted.set(vec!["0.0.0.0".parse().unwrap()]).unwrap_err();
        let refused = permitted.connect(address).unwrap_err();
        assert_eq!(refused, "Connection refused");
        let _listener = permitted.listen(address).unwrap();
        permitted.connect(address).unwrap();
        let taken = permitted.listen(address).unwrap_err();
        assert_eq!(taken, "Address already in use");
        for elsewhere in ["127.0.0.2:1", "0.0.0.0:1", "[::1]:1", "127.0.0.1:0"] {
            let elsewhere = elsewhere.parse().unwrap();
            permitted.listen(elsewhere).unwrap_err();
            permitted.connect(elsewhere).unwrap_err();
        }
    }
}
