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
use std::sync::PoisonError;
use std::time::Duration;

use baton_ipc::worker::VirtioKind;
use baton_ipc::worker::WorkerConfig;
use kvm_ioctls::VmFd;
use rustix::event::EventfdFlags;
use thiserror::Error;

use crate::boot::layout;
use crate::devices::Bus;
use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::Devices;
use crate::devices::IrqLine;
use crate::devices::Trigger;
use crate::devices::acpi_pm::AcpiPm;
use crate::devices::bus::BusError;
use crate::devices::i8042::I8042;
use crate::devices::lifecycle::LifecycleError;
use crate::devices::pci::segment::Segment;
use crate::devices::pci::segment::SegmentDevice;
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
use crate::io_pool::IoPool;
use crate::pci_host;
use crate::pci_host::PciHost;
use crate::pci_host::Preview;
use crate::vcpu::Exits;
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
const DEVICES: [DeviceId; 7] = [
    DeviceId::new(DeviceKind::POWER, 0),
    DeviceId::new(DeviceKind::SERIAL, 0),
    DeviceId::new(DeviceKind::I8042, 0),
    DeviceId::new(DeviceKind::ACPI_PM, 0),
    DeviceId::new(DeviceKind::RTC, 0),
    DeviceId::new(DeviceKind::PCI, 0),
    DeviceId::new(DeviceKind::PVPANIC, 0),
];

/// The devices of a VM, in the order in which their states go over.
pub(crate) fn device_ids(config: &WorkerConfig) -> Vec<DeviceId> {
    let virtio = config.virtio.iter().map(|device| {
        let kind = match device.device {
            VirtioKind::Block(_) => DeviceKind::BLOCK,
            VirtioKind::Entropy => DeviceKind::ENTROPY,
            VirtioKind::Net(_) => DeviceKind::NET,
            VirtioKind::Vsock(_) => DeviceKind::VSOCK,
            VirtioKind::Balloon => DeviceKind::BALLOON,
        };
        DeviceId::new(kind, device.slot.into())
    });
    DEVICES.into_iter().chain(virtio).collect()
}

/// A virtio device, not yet plugged in.
pub(crate) struct VirtioParts {
    pub(crate) slot: u8,
    pub(crate) device: Box<dyn VirtioDevice>,
    /// What a driver notifies each queue by.
    pub(crate) kicks: Vec<Arc<OwnedFd>>,
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
    let pci = plug(parts, &segment, &mut devices)?;

    let exits = Exits {
        ports: Arc::new(ports),
        mmio: Arc::new(mmio),
        power: Arc::clone(&power),
    };
    Ok(Platform {
        devices,
        exits,
        serial,
        acpi_pm,
        power,
        pvpanic,
        pci,
    })
}

/// Makes the virtio devices, plugs them in, and gives their backends to the pool's threads in turn.
fn plug(
    parts: PlatformParts<'_>,
    segment: &Mutex<Segment>,
    devices: &mut Devices,
) -> Result<PciHost, PlatformError> {
    let mut pci = PciHost::new(Arc::clone(parts.vm), Arc::clone(parts.wake));
    let mut seats = 0;
    for VirtioParts {
        slot,
        device,
        kicks,
    } in parts.virtio
    {
        let vectors = u16::try_from(kicks.len()).unwrap_or(0).saturating_add(1);
        let (sink, irqs) = pci.vectors(slot, vectors)?;
        let wakers: Vec<_> = (seats..)
            .take(kicks.len())
            .map(|number| parts.pool.waker(number))
            .collect();
        let transport = Transport::new(
            device,
            transport::Parts {
                slot,
                bar: pci_host::first_bar(slot),
                sink: Box::new(sink),
                kicks,
                ram: parts.ram,
                wakers,
                drain: parts.drain,
            },
        );
        for seat in transport.seats() {
            parts.pool.add(seats, Arc::clone(seat));
            seats += 1;
        }
        let transport = Arc::new(Mutex::new(transport));
        let plugged = segment
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .plug(slot, transport.clone());
        if !plugged {
            return Err(PlatformError::Slot(slot));
        }
        devices.add(transport.clone())?;
        pci.add(slot, transport, irqs);
    }
    pci.arrange(parts.preview)?;
    Ok(pci)
}
