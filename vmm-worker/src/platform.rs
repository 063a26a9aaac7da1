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
use crate::devices::power::Power;
use crate::devices::power::PowerLatch;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::vcpu::Exits;

/// Why the devices cannot be had.
#[derive(Debug, Error)]
pub(crate) enum PlatformError {
    /// An eventfd.
    #[error("eventfd: {0}")]
    EventFd(io::Error),
    /// The devices are not those of [`DEVICES`]: a mistake in this file.
    #[error("the devices are {0:?}")]
    Order(Vec<DeviceId>),
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

/// The devices of every VM, in the order in which their states go over.
pub(crate) const DEVICES: [DeviceId; 5] = [
    DeviceId::new(DeviceKind::POWER, 0),
    DeviceId::new(DeviceKind::SERIAL, 0),
    DeviceId::new(DeviceKind::I8042, 0),
    DeviceId::new(DeviceKind::ACPI_PM, 0),
    DeviceId::new(DeviceKind::RTC, 0),
];

/// All devices.
pub(crate) struct Platform {
    pub(crate) devices: Devices,
    pub(crate) exits: Exits,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) acpi_pm: Arc<Mutex<AcpiPm>>,
    pub(crate) power: Arc<PowerLatch>,
}

/// Makes all devices. `wake` tells the control thread to look after them.
///
/// # Errors
///
/// [`PlatformError`].
pub(crate) fn build(vm: &Arc<VmFd>, wake: &Arc<dyn Trigger>) -> Result<Platform, PlatformError> {
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

    // In the order of `DEVICES`.
    let mut devices = Devices::new();
    devices.add(Arc::new(Mutex::new(Power::new(Arc::clone(&power)))))?;
    devices.add(serial.clone())?;
    devices.add(i8042)?;
    devices.add(acpi_pm.clone())?;
    devices.add(rtc)?;
    if !devices.ids().eq(DEVICES) {
        return Err(PlatformError::Order(devices.ids().collect()));
    }

    let exits = Exits {
        ports: Arc::new(ports),
        mmio: Arc::new(Bus::new()),
        power: Arc::clone(&power),
    };
    Ok(Platform {
        devices,
        exits,
        serial,
        acpi_pm,
        power,
    })
}
