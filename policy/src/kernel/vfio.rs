//! VFIO (Linux, `Documentation/driver-api/vfio.rst` and `linux/vfio.h`): what whoever opens a device of the host asks of its
//! container, its group and the device itself.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vfio_bindings::bindings::vfio;

/// `_IO(';', 100 + number)`, which all of VFIO's requests are.
const fn request(number: libc::c_ulong) -> libc::c_ulong {
    0x3b64 + number
}
const VFIO_GET_API_VERSION: libc::c_ulong = request(0);
const VFIO_CHECK_EXTENSION: libc::c_ulong = request(1);
const VFIO_SET_IOMMU: libc::c_ulong = request(2);
const VFIO_GROUP_GET_STATUS: libc::c_ulong = request(3);
const VFIO_GROUP_SET_CONTAINER: libc::c_ulong = request(4);
const VFIO_GROUP_GET_DEVICE_FD: libc::c_ulong = request(6);
const VFIO_DEVICE_GET_INFO: libc::c_ulong = request(7);
const VFIO_DEVICE_GET_REGION_INFO: libc::c_ulong = request(8);
const VFIO_DEVICE_GET_IRQ_INFO: libc::c_ulong = request(9);

/// The version of VFIO's interface that there is (`VFIO_API_VERSION`).
pub const API_VERSION: i32 = 0;
/// Of [`has_extension`] and [`set_iommu`]: an IOMMU whose mappings are of whole ranges.
pub const TYPE1V2_IOMMU: u32 = vfio::VFIO_TYPE1v2_IOMMU;
/// Of [`has_extension`]: all ranges of a container are unmapped at once.
pub const UNMAP_ALL: u32 = vfio::VFIO_UNMAP_ALL;
/// Of [`has_extension`]: a range stays mapped for the device while another process gives it its addresses.
pub const UPDATE_VADDR: u32 = vfio::VFIO_UPDATE_VADDR;
/// Of [`region`]: configuration space of a PCI device. Its BARs have the indices from 0.
pub const CONFIG_REGION: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
/// Of [`interrupts`]: message-signalled interrupts of a PCI device.
pub const MSI: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
/// Of [`interrupts`]: its MSI-X vectors.
pub const MSIX: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;

/// What a device is, as far as somebody who hands it on has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// It is a PCI device.
    pub pci: bool,
    /// It can be reset by itself (VFIO_DEVICE_RESET).
    pub resets: bool,
}

/// A region of a device, in its descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Where it begins.
    pub at: u64,
    /// Bytes; 0 where there is nothing.
    pub size: u64,
}

fn outcome(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A request whose argument is a number, or none.
fn plain(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: u32) -> io::Result<libc::c_int> {
    // SAFETY: the requests of this file that come here take their argument as a number and follow no pointer. On a
    // descriptor of another kind they are unknown (ENOTTY).
    outcome(unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(argument)) })
}

/// A request that reads and writes one structure, which begins with its size.
fn filled<T>(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: the kernel reads and writes no more than the structure's `argsz` bytes, which every caller in this file sets
    // to its size, and keeps no pointer to it.
    outcome(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) }).map(drop)
}

/// The `argsz` of a structure.
fn size_of<T>() -> u32 {
    u32::try_from(std::mem::size_of::<T>()).unwrap_or(u32::MAX)
}

/// The version of the interface of a container, `/dev/vfio/vfio`.
///
/// # Errors
///
/// ENOTTY for a descriptor of another kind.
pub fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    plain(container, VFIO_GET_API_VERSION, 0)
}

/// Whether a container has an extension. Once it has an IOMMU, that one is asked.
///
/// # Errors
///
/// ENOTTY for a descriptor of another kind.
pub fn has_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    Ok(plain(container, VFIO_CHECK_EXTENSION, extension)? > 0)
}

/// Whether all devices of a group are VFIO's, so that it may be used.
///
/// # Errors
///
/// ENOTTY for a descriptor of another kind.
pub fn is_viable(group: BorrowedFd<'_>) -> io::Result<bool> {
    let mut status = vfio::vfio_group_status {
        argsz: size_of::<vfio::vfio_group_status>(),
        flags: 0,
    };
    filled(group, VFIO_GROUP_GET_STATUS, &mut status)?;
    Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Attaches a group to a container.
///
/// # Errors
///
/// EINVAL when it is attached already, or the descriptor is no container's; EPERM when it is not viable; EBUSY while addresses of
/// the container's mappings are nobody's.
pub fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let descriptor: libc::c_int = container.as_raw_fd();
    // SAFETY: the request reads one int, which lives through the call, and keeps no pointer to it.
    let result = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            VFIO_GROUP_SET_CONTAINER,
            &raw const descriptor,
        )
    };
    outcome(result).map(drop)
}

