//! The sockets on which a migration's channels come in, and go out.
//!
//! Only this broker's own user is at the other end of a Unix socket (SO_PEERCRED, unix(7)), whoever named the path: so nobody can
//! have a guest handed to a socket of theirs. Of a TCP connection the kernel says only between which ports it is: both brokers
//! compare that over their link ([`ends`]), before any of the guest's state goes over. The launcher makes those sockets.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use baton_ipc::Address;
use baton_ipc::control::Refusal;
use baton_policy::Policy;
use nix::sys::socket::sockopt::PeerPidfd;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::process::PidfdFlags;
use rustix::process::PidfdGetfdFlags;

use crate::clients::socket_file::SocketFile;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::run_dir::VmDirectory;
use crate::transfer::channel_path::Place;
use crate::transfer::channel_path::Unreachable;
use crate::transfer::channel_path::Which;
use crate::worker::launcher::Launcher;

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    /// Its path, if it was bound here; it goes with this.
    _file: Option<SocketFile>,
    tcp: bool,
}

impl Listener {
    fn bind(path: &str, place: std::result::Result<Place, Unreachable>) -> Result<Self> {
        let failed = |why: Unreachable| {
            let remedy = match why {
                Unreachable(Errno::ACCESS) => crate::own::OUT_OF_REACH,
                _ => "remove what is there, or name another path",
            };
            unfit(
                format_args!("Failed to bind socket to {path}: {why}"),
                remedy,
            )
        };
        let place = place.map_err(failed)?;
        let socket = stream_socket()?;
        let address = unix_address(&place.door())?;
        // Its file has this mode from its first moment (unix(7): of the socket, less the umask).
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .and_then(|()| rustix::net::bind(&socket, &address))
            .and_then(|()| rustix::net::listen(&socket, 1))
            .map_err(|e| failed(e.into()))?;
        let (directory, name) = place.into_parts();
        let file = SocketFile::in_directory(directory, name)
            .doing(format_args!("cannot examine {path}"))?;
        Ok(Self {
            socket,
            _file: Some(file),
            tcp: false,
        })
    }

