//! The host's side of a guest's vsock: the socket that programs of the host connect to, and the ones that the guest's
//! programs reach. By Firecracker's convention, so that its clients work:
//!
//! * Whoever connects to SOCKET writes `CONNECT PORT` and a newline, and gets `OK HOSTPORT` when the guest has accepted. (The
//!   worker writes that; here the line is read, and not a byte more.)
//! * The guest's connection to port P of the host, context id 2, reaches whoever listens on `SOCKET_P`.
//!
//! Policy permits each by its path, and so by its port. A worker gets connected sockets and nothing else. The registry has
//! each for as long as the worker has not said that it is closed, so that it is in every CPR state.
//! While the guest goes to another broker nobody accepts and nobody connects (`handover`).

pub(crate) mod handover;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::StartMode;
use baton_ipc::descriptor;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::Order;
use baton_ipc::worker::VsockOrder;
use baton_ipc::worker::VsockReport;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use serde_json::json;

use crate::broker::Broker;
use crate::clients::socket_file::SocketFile;
use crate::devices::granted_socket;
use crate::devices::granted_socket::NotConnected;
use crate::devices::resources::check_grant;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::upgrade::Upgrade;
use crate::worker::Phase;

/// Programs of the host that have not said what they want, or that nobody had time for.
const MAX_CALLERS: usize = 16;
/// How long one may take to say it.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest line: the word, a space, the digits of a u32, a newline.
const MAX_LINE: usize = "CONNECT 4294967295\n".len();
/// Connections that are made at once, and how long each takes to be earned again: every one is in the audit log.
const BURST: u32 = 64;
const EARNED: Duration = Duration::from_millis(10);
/// How soon what could not be done is tried again.
const RETRY: Duration = Duration::from_millis(10);

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// The host's side.
#[derive(Debug)]
pub(crate) struct Vsock {
    path: PathBuf,
    listener: OwnedFd,
    /// Goes with this.
    file: SocketFile,
    /// The guest is on its way to another broker: who wants a connection waits until somebody has it.
    held: bool,
    callers: Vec<Caller>,
    /// What the guest has asked for: ticket and port.
    asked: VecDeque<(u32, u32)>,
    allowance: u32,
    earned: Instant,
}

/// A program of the host.
#[derive(Debug)]
struct Caller {
    socket: OwnedFd,
    line: Vec<u8>,
    /// The guest's port, when it has said which.
    port: Option<u32>,
    by: Instant,
}

impl Caller {
    /// Reads on; `false` when it is not to be had.
    fn listen(&mut self) -> bool {
        let mut byte = [0];
        while self.port.is_none() && self.line.len() < MAX_LINE {
            // One by one: what follows the line is the guest's.
            match rustix::io::read(&self.socket, &mut byte) {
                Ok(1) => self.line.extend(byte),
                Err(Errno::AGAIN | Errno::INTR) => return Instant::now() < self.by,
                _ => return false,
            }
            if byte == *b"\n" {
                self.port = parse(&self.line);
                return self.port.is_some();
            }
        }
        self.port.is_some()
    }
}

/// The port of `CONNECT PORT` and a newline.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    let digits = std::str::from_utf8(digits).ok()?;
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

