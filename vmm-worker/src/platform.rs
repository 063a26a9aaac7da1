//! The devices of a VM: made, put on their buses, and wired to the VM's interrupts.
//!
//! These devices raise interrupts by KVM_IRQ_LINE, not by eventfds: KVM carries an eventfd's signal to the PICs and the
//! I/O APIC from a work queue, which may be after they were saved, and the interrupt would be lost. This way it is in the
//! saved state of either the controllers or the device.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_ipc::worker::WorkerConfig;
use kvm_ioctls::VmFd;
use rustix::event::EventfdFlags;
use thiserror::Error;

use crate::boot::layout;
use crate::devices::Bus;
use crate::devices::Device as _;
use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::Devices;
use crate::devices::IrqLine;
use crate::devices::SharedLine;
use crate::devices::Trigger;
use crate::devices::acpi_pm::AcpiPm;
use crate::devices::bus::BusError;
use crate::devices::i8042::I8042;
use crate::devices::lifecycle::DeviceError;
use crate::devices::lifecycle::LifecycleError;
use crate::devices::pci::hotplug::Hotplug;
use crate::devices::pci::msix::Msix;
use crate::devices::pci::segment::Segment;
use crate::devices::pci::segment::SegmentDevice;
use crate::devices::pci::segment::SharedFunction;
use crate::devices::pci::segment::Window;
use crate::devices::pci::segment::WindowDevice;
use crate::devices::power::Power;
use crate::devices::power::PowerLatch;
use crate::devices::pvpanic::PvPanic;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::buffers::Ram;
use crate::devices::virtio::transport;
use crate::devices::virtio::transport::Transport;
use crate::devices::virtio::vhost_user;
use crate::diagnostics::log;
use crate::io_pool::IoPool;
use crate::pci_host;
use crate::pci_host::PciHost;
use crate::pci_host::Preview;
use crate::pci_host::Room;
use crate::vcpu::Exits;
use crate::vfio;
use crate::vfio::VfioError;
use crate::vfio::container::Container;
use crate::vfio::device::HostDevice;
use crate::vfio::interrupts::Vectors;
use crate::vm::VmError;

/// Why the devices cannot be had.
#[derive(Debug, Error)]
pub(crate) enum PlatformError {
    /// An eventfd.
    #[error("eventfd: {0}")]
    EventFd(io::Error),
    /// The devices are not those of [`DEVICES`]: a mistake in this file.
    #[error("the devices are {0:?}")]
    Order(Vec<DeviceId>),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// More interrupt routes than a table holds.
    #[error("{0} interrupt routes")]
    Routes(usize),
    /// A PCI device where there can be none.
    #[error("PCI device {0} cannot be there")]
    Slot(u8),
    /// Two devices want the same addresses.
    #[error("bus: {0}")]
    Bus(#[from] BusError),
    /// A device cannot end.
    #[error(transparent)]
    Device(DeviceError),
    /// A device of the host.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The device set refuses.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
}

/// The wake-up of the control thread.
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> Result<Self, PlatformError> {
        rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map(Self)
            .map_err(|e| PlatformError::EventFd(e.into()))
    }

