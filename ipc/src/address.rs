//! Where a channel of a migration comes in, in QEMU's words: `unix:PATH`, `tcp:HOST:PORT`, `fd:NUMBER`.

use std::fmt;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// The longest path of a Unix socket, in bytes (sun_path has 108 with its NUL, unix(7)).
pub(crate) const MAX_PATH: usize = 107;

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Address {
    /// A Unix stream socket's path.
    Unix(String),
    /// A listening socket that a process has inherited, by its number there.
    Fd(u32),
    /// A TCP port of this host. Hosts are given in digits, or as `localhost`, which is 127.0.0.1: nothing is looked up.
    Tcp(SocketAddr),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Neither of the forms.
    #[error("{0:?} is no address of a channel: unix:PATH, tcp:HOST:PORT or fd:NUMBER")]
    Form(String),
    /// A host that would have to be looked up.
    #[error("{0:?} is no numeric IP address, nor localhost: no name is looked up here")]
    Host(String),
    /// A port that is none, or stands for any.
    #[error(
        "{0:?} is no port: 1 to 65535 (port 0, which stands for any, says nothing to the other side)"
    )]
    Port(String),
    /// Something that is said of a port, and not done here.
    #[error("'{option}' is not supported by this VMM: {remedy}")]
    Option {
        /// What it is called.
        option: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// No family is left (QEMU, `util/qemu-sockets.c`).
    #[error("Cannot disable IPv4 and IPv6 at same time")]
    NoFamily,
    /// A host of another family than the one that may be used.
    #[error(
        "{host} is no {family} address, which 'ipv4' and 'ipv6' ask for: leave them out, or name another host"
    )]
    Family {
        /// The host.
        host: IpAddr,
        /// The family.
        family: &'static str,
    },
    /// A path that no socket has.
    #[error("a Unix socket's path has 1 to {MAX_PATH} bytes and no NUL; {0:?} has {length}", length = .0.len())]
    Path(String),
    /// A path that names no file here.
    #[error(
        "a state file has an absolute path of at most {MAX_FILE_PATH} bytes, since it outlives this VM's directory; {0:?} is none"
    )]
    File(String),
    /// No offset.
    #[error("{0:?} is no offset into a file, in bytes")]
    Offset(String),
}

impl Address {
    /// The address of a Unix socket.
    ///
    /// # Errors
    ///
    /// [`AddressError::Path`].
    pub fn unix(path: &str) -> Result<Self, AddressError> {
        if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
            return Err(AddressError::Path(path.chars().take(MAX_PATH).collect()));
        }
        Ok(Self::Unix(path.to_owned()))
    }

    /// The address of a TCP port.
    ///
    /// # Errors
    ///
    /// [`AddressError::Host`] and [`AddressError::Port`].
    pub fn tcp(host: &str, port: &str) -> Result<Self, AddressError> {
        let short = |text: &str| text.chars().take(MAX_PATH).collect();
        let ip = match host {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            host => host.parse().map_err(|_| AddressError::Host(short(host)))?,
        };
        let number = port.parse::<NonZeroU16>();
        let number = number.map_err(|_| AddressError::Port(short(port)))?;
        Ok(Self::Tcp(SocketAddr::new(ip, number.get())))
    }

    /// The address in `HOST:PORT`, where an IPv6 address has brackets.
    ///
    /// # Errors
    ///
    /// As [`Address::tcp`].
    fn host_and_port(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.chars().take(MAX_PATH).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        // Without them its last group could not be told from a port.
        if bare.is_none() && host.contains(':') {
            return Err(form());
        }
        Self::tcp(bare.unwrap_or(host), port)
    }
}

/// A place in a file, in QEMU's words: `PATH` or `PATH,offset=BYTES`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAddress {
    /// The file's absolute path.
    pub path: String,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// The longest path of a file, in bytes (PATH_MAX of `linux/limits.h`, with its NUL).
const MAX_FILE_PATH: usize = 4095;
/// The largest offset into a file, in bytes: what off_t has.
const MAX_OFFSET: u64 = i64::MAX.unsigned_abs();

impl FileAddress {
    /// A place in a file.
    ///
    /// # Errors
    ///
    /// [`AddressError::File`] and [`AddressError::Offset`].
    pub fn new(path: &str, offset: u64) -> Result<Self, AddressError> {
        let short = path.len() <= MAX_FILE_PATH && !path.contains('\0');
        if !path.starts_with('/') || !short {
            return Err(AddressError::File(
                path.chars().take(MAX_FILE_PATH).collect(),
            ));
        }
        if offset > MAX_OFFSET {
            return Err(AddressError::Offset(offset.to_string()));
        }
        Ok(Self {
            path: path.to_owned(),
            offset,
        })
    }
}

impl FromStr for FileAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some((path, offset)) = text.rsplit_once(",offset=") else {
            return Self::new(text, 0);
        };
        let number = match offset.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => offset.parse(),
        };
        let number = number
            .map_err(|_| AddressError::Offset(offset.chars().take(MAX_FILE_PATH).collect()))?;
        Self::new(path, number)
    }
}

impl fmt::Display for FileAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},offset={}", self.path, self.offset)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.chars().take(MAX_PATH).collect());
        match text.split_once(':') {
            Some(("unix", path)) => Self::unix(path),
            Some(("tcp", place)) => Self::host_and_port(place),
            Some(("fd", number)) => number.parse().map(Self::Fd).map_err(|_| form()),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_they_print() {
        for text in [
            "unix:/run/main.sock",
            "unix:a:b",
            "tcp:127.0.0.1:4444",
            "tcp:[::1]:1",
            "fd:7",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn localhost_is_an_address_and_no_other_name_is() {
        let local: Address = "tcp:localhost:4444".parse().unwrap();
        assert_eq!(local.to_string(), "tcp:127.0.0.1:4444");
        for (text, words) in [
            ("tcp:example.org:1", "no name is looked up"),
            ("tcp::4444", "no name is looked up"),
            ("tcp:127.0.0.1:0", "is no port"),
            ("tcp:127.0.0.1:65536", "is no port"),
            ("tcp:127.0.0.1:4444,ipv4=on", "is no port"),
            ("tcp:::1:4444", "is no address"),
            ("tcp:4444", "is no address"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn places_in_files_are_what_they_print() {
        for (text, path, offset) in [
            ("/var/a", "/var/a", 0),
            ("/var/a,offset=0x1000", "/var/a", 4096),
            ("/a,b,offset=7", "/a,b", 7),
            ("/a,offset=1,offset=2", "/a,offset=1", 2),
        ] {
            let place: FileAddress = text.parse().unwrap();
            assert_eq!((place.path.as_str(), place.offset), (path, offset));
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for text in [
            "",
            "a",
            "/a\0",
            "/a,offset=",
            "/a,offset=-1",
            "/a,offset=0x8000000000000000",
        ] {
            assert!(text.parse::<FileAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("unix:{}", "x".repeat(MAX_PATH + 1));
        for text in [
            "",
            "unix:",
            "/run/a",
            "fd:-1",
            "fd:x",
            "tcp:h:1",
            "unix:a\0b",
            &long,
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
