//! The machine that a VM file makes, for comparison with one that runs; and whether descriptors that came from another broker
//! are what the VM file names.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::descriptor;
use baton_ipc::transfer::GuestMachine;
use baton_ipc::transfer::Hotplugged;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_policy::Policy;

use crate::devices::console::Port;
use crate::devices::resources::check_grant;
use crate::devices::taps;
use crate::devices::vhost_user;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::Console;
use crate::vm_file::VmFile;
use crate::vm_file::net::Interface;
use crate::vm_file::slots::Plugged;

/// The machine of a VM file with these devices.
pub(crate) fn of(vm: &VmFile, virtio: &[VirtioConfig]) -> GuestMachine {
    let mut hide = vm.cpus.hide.clone();
    hide.sort_by_key(ToString::to_string);
    hide.dedup();
    GuestMachine {
        name: vm.name.as_str().to_owned(),
        cpus: vm.cpus.count.0,
        hide,
        ram: vm.ram(),
        pages: vm.memory.pages,
        cmdline: vm.boot.cmdline.0.clone(),
        initrd: vm.boot.initrd.is_some(),
        console: consoles(vm),
        virtio: virtio.to_vec(),
        backing: vm.memory.backing(),
    }
}

/// The kinds of its consoles, as the VM file names them.
fn consoles(vm: &VmFile) -> String {
    let kinds = Port::of(vm).map(|(_, kind)| match kind {
        Console::Socket => "socket",
        Console::Stdio => "stdio",
        Console::Pty => "pty",
        Console::File { .. } => "file",
    });
    kinds.collect::<Vec<_>>().join(", virtio ")
}

/// The devices that a VM file names, in the order of their slots. What only an open device tells (a disk's size, a tap's MTU)
/// is taken from the running machine's device in that slot, whose descriptor is compared by itself. So are those that came
/// while the guest ran, to slots that the VM file leaves free.
pub(crate) fn devices(
    vm: &VmFile,
    running: &[VirtioConfig],
    hotplugged: &[Hotplugged],
) -> Vec<VirtioConfig> {
    let removable = vm.removable();
    let came = |config: &&VirtioConfig| {
        removable.checked_shr(config.slot.into()).unwrap_or(0) & 1 == 1
            && matches!(config.device, VirtioKind::Block(_) | VirtioKind::Net(_))
            && hotplugged.iter().any(|one| one.slot == config.slot)
    };
    let came: Vec<_> = running.iter().filter(came).cloned().collect();
    let running: BTreeMap<u8, &VirtioKind> = running
        .iter()
        .map(|config| (config.slot, &config.device))
        .collect();
    let device = |slot: u8, plugged| match (plugged, running.get(&slot)) {
        (Plugged::Disk(disk), Some(VirtioKind::Block(block))) => {
            VirtioKind::Block(disk.config(block.bytes, block.device, block.block_size))
        }
        (Plugged::Disk(disk), _) => VirtioKind::Block(disk.config(0, false, 512)),
        (Plugged::Net(net), Some(VirtioKind::Net(found))) => VirtioKind::Net(net.config(found.mtu)),
        (Plugged::Net(net), _) => VirtioKind::Net(net.config(0)),
        (Plugged::VhostUser(device), Some(VirtioKind::VhostUser(found))) => {
            VirtioKind::VhostUser(vhost_user::config(device, Some(found)))
        }
        (Plugged::VhostUser(device), _) => VirtioKind::VhostUser(vhost_user::config(device, None)),
        (Plugged::Balloon, _) => VirtioKind::Balloon,
        (Plugged::Vsock(vsock), _) => VirtioKind::Vsock(vsock.config()),
        (Plugged::Entropy, _) => VirtioKind::Entropy,
        (Plugged::Console, _) => VirtioKind::Console,
    };
    let fixed = vm.devices().map(|(slot, plugged)| VirtioConfig {
        slot,
        device: device(slot, plugged),
    });
    let mut all: Vec<_> = fixed.chain(came).collect();
    all.sort_by_key(|config| config.slot);
    all
}

/// Whether the descriptors are those that this machine has, no more and no fewer but connections of its vsock, each granted by policy and the very file
/// that the VM file names. Kind, access, size, seals and identity were compared with their descriptions on arrival.
pub(crate) fn check(
    vm: &VmFile,
    policy: &Policy,
    registry: &Registry,
    machine: &GuestMachine,
) -> Result<()> {
    for device in &machine.virtio {
        crate::devices::io_limits::check(policy, device)?;
    }
    let wanted = wanted(machine)?;
    for (key, kind) in &wanted {
        registry
            .find(key, *kind)
            .map_err(|e| unfit(format_args!("the CPR state: {e}"), ""))?;
    }
    let has_vsock = vm.vsock.is_some();
    let connection = |key: &DescriptorKey, description: &Description| {
        has_vsock
            && key.name() == descriptor::VSOCK
            && key.id() < MAX_VSOCK_CONNECTIONS
            && description.kind == DescriptorKind::Stream
    };
    for (key, description, fd) in registry.iter() {
        if !wanted.contains_key(key) && !connection(key, description) {
            return Err(unfit(
                format_args!(
                    "the CPR state has a descriptor {key} that the VM file has no use for"
                ),
                "",
            ));
        }
        if matches!(
            description.kind,
            DescriptorKind::GuestRam | DescriptorKind::RamFile
        ) {
            let region = machine.ram.iter().zip(0..).find(|(_, id)| *id == key.id());
            let size = region.map_or(0, |(region, _)| region.size);
            if description.size != size {
                return Err(unfit(
                    format_args!(
                        "{key}: the CPR state has {} bytes, the VM file {size}",
                        description.size
                    ),
                    "",
                ));
            }
        }
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let path = match description.kind {
            DescriptorKind::Image
            | DescriptorKind::RamFile
            | DescriptorKind::Kvm
            | DescriptorKind::Disk
            | DescriptorKind::BlockDevice
            | DescriptorKind::VfioContainer => {
                Some(fs::read_link(&link).doing(format_args!("cannot resolve {key}"))?)
            }
            DescriptorKind::Tap => {
                let tap = taps::interface_of(fd)?;
                check_tap(vm, key, &tap)?;
                Some(taps::place(&tap))
            }
            DescriptorKind::GuestRam
            | DescriptorKind::Stream
            | DescriptorKind::Eventfd
            | DescriptorKind::VfioDevice => None,
        };
        if key.name() == descriptor::VHOST_USER {
            check_backend(vm, policy, key, fd)?;
        }
        check_grant(policy, key, description, path.as_deref())?;
        if matches!(
            description.kind,
            DescriptorKind::Disk | DescriptorKind::BlockDevice
        ) {
            check_disk(vm, key, (description.device, description.inode))?;
        }
    }
    Ok(())
}