    fn inherited(number: u32) -> Result<Self> {
        let what = format!("descriptor {number} is no listening Unix stream socket");
        let me = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
            .doing(&what)?;
        let number = i32::try_from(number).doing(&what)?;
        // Its own number: another descriptor of the same socket, owned by this value alone.
        let socket = rustix::process::pidfd_getfd(&me, number, PidfdGetfdFlags::empty())
            .map_err(|_| unfit(&what, "have it inherited, without close-on-exec"))?;
        let listens = rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false);
        let kind = rustix::net::sockopt::socket_type(&socket).ok();
        let domain = rustix::net::sockopt::socket_domain(&socket).ok();
        if !listens || kind != Some(SocketType::STREAM) || domain != Some(AddressFamily::UNIX) {
            return Err(unfit(what, ""));
        }
        rustix::io::ioctl_fionbio(&socket, true).doing(what)?;
        Ok(Self {
            socket,
            _file: None,
            tcp: false,
        })
    }

    /// Turns away whoever has connected and whoever will, also where somebody else holds the socket, too.
    pub(crate) fn refuse(self) {
        // One that does not listen any more has nobody to turn away.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Whoever has connected, if somebody has and is of this user, as far as that can be known.
    pub(crate) fn accept(&self) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = rustix::net::accept_with(&self.socket, flags).ok()?;
        if self.tcp {
            return Some(stream);
        }
        check_peer(&stream).ok().map(|()| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whatever decides where a channel may lead.
#[derive(Clone, Copy)]
pub(crate) struct Doors<'a> {
    pub(crate) directory: &'a VmDirectory,
    pub(crate) policy: &'a Policy,
    pub(crate) launcher: &'a Launcher,
}

impl Doors<'_> {
    /// Listens: at a path, for this user alone.
    pub(crate) fn listen(&self, address: &Address, which: Which) -> Result<Listener> {
        match address {
            Address::Tcp(_) if which == Which::Cpr => Err(unfit(
                "bad cpr channel socket type; must be unix or fd",
                "descriptors go over a Unix socket only",
            )),
            Address::Tcp(place) => {
                let socket = self.launcher.listen(*place)?.map_err(|why| {
                    unfit(
                        format_args!("Failed to listen at {address}: {why}"),
                        "name another port",
                    )
                })?;
                Ok(Listener {
                    socket,
                    _file: None,
                    tcp: true,
                })
            }
            Address::Unix(path) => {
                let place = Place::of(path, which, self.directory, self.policy)?;
                Listener::bind(path, place)
            }
            Address::Fd(number) => Listener::inherited(*number),
        }
    }

    /// Whether one could connect there, as far as that can be known before.
    pub(crate) fn check(&self, address: &Address, which: Which) -> Result<()> {
        match address {
            Address::Unix(path) => Place::of(path, which, self.directory, self.policy).map(drop),
            Address::Tcp(_) => Ok(()),
            Address::Fd(_) => Err(Self::no_address(address)),
        }
    }

    fn no_address(address: &Address) -> Refusal {
        unfit(
            format_args!("cannot connect to {address}"),
            "name the path of a Unix socket, or a TCP port",
        )
    }

    /// Connects without waiting, or but for so long as the launcher does.
    pub(crate) fn connect(&self, address: &Address, which: Which) -> Result<OwnedFd> {
        let path = match address {
            Address::Unix(path) => path,
            Address::Tcp(place) if which == Which::Main => {
                let failed = |why| unfit(format_args!("Failed to connect to '{place}': {why}"), "");
                return self.launcher.connect(*place)?.map_err(failed);
            }
            Address::Tcp(_) => {
                return Err(unfit(
                    "bad cpr channel address; must be unix",
                    "name the path of a Unix socket",
                ));
            }
            Address::Fd(_) => return Err(Self::no_address(address)),
        };
        let failed =
            |why: Unreachable| unfit(format_args!("Failed to connect to '{path}': {why}"), "");
        let place = Place::of(path, which, self.directory, self.policy)?;
        let held = place.and_then(|place| place.hold()).map_err(failed)?;
        let socket = stream_socket()?;
        let address = unix_address(Path::new(&format!("/proc/self/fd/{}", held.as_raw_fd())))?;
        rustix::net::connect(&socket, &address).map_err(|e| failed(e.into()))?;
        check_peer(&socket).map_err(|uid| {
            refused(
                format_args!("user {uid} listens at '{path}'"),
                "a guest goes to a broker of the same user only",
            )
        })?;
        Ok(socket)
    }
}

/// Between which ports a TCP connection is: this side's, and the other's. None for a socket of another kind.
pub(crate) fn ends(stream: &OwnedFd) -> Option<(SocketAddr, SocketAddr)> {
    let here = SocketAddr::try_from(rustix::net::getsockname(stream).ok()?).ok()?;
    let there = SocketAddr::try_from(rustix::net::getpeername(stream).ok()??).ok()?;
    Some((here, there))
}

/// A descriptor of the process that has connected; none when it is gone by now.
pub(crate) fn peer_process(stream: &OwnedFd) -> Option<OwnedFd> {
    nix::sys::socket::getsockopt(stream, PeerPidfd).ok()
}

/// Whether this broker's user is at the other end; who else, if not.
fn check_peer(stream: &OwnedFd) -> std::result::Result<(), u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|_| u32::MAX)?;
    if peer.uid == rustix::process::geteuid() {
        Ok(())
    } else {
        Err(peer.uid.as_raw())
    }
}

fn stream_socket() -> Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .doing("cannot make a socket")
}

fn unix_address(path: &Path) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|_| {
        unfit(
            format_args!("the socket's path {} is too long", path.display()),
            "choose a shorter one",
        )
    })
}

/// An error as strerror(3) has it.
pub(crate) fn words(error: Errno) -> String {
    nix::errno::Errno::from_raw(error.raw_os_error())
        .desc()
        .to_owned()
}
