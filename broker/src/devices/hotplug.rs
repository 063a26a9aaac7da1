//! Devices that come and go while the guest runs.
//!
//! ```text
//! device_add ─► Coming ── plugged ──► Here ── device_del ──► Asked ── ejected ──► Gone ── end ──► Ending ── unplugged ─► ∅
//!                 └── failed ─► ∅      ▲ └────────────────────┼──────── ejected ───▲            │
//!                                      └──── too late ────────┘       └──── failed ◄────────────┘
//! ```
//!
//! A device's descriptors are in the registry, and so in the next CPR state, from `Coming` to the end of `Ending`. No upgrade
//! begins in these two: a new worker is made with all devices that the old one has. In the others one may; the guest's word on
//! a device that is gone is said again by whoever takes it over.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_ipc::DescriptorKey;
use baton_ipc::Registry;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::NewDevice;
use baton_ipc::control::NewInterface;
use baton_ipc::control::Reply;
use baton_ipc::descriptor;
use baton_ipc::transfer::Hotplugged;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::MAX_DISK_QUEUES;
use baton_ipc::worker::MAX_SLOTS;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::Order;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use serde_json::json;

use crate::broker::Broker;
use crate::clients::Awaiting;
use crate::devices::nodes::Node;
use crate::devices::resources::Opening;
use crate::devices::taps;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::busy;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Mac;
use crate::vm_file::net::Pairs;

/// How long a guest may take to let a device go before those who wait are told that it does not: libvirt waits as long.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a device is left alone whose requests did not come to an end.
const REST: Duration = Duration::from_secs(1);

/// How long until somebody looks again whether the worker may be told to end a device.
const LOOK: Duration = Duration::from_millis(50);

/// A device.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) slot: u8,
    /// What it is made of.
    pub(crate) backing: Backing,
    stage: Stage,
}

/// What a device is made of, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A disk.
    Node(String),
    /// A network interface.
    Netdev(String),
}

impl Backing {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Node(name) | Self::Netdev(name) => name,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The worker makes it.
    Coming,
    /// The guest has it.
    Here,
    /// The guest was asked to let it go; when that is given up.
    Asked(Instant),
    /// The guest has let it go; when its worker is told to end it.
    Gone(Instant),
    /// Its worker ends it.
    Ending,
}

impl Device {
    fn changes(&self) -> bool {
        matches!(self.stage, Stage::Coming | Stage::Ending)
    }

    /// When something is to be done by itself.
    pub(crate) fn due(&self) -> Option<Instant> {
        match self.stage {
            Stage::Asked(at) | Stage::Gone(at) => Some(at),
            Stage::Coming | Stage::Here | Stage::Ending => None,
        }
    }
}

impl Broker {
    /// Whether the worker has to answer for a device before anything else is done with it.
    pub(crate) fn devices_change(&self) -> bool {
        self.resizing.is_some() || self.devices.iter().any(Device::changes)
    }