impl Vsock {
    /// Listens at `path`, whose directory has to exist. A socket that nobody listens on any more is taken over.
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let address = address(path)?;
        let socket = || {
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)
                .doing("cannot make the vsock's socket")
        };
        let listener = socket()?;
        let mut bound = rustix::net::bind(&listener, &address);
        // A file that is none is "refused", too.
        let is_socket = rustix::fs::lstat(path)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
        let abandoned = bound == Err(Errno::ADDRINUSE)
            && is_socket
            && rustix::net::connect(&socket()?, &address) == Err(Errno::CONNREFUSED);
        if abandoned {
            let _ = rustix::fs::unlink(path);
            bound = rustix::net::bind(&listener, &address);
        }
        bound
            .and_then(|()| rustix::fs::chmod(path, Mode::from_raw_mode(0o600)))
            .and_then(|()| rustix::net::listen(&listener, 16))
            .map_err(|e| {
                unfit(
                    format_args!("cannot listen on vsock.socket {}: {e}", path.display()),
                    "it has to be a path where this user can make a socket, and where nothing is yet",
                )
            })?;
        Self::resume(path, listener)
    }

    /// Listens on a socket that was bound at `path`, and owns that from now on.
    pub(crate) fn resume(path: &Path, listener: OwnedFd) -> Result<Self> {
        let file = SocketFile::at(path).doing(format_args!("cannot examine {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            file,
            held: false,
            callers: Vec::new(),
            asked: VecDeque::new(),
            allowance: BURST,
            earned: Instant::now(),
        })
    }

    /// What to poll for reading.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let room = self.callers.len() < MAX_CALLERS && !self.held;
        let speaking = self.callers.iter().filter(|caller| caller.port.is_none());
        let speaking = speaking.filter(|_| !self.held);
        let listener = room.then(|| self.listener.as_fd());
        listener
            .into_iter()
            .chain(speaking.map(|caller| caller.socket.as_fd()))
    }

    /// When it is to be looked at without being ready.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.held {
            return None;
        }
        let waiting = !self.asked.is_empty() || self.callers.iter().any(|one| one.port.is_some());
        let retry = waiting.then(|| Instant::now() + RETRY);
        let speaking = self.callers.iter().filter(|one| one.port.is_none());
        speaking.map(|one| one.by).chain(retry).min()
    }

    /// Lets everybody wait, or no longer.
    fn hold(&mut self, held: bool) {
        if self.held && !held {
            // Nobody has listened to them meanwhile.
            let by = Instant::now() + PATIENCE;
            self.callers.iter_mut().for_each(|caller| caller.by = by);
        }
        self.held = held;
    }

    /// Takes in who is at the door, and hears what they want.
    fn hear_callers(&mut self) {
        while self.callers.len() < MAX_CALLERS {
            let Ok(socket) = rustix::net::accept_with(&self.listener, FLAGS) else {
                break;
            };
            self.callers.push(Caller {
                socket,
                line: Vec::new(),
                port: None,
                by: Instant::now() + PATIENCE,
            });
        }
        self.callers
            .retain_mut(|caller| caller.port.is_some() || caller.listen());
    }

    /// Whether one more connection may be made now.
    fn may(&mut self) -> bool {
        let earned = self.earned.elapsed().as_millis() / EARNED.as_millis();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(BURST);
            self.allowance = self.allowance.saturating_add(earned).min(BURST);
            self.earned = Instant::now();
        }
        self.allowance > 0
    }

    /// The socket that a port of the host is.
    fn path_of(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

fn address(path: &Path) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|_| {
        unfit(
            format_args!("the path {} is too long for a socket", path.display()),
            "choose a shorter vsock.socket",
        )
    })
}

/// What is wanted next.
#[derive(Clone, Copy)]
enum Wanted {
    /// By the guest.
    Asked { ticket: u32, port: u32 },
    /// By a program of the host; the index of its caller.
    Called { caller: usize, port: u32 },
}

/// Why a connection is not made.
enum Not {
    /// The worker takes no orders now.
    Now,
    /// It is not to be had.
    Ever(String),
}

impl Vsock {
    fn wanted(&self) -> Option<Wanted> {
        if let Some((ticket, port)) = self.asked.front().copied() {
            return Some(Wanted::Asked { ticket, port });
        }
        let mut callers = self.callers.iter().enumerate();
        callers.find_map(|(caller, one)| one.port.map(|port| Wanted::Called { caller, port }))
    }

    /// What was wanted is done.
    fn done(&mut self, wanted: Wanted) {
        self.allowance = self.allowance.saturating_sub(1);
        match wanted {
            Wanted::Asked { .. } => drop(self.asked.pop_front()),
            Wanted::Called { caller, .. } if caller < self.callers.len() => {
                self.callers.swap_remove(caller);
            }
            Wanted::Called { .. } => {}
        }
    }
}

