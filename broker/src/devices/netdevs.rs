//! Taps that are opened while the guest runs, before a network interface is made of them and after it is gone: QEMU's netdevs.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use baton_audit::Actor;
use baton_ipc::control::Exit;
use baton_ipc::control::NewNetdev;
use baton_ipc::worker::NetConfig;
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
    pub(crate) claim: OwnedFd,
}

impl Broker {
    /// Has a tap opened that is there, if policy grants it.
    pub(crate) fn add_netdev(&mut self, new: &NewNetdev, asked_by: &Actor) -> Result<()> {
        let NewNetdev { id, tap, pairs } = new;
        let wrong = |reason: String| refusal(Exit::Usage, reason, "");
        let id = Label::try_from(id.clone()).map_err(wrong)?;
        let tap = Interface::try_from(tap.clone()).map_err(wrong)?;
        if self.has_netdev(&id) {
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
        let place = taps::place(&tap);
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
            claim,
        });
        Ok(())
    }

    /// Closes one that no device is made of.
    pub(crate) fn delete_netdev(&mut self, id: &str, asked_by: &Actor) -> Result<()> {
        let Some(netdev) = self.netdev(id) else {
            // QEMU's words (`qmp_netdev_del`, net/net.c).
            return Err(unfit(format_args!("Device '{id}' not found"), ""));
        };
        let record = json!({"netdev": id, "path": taps::place(&netdev.tap)});
        if self.is_used(netdev) {
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

    /// Netdevs without a device are nobody's in a transfer.
    pub(crate) fn refuse_loose_netdevs(&self) -> Result<()> {
        match self.netdevs.iter().find(|netdev| !self.is_used(netdev)) {
            None => Ok(()),
            Some(netdev) => Err(unfit(
                format_args!(
                    "netdev {} would be lost: no device is made of it",
                    netdev.id.0
                ),
                "`netdev_del` it first",
            )),
        }
    }

    /// Of that name, the VM file's own among them.
    fn has_netdev(&self, id: &Label) -> bool {
        let of_the_vm_file = self.vm.net.0.iter().any(|net| net.id == *id);
        of_the_vm_file || self.netdev(&id.0).is_some()
    }

    fn is_used(&self, netdev: &Netdev) -> bool {
        let backing = Backing::Netdev(netdev.id.0.clone());
        self.devices.iter().any(|device| device.backing == backing)
    }

    /// Takes over what an interface of another broker's guest is made of: these queues of a tap, with what keeps other VMs from it.
    pub(crate) fn adopt_netdev(
        &mut self,
        name: &str,
        config: &NetConfig,
        queues: Vec<OwnedFd>,
        claims: &mut Vec<OwnedFd>,
    ) -> Result<()> {
        let id = Label::try_from(name.to_owned()).map_err(|reason| unfit(reason, ""))?;
        if self.has_netdev(&id) {
            return Err(unfit(format_args!("Duplicate ID '{name}' for netdev"), ""));
        }
        let mut taps = queues.iter().map(|queue| taps::interface_of(queue.as_fd()));
        let tap = taps
            .next()
            .unwrap_or_else(|| Err(unfit(format_args!("netdev {name} has no queue"), "")))?;
        for other in taps {
            let other = other?;
            if other != tap {
                return Err(unfit(
                    format_args!("netdev {name} has queues of {} and of {}", tap.0, other.0),
                    "",
                ));
            }
        }
        let own = self.vm.net.0.iter().map(|net| &net.tap);
        let mut others = own.chain(self.netdevs.iter().map(|netdev| &netdev.tap));
        if others.any(|other| *other == tap) {
            return Err(unfit(
                format_args!("netdev {name} has the tap {} of another", tap.0),
                "",
            ));
        }
        let claim = taps::take_claim(claims, &tap)?;
        self.netdevs.push(Netdev {
            id,
            tap,
            queues,
            mtu: config.mtu,
            claim,
        });
        Ok(())
    }
}
