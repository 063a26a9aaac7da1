//! Making a VM of what the broker handed over: everything that is expensive, before any pause.
//!
//! The same for a cold start and for an upgrade, but for what `StartMode` says: a worker that takes a running guest over
//! uses `/dev/kvm` and the mappings of RAM, and nothing else of what it was handed.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use baton_ipc::DescriptorError;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::RegistryError;
use baton_ipc::StartMode;
use baton_ipc::descriptor;
use baton_ipc::vhost_user;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::MAX_CMDLINE;
use baton_ipc::worker::MAX_CPUS;
use baton_ipc::worker::MAX_DISK_QUEUES;
use baton_ipc::worker::MAX_IO_THREADS;
use baton_ipc::worker::MAX_NET_QUEUES;
use baton_ipc::worker::MAX_QUEUES;
use baton_ipc::worker::MAX_SERIAL;
use baton_ipc::worker::MAX_SLOTS;
use baton_ipc::worker::MAX_VHOST_USER_QUEUES;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::PanicAction;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::VhostUserConfig;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_ipc::worker::VsockConfig;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Program;
use baton_policy::ProgramError;
use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use rustix::fs::OFlags;
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::boot;
use crate::boot::AcpiExtras;
use crate::boot::BootError;
use crate::boot::BootParams;
use crate::boot::RamContent;
use crate::clock;
use crate::console::Console;
use crate::control::ballooning::Ballooning;
use crate::cpuid;
use crate::cpuid::Processors;
use crate::cpuid::Told;
use crate::devices::Trigger;
use crate::devices::lifecycle::LifecycleError;
use crate::devices::virtio::F_VERSION_1;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console as virtio_console;
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::vhost_user::VhostUser;
use crate::devices::virtio::vsock;
use crate::devices::virtio::vsock::Vsock;
use crate::fail_point::fail_point;
use crate::io_pool::IoPool;
use crate::io_pool::PoolError;
use crate::memory;
use crate::memory::MemoryError;
use crate::pci_host::Preview;
use crate::platform;
use crate::platform::Platform;
use crate::platform::PlatformError;
use crate::platform::PlatformParts;
use crate::platform::VfioParts;
use crate::platform::VirtioParts;
use crate::transfer::entries::Entries;
use crate::vcpu::Inventory;
use crate::vcpu::Rendezvous;
use crate::vcpu::VcpuError;
use crate::vcpu::VcpuStateError;
use crate::vcpu::Vcpus;
use crate::vfio;
use crate::vfio::VfioError;
use crate::vfio::container::Container;
use crate::vm;
use crate::vm::VmError;

/// The most regions of RAM.
const MAX_REGIONS: usize = 64;
/// The longest that draining may take, in milliseconds: no pause is nearly as long.
const MAX_DRAIN_MS: u32 = 10_000;

