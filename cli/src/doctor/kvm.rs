//! `/dev/kvm`, and which KVM stands behind it.
//!
//! Its API version takes an ioctl, which this program has no means to issue; the worker asks for it.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;

use crate::doctor::Check;
use crate::doctor::Host;

pub(super) fn examine(host: &Host) -> Vec<Check> {
    vec![device(host), flavour(host), tap(host)]
}

fn device(host: &Host) -> Check {
    const ID: &str = "kvm";
    let path = host.path("dev/kvm");
    match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(_) => Check::ok(ID, "/dev/kvm can be opened"),
        Err(error) if error.kind() == ErrorKind::NotFound => Check::missing(
            ID,
            "there is no /dev/kvm",
            "enable virtualisation in the firmware, or nested virtualisation for this machine, and load the module: modprobe kvm_intel, kvm_amd or kvm_pvm",
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Check::missing(
            ID,
            "this user may not open /dev/kvm",
            match std::fs::metadata(&path).map(|device| device.mode() & 0o060) {
                Ok(0o060) => {
                    "run as root, or join the device's group and log in again: usermod -aG kvm $USER"
                }
                _ => {
                    "run as root, or let a group open it: chgrp kvm /dev/kvm && chmod g+rw /dev/kvm"
                }
            },
        ),
        Err(error) => Check::missing(
            ID,
            format!("/dev/kvm cannot be opened: {error}"),
            "look for KVM's messages: dmesg | grep -i kvm",
        ),
    }
}

fn flavour(host: &Host) -> Check {
    const ID: &str = "kvm-flavour";
    let module = |name: &str| host.exists(&format!("sys/module/{name}"));
    let paging_off = |parameter: &str| {
        host.read(parameter)
            .is_some_and(|value| matches!(value.as_str(), "N" | "0"))
    };
    if module("kvm_intel") {
        return match paging_off("sys/module/kvm_intel/parameters/ept") {
            false => Check::ok(ID, "kvm_intel, with EPT"),
            true => Check::warn(
                ID,
                "kvm_intel without EPT: guests are slow",
                "load kvm_intel with ept=1, if the processor has it",
            ),
        };
    }
    if module("kvm_amd") {
        return match paging_off("sys/module/kvm_amd/parameters/npt") {
            false => Check::ok(ID, "kvm_amd, with nested paging"),
            true => Check::warn(
                ID,
                "kvm_amd without nested paging: guests are slow",
                "load kvm_amd with npt=1, if the processor has it",
            ),
        };
    }
    if module("kvm_pvm") {
        return Check::warn(
            ID,
            "kvm_pvm: guest kernels that do not know PVM are emulated, and have no user space",
            "use a host with VMX or SVM for such guests; the demo's guest runs here",
        );
    }
    Check::warn(
        ID,
        "no KVM module that this program knows (kvm_intel, kvm_amd, kvm_pvm)",
        "it may be built into the kernel: `baton demo` tells",
    )
}

fn tap(host: &Host) -> Check {
    const ID: &str = "tun";
    if host.exists("dev/net/tun") {
        Check::ok(ID, "/dev/net/tun is there")
    } else {
        Check::warn(
            ID,
            "there is no /dev/net/tun: no VM can have a network interface",
            "modprobe tun",
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::doctor::Level;
    use crate::doctor::tests::host;
    use crate::doctor::tests::level;

    use super::*;

    #[test]
    fn a_host_without_kvm_is_not_fit() {
        let (_directory, host) = host(&[]);
        let checks = examine(&host);
        assert_eq!(level(&checks, "kvm"), Level::Missing);
        assert_eq!(level(&checks, "kvm-flavour"), Level::Warn);
        assert_eq!(level(&checks, "tun"), Level::Warn);
    }

    #[test]
    fn each_flavour_is_told_apart() {
        for (files, expected) in [
            (&[("sys/module/kvm_intel/parameters/ept", "Y\n")], Level::Ok),
            (
                &[("sys/module/kvm_intel/parameters/ept", "N\n")],
                Level::Warn,
            ),
            (&[("sys/module/kvm_amd/parameters/npt", "1\n")], Level::Ok),
            (&[("sys/module/kvm_amd/parameters/npt", "0\n")], Level::Warn),
            (&[("sys/module/kvm_pvm/refcnt", "0\n")], Level::Warn),
        ] {
            let (_directory, host) = host(files);
            assert_eq!(flavour(&host).level, expected, "{files:?}");
        }
        let (_directory, host) = host(&[("dev/kvm", "")]);
        assert_eq!(device(&host).level, Level::Ok);
    }
}
