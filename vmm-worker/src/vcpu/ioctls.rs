//! The vCPU ioctls that kvm-ioctls does not have on x86-64, or has as unsafe functions.
#![expect(
    unsafe_code,
    reason = "raw ioctls; XSAVE buffers whose length the caller answers for"
)]

use kvm_bindings::KVM_VCPU_TSC_CTRL;
use kvm_bindings::KVM_VCPU_TSC_OFFSET;
use kvm_bindings::Xsave;
use kvm_bindings::kvm_device_attr;
use kvm_bindings::kvm_sregs2;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl::ioctl_with_ref;
use zerocopy::IntoBytes as _;

// Request numbers (Linux, include/uapi/linux/kvm.h); a test recomputes them.
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_aee2;
const KVM_HAS_DEVICE_ATTR: u64 = 0x4018_aee3;
const KVM_GET_SREGS2: u64 = 0x8140_aecc;
const KVM_SET_SREGS2: u64 = 0x4140_aecd;

/// The part of the XSAVE area that every vCPU has (`struct kvm_xsave` without its flexible array), in bytes.
pub(crate) const XSAVE_MIN: usize = 4096;

type Result<T> = std::result::Result<T, errno::Error>;

fn outcome(returned: i32) -> Result<()> {
    if returned < 0 {
        errno::errno_result()
    } else {
        Ok(())
    }
}

/// KVM_GET_SREGS2: with the PDPTRs of a guest in PAE paging, which KVM_GET_SREGS leaves out.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: `vcpu` is a vCPU; the request writes one kvm_sregs2, which is what it is given.
    outcome(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2, &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<()> {
    // SAFETY: `vcpu` is a vCPU; the request reads one kvm_sregs2, which is what it is given.
    outcome(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2, sregs) })
}

fn tsc_offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
    }
}

/// Whether the TSC offset is an attribute of vCPUs (Linux 5.16).
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let attribute = tsc_offset_attribute(0);
    // SAFETY: `vcpu` is a vCPU; the request reads one kvm_device_attr and follows no address in it.
    outcome(unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR, &attribute) }).is_ok()
}

/// The TSC offset: guest TSC less host TSC (Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_attribute(&raw mut offset as u64);
    // SAFETY: `vcpu` is a vCPU; the request writes the u64 at `addr`, which is `offset`, alive and not otherwise
    // borrowed.
    outcome(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR, &attribute) })?;
    Ok(offset)
}

/// Sets the TSC offset. kvm-pvm accepts and ignores it: whoever needs to know reads it back.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<()> {
    let attribute = tsc_offset_attribute(&raw const offset as u64);
    // SAFETY: `vcpu` is a vCPU; the request reads the u64 at `addr`, which is `offset`, alive.
    outcome(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR, &attribute) })
}

/// KVM_GET_XSAVE2. `size` is what KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says for this VM, in bytes.
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>> {
    let mut xsave = blank_xsave(size)?;
    // SAFETY: the buffer has `size` bytes (rounded up to whole words), which is what the kernel writes for this VM.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(xsave.as_fam_struct_ref().xsave.region.as_bytes());
    bytes.extend_from_slice(xsave.as_slice().as_bytes());
    bytes.truncate(size);
    Ok(bytes)
}

/// KVM_SET_XSAVE of `bytes`, which are as many as [`get_xsave`] gives for this VM.
pub(crate) fn set_xsave(vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let mut xsave = blank_xsave(bytes.len())?;
    let (fixed, flexible) = bytes
        .split_at_checked(XSAVE_MIN)
        .ok_or(errno::Error::new(libc::EINVAL))?;
    // SAFETY: the flexible array keeps its length; only the fixed part is written.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    region.as_mut_bytes().copy_from_slice(fixed);
    for (to, from) in xsave.as_mut_slice().as_mut_bytes().iter_mut().zip(flexible) {
        *to = *from;
    }
    // SAFETY: the buffer has at least as many bytes as the kernel reads for this VM: callers check that `bytes` is of
    // KVM_CAP_XSAVE2's size, and the buffer is never smaller than `bytes`.
    unsafe { vcpu.set_xsave2(&xsave) }
}

fn blank_xsave(size: usize) -> Result<Xsave> {
    let words = size.saturating_sub(XSAVE_MIN).div_ceil(size_of::<u32>());
    Xsave::new(words).map_err(|_| errno::Error::new(libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::ioctl::_IOC_READ;
    use vmm_sys_util::ioctl::_IOC_WRITE;
    use vmm_sys_util::ioctl::ioctl_expr;

    use super::*;

    #[test]
    fn request_numbers_are_the_kernels() {
        let attribute = u32::try_from(size_of::<kvm_device_attr>()).unwrap();
        let sregs2 = u32::try_from(size_of::<kvm_sregs2>()).unwrap();
        for (number, direction, nr, size) in [
            (KVM_SET_DEVICE_ATTR, _IOC_WRITE, 0xe1, attribute),
            (KVM_GET_DEVICE_ATTR, _IOC_WRITE, 0xe2, attribute),
            (KVM_HAS_DEVICE_ATTR, _IOC_WRITE, 0xe3, attribute),
            (KVM_GET_SREGS2, _IOC_READ, 0xcc, sregs2),
            (KVM_SET_SREGS2, _IOC_WRITE, 0xcd, sregs2),
        ] {
            assert_eq!(number, ioctl_expr(direction, kvm_bindings::KVMIO, nr, size));
        }
    }
}