    /// Forgets that it was triggered.
    pub(crate) fn clear(&self) {
        // Nothing to read is as good.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Trigger for Wake {
    fn trigger(&self) {
        // Only a counter at its end refuses, and then whoever waits is woken anyhow.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

/// An edge-triggered input of the interrupt controllers.
struct Edge {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Trigger for Edge {
    fn trigger(&self) {
        for high in [true, false] {
            // KVM_IRQ_LINE of an existing GSI cannot fail.
            let _ = self.vm.set_irq_line(self.gsi, high);
        }
    }
}

/// A level-triggered input of the interrupt controllers.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        // KVM_IRQ_LINE of an existing GSI cannot fail.
        let _ = self.vm.set_irq_line(self.gsi, high);
    }
}

/// The devices of every VM, in the order in which their states go over; virtio devices follow.
const DEVICES: [DeviceId; 8] = [
    DeviceId::new(DeviceKind::POWER, 0),
    DeviceId::new(DeviceKind::SERIAL, 0),
    DeviceId::new(DeviceKind::I8042, 0),
    DeviceId::new(DeviceKind::ACPI_PM, 0),
    DeviceId::new(DeviceKind::RTC, 0),
    DeviceId::new(DeviceKind::PCI, 0),
    DeviceId::new(DeviceKind::PVPANIC, 0),
    DeviceId::new(DeviceKind::HOTPLUG, 0),
];

/// The devices of a VM, in the order in which their states go over.
pub(crate) fn device_ids(config: &WorkerConfig) -> Vec<DeviceId> {
    DEVICES
        .into_iter()
        .chain(config.virtio.iter().map(device_id))
        .chain((config.vfio.iter()).map(|one| DeviceId::new(DeviceKind::VFIO, one.slot.into())))
        .collect()
}

fn device_id(device: &VirtioConfig) -> DeviceId {
    let kind = match &device.device {
        VirtioKind::Block(_) => DeviceKind::BLOCK,
        VirtioKind::Entropy => DeviceKind::ENTROPY,
        VirtioKind::Net(_) => DeviceKind::NET,
        VirtioKind::Vsock(_) => DeviceKind::VSOCK,
        VirtioKind::Balloon => DeviceKind::BALLOON,
        VirtioKind::VhostUser(backend) => vhost_user::identity(backend.kind).kind,
        VirtioKind::Console => DeviceKind::CONSOLE,
    };
    DeviceId::new(kind, device.slot.into())
}

/// A virtio device, not yet plugged in.
pub(crate) struct VirtioParts {
    pub(crate) slot: u8,
    pub(crate) device: Box<dyn VirtioDevice>,
    /// What a driver notifies each queue by.
    pub(crate) kicks: Vec<Arc<OwnedFd>>,
}

/// A PCI device of the host, not yet plugged in.
pub(crate) struct VfioParts {
    pub(crate) config: VfioConfig,
    pub(crate) file: OwnedFd,
    /// What each of its vectors signals.
    pub(crate) vectors: Vec<OwnedFd>,
}

/// What platform devices are made with.
pub(crate) struct PlatformParts<'a> {
    pub(crate) vm: &'a Arc<VmFd>,
    /// Tells the control thread to look after devices.
    pub(crate) wake: &'a Arc<dyn Trigger>,
    pub(crate) ram: Ram,
    pub(crate) pool: &'a IoPool,
    /// How long requests in flight may take when devices park.
    pub(crate) drain: Duration,
    pub(crate) virtio: Vec<VirtioParts>,
    /// PCI devices of the host, and what they share.
    pub(crate) vfio: Option<(Arc<Mutex<Container>>, Vec<VfioParts>)>,
    /// Slots that devices come to and go from while the guest runs, one bit each.
    pub(crate) removable: u32,
    /// What the old worker of an upgrade says in advance.
    pub(crate) preview: &'a Preview,
}

/// All devices.
pub(crate) struct Platform {
    pub(crate) devices: Devices,
    pub(crate) exits: Exits,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) acpi_pm: Arc<Mutex<AcpiPm>>,
    pub(crate) power: Arc<PowerLatch>,
    pub(crate) pvpanic: Arc<Mutex<PvPanic>>,
    pub(crate) pci: PciHost,
    hotplug: Arc<Mutex<Hotplug>>,
    segment: Arc<Mutex<Segment>>,
    ram: Ram,
    drain: Duration,
    /// Backends that the pool's threads have got, in turn.
    seats: usize,
}

