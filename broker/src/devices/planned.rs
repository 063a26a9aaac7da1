//! What a start would open and make for a VM, told without opening any of it, for `baton policy explain --vm`.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::descriptor;
use baton_ipc::worker::MAX_VFIO_VECTORS;
use baton_ipc::worker::VhostUserConfig;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_policy::Access;
use baton_policy::Kind;
use baton_policy::vm_plan::Holder;
use baton_policy::vm_plan::Planned;
use baton_policy::vm_plan::VmPlan;

use crate::devices::console::Port;
use crate::devices::ram_file;
use crate::devices::taps;
use crate::devices::vfio;
use crate::reboot::state_file;
use crate::refusal::Result;
use crate::transfer::channel_path::Which;
use crate::vm_file::Console;
use crate::vm_file::VmFile;
use crate::vm_file::slots::Plugged;

/// KVM's own device.
const KVM: &str = "/dev/kvm";

/// The MTU of an interface that nobody has asked the kernel about, in bytes (RFC 894).
const ANY_MTU: u16 = 1500;

/// Reads a VM file, and says what it comes to.
pub(crate) fn of_file(path: &Path) -> Result<VmPlan> {
    let vm = VmFile::load(path)?;
    let beside = crate::rules::beside_broker("baton-worker")?;
    let worker = vm.worker.clone().unwrap_or_else(|| beside.clone());
    Ok(VmPlan {
        name: vm.name.as_str().to_owned(),
        policy: vm.policy.clone(),
        worker_is_beside: worker == beside,
        worker,
        vcpus: vm.cpus.count.0.into(),
        ram: vm.memory.size.0,
        pinned: vm.pinned(),
        descriptors: descriptors(&vm),
        later: later(&vm),
    })
}

/// The names under which a worker may get more than what a start opens: an upgrade's channels, a state file, devices that come
/// while the guest runs, and connections.
fn later(vm: &VmFile) -> Vec<String> {
    let mut names = vec![Which::Cpr.grant(), Which::Main.grant(), state_file::GRANT];
    if vm.removable() != 0 {
        names.extend([descriptor::DISK, descriptor::NET, descriptor::KICK]);
    }
    names.extend(vm.vsock.iter().map(|_| descriptor::VSOCK));
    names.into_iter().map(str::to_owned).collect()
}

/// In the order in which a start opens them.
fn descriptors(vm: &VmFile) -> Vec<Planned> {
    let mut all = vec![
        made(
            "control",
            (0, 0),
            Kind::SeqpacketSocket,
            "orders and answers",
        ),
        Planned {
            access: Access::Write,
            ..made("log", (0, 1), Kind::Pipe, "diagnostics")
        },
        existing(descriptor::KVM, 0, Path::new(KVM), "the virtual machine"),
        image(descriptor::KERNEL, &vm.boot.kernel, "boot.kernel"),
    ];
    let initrd = vm.boot.initrd.iter();
    all.extend(initrd.map(|path| image(descriptor::INITRD, path, "boot.initrd")));
    for (id, region) in (0..).zip(vm.ram()) {
        let purpose = format!("memory, {} bytes at {:#x}", region.size, region.address);
        all.push(match &vm.memory.path {
            Some(path) => Planned {
                kind: Kind::File,
                ..named(descriptor::RAM, id, &ram_file::path(path, id), &purpose)
            },
            None => made(descriptor::RAM, (id, id), Kind::Memfd, &purpose),
        });
    }
    for (slot, device) in vm.devices() {
        all.extend(of_device(slot, &device));
    }
    all.extend(host_devices(vm));
    for (port, kind) in Port::of(vm) {
        let (name, id, table) = (descriptor::CONSOLE, port.id(), port.table());
        all.push(made(name, (id, id), Kind::StreamSocket, table));
        if let Console::File { path } = kind {
            all.push(Planned {
                kind: Kind::File,
                holder: Holder::Broker,
                ..named(name, id, path, &format!("{table}.path"))
            });
        }
    }
    all.extend(vm.vsock.iter().map(|vsock| Planned {
        holder: Holder::Broker,
        ..named(
            descriptor::VSOCK,
            0,
            &vsock.socket,
            "vsock.socket, to listen on",
        )
    }));
    all
}