/// Why a VM cannot be made.
#[derive(Debug, Error)]
pub(crate) enum BuildError {
    /// The configuration has an impossible value.
    #[error("configuration: {field} is {value}")]
    Config {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A filter is none.
    #[error("configuration: {0}")]
    Filter(#[from] ProgramError),
    /// A descriptor is missing, of another kind, or nobody's.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A descriptor's name.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A vCPU's state.
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The devices.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// A device of the host.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The I/O threads.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The devices' set-up.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// A fault for a test.
    #[error("{0}")]
    FailPoint(String),
}

/// A VM in which nothing has run yet in this worker.
pub(crate) struct Machinery {
    pub(crate) memory: &'static GuestMemoryMmap,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpus: Vcpus,
    pub(crate) inventory: Arc<Inventory>,
    pub(crate) platform: Platform,
    pub(crate) cpuid: Told,
    pub(crate) console: Console,
    /// What this worker was handed, but for connections of the vsock.
    pub(crate) entries: Entries,
    pub(crate) vsock: Option<vsock::Link>,
    pub(crate) balloon: Option<Ballooning>,
    pub(crate) virtio_console: Option<virtio_console::Link>,
    kernel: File,
    initrd: Option<File>,
    pub(crate) pool: IoPool,
    /// What follows a panic of the guest's.
    pub(crate) on_panic: PanicAction,
    cmdline: String,
    cpus: u8,
    generation_id: [u8; 16],
    removable: u32,
}

/// The last filters, parsed.
pub(crate) struct LastFilters {
    pub(crate) control: Program,
    pub(crate) vcpu: Program,
    pub(crate) io: Program,
}

/// Checks what no broker of ours would say.
///
/// # Errors
///
/// [`BuildError::Config`] and [`BuildError::Filter`].
pub(crate) fn check(config: &WorkerConfig) -> Result<LastFilters, BuildError> {
    let wrong = |field, value: String| Err(BuildError::Config { field, value });
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        return wrong("cpus", config.cpus.to_string());
    }
    if config.generation == 0 {
        return wrong("generation", "0".to_owned());
    }
    if config.ram.is_empty() || config.ram.len() > MAX_REGIONS {
        return wrong("ram", format!("{} regions", config.ram.len()));
    }
    if !config.ram.is_sorted_by_key(|region| region.address) {
        return wrong("ram", "not ascending".to_owned());
    }
    if config.cmdline.len() > MAX_CMDLINE {
        return wrong("cmdline", format!("{} bytes long", config.cmdline.len()));
    }
    if config.io_threads == 0 || config.io_threads > MAX_IO_THREADS {
        return wrong("io_threads", config.io_threads.to_string());
    }
    if config.drain_ms > MAX_DRAIN_MS {
        return wrong("drain_ms", config.drain_ms.to_string());
    }
    if !config.virtio.is_sorted_by(|a, b| a.slot < b.slot) {
        return wrong("virtio", "not in the order of its slots".to_owned());
    }
    config.virtio.iter().try_for_each(check_virtio)?;
    config.vfio.iter().try_for_each(vfio::check)?;
    // The host bridge stays.
    if config.removable & 1 != 0 {
        return wrong("removable", format!("{:#x}", config.removable));
    }
    Ok(LastFilters {
        control: Program::from_bytes(&config.filters.control)?,
        vcpu: Program::from_bytes(&config.filters.vcpu)?,
        io: Program::from_bytes(&config.filters.io)?,
    })
}

/// The same for one device.
///
/// # Errors
///
/// [`BuildError::Config`].
pub(crate) fn check_virtio(config: &VirtioConfig) -> Result<(), BuildError> {
    let VirtioConfig { slot, device } = config;
    let reserved = *slot == 0 || *slot >= MAX_SLOTS;
    if reserved || device.queues() == 0 || device.queues() > MAX_QUEUES {
        return Err(BuildError::Config {
            field: "virtio",
            value: format!("slot {slot}, {} queues", device.queues()),
        });
    }
    match device {
        VirtioKind::Block(block) => check_block(block),
        VirtioKind::Entropy | VirtioKind::Balloon | VirtioKind::Console => Ok(()),
        VirtioKind::Net(net) => check_net(net),
        VirtioKind::Vsock(vsock) => check_vsock(vsock),
        VirtioKind::VhostUser(backend) => check_vhost_user(backend),
    }
}

fn check_block(block: &BlockConfig) -> Result<(), BuildError> {
    let BlockConfig {
        bytes,
        device: _,
        readonly: _,
        direct: _,
        block_size,
        queues,
        serial,
        limits,
    } = block;
    let wrong = |field, value: String| Err(BuildError::Config { field, value });
    if !block_size.is_power_of_two() || !(512..=4096).contains(block_size) {
        return wrong("disk.block_size", block_size.to_string());
    }
    if bytes % u64::from(*block_size) != 0 {
        return wrong("disk.bytes", bytes.to_string());
    }
    if *queues > MAX_DISK_QUEUES {
        return wrong("disk.queues", queues.to_string());
    }
    if serial.len() > MAX_SERIAL || !serial.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return wrong("disk.serial", format!("{serial:?}"));
    }
    check_limits("disk.limits", limits)
}

fn check_net(net: &NetConfig) -> Result<(), BuildError> {
    let NetConfig {
        mac,
        mtu,
        queues,
        limits,
    } = net;
    let wrong = |field, value: String| Err(BuildError::Config { field, value });
    let [first, ..] = mac;
    if first & 1 != 0 {
        return wrong("net.mac", format!("{mac:02x?}"));
    }
    // RFC 791, "Maximum Transmission Unit".
    if *mtu < 68 {
        return wrong("net.mtu", mtu.to_string());
    }
    if *queues > MAX_NET_QUEUES {
        return wrong("net.queues", queues.to_string());
    }
    check_limits("net.limits", limits)
}

