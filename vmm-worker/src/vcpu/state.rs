//! One vCPU's state: what KVM says of it, and the order in which KVM takes it back.
//!
//! The order of saving and loading follows Documentation/virt/kvm/api.rst and the comments in `arch/x86/kvm/x86.c`:
//! MP_STATE first when saving, since getting it lets pending INITs and SIPIs happen; registers before pending events,
//! since setting them clears exceptions; the APIC base before the local APIC; the local APIC before the MSRs; the TSC
//! deadline after everything that it depends on.
//!
//! MSR_KVM_WALL_CLOCK in both its numbers is neither saved nor loaded: setting it writes guest RAM at once. Its value
//! matters only at the moment when the guest sets it.

use kvm_bindings::KVM_MAX_MSR_ENTRIES;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_debugregs;
use kvm_bindings::kvm_lapic_state;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs2;
use kvm_bindings::kvm_vcpu_events;
use kvm_bindings::kvm_xcrs;
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno;

use super::ioctls;
use crate::gap::Forward;

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4): goes over as an offset instead.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE (Intel SDM volume 4).
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_DEBUGCTL (Intel SDM volume 4; AMD APM volume 2, appendix A).
const MSR_DEBUGCTL: u32 = 0x1d9;
/// MSR_KVM_WALL_CLOCK and MSR_KVM_WALL_CLOCK_NEW (Documentation/virt/kvm/x86/msr.rst).
const MSR_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Why a vCPU's state cannot be saved or loaded.
#[derive(Debug, Error)]
pub(crate) enum VcpuStateError {
    /// An ioctl failed.
    #[error("{call}: {source}")]
    Ioctl {
        /// Its name.
        call: &'static str,
        /// Its error.
        source: errno::Error,
    },
    /// An MSR cannot be read or written.
    #[error("MSR {index:#x} cannot be {verb} ({value:#x})")]
    Msr {
        /// Its number.
        index: u32,
        /// `read` or `set`.
        verb: &'static str,
        /// The value to set; 0 when reading.
        value: u64,
    },
    /// The TSC offset did not take effect.
    #[error("TSC offset {wanted:#x} was set, and is {found:#x}: this host's KVM does not take it")]
    TscOffset {
        /// The offset to set.
        wanted: u64,
        /// What it is after that.
        found: u64,
    },
}

fn ioctl(call: &'static str) -> impl Fn(errno::Error) -> VcpuStateError {
    move |source| VcpuStateError::Ioctl { call, source }
}

/// What there is to save of a vCPU of this VM; the same for all of them.
#[derive(Clone, Debug)]
pub(crate) struct Inventory {
    /// MSRs that are saved, ascending.
    msrs: Vec<u32>,
    /// Size of the XSAVE area in bytes.
    xsave: usize,
    /// The TSC's frequency in kHz.
    tsc_khz: u32,
}

impl Inventory {
    /// Finds out, on a vCPU that has its CPUID: `indexes` is KVM's list of MSRs, `xsave` its KVM_CAP_XSAVE2 in bytes.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn of(vcpu: &VcpuFd, indexes: &[u32], xsave: usize) -> Result<Self, VcpuStateError> {
        if !ioctls::has_tsc_offset(vcpu) {
            let source = errno::Error::new(libc::ENXIO);
            return Err(VcpuStateError::Ioctl {
                call: "KVM_VCPU_TSC_OFFSET (Linux 5.16 is needed)",
                source,
            });
        }
        let tsc_khz = vcpu.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?;
        let mut msrs: Vec<u32> = indexes
            .iter()
            .copied()
            .filter(|index| *index != MSR_TSC && !MSR_WALL_CLOCK.contains(index))
            .collect();
        msrs.sort_unstable();
        msrs.dedup();
        // What cannot be read of a fresh vCPU belongs to a feature that the guest does not have.
        let mut readable = Vec::with_capacity(msrs.len());
        for index in msrs {
            match get_msrs(vcpu, &[index]) {
                Ok(_) => readable.push(index),
                Err(VcpuStateError::Msr { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            msrs: readable,
            xsave,
            tsc_khz,
        })
    }

    /// MSRs that are saved, ascending.
    #[must_use]
    pub(crate) fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Size of the XSAVE area in bytes.
    #[must_use]
    pub(crate) fn xsave(&self) -> usize {
        self.xsave
    }

    /// Frequency of the TSC in kHz.
    #[must_use]
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}

/// Why a state is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The state of a running guest, or of a rehearsal.
    Transfer,
    /// The reset state: the clocks run on, as those of a machine that was reset do.
    Reset,
}

/// One vCPU's state, as KVM's own structures.
#[derive(Clone, Debug)]
pub(crate) struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs2,
    pub(super) xsave: Vec<u8>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debugregs: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    /// The TSC's frequency in kHz.
    pub(crate) tsc_khz: u32,
    pub(super) tsc_offset: u64,
    /// The guest's TSC when this was saved.
    pub(super) tsc: u64,
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) events: kvm_vcpu_events,
}

