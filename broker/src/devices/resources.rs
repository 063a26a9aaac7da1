//! What the broker opens for a VM, once, through the paths that the VM file has and policy permits.

use std::collections::BTreeSet;
use std::fs::File;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use baton_audit::AuditLog;
use baton_ipc::Access;
use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::descriptor;
use baton_ipc::descriptor::RAM_SEALS;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::Pages;
use baton_ipc::worker::RamRegion;
use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_policy::Policy;
use baton_policy::Seal;
use rustix::fs::MemfdFlags;
use rustix::fs::OFlags;
use serde::Serialize;
use serde_json::json;

use crate::devices::console::Port;
use crate::devices::disks;
use crate::devices::disks::OpenDisk;
use crate::devices::io_limits;
use crate::devices::ram_file;
use crate::devices::taps;
use crate::devices::taps::OpenTap;
use crate::devices::vfio;
use crate::devices::vfio::OpenDevice;
use crate::devices::vhost_user;
use crate::devices::vhost_user::OpenBackend;
use crate::devices::vsock::Vsock;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::vm_file::Console;
use crate::vm_file::VmFile;
use crate::vm_file::disk::Disk;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Interface;
use crate::vm_file::net::Net;
use crate::vm_file::page_size;
use crate::vm_file::slots::Plugged;
use crate::vm_file::vhost_user::VhostUser;
use crate::vm_file::vsock::Vsock as VsockSection;

#[derive(Serialize)]
struct Opened<'a> {
    descriptor: &'a DescriptorKey,
    kind: DescriptorKind,
    path: String,
}

/// What a VM has.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    pub(crate) registry: Registry,
    /// Its virtio devices.
    pub(crate) virtio: Vec<VirtioConfig>,
    /// Its devices that are PCI devices of the host.
    pub(crate) vfio: Vec<VfioConfig>,
    /// What keeps its taps from other VMs.
    pub(crate) claims: Vec<OwnedFd>,
}

/// Opens everything but the consoles, which have a life of their own. The RAM of a guest that comes back is left as it is.
pub(crate) fn open(
    vm: &VmFile,
    policy: &Policy,
    log: &mut AuditLog,
    restoring: bool,
) -> Result<Resources> {
    let mut opening = Opening::new(policy, log);
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|e| {
        unfit(
            format_args!("cannot open /dev/kvm: {e}"),
            "load kvm_intel, kvm_amd or kvm_pvm, and let this user read and write /dev/kvm (group kvm)",
        )
    })?;
    opening.save(
        descriptor::KVM,
        0,
        DescriptorKind::Kvm,
        kvm.into(),
        Path::new("/dev/kvm"),
    )?;
    opening.image(descriptor::KERNEL, &vm.boot.kernel, "boot.kernel")?;
    if let Some(initrd) = &vm.boot.initrd {
        opening.image(descriptor::INITRD, initrd, "boot.initrd")?;
    }
    let page = page_size(vm.memory.pages);
    if vm.memory.size.0 % page != 0 {
        return Err(unfit(
            format_args!(
                "memory.size of {} bytes is no multiple of the page size of {page} bytes",
                vm.memory.size.0
            ),
            "choose a multiple, or other memory.pages",
        ));
    }
    for (id, region) in (0..).zip(vm.ram()) {
        if let Some(path) = &vm.memory.path {
            let path = ram_file::path(path, id);
            let file = opening.ram_file(&path, region, vm.memory.pages, restoring)?;
            let kind = DescriptorKind::RamFile;
            opening.save(descriptor::RAM, id, kind, file.into(), &path)?;
            continue;
        }
        let memfd = guest_ram(region, vm.memory.pages)?;
        opening.save(
            descriptor::RAM,
            id,
            DescriptorKind::GuestRam,
            memfd,
            Path::new("memfd:guest-ram"),
        )?;
    }
    let mut virtio = Vec::new();
    for (slot, device) in vm.devices() {
        virtio.push(match device {
            Plugged::Disk(disk) => opening.disk(slot, disk)?,
            Plugged::Net(net) => opening.net(slot, net)?,
            Plugged::VhostUser(device) => opening.vhost_user(slot, device, &vm.ram())?,
            Plugged::Balloon => opening.plug(slot, VirtioKind::Balloon)?,
            Plugged::Vsock(vsock) => opening.plug(slot, VirtioKind::Vsock(vsock.config()))?,
            Plugged::Entropy => opening.plug(slot, VirtioKind::Entropy)?,
            Plugged::Console => opening.plug(slot, VirtioKind::Console)?,
        });
    }
    let vfio = opening.host_devices(vm)?;
    Ok(Resources {
        registry: opening.registry,
        virtio,
        vfio,
        claims: opening.claims,
    })
}

