//! The vsock from one broker to the next. Its connections are descriptors like any other. The listening socket goes over
//! before the guest, and its path is the other broker's from the commit on; who is there by then and has no connection yet goes
//! over too. In between nobody accepts and nobody connects: who wants to waits in the socket's queue, or in this broker's.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use baton_ipc::DescriptorKey;
use baton_ipc::Registry;
use baton_ipc::descriptor;
use baton_ipc::transfer::VsockPart;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketType;

use super::Caller;
use super::MAX_CALLERS;
use super::MAX_LINE;
use super::PATIENCE;
use super::Vsock;
use super::parse;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// One message: a part, and what comes with it.
pub(crate) type Part = (VsockPart, Option<OwnedFd>);

impl Vsock {
    /// Where it listens.
    pub(crate) fn listener(&self) -> impl AsFd {
        self.listener.as_fd()
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Who has no connection yet. The path is another's from now on.
    pub(crate) fn into_parts(self) -> Vec<Part> {
        self.file.leave();
        let asked = VsockPart::Asked(self.asked.into());
        let callers = self
            .callers
            .into_iter()
            .map(|caller| (VsockPart::Caller(caller.line), Some(caller.socket)));
        std::iter::once((asked, None)).chain(callers).collect()
    }

    /// Takes one of those over. More than there can be, and what no broker of ours says, is forgotten.
    pub(crate) fn take_part(&mut self, part: VsockPart, socket: Option<OwnedFd>) {
        match (part, socket) {
            (VsockPart::Asked(asked), _) => {
                let room = (MAX_VSOCK_CONNECTIONS as usize).saturating_sub(self.asked.len());
                self.asked.extend(asked.into_iter().take(room));
            }
            (VsockPart::Caller(line), Some(socket)) => {
                if self.callers.len() < MAX_CALLERS && line.len() <= MAX_LINE {
                    self.callers.push(Caller {
                        socket,
                        port: parse(&line),
                        line,
                        by: std::time::Instant::now() + PATIENCE,
                    });
                }
            }
            (VsockPart::Caller(_), None) => {}
        }
    }
}

/// Checks that what came as the vsock's socket listens at `path`.
pub(crate) fn check_listener(socket: Option<&OwnedFd>, path: &Path) -> Result<()> {
    let socket = socket.ok_or_else(|| unfit("the vsock's listening socket did not come", ""))?;
    let listens = rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(false);
    let kind = rustix::net::sockopt::socket_type(socket).ok();
    let domain = rustix::net::sockopt::socket_domain(socket).ok();
    if !listens || kind != Some(SocketType::STREAM) || domain != Some(AddressFamily::UNIX) {
        return Err(unfit(
            "what came as the vsock's listening socket is none",
            "",
        ));
    }
    // Nobody waits where nobody calls.
    rustix::io::ioctl_fionbio(socket, true).doing("cannot use the vsock's listening socket")?;
    let name = rustix::net::getsockname(socket)
        .ok()
        .and_then(|name| SocketAddrUnix::try_from(name).ok());
    let bound = name.as_ref().and_then(SocketAddrUnix::path_bytes);
    if bound == Some(path.as_os_str().as_bytes()) {
        return Ok(());
    }
    let bound = String::from_utf8_lossy(bound.unwrap_or_default());
    Err(unfit(
        format_args!(
            "vsock.socket: the running VM has {}, the new VM file {}",
            baton_audit::quoted(&bound),
            path.display()
        ),
        "name the socket that the running VM has",
    ))
}

/// The ids of the connections that there are.
pub(crate) fn connections(registry: &Registry) -> Vec<u32> {
    registry
        .iter()
        .filter(|(key, ..)| key.name() == descriptor::VSOCK)
        .map(|(key, ..)| key.id())
        .collect()
}

/// Forgets the connections that are not among `open`.
pub(crate) fn forget_others(registry: &mut Registry, open: &[u32]) {
    for id in connections(registry) {
        if !open.contains(&id) {
            let key = DescriptorKey::new(descriptor::VSOCK, id);
            let _ = key.map(|key| registry.delete(&key));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::os::unix::net::UnixStream;

    use baton_ipc::DescriptorKind;

    use super::*;

    #[test]
    fn connections_that_were_closed_on_the_way_are_forgotten() {
        let mut registry = Registry::default();
        for (name, id) in [
            (descriptor::VSOCK, 1),
            (descriptor::VSOCK, 2),
            ("console", 2),
        ] {
            let key = DescriptorKey::new(name, id).unwrap();
            let (socket, _) = UnixStream::pair().unwrap();
            socket.set_nonblocking(true).unwrap();
            registry
                .save(key, DescriptorKind::Stream, socket.into())
                .unwrap();
        }
        forget_others(&mut registry, &[1, 5]);
        assert_eq!(connections(&registry), [1]);
        assert_eq!(registry.len(), 2);
    }

    #[test]
    fn the_socket_and_its_callers_change_hands_and_nobody_removes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let mut old = Vsock::listen(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        old.hear_callers();
        let copy = old.listener().as_fd().try_clone_to_owned().unwrap();
        check_listener(Some(&copy), &path).unwrap();
        let parts = old.into_parts();
        assert!(path.exists());
        let mut new = Vsock::resume(&path, copy).unwrap();
        for (part, socket) in parts {
            new.take_part(part, socket);
        }
        assert_eq!(new.callers.len(), 1);
        let _second = UnixStream::connect(&path).unwrap();
        new.hear_callers();
        assert_eq!(new.callers.len(), 2);
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn what_listens_elsewhere_or_not_at_all_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        check_listener(Some(&listener), &path).unwrap();
        let other = directory.path().join("w");
        let elsewhere = check_listener(Some(&listener), &other).unwrap_err();
        assert!(elsewhere.reason.contains("the running VM has"));
        let connected = OwnedFd::from(UnixStream::connect(&path).unwrap());
        check_listener(Some(&connected), &path).unwrap_err();
        check_listener(None, &path).unwrap_err();
    }
}