impl VcpuState {
    /// Saves a vCPU that is stopped, as all others of its VM are, and has no I/O pending.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn save(vcpu: &VcpuFd, inventory: &Inventory) -> Result<Self, VcpuStateError> {
        let mp_state = vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
        let sregs = ioctls::get_sregs2(vcpu).map_err(ioctl("KVM_GET_SREGS2"))?;
        let xsave = ioctls::get_xsave(vcpu, inventory.xsave).map_err(ioctl("KVM_GET_XSAVE2"))?;
        let xcrs = vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let debugregs = vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(ioctl("KVM_GET_TSC_KHZ"))?;
        let tsc_offset =
            ioctls::get_tsc_offset(vcpu).map_err(ioctl("KVM_VCPU_TSC_OFFSET (get)"))?;
        let msrs = get_msrs(vcpu, &inventory.msrs)?;
        let tsc = get_msrs(vcpu, &[MSR_TSC])?
            .first()
            .map_or(0, |(_, value)| *value);
        let events = vcpu
            .get_vcpu_events()
            .map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            tsc_khz,
            tsc_offset,
            tsc,
            msrs,
            events,
        })
    }

    /// Puts the TSC forward, over a boot of the host.
    pub(crate) fn forward(&mut self, forward: Forward) {
        self.tsc_offset = self.tsc_offset.wrapping_add(forward.tsc);
    }

    /// Loads this state into a vCPU that is stopped, as all others of its VM are.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`]; the vCPU then has parts of it.
    pub(crate) fn load(&self, vcpu: &VcpuFd, purpose: Purpose) -> Result<(), VcpuStateError> {
        // Exhaustive: a new field does not compile until somebody decides where it goes.
        let Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            tsc_khz: _,
            tsc_offset,
            tsc,
            msrs,
            events,
        } = self;
        vcpu.set_mp_state(*mp_state)
            .map_err(ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(regs).map_err(ioctl("KVM_SET_REGS"))?;
        ioctls::set_sregs2(vcpu, sregs).map_err(ioctl("KVM_SET_SREGS2"))?;
        ioctls::set_xsave(vcpu, xsave).map_err(ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(debugregs)
            .map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) = msrs
            .iter()
            .partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &unless_already(vcpu, MSR_DEBUGCTL, others)?)?;
        if purpose == Purpose::Transfer {
            ioctls::set_tsc_offset(vcpu, *tsc_offset)
                .map_err(ioctl("KVM_VCPU_TSC_OFFSET (set)"))?;
            let found = ioctls::get_tsc_offset(vcpu).map_err(ioctl("KVM_VCPU_TSC_OFFSET (get)"))?;
            if found != *tsc_offset {
                return Err(VcpuStateError::TscOffset {
                    wanted: *tsc_offset,
                    found,
                });
            }
        }
        // A deadline of 0 is a timer that is disarmed, or one that has expired and whose interrupt is still on its way,
        // which the local APIC's state does not have. One interrupt too many is harmless, one too few is not: let it
        // expire at once. KVM ignores this unless the timer is in its deadline mode.
        let deadline: Vec<_> = deadline
            .iter()
            .map(|&(index, value)| {
                (
                    index,
                    if value == 0 && purpose == Purpose::Transfer {
                        *tsc
                    } else {
                        value
                    },
                )
            })
            .collect();
        set_msrs(vcpu, &deadline)?;
        vcpu.set_vcpu_events(events)
            .map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }
}

/// `values` without that of `index`, if the vCPU has it already. KVM on AMD without LBR virtualization takes a write of any
/// value to DEBUGCTL, and complains of each in the host's kernel log.
fn unless_already(
    vcpu: &VcpuFd,
    index: u32,
    mut values: Vec<(u32, u64)>,
) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    if values.iter().any(|value| value.0 == index) {
        let found = get_msrs(vcpu, &[index])?;
        values.retain(|value| value.0 != index || !found.contains(value));
    }
    Ok(values)
}

fn get_msrs(vcpu: &VcpuFd, indexes: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indexes.len());
    for chunk in indexes.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| ioctl("KVM_GET_MSRS")(errno::Error::new(libc::ENOMEM)))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        if let Some(entry) = msrs.as_slice().get(count) {
            return Err(VcpuStateError::Msr {
                index: entry.index,
                verb: "read",
                value: 0,
            });
        }
        values.extend(
            msrs.as_slice()
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
    }
    Ok(values)
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    for chunk in values.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries)
            .map_err(|_| ioctl("KVM_SET_MSRS")(errno::Error::new(libc::ENOMEM)))?;
        let count = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
        if let Some(&(index, value)) = chunk.get(count) {
            return Err(VcpuStateError::Msr {
                index,
                verb: "set",
                value,
            });
        }
    }
    Ok(())
}
