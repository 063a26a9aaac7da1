//! `[[net]]` of the VM file.

use baton_ipc::worker::MAX_NET_QUEUES;
use baton_ipc::worker::NetConfig;
use serde::Deserialize;

use super::disk::Label;
use super::disk::Limit;

/// The most network interfaces of a VM.
pub(crate) const MAX_NETS: usize = 8;
/// Bytes of an interface's name (IFNAMSIZ of `linux/if.h`, without its NUL).
const MAX_INTERFACE: usize = 15;

/// One network interface.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Net {
    /// Its name, of no other network interface.
    pub(crate) id: Label,
    /// The tap at the host's end.
    pub(crate) tap: Interface,
    /// The guest's address.
    pub(crate) mac: Mac,
    /// How many queue pairs.
    #[serde(default)]
    pub(crate) queues: Pairs,
    /// Rate limits, of each direction.
    #[serde(default)]
    pub(crate) limit: Limit,
}

impl Net {
    /// What a worker is told: this, and the tap's MTU in bytes.
    pub(crate) fn config(&self, mtu: u16) -> NetConfig {
        NetConfig {
            mac: self.mac.0,
            mtu,
            queues: self.queues.0,
            limits: self.limit.limits(),
        }
    }
}

/// The name of an interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Interface(pub(crate) String);

impl TryFrom<String> for Interface {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        // Narrower than the kernel's rule (`dev_valid_name`), and without the `%` that asks it for a number.
        let plain = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        let dots = name.bytes().all(|b| b == b'.');
        if plain && !dots && name.len() <= MAX_INTERFACE {
            Ok(Self(name))
        } else {
            Err(format!(
                "{name:?} is no interface name: 1 to {MAX_INTERFACE} of A-Z a-z 0-9 . _ -"
            ))
        }
    }
}

/// A MAC address that one interface can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parse = || {
            let mut mac = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut mac {
                let part = parts.next().filter(|part| part.len() == 2)?;
                let hex = part.bytes().all(|b| b.is_ascii_hexdigit());
                *byte = u8::from_str_radix(part, 16).ok().filter(|_| hex)?;
            }
            let [first, ..] = mac;
            // The lowest bit of the first byte says that it is a group's (IEEE 802, 8.2).
            (parts.next().is_none() && first & 1 == 0 && mac != [0; 6]).then_some(mac)
        };
        parse().map(Self).ok_or_else(|| {
            format!(
                "{text:?} is no address of one interface; write six bytes, as in \"52:54:00:12:34:56\""
            )
        })
    }
}

/// 1 to [`MAX_NET_QUEUES`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u32")]
pub(crate) struct Pairs(pub(crate) u8);

impl Default for Pairs {
    fn default() -> Self {
        Self(1)
    }
}

impl TryFrom<u32> for Pairs {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        match u8::try_from(count) {
            Ok(n @ 1..=MAX_NET_QUEUES) => Ok(Self(n)),
            _ => Err(format!(
                "{count} queues; a network interface has 1 to {MAX_NET_QUEUES}"
            )),
        }
    }
}

/// The network interfaces of a VM, checked together.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "Vec<Net>")]
pub(crate) struct Nets(pub(crate) Vec<Net>);

impl TryFrom<Vec<Net>> for Nets {
    type Error = String;

    fn try_from(nets: Vec<Net>) -> Result<Self, String> {
        if nets.len() > MAX_NETS {
            return Err(format!(
                "{} network interfaces; a VM has at most {MAX_NETS}",
                nets.len()
            ));
        }
        for (index, net) in nets.iter().enumerate() {
            let mut others = nets.iter().take(index);
            let id = &net.id.0;
            if others.clone().any(|other| other.id == net.id) {
                return Err(format!("two network interfaces have the id {id:?}"));
            }
            if others.clone().any(|other| other.tap == net.tap) {
                return Err(format!(
                    "two network interfaces have the tap {:?}",
                    net.tap.0
                ));
            }
            if others.any(|other| other.mac == net.mac) {
                return Err(format!(
                    "network interface {id:?} has the address of another"
                ));
            }
            if !net.limit.fits() {
                return Err(format!(
                    "network interface {id:?} has a burst without the limit that it belongs to"
                ));
            }
        }
        Ok(Self(nets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        net: Nets,
    }

    fn parse(text: &str) -> Result<Vec<Net>, String> {
        let file: Result<File, _> = toml::from_str(text);
        file.map(|file| file.net.0).map_err(|e| e.to_string())
    }

    const ONE: &str = "[[net]]\nid = \"net0\"\ntap = \"tap0\"\nmac = \"52:54:00:00:00:01\"\n";

    #[test]
    fn an_interface_is_parsed() {
        let nets = parse(&format!(
            "{ONE}queues = 2\nlimit = {{ bytes = \"1M\", operations = 10 }}"
        ))
        .unwrap();
        assert_eq!(nets[0].mac.0, [0x52, 0x54, 0, 0, 0, 1]);
        assert_eq!(nets[0].queues.0, 2);
        assert_eq!(parse(ONE).unwrap()[0].queues.0, 1);
    }

    #[test]
    fn what_no_interface_has_is_refused() {
        for (from, to, expected) in [
            ("tap0", "", "no interface name"),
            ("tap0", "..", "no interface name"),
            ("tap0", "a/b", "no interface name"),
            ("tap0", "tap%d", "no interface name"),
            ("tap0", "sixteen-letters-", "no interface name"),
            ("52:", "53:", "no address of one interface"),
            ("52:", "", "no address of one interface"),
            ("52:", "+2:", "no address of one interface"),
            (
                "52:54:00:00:00:01",
                "00:00:00:00:00:00",
                "no address of one",
            ),
            (":01", ":01:02", "no address of one interface"),
            ("mac", "queues = 9\nmac", "9 queues"),
            ("mac", "queues = 0\nmac", "0 queues"),
            ("mac", "mtu = 9\nmac", "unknown field"),
            (
                "mac",
                "limit = { bytes_burst = \"1M\" }\nmac",
                "a burst without",
            ),
        ] {
            let error = parse(&ONE.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
        }
        let other = ONE.replace("net0", "net1");
        for (more, expected) in [
            (ONE.to_owned(), "have the id"),
            (other.clone(), "have the tap"),
            (other.replace("tap0", "tap1"), "the address of another"),
        ] {
            let error = parse(&format!("{ONE}{more}")).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let many: String = (0..9)
            .map(|n| {
                ONE.replace("net0", &format!("n{n}"))
                    .replace("tap0", &format!("t{n}"))
                    .replace(":01", &format!(":0{n}"))
            })
            .collect();
        assert!(parse(&many).unwrap_err().contains("at most 8"));
    }
}