fn check_vsock(vsock: &VsockConfig) -> Result<(), BuildError> {
    let VsockConfig { cid } = vsock;
    // vsock(7): the hypervisor's, the local, the host's, and any.
    match cid {
        0..=2 | &u32::MAX => Err(BuildError::Config {
            field: "vsock.cid",
            value: cid.to_string(),
        }),
        _ => Ok(()),
    }
}

fn check_vhost_user(backend: &VhostUserConfig) -> Result<(), BuildError> {
    let VhostUserConfig {
        kind: _,
        queues,
        features,
        config,
    } = backend;
    let wrong = |field, value: String| Err(BuildError::Config { field, value });
    if *queues > MAX_VHOST_USER_QUEUES {
        return wrong("vhost_user.queues", queues.to_string());
    }
    if features & F_VERSION_1 == 0 || features & vhost_user::F_PROTOCOL_FEATURES != 0 {
        return wrong("vhost_user.features", format!("{features:#x}"));
    }
    if config.len() > vhost_user::MAX_CONFIG {
        return wrong("vhost_user.config", format!("{} bytes long", config.len()));
    }
    Ok(())
}

fn check_limits(field: &'static str, limits: &DeviceLimits) -> Result<(), BuildError> {
    let DeviceLimits { bytes, operations } = limits;
    for limit in [bytes, operations].into_iter().flatten() {
        if limit.per_second == 0 || limit.burst == 0 {
            let value = format!("{limit:?}");
            return Err(BuildError::Config { field, value });
        }
    }
    Ok(())
}