/// Every descriptor that a machine has.
fn wanted(machine: &GuestMachine) -> Result<BTreeMap<DescriptorKey, DescriptorKind>> {
    let mut wanted = BTreeMap::new();
    let mut want = |name: &str, id: u32, kind: DescriptorKind| -> Result<()> {
        let key = DescriptorKey::new(name, id).doing("cannot name a descriptor")?;
        wanted.insert(key, kind);
        Ok(())
    };
    want(descriptor::KVM, 0, DescriptorKind::Kvm)?;
    want(descriptor::KERNEL, 0, DescriptorKind::Image)?;
    let (console, serial) = (descriptor::CONSOLE, descriptor::SERIAL_CONSOLE);
    want(console, serial, DescriptorKind::Stream)?;
    if machine.initrd {
        want(descriptor::INITRD, 0, DescriptorKind::Image)?;
    }
    let ram = match machine.backing {
        RamBacking::File => DescriptorKind::RamFile,
        RamBacking::Shared | RamBacking::Private => DescriptorKind::GuestRam,
    };
    for (id, _) in (0..).zip(&machine.ram) {
        want(descriptor::RAM, id, ram)?;
    }
    for config in &machine.virtio {
        match &config.device {
            VirtioKind::Block(block) => {
                let kind = if block.device {
                    DescriptorKind::BlockDevice
                } else {
                    DescriptorKind::Disk
                };
                want(descriptor::DISK, config.slot.into(), kind)?;
            }
            VirtioKind::Net(net) => {
                for pair in 0..net.queues {
                    want(descriptor::NET, config.tap(pair), DescriptorKind::Tap)?;
                }
            }
            VirtioKind::VhostUser(_) => {
                let (name, kind) = (descriptor::VHOST_USER, DescriptorKind::Stream);
                want(name, config.slot.into(), kind)?;
            }
            VirtioKind::Console => {
                want(console, descriptor::VIRTIO_CONSOLE, DescriptorKind::Stream)?;
            }
            // A vsock has as many as there are connections.
            VirtioKind::Entropy | VirtioKind::Balloon | VirtioKind::Vsock(_) => {}
        }
        for queue in 0..config.device.queues() {
            want(
                descriptor::KICK,
                config.kick(queue),
                DescriptorKind::Eventfd,
            )?;
        }
    }
    Ok(wanted)
}

fn check_disk(vm: &VmFile, key: &DescriptorKey, found: (u64, u64)) -> Result<()> {
    let index = usize::try_from(key.id())
        .ok()
        .and_then(|slot| slot.checked_sub(1));
    let Some(disk) = index.and_then(|index| vm.disk.0.get(index)) else {
        return Ok(());
    };
    let there = fs::metadata(&disk.path).ok();
    if there.map(|there| (there.dev(), there.ino())) == Some(found) {
        return Ok(());
    }
    Err(unfit(
        format_args!(
            "disk {}: the running VM has another file than {}",
            disk.id.0,
            disk.path.display()
        ),
        "name the file that the running VM has",
    ))
}

fn check_backend(
    vm: &VmFile,
    policy: &Policy,
    key: &DescriptorKey,
    connection: BorrowedFd<'_>,
) -> Result<()> {
    let plugged = vm.devices().find_map(|(slot, plugged)| match plugged {
        Plugged::VhostUser(device) if u32::from(slot) == key.id() => Some(device),
        _ => None,
    });
    plugged.map_or(Ok(()), |device| {
        vhost_user::check_peer(device, policy, connection)
    })
}

fn check_tap(vm: &VmFile, key: &DescriptorKey, found: &Interface) -> Result<()> {
    let slot = key.id() / u32::from(baton_ipc::worker::MAX_NET_QUEUES);
    let index = usize::try_from(slot)
        .ok()
        .and_then(|slot| slot.checked_sub(1 + vm.disk.0.len()));
    match index.and_then(|index| vm.net.0.get(index)) {
        Some(net) if net.tap != *found => Err(unfit(
            format_args!(
                "network interface {}: the running VM has the tap {:?}, not {}",
                net.id.0, found.0, net.tap.0
            ),
            "name the tap that the running VM has",
        )),
        _ => Ok(()),
    }
}
