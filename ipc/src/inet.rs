//! The optional members of QEMU's InetSocketAddress (`qapi/sockets.json`): which of them mean something here.

use crate::Address;
use crate::AddressError;

/// What may be said of a TCP port besides where it is. `numeric` is no part of it: whatever it says, no name is looked up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InetOptions {
    /// The port is the first of a range, of which a free one is to be listened on.
    pub to: bool,
    /// IPv4 may be used.
    pub ipv4: Option<bool>,
    /// IPv6 may be used.
    pub ipv6: Option<bool>,
    /// TCP is to find out by itself that a silent peer is gone.
    pub keep_alive: bool,
    /// Multipath TCP.
    pub mptcp: bool,
}

impl InetOptions {
    /// The address of a TCP port of which this was said, too.
    ///
    /// # Errors
    ///
    /// As [`Address::tcp`]; [`AddressError::Option`] for what is not done here, [`AddressError::NoFamily`] and
    /// [`AddressError::Family`] if the host is of a family that may not be used.
    pub fn tcp(self, host: &str, port: &str) -> Result<Address, AddressError> {
        let unsupported = [
            (
                "to",
                self.to,
                "the other side has to know the port; name one",
            ),
            (
                "keep-alive",
                self.keep_alive,
                "each step of a transfer has a deadline; leave it out",
            ),
            (
                "mptcp",
                self.mptcp,
                "the connection is plain TCP; leave it out",
            ),
        ];
        if let Some((option, _, remedy)) = unsupported.into_iter().find(|one| one.1) {
            return Err(AddressError::Option { option, remedy });
        }
        let family = self.family()?;
        let address = Address::tcp(host, port)?;
        let Address::Tcp(place) = &address else {
            return Ok(address);
        };
        match family {
            Some(family) if (family == Family::V4) != place.is_ipv4() => {
                Err(AddressError::Family {
                    host: place.ip(),
                    family: family.name(),
                })
            }
            _ => Ok(address),
        }
    }

    /// The one family that may be used, if not both (QEMU, `util/qemu-sockets.c`: what is said of one says the opposite of
    /// the other, of which nothing is said).
    fn family(self) -> Result<Option<Family>, AddressError> {
        match (self.ipv4, self.ipv6) {
            (Some(false), Some(false)) => Err(AddressError::NoFamily),
            (None, None) | (Some(true), Some(true)) => Ok(None),
            (_, Some(true)) | (Some(false), None) => Ok(Some(Family::V6)),
            (Some(true), _) | (None, Some(false)) => Ok(Some(Family::V4)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "127.0.0.1";
    const V6: &str = "::1";

    fn options(ipv4: Option<bool>, ipv6: Option<bool>) -> InetOptions {
        InetOptions {
            ipv4,
            ipv6,
            ..InetOptions::default()
        }
    }

    #[test]
    fn a_host_is_of_a_family_that_may_be_used() {
        let (on, off) = (Some(true), Some(false));
        for (ipv4, ipv6, takes_v4, takes_v6) in [
            (None, None, true, true),
            (on, on, true, true),
            (on, None, true, false),
            (None, off, true, false),
            (on, off, true, false),
            (None, on, false, true),
            (off, None, false, true),
            (off, on, false, true),
        ] {
            for (host, takes) in [(V4, takes_v4), ("localhost", takes_v4), (V6, takes_v6)] {
                let taken = options(ipv4, ipv6).tcp(host, "4444");
                assert_eq!(taken.is_ok(), takes, "{host} {ipv4:?} {ipv6:?}: {taken:?}");
            }
        }
        let neither = options(off, off).tcp(V4, "1").unwrap_err();
        assert_eq!(
            neither.to_string(),
            "Cannot disable IPv4 and IPv6 at same time"
        );
        let wrong = options(off, None).tcp(V4, "1").unwrap_err().to_string();
        assert!(wrong.contains("127.0.0.1 is no IPv6 address"), "{wrong}");
    }

    #[test]
    fn what_is_not_done_is_named() {
        for (options, name) in [
            (
                InetOptions {
                    to: true,
                    ..InetOptions::default()
                },
                "'to'",
            ),
            (
                InetOptions {
                    keep_alive: true,
                    ..InetOptions::default()
                },
                "'keep-alive'",
            ),
            (
                InetOptions {
                    mptcp: true,
                    ..InetOptions::default()
                },
                "'mptcp'",
            ),
        ] {
            let error = options.tcp(V4, "4444").unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