/// Checks that a disk can be written exactly if the guest may.
fn check_access(disk: &OwnedFd, readonly: bool) -> Result<(), BuildError> {
    let flags = rustix::fs::fcntl_getfl(disk).map_err(|e| BuildError::Config {
        field: "disk",
        value: format!("not to be examined: {e}"),
    })?;
    let expected = if readonly {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    if flags & OFlags::ACCMODE == expected {
        Ok(())
    } else {
        Err(BuildError::Config {
            field: "disk",
            value: format!(
                "open with flags {:#o}, readonly is {readonly}",
                flags.bits()
            ),
        })
    }
}

fn claim(
    registry: &mut Registry,
    name: &str,
    id: u32,
    kind: DescriptorKind,
) -> Result<OwnedFd, BuildError> {
    Ok(registry.claim(&DescriptorKey::new(name, id)?, kind)?)
}

/// A device that needs nobody but its descriptors.
fn make(
    config: &VirtioConfig,
    registry: &mut Registry,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    match &config.device {
        VirtioKind::Block(block) => {
            let kind = if block.device {
                DescriptorKind::BlockDevice
            } else {
                DescriptorKind::Disk
            };
            let file = claim(registry, descriptor::DISK, config.slot.into(), kind)?;
            check_access(&file, block.readonly)?;
            Ok(Box::new(Block::new(file, block)))
        }
        VirtioKind::Net(net) => {
            let tap = |pair| {
                claim(
                    registry,
                    descriptor::NET,
                    config.tap(pair),
                    DescriptorKind::Tap,
                )
            };
            let taps = (0..net.queues).map(tap).collect::<Result<_, _>>()?;
            Ok(Box::new(Net::new(taps, net)))
        }
        VirtioKind::Entropy => Ok(Box::new(Entropy)),
        VirtioKind::VhostUser(backend) => {
            let (name, kind) = (descriptor::VHOST_USER, DescriptorKind::Stream);
            let connection = claim(registry, name, config.slot.into(), kind)?;
            let device = VhostUser::new(connection, backend).map_err(PlatformError::EventFd)?;
            Ok(Box::new(device))
        }
        VirtioKind::Vsock(_) | VirtioKind::Balloon | VirtioKind::Console => {
            Err(BuildError::Config {
                field: "virtio",
                value: format!(
                    "slot {}: neither a disk nor a network interface",
                    config.slot
                ),
            })
        }
    }
}

/// What the guest notifies a device by.
fn kicks(config: &VirtioConfig, registry: &mut Registry) -> Result<Vec<Arc<OwnedFd>>, BuildError> {
    let kind = DescriptorKind::Eventfd;
    (0..config.device.queues())
        .map(|queue| claim(registry, descriptor::KICK, config.kick(queue), kind).map(Arc::new))
        .collect()
}

/// The container of the host's devices, and those.
fn host_devices(
    config: &WorkerConfig,
    registry: &mut Registry,
) -> Result<Option<(OwnedFd, Vec<VfioParts>)>, BuildError> {
    if config.vfio.is_empty() {
        return Ok(None);
    }
    let (name, kind) = (descriptor::VFIO_CONTAINER, DescriptorKind::VfioContainer);
    let container = claim(registry, name, 0, kind)?;
    let mut devices = Vec::with_capacity(config.vfio.len());
    for device in &config.vfio {
        let (name, kind) = (descriptor::VFIO_DEVICE, DescriptorKind::VfioDevice);
        let file = claim(registry, name, device.slot.into(), kind)?;
        let (name, kind) = (descriptor::VFIO_VECTOR, DescriptorKind::Eventfd);
        let vectors = (0..device.vectors)
            .map(|vector| claim(registry, name, device.vector(vector), kind))
            .collect::<Result<_, _>>()?;
        devices.push(VfioParts {
            config: device.clone(),
            file,
            vectors,
        });
    }
    Ok(Some((container, devices)))
}

/// Maps guest RAM for the host's devices, and has their vectors signal. Those of a guest that another worker has are left alone.
fn arrange_vfio(
    container: OwnedFd,
    devices: Vec<VfioParts>,
    memory: &'static GuestMemoryMmap,
    mode: StartMode,
) -> Result<(Arc<Mutex<Container>>, Vec<VfioParts>), BuildError> {
    let container = if mode.preserves_guest() {
        Container::of_another(container, memory)
    } else {
        for device in &devices {
            let kind = device.config.interrupts;
            vfio::interrupts::enable(device.file.as_fd(), kind, &device.vectors)?;
        }
        Container::mapped(container, memory)?
    };
    Ok((Arc::new(Mutex::new(container)), devices))
}

/// A device that comes while the guest runs, of everything that was lent for it.
///
/// # Errors
///
/// [`BuildError`].
pub(crate) fn newcomer(
    config: &VirtioConfig,
    mut registry: Registry,
) -> Result<VirtioParts, BuildError> {
    check_virtio(config)?;
    let parts = VirtioParts {
        slot: config.slot,
        device: make(config, &mut registry)?,
        kicks: kicks(config, &mut registry)?,
    };
    registry.finish()?;
    Ok(parts)
}

/// Builds the VM. `wake` tells the control thread to look after devices and vCPUs; `origin_ns` is when this worker
/// began, `preview` what the old worker of an upgrade says in advance.
///
/// # Errors
///
/// [`BuildError`].
pub(crate) fn build(
    config: &WorkerConfig,
    mut registry: Registry,
    wake: &Arc<dyn Trigger>,
    origin_ns: u64,
    preview: &Preview,
) -> Result<(Machinery, BuildTimes), BuildError> {
    let mut times = BuildTimes::default();
    let since = || clock::monotonic_ns().saturating_sub(origin_ns) / 1000;
    let entries = Entries::lasting(&registry);
    let registry = &mut registry;
    let kvm = claim(registry, descriptor::KVM, 0, DescriptorKind::Kvm)?;
    let ram_kind = match config.backing {
        RamBacking::File => DescriptorKind::RamFile,
        RamBacking::Shared | RamBacking::Private => DescriptorKind::GuestRam,
    };
    let memfds = (0..)
        .zip(&config.ram)
        .map(|(id, _)| claim(registry, descriptor::RAM, id, ram_kind))
        .collect::<Result<Vec<_>, _>>()?;
    let kernel = claim(registry, descriptor::KERNEL, 0, DescriptorKind::Image)?;
    let initrd = config
        .initrd
        .then(|| claim(registry, descriptor::INITRD, 0, DescriptorKind::Image))
        .transpose()?;
    let stream = DescriptorKind::Stream;
    let serial = descriptor::SERIAL_CONSOLE;
    let console = claim(registry, descriptor::CONSOLE, serial, stream)?;
    let mut virtio = Vec::with_capacity(config.virtio.len());
    let (mut vsock, mut balloon, mut virtio_console) = (None, None, None);
    for device in &config.virtio {
        let made: Box<dyn VirtioDevice> = match &device.device {
            VirtioKind::Block(_)
            | VirtioKind::Net(_)
            | VirtioKind::Entropy
            | VirtioKind::VhostUser(_) => make(device, registry)?,
            VirtioKind::Balloon => {
                let mut made = Balloon::new(memory::page(config.pages));
                let link = made.link(Arc::clone(wake));
                balloon = Some(Ballooning::new(device.slot, link));
                Box::new(made)
            }
            VirtioKind::Console => {
                let (name, id) = (descriptor::CONSOLE, descriptor::VIRTIO_CONSOLE);
                let socket = claim(registry, name, id, stream)?;
                let (device, link) = virtio_console::Console::new(socket);
                virtio_console = Some(link);
                Box::new(device)
            }
            VirtioKind::Vsock(config) => {
                let held = registry.claim_all(descriptor::VSOCK, DescriptorKind::Stream)?;
                let (device, link) = Vsock::new(config, held, Arc::clone(wake));
                vsock = Some(link);
                Box::new(device)
            }
        };
        virtio.push(VirtioParts {
            slot: device.slot,
            device: made,
            kicks: kicks(device, registry)?,
        });
    }
    let host_devices = host_devices(config, registry)?;
    registry.finish()?;

    // The mapping is the VM's, and the VM lives as long as this process.
    let memory: &'static GuestMemoryMmap = Box::leak(Box::new(memory::map(
        &config.ram,
        memfds,
        config.pages,
        config.backing,
        config.mode,
    )?));
    times.memory_us = since();
    fail_point!(Build).map_err(BuildError::FailPoint)?;

    let (vm, host) = vm::create(kvm)?;
    vm::add_memory(&vm, memory)?;
    let vm = Arc::new(vm);
    let vcpus = vm::add_processors(&vm, config.cpus)?;
    let first = vcpus.first().ok_or_else(|| BuildError::Config {
        field: "cpus",
        value: "0".to_owned(),
    })?;
    let tsc_khz = first.get_tsc_khz().map_err(vm::ioctl("KVM_GET_TSC_KHZ"))?;
    let processors = Processors {
        count: config.cpus,
        hide: &config.hide,
        tsc_khz,
        tsc_deadline: host.tsc_deadline,
    };
    let tables = cpuid::tables(&host.cpuid, processors);
    for (vcpu, table) in vcpus.iter().zip(&tables) {
        let table = CpuId::from_entries(table).map_err(|_| BuildError::Config {
            field: "CPUID entries",
            value: table.len().to_string(),
        })?;
        vcpu.set_cpuid2(&table)
            .map_err(vm::ioctl("KVM_SET_CPUID2"))?;
    }
    let inventory = Arc::new(Inventory::of(first, &host.msrs, host.xsave)?);
    let pool = IoPool::spawn(config.io_threads)?;
    let vfio = match host_devices {
        Some((container, devices)) => Some(arrange_vfio(container, devices, memory, config.mode)?),
        None => None,
    };
    let mut platform = platform::build(PlatformParts {
        vm: &vm,
        wake,
        ram: memory,
        pool: &pool,
        drain: Duration::from_millis(config.drain_ms.into()),
        virtio,
        vfio,
        removable: config.removable,
        preview,
    })?;
    platform.devices.setup(config.mode)?;
    let rendezvous = Rendezvous::new(Arc::clone(wake));
    let vcpus = Vcpus::spawn(vcpus, &inventory, &platform.exits, rendezvous)?;
    times.vm_us = since();

    let machinery = Machinery {
        memory,
        vm,
        vcpus,
        inventory,
        console: Console::new(console, Arc::clone(&platform.serial)),
        entries,
        vsock,
        balloon,
        virtio_console,
        platform,
        cpuid: Told::of(&tables),
        kernel: kernel.into(),
        initrd: initrd.map(File::from),
        pool,
        on_panic: config.on_panic,
        cmdline: config.cmdline.clone(),
        cpus: config.cpus,
        generation_id: config.vm.0,
        removable: config.removable,
    };
    Ok((machinery, times))
}

impl Machinery {
    /// Writes the kernel and all that belongs to it into guest RAM, and says where the first vCPU enters it.
    ///
    /// # Errors
    ///
    /// [`BootError`].
    pub(crate) fn load_kernel(&self, ram: RamContent) -> Result<boot::Loaded, BootError> {
        let bridge = boot::pci_host_bridge();
        let generation_id = boot::generation_id_device();
        let hotplug = boot::pci_hotplug(self.removable);
        let mcfg = boot::mcfg();
        let params = BootParams {
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            cmdline: &self.cmdline,
            cpus: self.cpus,
            ram,
            acpi: AcpiExtras {
                dsdt: &[&*bridge, &*hotplug, &*generation_id],
                tables: &[&mcfg],
            },
        };
        let loaded = boot::load(self.memory, &params)?;
        boot::write_generation_id(self.memory, self.generation_id)?;
        Ok(loaded)
    }
}
