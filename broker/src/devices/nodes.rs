//! Disks that are opened while the guest runs, before a device is made of them and after it is gone: QEMU's block nodes.

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;

use baton_audit::Actor;
use baton_ipc::Description;
use baton_ipc::DescriptorKind;
use baton_ipc::control::NewNode;
use baton_ipc::descriptor;
use baton_ipc::worker::BlockConfig;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_json::json;

use crate::broker::Broker;
use crate::client_path;
use crate::devices::disks;
use crate::devices::disks::OpenDisk;
use crate::devices::hotplug::Backing;
use crate::devices::resources;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::vm_file::disk::Disk;
use crate::vm_file::disk::Label;

/// The most nodes: as many as there could be devices of them, and some that wait.
const MAX_NODES: usize = 64;

/// An open disk. Its lock is its own until the last of those who hold the file is gone: this broker, and the worker while
/// there is a device of it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: Label,
    /// Where the kernel says that it is.
    pub(crate) path: PathBuf,
    pub(crate) kind: DescriptorKind,
    pub(crate) config: BlockConfig,
    pub(crate) file: OwnedFd,
}

impl Broker {
    /// Opens and locks a disk, if policy grants it.
    pub(crate) fn add_node(&mut self, new: &NewNode, asked_by: &Actor) -> Result<()> {
        let NewNode {
            name,
            path,
            device,
            readonly,
            direct,
        } = new;
        let name = Label::try_from(name.clone()).map_err(|reason| {
            refusal(
                baton_ipc::control::Exit::Usage,
                reason,
                "choose another node-name",
            )
        })?;
        self.check_node_name(&name)?;
        if self.nodes.len() >= MAX_NODES {
            return Err(unfit(
                format_args!("there are {MAX_NODES} nodes"),
                "`blockdev-del` those that nobody needs",
            ));
        }
        let mut disk = Disk {
            id: name,
            path: PathBuf::from(path),
            readonly: *readonly,
            direct: *direct,
            queues: Default::default(),
            serial: None,
            limit: Default::default(),
        };
        if !disk.path.is_absolute() {
            return Err(unfit(
                format_args!("{path} is no absolute path"),
                "name the file by its whole path",
            ));
        }
        let held = hold(&disk)?;
        disk.path = place(held.as_raw_fd(), &disk.path)?;
        resources::check_disk_path(&self.rules.policy, &disk)?;
        let door = format!("/proc/self/fd/{}", held.as_raw_fd());
        let OpenDisk { file, kind, config } = disks::open_at(&disk, Path::new(&door))?;
        if (kind == DescriptorKind::BlockDevice) != *device {
            let (is, driver) = match kind {
                DescriptorKind::BlockDevice => ("a block device", "host_device"),
                _ => ("a regular file", "file"),
            };
            return Err(unfit(
                format_args!("{path} is {is}"),
                format_args!("use driver '{driver}'"),
            ));
        }
        let node = Node {
            path: place(file.as_fd().as_raw_fd(), &disk.path)?,
            name: disk.id,
            kind,
            config: BlockConfig {
                serial: String::new(),
                ..config
            },
            file,
        };
        let found = Description::of(kind, node.file.as_fd()).doing("cannot examine the disk")?;
        let key =
            baton_ipc::DescriptorKey::new(descriptor::DISK, 0).doing("cannot name a descriptor")?;
        resources::check_grant(&self.rules.policy, &key, &found, Some(&node.path))?;
        self.log
            .write_by(
                "node-add",
                Some(asked_by),
                &json!({"node": node.name.0, "path": node.path, "kind": kind, "readonly": readonly}),
            )
            .recorded()?;
        self.nodes.push(node);
        Ok(())
    }

    /// Closes one that no device is made of.
    pub(crate) fn delete_node(&mut self, name: &str, asked_by: &Actor) -> Result<()> {
        let Some(node) = self.node(name) else {
            // QEMU's words (`qmp_blockdev_del`, blockdev.c).
            return Err(unfit(
                format_args!("Failed to find node with node-name='{name}'"),
                "",
            ));
        };
        let record = json!({"node": node.name.0, "path": node.path});
        let backing = Backing::Node(name.to_owned());
        if self.devices.iter().any(|device| device.backing == backing) {
            return Err(unfit(
                format_args!("Node {name} is in use"),
                "`device_del` its device, and wait for DEVICE_DELETED",
            ));
        }
        self.log
            .write_by("node-delete", Some(asked_by), &record)
            .recorded()?;
        self.nodes.retain(|node| node.name.0 != name);
        Ok(())
    }

    /// Takes over what a disk of another broker's guest is made of.
    pub(crate) fn adopt_node(
        &mut self,
        name: &str,
        config: BlockConfig,
        kind: DescriptorKind,
        file: OwnedFd,
    ) -> Result<()> {
        let label = Label::try_from(name.to_owned()).map_err(|reason| unfit(reason, ""))?;
        self.check_node_name(&label)?;
        self.nodes.push(Node {
            path: place(file.as_raw_fd(), Path::new(name))?,
            name: label,
            kind,
            config,
            file,
        });
        Ok(())
    }

    /// Whether nobody else has it.
    fn check_node_name(&self, name: &Label) -> Result<()> {
        let of_the_vm_file = self.vm.disk.0.iter().any(|disk| disk.id == *name);
        if of_the_vm_file || self.node(&name.0).is_some() {
            // QEMU's words (`bdrv_assign_node_name`, block.c).
            return Err(unfit(
                format_args!("Duplicate nodes with node-name='{}'", name.0),
                "",
            ));
        }
        Ok(())
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name.0 == name)
    }
}

/// What a client's path names, held before anything of it is opened: no symbolic link leads there (openat2(2)), and what is opened
/// by this is that, whatever becomes of the path meanwhile.
fn hold(disk: &Disk) -> Result<OwnedFd> {
    client_path::open(rustix::fs::CWD, &disk.path, OFlags::PATH).map_err(|error| {
        let remedy = match error {
            Errno::LOOP => "name the file where it is (`realpath`)",
            _ => "mend the path",
        };
        unfit(
            format_args!(
                "disk {}: cannot open {}: {}",
                disk.id.0,
                disk.path.display(),
                client_path::words(error)
            ),
            remedy,
        )
    })
}

/// Where the kernel says that an open file is.
fn place(descriptor: i32, path: &Path) -> Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{descriptor}"))
        .doing(format_args!("cannot resolve {}", path.display()))
}