    /// Makes a disk of a node: the worker's word is the answer. A refusal here means that nothing has happened.
    pub(crate) fn begin_plug(&mut self, new: &NewDevice, asked_by: &Actor) -> Result<()> {
        self.check_worker()?;
        let NewDevice {
            id,
            node,
            serial,
            queues,
            slot,
        } = new;
        self.check_id(id)?;
        let serial = match serial {
            Some(serial) => Label::try_from(serial.clone()).map(|serial| serial.0),
            None => Ok(String::new()),
        };
        let serial = serial.map_err(|reason| refusal(Exit::Usage, reason, ""))?;
        if !(1..=MAX_DISK_QUEUES).contains(queues) {
            return Err(refusal(
                Exit::Usage,
                format_args!("{queues} queues; a disk has 1 to {MAX_DISK_QUEUES}"),
                "",
            ));
        }
        let slot = self.free_slot(*slot)?;
        let backing = Backing::Node(node.clone());
        if self.devices.iter().any(|device| device.backing == backing) {
            return Err(unfit(
                format_args!("Drive '{node}' is already in use by another block device"),
                "",
            ));
        }
        let Some(found) = self.node(node) else {
            // QEMU's words (`parse_drive`, hw/core/qdev-properties-system.c).
            return Err(unfit(
                format_args!("Property 'virtio-blk-device.drive' can't find value '{node}'"),
                "`blockdev-add` opens one",
            ));
        };
        let (kind, path) = (found.kind, found.path.clone());
        let file = found.file.try_clone().doing("cannot hold the disk")?;
        let config = BlockConfig {
            queues: *queues,
            serial,
            ..found.config.clone()
        };
        self.log
            .write_by(
                "device-add",
                Some(asked_by),
                &json!({"device": id, "node": node, "slot": slot, "path": path}),
            )
            .recorded()?;
        let mut opening = Opening::new(&self.rules.policy, &mut self.log);
        opening.save(descriptor::DISK, slot.into(), kind, file, &path)?;
        let config = opening.plug(slot, VirtioKind::Block(config))?;
        let opened = opening.into_registry();
        self.plug(id, backing, config, opened)
    }

    /// Makes a network interface of a netdev, likewise.
    pub(crate) fn begin_plug_interface(
        &mut self,
        new: &NewInterface,
        asked_by: &Actor,
    ) -> Result<()> {
        self.check_worker()?;
        let NewInterface {
            id,
            netdev,
            mac,
            slot,
        } = new;
        self.check_id(id)?;
        let wrong = |reason: String| refusal(Exit::Usage, reason, "");
        let Mac(mac) = Mac::try_from(mac.clone()).map_err(wrong)?;
        let slot = self.free_slot(*slot)?;
        let backing = Backing::Netdev(netdev.clone());
        if self.devices.iter().any(|device| device.backing == backing) {
            // QEMU's words (`set_netdev`, hw/core/qdev-properties-system.c).
            return Err(unfit(
                format_args!(
                    "Property 'virtio-net-device.netdev' can't take value '{netdev}', it's in use"
                ),
                "",
            ));
        }
        let Some(found) = self.netdev(netdev) else {
            return Err(unfit(
                format_args!("Property 'virtio-net-device.netdev' can't find value '{netdev}'"),
                "`netdev_add` opens one",
            ));
        };
        let place = taps::place(&found.tap);
        let queues = found.queues.iter().map(OwnedFd::try_clone);
        let queues: Vec<_> = queues
            .collect::<std::io::Result<_>>()
            .doing("cannot hold the tap")?;
        let config = NetConfig {
            mac,
            mtu: found.mtu,
            queues: u8::try_from(queues.len()).unwrap_or(u8::MAX),
            limits: DeviceLimits::default(),
        };
        self.log
            .write_by(
                "device-add",
                Some(asked_by),
                &json!({"device": id, "netdev": netdev, "slot": slot, "path": place}),
            )
            .recorded()?;
        let mut opening = Opening::new(&self.rules.policy, &mut self.log);
        let config = opening.interface(slot, config, queues, &place)?;
        let opened = opening.into_registry();
        self.plug(id, backing, config, opened)
    }

    /// Hands the worker what was opened, and has it make the device.
    fn plug(
        &mut self,
        id: &str,
        backing: Backing,
        config: VirtioConfig,
        opened: Registry,
    ) -> Result<()> {
        self.record_grants_of(&opened)?;
        let keys: Vec<_> = opened.iter().map(|(key, ..)| key.clone()).collect();
        self.registry.absorb(opened).doing("cannot hold a device")?;
        let told = self.tell_of(&keys, &config);
        self.devices.push(Device {
            id: id.to_owned(),
            slot: config.slot,
            backing,
            stage: Stage::Coming,
        });
        self.virtio.push(config);
        self.virtio.sort_by_key(|config| config.slot);
        if let Err(refusal) = told {
            self.plug_failed(&refusal.reason);
        }
        Ok(())
    }