/// Descriptors that are opened, asked policy for, and written down.
pub(crate) struct Opening<'a> {
    registry: Registry,
    claims: Vec<OwnedFd>,
    policy: &'a Policy,
    log: &'a mut AuditLog,
}

impl<'a> Opening<'a> {
    pub(crate) fn new(policy: &'a Policy, log: &'a mut AuditLog) -> Self {
        Self {
            registry: Registry::default(),
            claims: Vec::new(),
            policy,
            log,
        }
    }

    /// What was opened.
    pub(crate) fn into_registry(self) -> Registry {
        self.registry
    }

    fn image(&mut self, name: &str, path: &Path, field: &str) -> Result<()> {
        let file = open_image(path).map_err(|e| {
            unfit(
                format_args!("cannot open {field} {}: {e}", path.display()),
                "mend the path in the VM file",
            )
        })?;
        self.save(name, 0, DescriptorKind::Image, file.into(), path)
    }

    /// By the path as it is, before anything is done to what lies there.
    fn ram_file(
        &mut self,
        path: &Path,
        region: RamRegion,
        pages: Pages,
        restoring: bool,
    ) -> Result<File> {
        let directory = path.parent().unwrap_or(Path::new("/")).canonicalize();
        let directory = directory.map_err(|e| {
            unfit(
                format_args!("cannot open memory.path {}: {e}", path.display()),
                "mend the path in the VM file",
            )
        })?;
        let resolved = directory.join(path.file_name().unwrap_or_default());
        let grant = self.policy.grant(descriptor::RAM);
        if !grant.is_some_and(|grant| grant.permits_path(&resolved)) {
            return Err(refused(
                format_args!(
                    "policy {} does not grant guest RAM in {}",
                    self.policy.name,
                    resolved.display()
                ),
                "",
            ));
        }
        ram_file::open(path, region.size, pages, restoring)
    }

    fn disk(&mut self, slot: u8, disk: &Disk) -> Result<VirtioConfig> {
        check_disk_path(self.policy, disk)?;
        let OpenDisk { file, kind, config } = disks::open(disk)?;
        self.save(descriptor::DISK, slot.into(), kind, file, &disk.path)?;
        self.plug(slot, VirtioKind::Block(config))
    }

    fn net(&mut self, slot: u8, net: &Net) -> Result<VirtioConfig> {
        let origin = taps::origin(&net.tap);
        check_tap_origin(self.policy, &net.id, &net.tap, &origin)?;
        let OpenTap { queues, mtu, claim } = taps::open(&net.id, &net.tap, net.queues.0)?;
        self.claims.push(claim);
        self.interface(slot, net.config(mtu), queues, &origin)
    }

    /// A network interface on these queues of a tap.
    pub(crate) fn interface(
        &mut self,
        slot: u8,
        config: NetConfig,
        queues: impl IntoIterator<Item = OwnedFd>,
        origin: &Path,
    ) -> Result<VirtioConfig> {
        let config = self.plug(slot, VirtioKind::Net(config))?;
        for (queue, pair) in queues.into_iter().zip(0..) {
            let id = config.tap(pair);
            self.save(descriptor::NET, id, DescriptorKind::Tap, queue, origin)?;
        }
        Ok(config)
    }

