//! Kernels made here, good and bad, loaded into memory without KVM.

use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

/// Guest memory of `mib` MiB.
pub(in crate::boot) fn guest_memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}