impl Broker {
    /// Takes in what a worker says of its guest's vsock.
    pub(crate) fn vsock_said(&mut self, report: VsockReport) {
        match report {
            VsockReport::Connect { ticket, port } => {
                // No honest worker has more under way.
                let most = MAX_VSOCK_CONNECTIONS as usize;
                if let Some(vsock) = self.vsock.as_mut().filter(|one| one.asked.len() < most) {
                    vsock.asked.push_back((ticket, port));
                }
            }
            VsockReport::Closed { id } => {
                let key = DescriptorKey::new(descriptor::VSOCK, id);
                // One that it never had is none of the registry's.
                let _ = key.map(|key| self.registry.delete(&key));
            }
        }
    }

    /// Makes the connections that the guest and the host's programs ask for.
    pub(crate) fn advance_vsock(&mut self) {
        let leaving = self.upgrade.as_ref().and_then(Upgrade::outgoing).is_some();
        if let Some(vsock) = &mut self.vsock {
            vsock.hold(leaving);
            if leaving {
                return;
            }
            vsock.hear_callers();
        }
        // In other phases nobody takes orders. A guest that stands still finds its connections later.
        let told = |phase| matches!(phase, Phase::Running | Phase::Transferring);
        while self.worker.as_ref().is_some_and(|one| told(one.phase)) {
            let wanted = match &mut self.vsock {
                Some(vsock) => vsock.may().then(|| vsock.wanted()).flatten(),
                None => None,
            };
            let Some(wanted) = wanted else {
                return;
            };
            let (port, made) = match wanted {
                Wanted::Asked { ticket, port } => {
                    let made = self.connect(port).and_then(|socket| {
                        self.hand(socket, |id| VsockOrder::Connected { ticket, id })
                    });
                    let refused = Order::Vsock(VsockOrder::Refused { ticket });
                    let made = match (made, &self.worker) {
                        (Err(Not::Ever(why)), Some(worker)) => match worker.order(&refused) {
                            Ok(()) => Err(Not::Ever(why)),
                            Err(_) => Err(Not::Now),
                        },
                        (made, _) => made,
                    };
                    (port, made)
                }
                Wanted::Called { caller, port } => {
                    let callers = self.vsock.as_ref().map(|vsock| &vsock.callers);
                    let copy = callers
                        .and_then(|callers| callers.get(caller)?.socket.try_clone().ok())
                        .ok_or(Not::Now);
                    let made = copy.and_then(|socket| {
                        self.hand(socket, |id| VsockOrder::Incoming { id, port })
                    });
                    (port, made)
                }
            };
            match made {
                Err(Not::Now) => return,
                Ok(()) => {}
                Err(Not::Ever(reason)) => {
                    let record = json!({"port": port, "reason": reason});
                    self.log.note("vsock-refused", &record);
                }
            }
            if let Some(vsock) = &mut self.vsock {
                vsock.done(wanted);
            }
        }
    }

    /// Nobody runs the guest any more: its connections end, whoever else holds them.
    pub(crate) fn end_vsock(&mut self) {
        for id in 0..MAX_VSOCK_CONNECTIONS {
            let key = DescriptorKey::new(descriptor::VSOCK, id);
            let _ = key.map(|key| self.registry.delete(&key));
        }
    }

    /// Reaches whoever listens for the guest at a port of the host, if policy lets it.
    fn connect(&self, port: u32) -> std::result::Result<OwnedFd, Not> {
        let path = self.vsock.as_ref().map(|vsock| vsock.path_of(port));
        let path = path.unwrap_or_default();
        granted_socket::connect(&path, &self.rules.policy, descriptor::VSOCK)
            .map(|(socket, _)| socket)
            .map_err(|why| match why {
                NotConnected::Failed(e) => Not::Ever(e.to_string()),
                NotConnected::Denied { policy, place } => Not::Ever(format!(
                    "policy {policy} does not grant the guest's vsock {}",
                    place.display()
                )),
            })
    }

