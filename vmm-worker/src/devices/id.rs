//! Names of devices in a saved VM.

use std::fmt;
use std::ops::RangeInclusive;

/// What a device is. The number is its name in the saved state for all time: a number is never used again for another
/// kind, and the kinds of all devices are listed here so that none is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKind(pub u16);

impl DeviceKind {
    /// [`super::power::PowerLatch`].
    pub const POWER: DeviceKind = DeviceKind(1);
    /// [`super::serial::SerialPort`].
    pub const SERIAL: DeviceKind = DeviceKind(2);
    /// [`super::i8042::I8042`].
    pub const I8042: DeviceKind = DeviceKind(3);
    /// [`super::acpi_pm::AcpiPm`].
    pub const ACPI_PM: DeviceKind = DeviceKind(4);
    /// [`super::rtc::Rtc`].
    pub const RTC: DeviceKind = DeviceKind(5);
    /// [`super::pci::segment::SegmentDevice`].
    pub const PCI: DeviceKind = DeviceKind(6);
    /// [`super::virtio::block::Block`]; the instance is the PCI device number.
    pub const BLOCK: DeviceKind = DeviceKind(7);
    /// [`super::virtio::entropy::Entropy`]; the instance is the PCI device number.
    pub const ENTROPY: DeviceKind = DeviceKind(8);
    /// [`super::virtio::net::Net`]; the instance is the PCI device number.
    pub const NET: DeviceKind = DeviceKind(9);
    /// [`super::virtio::vsock::Vsock`]; the instance is the PCI device number.
    pub const VSOCK: DeviceKind = DeviceKind(10);
    /// [`super::virtio::balloon::Balloon`]; the instance is the PCI device number.
    pub const BALLOON: DeviceKind = DeviceKind(11);
    /// [`super::pvpanic::PvPanic`].
    pub const PVPANIC: DeviceKind = DeviceKind(12);
    /// [`super::pci::hotplug::Hotplug`].
    pub const HOTPLUG: DeviceKind = DeviceKind(13);
    /// [`super::virtio::vhost_user::VhostUser`] as a disk; the instance is the PCI device number.
    pub const VHOST_USER_BLK: DeviceKind = DeviceKind(14);
    /// [`super::virtio::vhost_user::VhostUser`] as a file system; the instance is the PCI device number.
    pub const VHOST_USER_FS: DeviceKind = DeviceKind(15);
    /// [`super::virtio::console::Console`]; the instance is the PCI device number.
    pub const CONSOLE: DeviceKind = DeviceKind(16);
    /// A PCI device of the host; the instance is the PCI device number.
    pub const VFIO: DeviceKind = DeviceKind(17);

    /// The versions of its section that this build reads. It writes the newest.
    #[must_use]
    pub fn versions(self) -> RangeInclusive<u16> {
        match self {
            // 2: with the block size.
            DeviceKind::BLOCK => 1..=2,
            _ => 1..=1,
        }
    }

    /// The name for people; a kind that is not listed here shows as its number only.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::POWER => "power",
            DeviceKind::SERIAL => "serial",
            DeviceKind::I8042 => "i8042",
            DeviceKind::ACPI_PM => "acpi-pm",
            DeviceKind::RTC => "rtc",
            DeviceKind::PCI => "pci",
            DeviceKind::BLOCK => "virtio-blk",
            DeviceKind::ENTROPY => "virtio-rng",
            DeviceKind::NET => "virtio-net",
            DeviceKind::VSOCK => "virtio-vsock",
            DeviceKind::BALLOON => "virtio-balloon",
            DeviceKind::PVPANIC => "pvpanic",
            DeviceKind::HOTPLUG => "pci-hotplug",
            DeviceKind::VHOST_USER_BLK => "vhost-user-blk",
            DeviceKind::VHOST_USER_FS => "vhost-user-fs",
            DeviceKind::CONSOLE => "virtio-console",
            DeviceKind::VFIO => "vfio-pci",
            _ => "device",
        }
    }
}

/// One device of a VM: what it is, and which one of those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// What it is.
    pub kind: DeviceKind,
    /// 0 for the first of its kind.
    pub instance: u16,
}

impl DeviceId {
    /// The `instance`th device of its kind.
    #[must_use]
    pub const fn new(kind: DeviceKind, instance: u16) -> Self {
        DeviceId { kind, instance }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}.{}]", self.kind.name(), self.kind.0, self.instance)
    }
}
