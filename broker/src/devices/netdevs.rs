//! Taps that are opened while the guest runs, before a network interface is made of them and after it is gone: QEMU's netdevs.

use std::os::fd::OwnedFd;
use std::path::Path;

use baton_audit::Actor;
use baton_ipc::control::Exit;
use baton_ipc::control::NewNetdev;
use serde_json::json;

use crate::broker::Broker;
use crate::devices::hotplug::Backing;
use crate::devices::resources;
use crate::devices::taps;
use crate::devices::taps::OpenTap;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Interface;
use crate::vm_file::net::MAX_NETS;

/// An open tap.
#[derive(Debug)]
pub(crate) struct Netdev {
    pub(crate) id: Label,
    pub(crate) tap: Interface,
    /// One a queue pair.
    pub(crate) queues: Vec<OwnedFd>,
    /// Bytes.
    pub(crate) mtu: u16,
    /// Held as long as this is, so that no other broker gives the tap to another VM.
    _claim: OwnedFd,
}

impl Broker {
    /// Has a tap opened that is there, if policy grants it.
    pub(crate) fn add_netdev(&mut self, new: &NewNetdev, asked_by: &Actor) -> Result<()> {
        let NewNetdev { id, tap, pairs } = new;
        let wrong = |reason: String| refusal(Exit::Usage, reason, "");
        let id = Label::try_from(id.clone()).map_err(wrong)?;
        let tap = Interface::try_from(tap.clone()).map_err(wrong)?;
        let of_the_vm_file = self.vm.net.0.iter().any(|net| net.id == id);
        if of_the_vm_file || self.netdev(&id.0).is_some() {
            // QEMU's words (`qemu_opts_create`, util/qemu-option.c).
            return Err(unfit(
                format_args!("Duplicate ID '{}' for netdev", id.0),
                "choose another id",
            ));
        }
        if self.netdevs.len() >= MAX_NETS {
            return Err(unfit(
                format_args!("there are {MAX_NETS} netdevs"),
                "`netdev_del` those that nobody needs",
            ));
        }
        let place = Path::new(taps::SYSFS).join(&tap.0);
        resources::check_tap_origin(&self.rules.policy, &id, &tap, &place)?;
        let OpenTap { queues, mtu, claim } = self.launcher.tap(&id, &tap, *pairs)?;
        self.log
            .write_by(
                "netdev-add",
                Some(asked_by),
                &json!({"netdev": id.0, "path": place, "queues": pairs}),
            )
            .recorded()?;
        self.netdevs.push(Netdev {
            id,
            tap,
            queues,
            mtu,
            _claim: claim,
        });
        Ok(())
    }

    /// Closes one that no device is made of.
    pub(crate) fn delete_netdev(&mut self, id: &str, asked_by: &Actor) -> Result<()> {
        let Some(netdev) = self.netdev(id) else {
            // QEMU's words (`qmp_netdev_del`, net/net.c).
            return Err(unfit(format_args!("Device '{id}' not found"), ""));
        };
        let record = json!({"netdev": id, "path": Path::new(taps::SYSFS).join(&netdev.tap.0)});
        let backing = Backing::Netdev(id.to_owned());
        if self.devices.iter().any(|device| device.backing == backing) {
            return Err(unfit(
                format_args!("Netdev {id} is in use"),
                "`device_del` its device, and wait for DEVICE_DELETED",
            ));
        }
        self.log
            .write_by("netdev-delete", Some(asked_by), &record)
            .recorded()?;
        self.netdevs.retain(|netdev| netdev.id.0 != id);
        Ok(())
    }

    pub(crate) fn netdev(&self, id: &str) -> Option<&Netdev> {
        self.netdevs.iter().find(|netdev| netdev.id.0 == id)
    }

    /// They stay with this broker: a tap's claim, and the queues that a guest reads, are the VM file's to hand over.
    pub(crate) fn refuse_netdevs(&self) -> Result<()> {
        match self.netdevs.first() {
            None => Ok(()),
            Some(netdev) => Err(unfit(
                format_args!(
                    "State blocked by netdev '{}': no VM file has its tap {}",
                    netdev.id.0, netdev.tap.0
                ),
                "`device_del` its device, then `netdev_del` it",
            )),
        }
    }
}
