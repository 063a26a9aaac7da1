//! Which device of a VM file is in which PCI slot: the same for whoever opens them and for whoever compares them.

use baton_ipc::worker::MAX_SLOTS;

use super::VmFile;
use super::disk::Disk;
use super::net::Net;
use super::vfio::Vfio;
use super::vhost_user::VhostUser;
use super::vsock::Vsock;

/// The PCI device number of the entropy device, which every VM has: the last, so that it moves no other.
const ENTROPY_SLOT: u8 = MAX_SLOTS - 1;
/// The one of the socket device.
const VSOCK_SLOT: u8 = MAX_SLOTS - 2;
/// The one of the balloon.
const BALLOON_SLOT: u8 = MAX_SLOTS - 3;
/// The one of the virtio console.
const CONSOLE_SLOT: u8 = MAX_SLOTS - 4;

/// A device as the VM file has it.
pub(crate) enum Plugged<'a> {
    Disk(&'a Disk),
    Net(&'a Net),
    VhostUser(&'a VhostUser),
    Console,
    Balloon,
    Vsock(&'a Vsock),
    Entropy,
}

impl VmFile {
    /// The devices with their slots: disks, network interfaces, and what other processes implement, each in the order of the VM
    /// file, from the slot after the host bridge; then those that have a slot of their own.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (u8, Plugged<'_>)> {
        let disks = self.disk.0.iter().map(Plugged::Disk);
        let nets = self.net.0.iter().map(Plugged::Net);
        let others = self.vhost_user.0.iter().map(Plugged::VhostUser);
        let balloon = self.memory.balloon.then_some(Plugged::Balloon);
        let vsock = self.vsock.as_ref().map(Plugged::Vsock);
        let console = self.virtio_console.as_ref().map(|_| Plugged::Console);
        let own = [
            (CONSOLE_SLOT, console),
            (BALLOON_SLOT, balloon),
            (VSOCK_SLOT, vsock),
            (ENTROPY_SLOT, Some(Plugged::Entropy)),
        ];
        let own = own.into_iter().filter_map(|(slot, one)| Some((slot, one?)));
        (1..).zip(disks.chain(nets).chain(others)).chain(own)
    }

    /// Whether two of them would have one slot.
    pub(super) fn overfull(&self) -> bool {
        !self.devices().is_sorted_by(|(a, _), (b, _)| a < b)
    }

    /// The devices that are PCI devices of the host, with their slots: after those in the order of the VM file.
    pub(crate) fn host_devices(&self) -> impl Iterator<Item = (u8, &Vfio)> {
        let before = self.disk.0.len() + self.net.0.len() + self.vhost_user.0.len();
        let first = u8::try_from(before + 1).unwrap_or(u8::MAX);
        (first..).zip(&self.vfio.0)
    }

    /// What does not go together with devices of the host.
    pub(crate) fn check_vfio(&self) -> Result<(), &'static str> {
        if !self.memory.share {
            return Err(
                "vfio with memory.share = false: memory that is the worker's own cannot be handed over",
            );
        }
        if self.memory.balloon {
            return Err(
                "vfio with memory.balloon: all of guest RAM is pinned, and none can be given back",
            );
        }
        // After those that are counted, each has a slot of its own.
        let first = self.host_devices().map(|(slot, _)| slot).min();
        let own = self.devices().map(|(slot, _)| slot);
        let first_own = own.filter(|slot| Some(*slot) >= first).min();
        if self.host_devices().any(|(slot, _)| Some(slot) >= first_own) {
            return Err("more devices than there are PCI device numbers");
        }
        Ok(())
    }

    /// The PCI device numbers that are free for devices to come to while the guest runs, one bit each: all but the host
    /// bridge's and those of this file.
    pub(crate) fn removable(&self) -> u32 {
        let taken = self.devices().map(|(slot, _)| slot);
        let host = self.host_devices().map(|(slot, _)| slot);
        let taken = taken
            .chain(host)
            .map(|slot| 1_u32.checked_shl(slot.into()).unwrap_or(0));
        !taken.fold(1, |taken, slot| taken | slot)
    }
}