/// A device's own descriptors, and those that the guest notifies its queues by.
fn of_device(slot: u8, device: &Plugged<'_>) -> Vec<Planned> {
    let id = u32::from(slot);
    let (what, kind) = match device {
        Plugged::Disk(disk) => (
            format!("disk {}", disk.id.0),
            VirtioKind::Block(disk.config(0, false, 512)),
        ),
        Plugged::Net(net) => (
            format!("net {}", net.id.0),
            VirtioKind::Net(net.config(ANY_MTU)),
        ),
        Plugged::VhostUser(backend) => (
            format!("vhost_user {}", backend.id.0),
            VirtioKind::VhostUser(VhostUserConfig {
                kind: backend.kind,
                queues: backend.virtqueues(),
                features: 0,
                config: Vec::new(),
            }),
        ),
        Plugged::Balloon => ("memory.balloon".to_owned(), VirtioKind::Balloon),
        Plugged::Vsock(vsock) => ("vsock".to_owned(), VirtioKind::Vsock(vsock.config())),
        Plugged::Entropy => ("the entropy device".to_owned(), VirtioKind::Entropy),
        Plugged::Console => ("virtio_console".to_owned(), VirtioKind::Console),
    };
    let config = VirtioConfig { slot, device: kind };
    let own = match device {
        Plugged::Disk(disk) => Some(Planned {
            access: if disk.readonly {
                Access::Read
            } else {
                Access::ReadWrite
            },
            ..existing(descriptor::DISK, id, &disk.path, &what)
        }),
        Plugged::Net(net) => Some(Planned {
            ids: (config.tap(0), config.tap(net.queues.0.saturating_sub(1))),
            kind: Kind::Tap,
            path: Some(taps::origin(&net.tap)),
            ..made(
                descriptor::NET,
                (0, 0),
                Kind::Tap,
                &format!("{what}, tap {}", net.tap.0),
            )
        }),
        Plugged::VhostUser(backend) => {
            Some(existing(descriptor::VHOST_USER, id, &backend.socket, &what))
        }
        Plugged::Balloon | Plugged::Vsock(_) | Plugged::Entropy | Plugged::Console => None,
    };
    let last = config.device.queues().saturating_sub(1);
    let kicks = (config.kick(0), config.kick(last));
    let what = format!("{what}, notifications");
    own.into_iter()
        .chain([made(descriptor::KICK, kicks, Kind::Eventfd, &what)])
        .collect()
}

/// Devices of the host. How many vectors one has, only the open device tells: it is the first that is planned.
fn host_devices(vm: &VmFile) -> Vec<Planned> {
    let mut all = Vec::new();
    for (slot, device) in vm.host_devices() {
        let what = format!("vfio {}, {}", device.id.0, device.device);
        let place = vfio::sysfs(device);
        let obstacle = (!place.exists()).then(|| "the host has no such device".to_owned());
        let id = u32::from(slot);
        all.push(Planned {
            path: Some(place),
            obstacle,
            ..made(descriptor::VFIO_DEVICE, (id, id), Kind::VfioDevice, &what)
        });
        let first = id * u32::from(MAX_VFIO_VECTORS);
        let what = format!("{what}, its first interrupt and as many more as it has");
        let ids = (first, first);
        all.push(made(descriptor::VFIO_VECTOR, ids, Kind::Eventfd, &what));
    }
    if !all.is_empty() {
        let (name, what) = (descriptor::VFIO_CONTAINER, "DMA of the host's devices");
        all.push(existing(name, 0, Path::new(vfio::CONTAINER), what));
    }
    all
}

/// What the broker makes, and opens no path for.
fn made(name: &str, ids: (u32, u32), kind: Kind, purpose: &str) -> Planned {
    Planned {
        name: name.to_owned(),
        ids,
        kind,
        access: Access::ReadWrite,
        path: None,
        purpose: purpose.to_owned(),
        holder: Holder::Worker,
        obstacle: None,
    }
}

/// What is opened by a path, to read.
fn image(name: &str, path: &Path, purpose: &str) -> Planned {
    Planned {
        access: Access::Read,
        ..existing(name, 0, path, purpose)
    }
}

/// What has to be there already.
fn existing(name: &str, id: u32, path: &Path, purpose: &str) -> Planned {
    let found = path
        .canonicalize()
        .and_then(|path| path.metadata().map(|metadata| (path, metadata)));
    let (path, kind, obstacle) = match found {
        Ok((path, metadata)) => match kind_of(&path, &metadata) {
            Some(kind) => (path, kind, None),
            None => (
                path,
                Kind::File,
                Some("it is no file that a VM could have".to_owned()),
            ),
        },
        Err(error) => (path.to_owned(), Kind::File, Some(error.to_string())),
    };
    Planned {
        path: Some(path),
        obstacle,
        ..made(name, (id, id), kind, purpose)
    }
}

fn kind_of(path: &Path, metadata: &Metadata) -> Option<Kind> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() => Some(Kind::File),
        () if kind.is_block_device() => Some(Kind::Block),
        () if kind.is_char_device() && path == Path::new(KVM) => Some(Kind::Kvm),
        () if kind.is_char_device() && path == Path::new(vfio::CONTAINER) => {
            Some(Kind::VfioContainer)
        }
        () if kind.is_socket() => Some(Kind::StreamSocket),
        () => None,
    }
}

/// What is made if it is not there, in a directory that is.
fn named(name: &str, id: u32, path: &Path, purpose: &str) -> Planned {
    let (path, obstacle) = match place(path) {
        Ok(place) => (place, None),
        Err(error) => (path.to_owned(), Some(error.to_string())),
    };
    Planned {
        path: Some(path),
        obstacle,
        ..made(name, (id, id), Kind::StreamSocket, purpose)
    }
}

fn place(path: &Path) -> io::Result<PathBuf> {
    let directory = path.parent().unwrap_or(Path::new("/")).canonicalize()?;
    Ok(directory.join(path.file_name().unwrap_or_default()))
}
