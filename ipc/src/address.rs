//! Where a channel of a migration comes in, in QEMU's words: `unix:PATH`, `tcp:HOST:PORT`, `fd:NUMBER`.

use std::fmt;
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
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Neither of the forms.
    #[error("{0:?} is no address of a channel: unix:PATH or fd:NUMBER")]
    Form(String),
    /// A path that no socket has.
    #[error("a Unix socket's path has 1 to {MAX_PATH} bytes and no NUL; {0:?} has {length}", length = .0.len())]
    Path(String),
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
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.chars().take(MAX_PATH).collect());
        match text.split_once(':') {
            Some(("unix", path)) => Self::unix(path),
            Some(("fd", number)) => number.parse().map(Self::Fd).map_err(|_| form()),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_they_print() {
        for text in ["unix:/run/main.sock", "unix:a:b", "fd:7"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
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