/// Makes all devices.
///
/// # Errors
///
/// [`PlatformError`].
pub(crate) fn build(parts: PlatformParts<'_>) -> Result<Platform, PlatformError> {
    let (vm, wake) = (parts.vm, parts.wake);
    let com1 = Arc::new(Edge {
        vm: Arc::clone(vm),
        gsi: layout::COM1_IRQ,
    });
    let sci = Arc::new(Line {
        vm: Arc::clone(vm),
        gsi: layout::SCI_IRQ,
    });

    let [sci, hotplug_sci] = SharedLine::two(sci).map(Arc::new);

    let power = PowerLatch::new(Arc::clone(wake));
    let serial = Arc::new(Mutex::new(SerialPort::new(0, com1, Arc::clone(wake))));
    let i8042 = Arc::new(Mutex::new(I8042::new(Arc::clone(&power))));
    let acpi_pm = Arc::new(Mutex::new(AcpiPm::new(Arc::clone(&power), sci)));
    let rtc = Arc::new(Mutex::new(Rtc::new()));
    let pvpanic = Arc::new(Mutex::new(PvPanic::new(Arc::clone(wake))));

    let mut ports = Bus::new();
    ports.insert(
        u64::from(layout::COM1_PORT),
        u64::from(layout::COM1_PORTS),
        serial.clone(),
    )?;
    ports.insert(
        u64::from(layout::I8042_PORT),
        u64::from(layout::I8042_PORTS),
        i8042.clone(),
    )?;
    ports.insert(
        u64::from(layout::RTC_PORT),
        u64::from(layout::RTC_PORTS),
        rtc.clone(),
    )?;
    ports.insert(
        u64::from(layout::ACPI_PM_PORT),
        u64::from(layout::ACPI_PM_PORTS),
        acpi_pm.clone(),
    )?;
    ports.insert(
        u64::from(layout::PVPANIC_PORT),
        u64::from(layout::PVPANIC_PORTS),
        pvpanic.clone(),
    )?;

    // In the order of `DEVICES`.
    let mut devices = Devices::new();
    devices.add(Arc::new(Mutex::new(Power::new(Arc::clone(&power)))))?;
    devices.add(serial.clone())?;
    devices.add(i8042)?;
    devices.add(acpi_pm.clone())?;
    devices.add(rtc)?;
    let segment = Arc::new(Mutex::new(Segment::new(layout::PCI_WINDOW_32)));
    devices.add(Arc::new(Mutex::new(SegmentDevice(Arc::clone(&segment)))))?;
    devices.add(pvpanic.clone())?;
    let hotplug = Arc::new(Mutex::new(Hotplug::new(
        Arc::clone(&segment),
        parts.removable,
        hotplug_sci,
        Arc::clone(wake),
    )));
    devices.add(hotplug.clone())?;
    ports.insert(
        u64::from(layout::PCI_HOTPLUG_PORT),
        u64::from(layout::PCI_HOTPLUG_PORTS),
        hotplug.clone(),
    )?;
    if !devices.ids().eq(DEVICES) {
        return Err(PlatformError::Order(devices.ids().collect()));
    }
    let mut mmio = Bus::new();
    let window = |window| {
        let segment = Arc::clone(&segment);
        Arc::new(Mutex::new(WindowDevice { window, segment }))
    };
    ports.insert(
        u64::from(layout::PCI_CONFIG_PORT),
        u64::from(layout::PCI_CONFIG_PORTS),
        window(Window::Ports),
    )?;
    mmio.insert(
        layout::PCI_ECAM,
        layout::PCI_ECAM_SIZE,
        window(Window::Ecam),
    )?;
    mmio.insert(
        layout::PCI_WINDOW_32,
        layout::PCI_WINDOW_32_SIZE,
        window(Window::Memory),
    )?;
    let exits = Exits {
        ports: Arc::new(ports),
        mmio: Arc::new(mmio),
        power: Arc::clone(&power),
    };
    let mut platform = Platform {
        devices,
        exits,
        serial,
        acpi_pm,
        power,
        pvpanic,
        pci: PciHost::new(Arc::clone(vm), Arc::clone(wake)),
        hotplug,
        segment,
        ram: parts.ram,
        drain: parts.drain,
        seats: 0,
    };
    for virtio in parts.virtio {
        let slot = virtio.slot;
        let (transport, irqs) = platform.attach(parts.pool, virtio)?;
        platform.devices.add(transport.clone())?;
        platform.put(slot, transport.clone())?;
        platform.pci.add(slot, transport, irqs);
    }
    if let Some((container, devices)) = parts.vfio {
        let mut room = Room::below_4_gib();
        for device in devices {
            platform.assign(vm, &mut room, &container, device)?;
        }
    }
    platform.pci.arrange(parts.preview);
    Ok(platform)
}

/// A virtio device behind its transport, and its vectors.
type Attached = (Arc<Mutex<Transport>>, Arc<Vec<OwnedFd>>);