    /// Puts a connection into the registry, and hands it to the worker; in an upgrade, to the next one too.
    fn hand(
        &mut self,
        socket: OwnedFd,
        order: impl FnOnce(u32) -> VsockOrder,
    ) -> std::result::Result<(), Not> {
        let failed = |what: &dyn std::fmt::Display| Not::Ever(what.to_string());
        let kind = DescriptorKind::Stream;
        let (id, key) = (0..MAX_VSOCK_CONNECTIONS)
            .filter_map(|id| Some((id, DescriptorKey::new(descriptor::VSOCK, id).ok()?)))
            .find(|(_, key)| self.registry.find(key, kind).is_err())
            .ok_or_else(|| failed(&"there are as many connections as there may be"))?;
        let description = Description::of(kind, socket.as_fd()).map_err(|e| failed(&e))?;
        check_grant(&self.rules.policy, &key, &description, None)
            .map_err(|refusal| failed(&refusal.reason))?;
        let record = json!({
            "generation": self.generation(), "mode": StartMode::None, "descriptor": key.name(), "id": key.id(),
            "uid": self.ids.ids.uid, "what": description,
        });
        self.log.write("grant", &record).map_err(|e| failed(&e))?;
        // Before the worker is told: a new one that gets the descriptors after this gets this one with them.
        self.registry
            .save(key.clone(), kind, socket)
            .map_err(|e| failed(&e))?;
        let connection = self.registry.find(&key, kind).map_err(|e| failed(&e))?;
        let next = self.upgrade.as_ref().and_then(Upgrade::heir);
        let told = next.map_or(Ok(()), |next| {
            let held = Order::Vsock(VsockOrder::Held { id });
            next.order_with(&held, &[connection])
        });
        let told = told.and_then(|()| match &self.worker {
            Some(worker) => worker.order_with(&Order::Vsock(order(id)), &[connection]),
            None => Ok(()),
        });
        told.map_err(|_| {
            let _ = self.registry.delete(&key);
            Not::Now
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_line_names_a_port_or_is_refused() {
        for (line, port) in [
            ("CONNECT 0\n", Some(0)),
            ("CONNECT 4294967295\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT \n", None),
            ("CONNECT 1", None),
            ("CONNECT 1 \n", None),
            ("connect 1\n", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn not_a_byte_beyond_the_line_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let mut vsock = Vsock::listen(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        for part in ["CONN", "ECT 5", "2\nand more"] {
            assert!(vsock.wanted().is_none());
            client.write_all(part.as_bytes()).unwrap();
            vsock.hear_callers();
        }
        assert!(matches!(
            vsock.wanted(),
            Some(Wanted::Called {
                caller: 0,
                port: 52
            })
        ));
        let mut rest = [0; 8];
        let read = rustix::io::read(&vsock.callers[0].socket, &mut rest).unwrap();
        assert_eq!(&rest[..read], b"and more");
    }

    #[test]
    fn who_says_something_else_or_too_much_is_hung_up_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let mut vsock = Vsock::listen(&path).unwrap();
        for line in ["GET / HTTP/1.1\n", "CONNECT 00000000000000001\n"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(line.as_bytes()).unwrap();
            vsock.hear_callers();
            assert!(vsock.callers.is_empty());
            // Reset, if something was left unread.
            let _ = client.read(&mut [0]);
        }
        let crowd: Vec<_> = (0..=MAX_CALLERS)
            .map(|_| UnixStream::connect(&path))
            .collect();
        vsock.hear_callers();
        assert_eq!(vsock.callers.len(), MAX_CALLERS);
        drop(crowd);
        vsock.hear_callers();
        vsock.hear_callers();
        assert!(vsock.callers.is_empty());
    }

    #[test]
    fn a_socket_that_is_in_use_is_left_alone_and_one_that_is_not_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let first = Vsock::listen(&path).unwrap();
        Vsock::listen(&path).unwrap_err();
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(!path.exists());
        std::fs::write(&path, "a file").unwrap();
        Vsock::listen(&path).unwrap_err();
        assert!(path.exists());
    }
}