    /// QEMU's `id_wellformed` and `qdev_set_id`, with a bound.
    fn check_id(&self, id: &str) -> Result<()> {
        let letter = id.starts_with(|first: char| first.is_ascii_alphabetic());
        if !letter || Label::try_from(id.to_owned()).is_err() {
            return Err(refusal(
                Exit::Usage,
                "Parameter 'id' expects an identifier",
                "a letter, then up to 19 of A-Z a-z 0-9 . _ -",
            ));
        }
        let known = self.devices.iter().map(|device| device.id.as_str());
        let disks = self.vm.disk.0.iter().map(|disk| disk.id.0.as_str());
        let nets = self.vm.net.0.iter().map(|net| net.id.0.as_str());
        if known.chain(disks).chain(nets).any(|known| known == id) {
            return Err(unfit(format_args!("Duplicate device ID '{id}'"), ""));
        }
        Ok(())
    }

    /// The slot that was asked for, or the first one that is free.
    fn free_slot(&self, wanted: Option<u8>) -> Result<u8> {
        let removable = self.vm.removable();
        let free = |slot: &u8| {
            removable & 1 << slot != 0 && self.virtio.iter().all(|one| one.slot != *slot)
        };
        match wanted {
            None => (1..MAX_SLOTS)
                .find(free)
                .ok_or_else(|| unfit("every PCI slot has a device", "`device_del` one")),
            Some(slot) if slot < MAX_SLOTS && free(&slot) => Ok(slot),
            Some(slot) => Err(unfit(
                format_args!("PCI: slot {slot} function 0 is not available"),
                "leave `addr` out",
            )),
        }
    }

    fn tell_of(&self, keys: &[DescriptorKey], config: &VirtioConfig) -> Result<()> {
        let worker = self.worker.as_ref();
        let worker = worker.ok_or_else(|| unfit("there is no worker", ""))?;
        let of_it = self.registry.iter().filter(|(key, ..)| keys.contains(key));
        for (key, description, descriptor) in of_it {
            let order = Order::Lend(key.clone(), description.clone());
            worker
                .order_with(&order, &[descriptor.as_fd()])
                .doing("cannot tell the worker")?;
        }
        worker
            .order(&Order::Plug(Box::new(config.clone())))
            .doing("cannot tell the worker")
    }

    /// The worker has made it.
    pub(crate) fn plugged(&mut self, slot: u8) -> Result<()> {
        let stage = |device: &&mut Device| (device.slot, device.stage) == (slot, Stage::Coming);
        match self.devices.iter_mut().find(stage) {
            Some(device) => {
                device.stage = Stage::Here;
                self.clients.answer(Awaiting::Devices, &Reply::Done);
                Ok(())
            }
            None => self.lose("the worker has made a device that it was not told to"),
        }
    }

    /// The worker cannot make it.
    pub(crate) fn plug_failed(&mut self, reason: &str) {
        let coming = |device: &Device| device.stage == Stage::Coming;
        let Some(slot) = self
            .devices
            .iter()
            .find(|one| coming(one))
            .map(|one| one.slot)
        else {
            return;
        };
        self.devices.retain(|device| !coming(device));
        self.forget_slot(slot);
        let refusal = unfit(
            format_args!("the worker cannot make the device: {reason}"),
            "",
        );
        self.clients
            .answer(Awaiting::Devices, &Reply::Refused(refusal));
    }