    fn vhost_user(
        &mut self,
        slot: u8,
        device: &VhostUser,
        regions: &[RamRegion],
    ) -> Result<VirtioConfig> {
        let mut ram = Vec::with_capacity(regions.len());
        for (id, region) in (0..).zip(regions) {
            let key = DescriptorKey::new(descriptor::RAM, id).doing("cannot name a descriptor")?;
            let found = [DescriptorKind::GuestRam, DescriptorKind::RamFile]
                .into_iter()
                .find_map(|kind| self.registry.find(&key, kind).ok());
            let file = found.ok_or_else(|| unfit(format_args!("{key} is not there"), ""))?;
            ram.push((*region, file));
        }
        let OpenBackend {
            connection,
            config,
            place,
            pid,
            uid,
        } = vhost_user::open(device, self.policy, &ram)?;
        let record = json!({"descriptor": "guest RAM for a vhost-user backend", "path": place, "pid": pid, "uid": uid});
        self.log.write("open", &record).recorded()?;
        let (name, kind) = (descriptor::VHOST_USER, DescriptorKind::Stream);
        self.save(name, slot.into(), kind, connection, &place)?;
        self.plug(slot, VirtioKind::VhostUser(config))
    }

    fn host_devices(&mut self, vm: &VmFile) -> Result<Vec<VfioConfig>> {
        if vm.vfio.0.is_empty() {
            return Ok(Vec::new());
        }
        let place = |(slot, device)| Ok((slot, device, vfio::place(device, self.policy)?));
        let granted: Vec<_> = vm.host_devices().map(place).collect::<Result<_>>()?;
        vfio::check_limit(self.policy, vm.pinned())?;
        let container = vfio::container()?;
        let mut configs = Vec::new();
        for (slot, device, place) in granted {
            let OpenDevice {
                file,
                config,
                place,
            } = vfio::open(slot, device, place, &container)?;
            let (name, kind) = (descriptor::VFIO_DEVICE, DescriptorKind::VfioDevice);
            self.save(name, slot.into(), kind, file, &place)?;
            for vector in 0..config.vectors {
                let (id, kind) = (config.vector(vector), DescriptorKind::Eventfd);
                let eventfd = disks::kick()?;
                self.save(
                    descriptor::VFIO_VECTOR,
                    id,
                    kind,
                    eventfd,
                    Path::new("eventfd"),
                )?;
            }
            configs.push(config);
        }
        let (name, kind) = (descriptor::VFIO_CONTAINER, DescriptorKind::VfioContainer);
        self.save(name, 0, kind, container, Path::new(vfio::CONTAINER))?;
        Ok(configs)
    }

    /// Makes what the guest notifies a device by.
    pub(crate) fn plug(&mut self, slot: u8, device: VirtioKind) -> Result<VirtioConfig> {
        let config = VirtioConfig { slot, device };
        io_limits::check(self.policy, &config)?;
        for queue in 0..config.device.queues() {
            self.save(
                descriptor::KICK,
                config.kick(queue),
                DescriptorKind::Eventfd,
                disks::kick()?,
                Path::new("eventfd"),
            )?;
        }
        Ok(config)
    }

