//! `[[vfio]]` of the VM file.

use std::fmt;

use serde::Deserialize;

use super::disk::Label;

/// The most such devices of a VM: with as many disks, network interfaces and others as it may have, there are slots for these.
pub(crate) const MAX_VFIOS: usize = 4;

/// One PCI device of the host that is the guest's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vfio {
    /// Its name, of no other such device.
    pub(crate) id: Label,
    /// Where it is in the host.
    pub(crate) device: PciAddress,
}

/// The address of a PCI function: domain, bus, device and function, as sysfs writes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct PciAddress(String);

impl PciAddress {
    /// Its text, `DDDD:BB:DD.F` in lower-case hexadecimal.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for PciAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = |digits: &str, length: usize| {
            (digits.len() == length && !digits.bytes().any(|b| b.is_ascii_uppercase()))
                .then(|| u32::from_str_radix(digits, 16).ok())
                .flatten()
                .filter(|_| digits.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        let parsed = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            // Domains of more than 16 bits have as many digits as they need (Linux, `drivers/pci/probe.c`: "%04x").
            hex(domain, domain.len().clamp(4, 8))?;
            hex(bus, 2)?;
            // 5 and 3 bits (PCI Local Bus 3.0, 3.2.2.3.2).
            hex(device, 2).filter(|device| *device < 32)?;
            hex(function, 1).filter(|function| *function < 8)
        };
        match parsed() {
            Some(_) => Ok(Self(text)),
            None => Err(format!(
                "{text:?} is no PCI address; write domain, bus, device and function as `lspci -D` does, such as \"0000:3b:00.0\""
            )),
        }
    }
}

/// The devices of a VM, checked together.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "Vec<Vfio>")]
pub(crate) struct Vfios(pub(crate) Vec<Vfio>);

impl TryFrom<Vec<Vfio>> for Vfios {
    type Error = String;

    fn try_from(devices: Vec<Vfio>) -> Result<Self, String> {
        if devices.len() > MAX_VFIOS {
            return Err(format!(
                "{} vfio devices; a VM has at most {MAX_VFIOS}",
                devices.len()
            ));
        }
        for (index, one) in devices.iter().enumerate() {
            let mut before = devices.iter().take(index);
            if before.clone().any(|other| other.id == one.id) {
                return Err(format!("two vfio devices have the id {:?}", one.id.0));
            }
            if before.any(|other| other.device == one.device) {
                return Err(format!("two vfio devices are {}", one.device));
            }
        }
        Ok(Self(devices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        vfio: Vfios,
    }

    fn parse(devices: &[(&str, &str)]) -> Result<Vec<Vfio>, String> {
        let text: String = devices
            .iter()
            .map(|(id, device)| format!("[[vfio]]\nid = {id:?}\ndevice = {device:?}\n"))
            .collect();
        let file: Result<File, _> = toml::from_str(&text);
        file.map(|file| file.vfio.0).map_err(|e| e.to_string())
    }

    #[test]
    fn an_address_is_as_sysfs_writes_it() {
        for good in ["0000:00:04.0", "ffff:3b:1f.7", "10000:e1:00.0"] {
            let parsed = parse(&[("nic", good)]).unwrap();
            assert_eq!(parsed[0].device.as_str(), good);
        }
        for bad in [
            "",
            "00:04.0",
            "0000:00:04",
            "0000:00:20.0",
            "0000:00:04.8",
            "0000:00:4.0",
            "0000:3B:00.0",
            "000:00:04.0",
            "0000:00:04.0/../x",
            "+000:00:04.0",
            "0000:00:+4.0",
            "123456789:00:04.0",
        ] {
            let error = parse(&[("nic", bad)]).unwrap_err();
            assert!(error.contains("is no PCI address"), "{bad:?}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_said_why() {
        let (a, b) = ("0000:00:04.0", "0000:00:05.0");
        for (devices, expected) in [
            (&[("a", a), ("a", b)][..], "two vfio devices have the id"),
            (&[("a", a), ("b", a)], "two vfio devices are 0000:00:04.0"),
            (&[("a", a); 5], "at most 4"),
        ] {
            let error = parse(devices).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