    /// Asks the guest to let a device go. What comes of it comes as an event.
    pub(crate) fn begin_unplug(&mut self, id: &str, asked_by: &Actor) -> Result<()> {
        self.check_worker()?;
        let by = Instant::now() + PATIENCE * self.deadlines.slowness();
        let Some(device) = self.devices.iter_mut().find(|device| device.id == id) else {
            return Err(unfit(
                format_args!("Device '{id}' not found"),
                "only what `device_add` has added can go",
            ));
        };
        match device.stage {
            Stage::Here => {}
            // QEMU's words (`qmp_device_del`, system/qdev-monitor.c).
            _ => {
                return Err(busy(format_args!(
                    "Device {id} is already in the process of unplug"
                )));
            }
        }
        let slot = device.slot;
        let worker = self.worker.as_ref();
        worker
            .ok_or_else(|| unfit("there is no worker", ""))?
            .order(&Order::Unplug { slot })
            .doing("cannot tell the worker")?;
        device.stage = Stage::Asked(by);
        self.log.note_by(
            "device-delete",
            Some(asked_by),
            &json!({"device": id, "slot": slot}),
        );
        Ok(())
    }

    /// The guest has let a device go, asked or not.
    pub(crate) fn ejected(&mut self, slot: u8) -> Result<()> {
        let Some(device) = self.devices.iter_mut().find(|device| device.slot == slot) else {
            return self.lose("the worker says that a device is gone which was never there");
        };
        if matches!(device.stage, Stage::Here | Stage::Asked(_)) {
            device.stage = Stage::Gone(Instant::now());
        }
        Ok(())
    }

    /// Goes on with devices whose time has come.
    pub(crate) fn advance_devices(&mut self) {
        let now = Instant::now();
        let mut kept = Vec::new();
        for device in &mut self.devices {
            if matches!(device.stage, Stage::Asked(by) if by < now) {
                device.stage = Stage::Here;
                kept.push(device.id.clone());
            }
        }
        for id in kept {
            self.log.note(
                "device-kept",
                &json!({"device": id, "reason": "the guest does not let it go"}),
            );
            self.happened(Happening::DeviceKept { id });
        }
        let due = |device: &&mut Device| matches!(device.stage, Stage::Gone(at) if at <= now);
        if !self.devices.iter_mut().any(|device| due(&device)) {
            return;
        }
        let possible = self.upgrade.is_none() && self.check_worker().is_ok();
        let Some(device) = self.devices.iter_mut().find(due) else {
            return;
        };
        let slot = device.slot;
        device.stage = match self.worker.as_ref().filter(|_| possible) {
            Some(worker) if worker.order(&Order::End { slot }).is_ok() => Stage::Ending,
            Some(_) => Stage::Gone(now + REST),
            None => Stage::Gone(now + LOOK),
        };
    }

    /// The worker has ended it: nothing of it is left but its node.
    pub(crate) fn unplugged(&mut self, slot: u8) -> Result<()> {
        let ended = |device: &Device| (device.slot, device.stage) == (slot, Stage::Ending);
        let Some(at) = self.devices.iter().position(ended) else {
            return self.lose("the worker has ended a device that it was not told to");
        };
        let Device { id, backing, .. } = self.devices.remove(at);
        self.forget_slot(slot);
        self.log.note(
            "device-deleted",
            &json!({"device": id, "node": backing.name(), "slot": slot}),
        );
        self.happened(Happening::DeviceDeleted { id });
        Ok(())
    }

    /// The worker cannot end it yet.
    pub(crate) fn unplug_failed(&mut self) {
        for device in &mut self.devices {
            if device.stage == Stage::Ending {
                device.stage = Stage::Gone(Instant::now() + REST);
            }
        }
    }

    /// Closes what the device of a slot had.
    fn forget_slot(&mut self, slot: u8) {
        let Some(at) = self.virtio.iter().position(|config| config.slot == slot) else {
            return;
        };
        let config = self.virtio.remove(at);
        let disk = (descriptor::DISK, u32::from(slot));
        let own: Vec<_> = match &config.device {
            VirtioKind::Net(net) => {
                let taps = (0..net.queues).map(|pair| (descriptor::NET, config.tap(pair)));
                taps.collect()
            }
            _ => vec![disk],
        };
        let kicks = (0..config.device.queues()).map(|queue| (descriptor::KICK, config.kick(queue)));
        for (name, id) in own.into_iter().chain(kicks) {
            let closed = DescriptorKey::new(name, id)
                .doing("cannot name a descriptor")
                .and_then(|key| self.registry.delete(&key).doing("a device's descriptor"));
            closed.unwrap_or_else(|refusal| complain(&refusal));
        }
    }