/// Gives a container that has a group its IOMMU.
///
/// # Errors
///
/// EINVAL without a group; ENODEV where the host has no such IOMMU; EPERM when interrupts are not remapped, so that a device could
/// write any.
pub fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    plain(container, VFIO_SET_IOMMU, kind).map(drop)
}

/// Opens a device of a group by its name, for a PCI device its address. It has been reset by the kernel if it can be. Its
/// descriptor holds the group.
///
/// # Errors
///
/// EINVAL for a name with a NUL, and when the group has no container with an IOMMU; ENODEV when the group has no such device.
pub fn device(group: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the request reads a text with a NUL at its end, which lives through the call, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), VFIO_GROUP_GET_DEVICE_FD, name.as_ptr()) };
    let descriptor: RawFd = outcome(result)?;
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// What a device is.
///
/// # Errors
///
/// ENOTTY for a descriptor of another kind.
pub fn info(device: BorrowedFd<'_>) -> io::Result<Info> {
    let mut info = vfio::vfio_device_info {
        argsz: size_of::<vfio::vfio_device_info>(),
        ..vfio::vfio_device_info::default()
    };
    filled(device, VFIO_DEVICE_GET_INFO, &mut info)?;
    Ok(Info {
        pci: info.flags & vfio::VFIO_DEVICE_FLAGS_PCI != 0,
        resets: info.flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0,
    })
}

/// A region of a device that can be read and written; of no bytes where there is none.
///
/// # Errors
///
/// EINVAL for an index that the device does not have.
pub fn region(device: BorrowedFd<'_>, index: u32) -> io::Result<Region> {
    const BOTH: u32 = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
    let mut info = vfio::vfio_region_info {
        argsz: size_of::<vfio::vfio_region_info>(),
        index,
        ..vfio::vfio_region_info::default()
    };
    filled(device, VFIO_DEVICE_GET_REGION_INFO, &mut info)?;
    if info.flags & BOTH == BOTH {
        Ok(Region {
            at: info.offset,
            size: info.size,
        })
    } else {
        Ok(Region::default())
    }
}

/// How many interrupts of a kind a device has that signal eventfds.
///
/// # Errors
///
/// EINVAL for an index that the device does not have.
pub fn interrupts(device: BorrowedFd<'_>, index: u32) -> io::Result<u32> {
    let mut info = vfio::vfio_irq_info {
        argsz: size_of::<vfio::vfio_irq_info>(),
        index,
        ..vfio::vfio_irq_info::default()
    };
    filled(device, VFIO_DEVICE_GET_IRQ_INFO, &mut info)?;
    let signals = info.flags & vfio::VFIO_IRQ_INFO_EVENTFD != 0;
    Ok(if signals { info.count } else { 0 })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_no_part_of_vfio_is_refused_by_the_kernel() {
        let file = File::open("/dev/null").unwrap();
        let null = file.as_fd();
        let refusals = [
            api_version(null).err(),
            has_extension(null, UPDATE_VADDR).err(),
            set_iommu(null, TYPE1V2_IOMMU).err(),
            is_viable(null).err(),
            set_container(null, null).err(),
            device(null, "0000:00:01.0").err(),
            info(null).err(),
            region(null, CONFIG_REGION).err(),
            interrupts(null, MSIX).err(),
        ];
        for refusal in refusals {
            assert_eq!(refusal.unwrap().raw_os_error(), Some(libc::ENOTTY));
        }
        let error = device(null, "a\0b").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn requests_are_as_the_header_numbers_them() {
        assert_eq!(
            VFIO_GET_API_VERSION,
            u64::from(vfio::VFIO_TYPE) << 8 | u64::from(vfio::VFIO_BASE)
        );
        assert_eq!(i64::from(API_VERSION), i64::from(vfio::VFIO_API_VERSION));
    }
}
