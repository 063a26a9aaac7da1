//! The container: guest RAM, pinned and mapped for the DMA of all devices at its guest-physical addresses, and the one worker whose
//! addresses stand behind that.
//!
//! VFIO_DMA_UNMAP_FLAG_VADDR takes the addresses away and leaves the pages pinned and mapped; VFIO_DMA_MAP_FLAG_VADDR gives
//! other ones of the same memory, in the memory of whoever calls (Linux 5.12, `linux/vfio.h`). Neither looks at a page.
#![expect(
    unsafe_code,
    reason = "ioctls of VFIO: a range of memory is named by an address of this process"
)]

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;

use vfio_bindings::bindings::vfio;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;

use super::VfioError;
use super::request;

/// The name of the request that maps.
pub(super) const MAP: &str = "VFIO_IOMMU_MAP_DMA";
const VFIO_IOMMU_MAP_DMA: libc::c_ulong = request(13);
const VFIO_IOMMU_UNMAP_DMA: libc::c_ulong = request(14);

/// Whose addresses stand behind the mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Addresses {
    /// This worker's.
    Ours,
    /// The first so many regions are this worker's, the others nobody's.
    Taken(usize),
}

/// The container of a VM's devices.
#[derive(Debug)]
pub(crate) struct Container {
    fd: OwnedFd,
    memory: &'static GuestMemoryMmap,
    addresses: Addresses,
}

impl Container {
    /// The container of a guest that another worker has, which is not touched.
    pub(crate) fn of_another(fd: OwnedFd, memory: &'static GuestMemoryMmap) -> Self {
        Self {
            fd,
            memory,
            addresses: Addresses::Taken(0),
        }
    }

    /// The container of a guest that begins: pins all of its RAM, and maps it.
    ///
    /// # Errors
    ///
    /// [`VfioError::Ioctl`]: ENOMEM beyond RLIMIT_MEMLOCK, or where the host has not as much memory.
    pub(crate) fn mapped(fd: OwnedFd, memory: &'static GuestMemoryMmap) -> Result<Self, VfioError> {
        let container = Self {
            fd,
            memory,
            addresses: Addresses::Ours,
        };
        for region in 0..memory.num_regions() {
            let both = vfio::VFIO_DMA_MAP_FLAG_READ | vfio::VFIO_DMA_MAP_FLAG_WRITE;
            container.map(region, both)?;
        }
        Ok(container)
    }

    /// Gives this worker's addresses up: DMA goes on, and another worker may take the mappings over. Nothing if that was done.
    ///
    /// # Errors
    ///
    /// [`VfioError::Ioctl`]; they are this worker's still.
    pub(crate) fn give_up(&mut self) -> Result<(), VfioError> {
        if self.addresses != Addresses::Ours {
            return Ok(());
        }
        let mut all = vfio::vfio_iommu_type1_dma_unmap {
            argsz: argsz::<vfio::vfio_iommu_type1_dma_unmap>(),
            flags: vfio::VFIO_DMA_UNMAP_FLAG_ALL | vfio::VFIO_DMA_UNMAP_FLAG_VADDR,
            ..vfio::vfio_iommu_type1_dma_unmap::default()
        };
        // SAFETY: the request reads and writes one such structure, without the array that its end may have, and keeps no
        // pointer to it. It changes no memory of this process, and what the device may reach is as it was.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), VFIO_IOMMU_UNMAP_DMA, &raw mut all) };
        outcome("VFIO_IOMMU_UNMAP_DMA", result)?;
        self.addresses = Addresses::Taken(0);
        Ok(())
    }

    /// Gives the mappings this worker's addresses, which it or another had given up. Nothing if they have them.
    ///
    /// # Errors
    ///
    /// [`VfioError::Ioctl`]; DMA goes on all the same, and it can be tried again.
    pub(crate) fn take(&mut self) -> Result<(), VfioError> {
        while let Addresses::Taken(region) = self.addresses {
            if region >= self.memory.num_regions() {
                self.addresses = Addresses::Ours;
                break;
            }
            self.map(region, vfio::VFIO_DMA_MAP_FLAG_VADDR)?;
            self.addresses = Addresses::Taken(region + 1);
        }
        Ok(())
    }

    fn map(&self, region: usize, flags: u32) -> Result<(), VfioError> {
        let Some(region) = self.memory.iter().nth(region) else {
            return Ok(());
        };
        let mut map = vfio::vfio_iommu_type1_dma_map {
            argsz: argsz::<vfio::vfio_iommu_type1_dma_map>(),
            flags,
            vaddr: region.as_ptr() as u64,
            iova: region.start_addr().0,
            size: region.len(),
        };
        // SAFETY: the request reads one such structure and keeps no pointer to it. The region's mapping lives as long as the
        // process (`memory` is 'static), has exactly `size` bytes, and is used by this process through volatile accesses
        // only, as memory that a device writes must be.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), VFIO_IOMMU_MAP_DMA, &raw mut map) };
        outcome(MAP, result)
    }
}

/// The `argsz` of a structure.
fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn outcome(call: &'static str, result: libc::c_int) -> Result<(), VfioError> {
    if result < 0 {
        let source = io::Error::last_os_error();
        Err(VfioError::Ioctl { call, source })
    } else {
        Ok(())
    }
}
