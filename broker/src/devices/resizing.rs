//! A disk gets another size: the file behind it is made longer before the guest is told, and cut off only after the worker has
//! said that no request reaches beyond the new end any more. A block device has the size that it has; the guest is told.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use baton_audit::Actor;
use baton_audit::quoted;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::control::Exit;
use baton_ipc::control::Reply;
use baton_ipc::descriptor;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::Order;
use baton_ipc::worker::VirtioKind;
use rustix::fs::SeekFrom;
use serde_json::json;

use crate::broker::Broker;
use crate::clients::Awaiting;
use crate::devices::disks;
use crate::devices::hotplug::Backing;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::vm_file::slots::Plugged;

/// A disk whose worker has been told, and has not answered.
#[derive(Debug)]
pub(crate) struct Resizing {
    slot: u8,
    bytes: u64,
    /// How long its file was, if that was made longer.
    grown_from: Option<u64>,
    /// Its file is to be cut off.
    shrinks: bool,
}

impl Broker {
    /// Begins: the worker's word is the answer. A refusal here means that nothing has happened.
    pub(crate) fn begin_resize(&mut self, id: &str, bytes: u64, asked_by: &Actor) -> Result<()> {
        self.check_worker()?;
        let Some((slot, path, readonly)) = self.find_disk(id) else {
            return Err(unfit(
                format_args!("there is no disk {:?}", quoted(id)),
                "`query-block` names them",
            ));
        };
        if readonly {
            return Err(unfit(format_args!("disk {id} is read-only"), ""));
        }
        let Some(config) = self.block(slot) else {
            return Err(unfit(format_args!("disk {id} is not open"), ""));
        };
        let (found, block_size) = (config.bytes, config.block_size);
        let (file, kind) = self.disk_file(slot)?;
        let cannot = format!("cannot resize disk {id}");
        let end = rustix::fs::seek(&file, SeekFrom::End(0)).doing(&cannot)?;
        let (bytes, grows) = match kind {
            // In QEMU's words (`raw_co_truncate`, block/file-posix.c): one that has become smaller is taken as it is.
            DescriptorKind::BlockDevice if bytes > end => {
                return Err(unfit(
                    "Cannot grow device files",
                    format_args!("the device has {end} bytes: resize it first"),
                ));
            }
            DescriptorKind::BlockDevice => (end, false),
            _ => (bytes, bytes >= found),
        };
        disks::check_bytes(bytes, block_size).map_err(|remedy| {
            unfit(
                format_args!("{cannot}: a disk has no {bytes} bytes"),
                remedy,
            )
        })?;
        self.log
            .write_by(
                "resize",
                Some(asked_by),
                &json!({"disk": id, "path": path, "from": found, "to": bytes}),
            )
            .recorded()?;
        let mut resizing = Resizing {
            slot,
            bytes,
            grown_from: None,
            shrinks: kind == DescriptorKind::Disk && !grows,
        };
        if grows && end != bytes {
            rustix::fs::ftruncate(&file, bytes).doing(&cannot)?;
            resizing.grown_from = Some(end);
        }
        let told = self.worker.as_ref().map_or(Ok(()), |worker| {
            worker.order(&Order::Resize { slot, bytes })
        });
        self.resizing = Some(resizing);
        if let Err(fault) = told {
            self.resize_failed(&fault.to_string());
        }
        Ok(())
    }

    /// The worker has done it.
    pub(crate) fn resized(&mut self, slot: u8, bytes: u64) -> Result<()> {
        let awaited = |resizing: &mut Resizing| (resizing.slot, resizing.bytes) == (slot, bytes);
        let Some(resizing) = self.resizing.take_if(awaited) else {
            return self.lose("the worker has resized a disk that it was not told to");
        };
        for config in &mut self.virtio {
            if let (true, VirtioKind::Block(block)) = (config.slot == slot, &mut config.device) {
                block.bytes = bytes;
            }
        }
        let device = self.devices.iter().find(|device| device.slot == slot);
        let backing = device.map(|device| device.backing.clone());
        for node in &mut self.nodes {
            if backing == Some(Backing::Node(node.name.0.clone())) {
                node.config.bytes = bytes;
            }
        }
        let reply = match self.settle_size(&resizing) {
            Ok(()) => Reply::Done,
            Err(refusal) => Reply::Refused(refusal),
        };
        self.clients.answer(Awaiting::Devices, &reply);
        Ok(())
    }

    fn settle_size(&mut self, resizing: &Resizing) -> Result<()> {
        if resizing.shrinks {
            let (file, _) = self.disk_file(resizing.slot)?;
            rustix::fs::ftruncate(&file, resizing.bytes)
                .doing("the guest has the new size, but its file cannot be cut off")?;
        }
        let key = disk_key(resizing.slot)?;
        // What goes over in the next upgrade is described as it is now.
        self.registry.refresh(&key).doing("the disk is resized")
    }

    /// The worker cannot: the guest has the disk that it had, and so has the host.
    pub(crate) fn resize_failed(&mut self, reason: &str) {
        let Some(resizing) = self.resizing.take() else {
            return;
        };
        if let Some(end) = resizing.grown_from {
            let undone = self.disk_file(resizing.slot).and_then(|(file, _)| {
                rustix::fs::ftruncate(&file, end).doing("cannot give the disk its old size again")
            });
            undone.unwrap_or_else(|refusal| complain(&refusal));
        }
        let reason = format!("the worker cannot resize: {reason}");
        let refusal = refusal(Exit::Busy, reason, "try again");
        self.clients
            .answer(Awaiting::Devices, &Reply::Refused(refusal));
    }

    /// A disk by its id, or by its node's name: its slot, where it is, and whether it is read-only.
    fn find_disk(&self, id: &str) -> Option<(u8, PathBuf, bool)> {
        let fixed = self.vm.devices().find_map(|(slot, plugged)| match plugged {
            Plugged::Disk(disk) if disk.id.0 == id => {
                Some((slot, disk.path.clone(), disk.readonly))
            }
            _ => None,
        });
        fixed.or_else(|| {
            let backing = Backing::Node(id.to_owned());
            let mut devices = self.devices.iter();
            let device = devices.find(|device| device.backing == backing)?;
            let node = self.node(id)?;
            Some((device.slot, node.path.clone(), node.config.readonly))
        })
    }

    /// The size that the guest sees of the disk in this slot.
    pub(crate) fn block_bytes(&self, slot: u8) -> Option<u64> {
        self.block(slot).map(|block| block.bytes)
    }

    /// The disk in this slot, as the guest sees it.
    fn block(&self, slot: u8) -> Option<&BlockConfig> {
        self.virtio.iter().find_map(|config| match &config.device {
            VirtioKind::Block(block) if config.slot == slot => Some(block),
            _ => None,
        })
    }

    /// What is behind the disk in this slot.
    fn disk_file(&self, slot: u8) -> Result<(OwnedFd, DescriptorKind)> {
        let key = disk_key(slot)?;
        let kinds = [DescriptorKind::Disk, DescriptorKind::BlockDevice];
        let found = kinds
            .into_iter()
            .find_map(|kind| Some((self.registry.find(&key, kind).ok()?, kind)));
        let (file, kind) = found.ok_or_else(|| unfit(format_args!("{key} is not open"), ""))?;
        let copy = file.try_clone_to_owned().doing("cannot hold the disk")?;
        Ok((copy, kind))
    }
}

fn disk_key(slot: u8) -> Result<DescriptorKey> {
    DescriptorKey::new(descriptor::DISK, slot.into()).doing("cannot name a descriptor")
}