    /// What another broker is told of them.
    pub(crate) fn hotplugged(&self) -> Vec<Hotplugged> {
        let device = |device: &Device| Hotplugged {
            id: device.id.clone(),
            backing: device.backing.name().to_owned(),
            slot: device.slot,
            asked: matches!(device.stage, Stage::Asked(_)),
        };
        self.devices.iter().map(device).collect()
    }

    /// Nodes without a device are nobody's in a transfer.
    pub(crate) fn refuse_loose_nodes(&self) -> Result<()> {
        let made =
            |node: &Node, device: &Device| device.backing == Backing::Node(node.name.0.clone());
        let used = |node: &&Node| self.devices.iter().any(|device| made(node, device));
        match self.nodes.iter().find(|node| !used(node)) {
            None => Ok(()),
            Some(node) => Err(unfit(
                format_args!(
                    "node {} would be lost: no device is made of it",
                    node.name.0
                ),
                "`blockdev-del` it first",
            )),
        }
    }

    /// No VM file has them, by which a guest comes out of a file again.
    pub(crate) fn refuse_hotplugged(&self) -> Result<()> {
        match self.devices.first() {
            None => Ok(()),
            Some(device) => Err(unfit(
                format_args!("State blocked by device '{}': no VM file has it", device.id),
                "`device_del` it first",
            )),
        }
    }

    /// Takes the devices of another broker's guest over, whose descriptors are here. Claims of their taps are taken from those
    /// that came.
    pub(crate) fn adopt_devices(
        &mut self,
        offered: &[Hotplugged],
        registry: &Registry,
        claims: &mut Vec<OwnedFd>,
    ) -> Result<()> {
        for one in offered {
            let Hotplugged {
                id,
                backing: name,
                slot,
                asked,
            } = one;
            self.check_id(id)?;
            let held = |name: &str, index: u32| {
                let key = DescriptorKey::new(name, index).doing("cannot name a descriptor")?;
                let found = registry.iter().find(|(found, ..)| **found == key);
                let (_, description, file) =
                    found.ok_or_else(|| unfit(format_args!("device {id} has no {key}"), ""))?;
                let file = file.try_clone_to_owned().doing("cannot hold a device")?;
                Ok((description.kind, file))
            };
            let config = self.virtio.iter().find(|config| config.slot == *slot);
            let backing = match config.map(|config| (&config.device, config)) {
                Some((VirtioKind::Block(block), _)) => {
                    let block = block.clone();
                    let (kind, file) = held(descriptor::DISK, (*slot).into())?;
                    self.adopt_node(name, block, kind, file)?;
                    Backing::Node(name.clone())
                }
                Some((VirtioKind::Net(net), config)) => {
                    let net = net.clone();
                    let Pairs(pairs) = Pairs::try_from(u32::from(net.queues))
                        .map_err(|reason| unfit(format_args!("device {id}: {reason}"), ""))?;
                    let queue = |pair| Ok(held(descriptor::NET, config.tap(pair))?.1);
                    let queues = (0..pairs).map(queue).collect::<Result<_>>()?;
                    self.adopt_netdev(name, &net, queues, claims)?;
                    Backing::Netdev(name.clone())
                }
                _ => {
                    return Err(unfit(
                        format_args!("device {id} is no disk and no network interface"),
                        "",
                    ));
                }
            };
            let by = Instant::now() + PATIENCE * self.deadlines.slowness();
            self.devices.push(Device {
                id: id.clone(),
                slot: *slot,
                backing,
                stage: if *asked {
                    Stage::Asked(by)
                } else {
                    Stage::Here
                },
            });
        }
        Ok(())
    }
}