    pub(crate) fn save(
        &mut self,
        name: &str,
        id: u32,
        kind: DescriptorKind,
        fd: OwnedFd,
        path: &Path,
    ) -> Result<()> {
        let key = DescriptorKey::new(name, id).doing("cannot name a descriptor")?;
        // Where the kernel says that it is, whatever the path led through.
        let resolved = match kind {
            DescriptorKind::Image
            | DescriptorKind::RamFile
            | DescriptorKind::Kvm
            | DescriptorKind::Disk
            | DescriptorKind::BlockDevice
            | DescriptorKind::VfioContainer => Some(
                std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
                    .doing(format_args!("cannot resolve {}", path.display()))?,
            ),
            // Where it comes from was asked before it was opened: the kernel only says /dev/net/tun, or that it is VFIO's.
            DescriptorKind::Tap | DescriptorKind::VfioDevice => Some(path.to_owned()),
            DescriptorKind::GuestRam | DescriptorKind::Stream | DescriptorKind::Eventfd => None,
        };
        let found = Description::of(kind, fd.as_fd()).map_err(|e| {
            unfit(
                format_args!("{}: {e}", path.display()),
                "mend the path in the VM file",
            )
        })?;
        check_grant(self.policy, &key, &found, resolved.as_deref())?;
        let record = Opened {
            descriptor: &key,
            kind,
            path: path.display().to_string(),
        };
        self.log.write("open", &record).recorded()?;
        self.registry
            .save(key, kind, fd)
            .doing("cannot hold a descriptor")
    }
}

/// Asks policy for a tap, by where it comes from.
pub(crate) fn check_tap_origin(
    policy: &Policy,
    id: &Label,
    tap: &Interface,
    origin: &Path,
) -> Result<()> {
    let grant = policy.grant(descriptor::NET);
    if grant.is_some_and(|grant| grant.permits_path(origin)) {
        return Ok(());
    }
    Err(refused(
        format_args!(
            "policy {} does not grant the network interface {} the tap {} from {}",
            policy.name,
            id.0,
            tap.0,
            origin.display()
        ),
        "",
    ))
}

/// Asks policy for a disk by its path as it is now, before anything is done to what lies there; what was opened is asked for
/// again.
pub(crate) fn check_disk_path(policy: &Policy, disk: &Disk) -> Result<()> {
    let (id, path) = (&disk.id.0, &disk.path);
    let resolved = path.canonicalize().map_err(|e| {
        unfit(
            format_args!("disk {id}: cannot open {}: {e}", path.display()),
            "mend its path",
        )
    })?;
    let grant = policy.grant(descriptor::DISK);
    if grant.is_some_and(|grant| grant.permits_path(&resolved)) {
        return Ok(());
    }
    Err(refused(
        format_args!(
            "policy {} does not grant the disk {id} at {}",
            policy.name,
            resolved.display()
        ),
        "",
    ))
}

/// Asks policy whether a worker may hold a descriptor.
pub(crate) fn check_grant(
    policy: &Policy,
    key: &DescriptorKey,
    found: &Description,
    path: Option<&Path>,
) -> Result<()> {
    let denied = |why: &dyn std::fmt::Display| {
        refused(
            format_args!("policy {} does not grant {key}: {why}", policy.name),
            "",
        )
    };
    let kind = match found.kind {
        DescriptorKind::Kvm => baton_policy::Kind::Kvm,
        DescriptorKind::GuestRam => baton_policy::Kind::Memfd,
        DescriptorKind::Image | DescriptorKind::Disk | DescriptorKind::RamFile => {
            baton_policy::Kind::File
        }
        DescriptorKind::BlockDevice => baton_policy::Kind::Block,
        DescriptorKind::Eventfd => baton_policy::Kind::Eventfd,
        DescriptorKind::Tap => baton_policy::Kind::Tap,
        DescriptorKind::Stream => baton_policy::Kind::StreamSocket,
        DescriptorKind::VfioContainer => baton_policy::Kind::VfioContainer,
        DescriptorKind::VfioDevice => baton_policy::Kind::VfioDevice,
    };
    // A registry holds guest RAM with all of these seals only.
    let seals = match found.kind {
        DescriptorKind::GuestRam => BTreeSet::from([Seal::Shrink, Seal::Grow, Seal::Seal]),
        _ => BTreeSet::new(),
    };
    let candidate = baton_policy::Candidate {
        name: key.name(),
        index: key.id(),
        kind,
        access: match found.access {
            Access::Read => baton_policy::Access::Read,
            Access::Write => baton_policy::Access::Write,
            Access::ReadWrite => baton_policy::Access::ReadWrite,
        },
        seals: &seals,
        path,
    };
    policy
        .grant(key.name())
        .ok_or_else(|| denied(&"it has no grant of that name"))?
        .permits(&candidate)
        .map_err(|e| denied(&e))
}