impl Platform {
    /// Makes a virtio device, and gives its backends to the pool's threads in turn.
    fn attach(&mut self, pool: &IoPool, parts: VirtioParts) -> Result<Attached, PlatformError> {
        let VirtioParts {
            slot,
            device,
            kicks,
        } = parts;
        let vectors = u16::try_from(kicks.len()).unwrap_or(0).saturating_add(1);
        let (sink, irqs) = self.pci.vectors(slot, vectors)?;
        let wakers: Vec<_> = (self.seats..)
            .take(kicks.len())
            .map(|number| pool.waker(number))
            .collect();
        let transport = Transport::new(
            device,
            transport::Parts {
                slot,
                bar: pci_host::first_bar(slot),
                sink: Box::new(sink),
                kicks,
                ram: self.ram,
                wakers,
                drain: self.drain,
            },
        );
        for seat in transport.seats() {
            pool.add(self.seats, Arc::clone(seat));
            self.seats += 1;
        }
        Ok((Arc::new(Mutex::new(transport)), irqs))
    }

    /// Puts a device of the host on the bus.
    fn assign(
        &mut self,
        vm: &Arc<VmFd>,
        room: &mut Room,
        container: &Arc<Mutex<Container>>,
        parts: VfioParts,
    ) -> Result<(), PlatformError> {
        let VfioParts {
            config,
            file,
            vectors,
        } = parts;
        let slot = config.slot;
        let shape = vfio::config::shape(&config, |size| {
            room.take(size).ok_or(VfioError::Room {
                slot,
                size,
                window: layout::PCI_WINDOW_32_SIZE,
            })
        })?;
        let first = pci_host::interrupt(slot, 0);
        let device = HostDevice::new(vfio::device::Parts {
            slot,
            file,
            space_at: config.space_at,
            bars: config.bars,
            shape,
            resets: config.resets,
            msix: Msix::new(config.vectors, Box::new(self.pci.sink())),
            vectors: Vectors::new(Arc::clone(vm), first, vectors),
            container: Arc::clone(container),
        });
        let device = Arc::new(Mutex::new(device));
        self.devices.add(device.clone())?;
        self.put(slot, device.clone())?;
        self.pci.assign(slot, device);
        Ok(())
    }

    /// Puts a function on the bus.
    fn put(&self, slot: u8, transport: SharedFunction) -> Result<(), PlatformError> {
        let mut segment = self.segment.lock().unwrap_or_else(PoisonError::into_inner);
        if segment.plug(slot, transport) {
            Ok(())
        } else {
            Err(PlatformError::Slot(slot))
        }
    }

    /// Makes a virtio device of a VM that runs or stands still, and tells the guest of it.
    ///
    /// # Errors
    ///
    /// [`PlatformError`]; nothing of it is left then.
    pub(crate) fn join(&mut self, pool: &IoPool, parts: VirtioParts) -> Result<(), PlatformError> {
        let slot = parts.slot;
        if !self.hotplug().is_removable(slot) || self.pci.transport(slot).is_some() {
            return Err(PlatformError::Slot(slot));
        }
        let (transport, irqs) = self.attach(pool, parts)?;
        let joined = self.devices.join(transport.clone());
        let put = joined
            .map_err(PlatformError::from)
            .and_then(|()| self.put(slot, transport.clone()));
        if let Err(error) = put {
            let transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            pool.forget(transport.seats());
            let _ = self.devices.leave(transport.id());
            return Err(error);
        }
        self.pci.join(slot, transport, irqs);
        self.hotplug().announce(slot);
        Ok(())
    }

    /// Ends the device of this slot, which the guest has let go.
    ///
    /// # Errors
    ///
    /// [`PlatformError`]: it is as before then, and this can be tried again.
    pub(crate) fn leave(&mut self, pool: &IoPool, slot: u8) -> Result<(), PlatformError> {
        let found = self.pci.transport(slot).map(Arc::clone);
        let Some(transport) = found.filter(|_| self.hotplug().is_gone(slot)) else {
            return Err(PlatformError::Slot(slot));
        };
        let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.end().map_err(PlatformError::Device)?;
        pool.forget(transport.seats());
        self.devices.leave(transport.id())?;
        drop(transport);
        if let Err(error) = self.pci.leave(slot) {
            // What KVM keeps of it signals nobody.
            log!("PCI device {slot}: {error}");
        }
        self.hotplug().ended(slot);
        Ok(())
    }

    /// The hot-plug registers.
    pub(crate) fn hotplug(&self) -> MutexGuard<'_, Hotplug> {
        self.hotplug.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
