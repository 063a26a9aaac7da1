//! The VM as KVM has it: made of the `/dev/kvm` that was handed over, checked for what this worker needs, and bound to
//! guest RAM before anything that makes KVM look at it.
#![expect(
    unsafe_code,
    reason = "memory slots are addresses of this process; adopting descriptors as /dev/kvm and as eventfds"
)]

use std::os::fd::IntoRawFd as _;
use std::os::fd::OwnedFd;

use kvm_bindings::KVM_API_VERSION;
use kvm_bindings::KVM_CAP_ADJUST_CLOCK;
use kvm_bindings::KVM_CAP_DEBUGREGS;
use kvm_bindings::KVM_CAP_EXT_CPUID;
use kvm_bindings::KVM_CAP_GET_TSC_KHZ;
use kvm_bindings::KVM_CAP_IMMEDIATE_EXIT;
use kvm_bindings::KVM_CAP_IRQCHIP;
use kvm_bindings::KVM_CAP_KVMCLOCK_CTRL;
use kvm_bindings::KVM_CAP_MP_STATE;
use kvm_bindings::KVM_CAP_PIT_STATE2;
use kvm_bindings::KVM_CAP_PIT2;
use kvm_bindings::KVM_CAP_SET_IDENTITY_MAP_ADDR;
use kvm_bindings::KVM_CAP_SET_TSS_ADDR;
use kvm_bindings::KVM_CAP_SREGS2;
use kvm_bindings::KVM_CAP_TSC_DEADLINE_TIMER;
use kvm_bindings::KVM_CAP_USER_MEMORY;
use kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES;
use kvm_bindings::KVM_CAP_VCPU_EVENTS;
use kvm_bindings::KVM_CAP_X86_TRIPLE_FAULT_EVENT;
use kvm_bindings::KVM_CAP_XCRS;
use kvm_bindings::KVM_CAP_XSAVE2;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::KVM_PIT_SPEAKER_DUMMY;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_bindings::kvm_enable_cap;
use kvm_bindings::kvm_pit_config;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use std::os::fd::FromRawFd as _;
use thiserror::Error;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::layout;
use crate::vcpu::ioctls::XSAVE_MIN;

/// What KVM must have, and since which Linux it does.
const NEEDED: &[(u32, &str, &str)] = &[
    (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", "2.6.20"),
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "2.6.25"),
    (KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", "2.6.25"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "2.6.26"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE", "2.6.26"),
    (KVM_CAP_PIT2, "KVM_CAP_PIT2", "2.6.31"),
    (
        KVM_CAP_SET_IDENTITY_MAP_ADDR,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "2.6.33",
    ),
    (KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2", "2.6.33"),
    (KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK", "2.6.33"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", "2.6.33"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS", "2.6.34"),
    (KVM_CAP_XCRS, "KVM_CAP_XCRS", "2.6.36"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ", "2.6.39"),
    (KVM_CAP_KVMCLOCK_CTRL, "KVM_CAP_KVMCLOCK_CTRL", "3.5"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "4.11"),
    (KVM_CAP_SREGS2, "KVM_CAP_SREGS2", "5.14"),
    (KVM_CAP_VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES", "5.16"),
    (KVM_CAP_XSAVE2, "KVM_CAP_XSAVE2", "5.17"),
];

/// Why a VM cannot be had.
#[derive(Debug, Error)]
pub(crate) enum VmError {
    /// Another KVM API.
    #[error("KVM API version {0}, not {KVM_API_VERSION}: this is no Linux KVM")]
    ApiVersion(i32),
    /// Something is missing.
    #[error("this host's KVM has no {name}: Linux {since} or later is needed")]
    Missing {
        /// The capability.
        name: &'static str,
        /// The first Linux that has it.
        since: &'static str,
    },
    /// An ioctl failed.
    #[error("{call}: {source}")]
    Ioctl {
        /// Its name.
        call: &'static str,
        /// Its error.
        source: errno::Error,
    },
    /// The XSAVE area is impossibly small.
    #[error("KVM_CAP_XSAVE2 is {0} bytes")]
    Xsave(i32),
}

pub(crate) fn ioctl(call: &'static str) -> impl Fn(errno::Error) -> VmError {
    move |source| VmError::Ioctl { call, source }
}

/// What KVM offers a VM on this host.
pub(crate) struct Host {
    /// CPUID that KVM can give a guest.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs that are state.
    pub(crate) msrs: Vec<u32>,
    /// Size of the XSAVE area in bytes.
    pub(crate) xsave: usize,
    /// Whether the local APICs' timers have a TSC-deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// Makes an empty VM.
///
/// # Errors
///
/// [`VmError`]: what this KVM lacks, with the Linux that has it.
pub(crate) fn create(kvm: OwnedFd) -> Result<(VmFd, Host), VmError> {
    // SAFETY: the descriptor is `/dev/kvm` (its device number was checked when it arrived), owned, and given away here.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(VmError::ApiVersion(version));
    }
    for &(capability, name, since) in NEEDED {
        if kvm.check_extension_raw(u64::from(capability)) <= 0 {
            return Err(VmError::Missing { name, since });
        }
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
    let msrs = kvm
        .get_msr_index_list()
        .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    let xsave = vm.check_extension_raw(u64::from(KVM_CAP_XSAVE2));
    let host = Host {
        cpuid: cpuid.as_slice().to_vec(),
        msrs: msrs.as_slice().to_vec(),
        xsave: usize::try_from(xsave)
            .ok()
            .filter(|size| *size >= XSAVE_MIN)
            .ok_or(VmError::Xsave(xsave))?,
        tsc_deadline: kvm.check_extension_raw(u64::from(KVM_CAP_TSC_DEADLINE_TIMER)) > 0,
    };
    if vm.check_extension_raw(u64::from(KVM_CAP_X86_TRIPLE_FAULT_EVENT)) > 0 {
        // A triple fault that has happened and not yet come out is part of the pending events then.
        let capability = kvm_enable_cap {
            cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            args: [1, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&capability)
            .map_err(ioctl("KVM_ENABLE_CAP(KVM_CAP_X86_TRIPLE_FAULT_EVENT)"))?;
    }
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
    vm.set_tss_address(tss).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
    Ok((vm, host))
}

/// An eventfd as the KVM crates want it.
pub(crate) fn event_fd(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is owned, and given away here. KVM refuses one that is no eventfd, and `EventFd` itself only
    // reads and writes it.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// Gives the VM its RAM. Before the irqchip: a memory slot costs far more after it.
///
/// # Errors
///
/// [`VmError::Ioctl`].
pub(crate) fn add_memory(vm: &VmFd, memory: &'static GuestMemoryMmap) -> Result<(), VmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region's mapping lives as long as the process (`memory` is 'static), has exactly `memory_size`
        // bytes, and is used by this process through volatile accesses only, as memory that a guest writes must be.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Gives the VM its interrupt controllers and its timer, and makes its vCPUs, the first one first.
///
/// # Errors
///
/// [`VmError::Ioctl`].
pub(crate) fn add_processors(vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, VmError> {
    vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
    (0..count)
        .map(|index| {
            vm.create_vcpu(u64::from(index))
                .map_err(ioctl("KVM_CREATE_VCPU"))
        })
        .collect()
}