/// Asks policy whether a console may go where the VM file says.
pub(crate) fn check_console(
    port: Port,
    console: &Console,
    policy: &Policy,
    log: &mut AuditLog,
) -> Result<()> {
    let denied = |what: &dyn std::fmt::Display| {
        refused(
            format_args!(
                "policy {} does not grant the {} {what}",
                policy.name,
                port.title()
            ),
            "",
        )
    };
    let grant = policy
        .grant(descriptor::CONSOLE)
        .ok_or_else(|| denied(&"at all"))?;
    let Console::File { path } = console else {
        return Ok(());
    };
    let directory = path.parent().unwrap_or(Path::new("/")).canonicalize();
    let directory = directory.map_err(|e| {
        unfit(
            format_args!("cannot open {}.path {}: {e}", port.table(), path.display()),
            "mend the path in the VM file",
        )
    })?;
    let resolved = directory.join(path.file_name().unwrap_or_default());
    if !grant.permits_path(&resolved) {
        return Err(denied(&resolved.display()));
    }
    let record = json!({"descriptor": format!("{} file", port.title()), "path": resolved});
    log.write("open", &record).recorded()
}

/// Listens for those who want to reach the guest's vsock, where the VM file says, if policy lets it.
pub(crate) fn listen_vsock(
    vsock: Option<&VsockSection>,
    policy: &Policy,
    log: &mut AuditLog,
) -> Result<Option<Vsock>> {
    let Some(vsock) = vsock else {
        return Ok(None);
    };
    let resolved = vsock_place(vsock, policy)?;
    let listening = Vsock::listen(&resolved)?;
    let record = json!({"descriptor": "vsock listener", "path": resolved});
    log.write("open", &record).recorded()?;
    Ok(Some(listening))
}

/// The path of a vsock's socket, without symbolic links in its directories, if policy grants it.
pub(crate) fn vsock_place(vsock: &VsockSection, policy: &Policy) -> Result<PathBuf> {
    let VsockSection { socket, .. } = vsock;
    let directory = socket.parent().unwrap_or(Path::new("/")).canonicalize();
    let directory = directory.map_err(|e| {
        unfit(
            format_args!("cannot listen on vsock.socket {}: {e}", socket.display()),
            "make its directory",
        )
    })?;
    let resolved = directory.join(socket.file_name().unwrap_or_default());
    let grant = policy.grant(descriptor::VSOCK);
    if !grant.is_some_and(|grant| grant.permits_path(&resolved)) {
        let (name, place) = (&policy.name, resolved.display());
        return Err(refused(
            format_args!("policy {name} does not grant a vsock at {place}"),
            "",
        ));
    }
    Ok(resolved)
}

/// Opens a file for reading, without waiting for anybody at the other end of a pipe that lies there instead.
pub(crate) fn open_image(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// One region of RAM: a memfd that can neither shrink, grow nor be sealed further, nor be executed.
fn guest_ram(region: RamRegion, pages: Pages) -> Result<OwnedFd> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    if pages == Pages::Huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let remedy = match pages {
        Pages::Huge => "reserve 2 MiB pages: sysctl vm.nr_hugepages",
        Pages::Small | Pages::Transparent => "",
    };
    let failed = |e| {
        unfit(
            format_args!("cannot make {} bytes of guest RAM: {e}", region.size),
            remedy,
        )
    };
    let memfd = rustix::fs::memfd_create("guest-ram", flags).map_err(failed)?;
    rustix::fs::ftruncate(&memfd, region.size).map_err(failed)?;
    rustix::fs::fcntl_add_seals(&memfd, RAM_SEALS).map_err(failed)?;
    Ok(memfd)
}
