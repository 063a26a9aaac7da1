//! A vCPU's section of the state stream, version 1: how a state becomes bytes, and how bytes of unknown origin become a
//! state.
//!
//! Numbers that KVM itself checks (control registers, MSR values, pending events) are left to it: it refuses them when
//! they are loaded. Judged here is what KVM would take and this worker must not, and what would be read past its end.
//! Nothing is refused that a guest can bring about, or a guest could prevent the replacement of its worker.

use kvm_bindings::KVM_MP_STATE_SIPI_RECEIVED;
use kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID;
use kvm_bindings::kvm_debugregs;
use kvm_bindings::kvm_dtable;
use kvm_bindings::kvm_lapic_state;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_bindings::kvm_sregs2;
use kvm_bindings::kvm_vcpu_events;
use kvm_bindings::kvm_xcrs;
use serde::Deserialize;
use serde::Serialize;

use super::state::Inventory;
use super::state::VcpuState;
use crate::blob::Blob;
use crate::blob::Bytes;
use crate::devices::state::StateError;
use crate::gap::Gap;

/// The version of [`SavedVcpu`].
pub(crate) const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedVcpu {
    mp_state: u32,
    regs: Blob<kvm_regs>,
    sregs: SavedSregs,
    xsave: Bytes,
    xcrs: Blob<kvm_xcrs>,
    debugregs: Blob<kvm_debugregs>,
    lapic: Blob<kvm_lapic_state>,
    tsc_khz: u32,
    tsc_offset: u64,
    tsc: u64,
    msrs: Vec<(u32, u64)>,
    events: Blob<kvm_vcpu_events>,
}

/// kvm_sregs2 with its segments in the order CS, DS, ES, FS, GS, SS, TR, LDT.
#[derive(Debug, Serialize, Deserialize)]
struct SavedSregs {
    segments: [Blob<kvm_segment>; 8],
    gdt: Blob<kvm_dtable>,
    idt: Blob<kvm_dtable>,
    control: [u64; 5],
    efer: u64,
    apic_base: u64,
    flags: u64,
    pdptrs: [u64; 4],
}

impl From<kvm_sregs2> for SavedSregs {
    fn from(sregs: kvm_sregs2) -> Self {
        let kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        } = sregs;
        Self {
            segments: [cs, ds, es, fs, gs, ss, tr, ldt].map(Blob),
            gdt: Blob(gdt),
            idt: Blob(idt),
            control: [cr0, cr2, cr3, cr4, cr8],
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }
}

impl From<SavedSregs> for kvm_sregs2 {
    fn from(saved: SavedSregs) -> Self {
        let SavedSregs {
            segments,
            gdt,
            idt,
            control,
            efer,
            apic_base,
            flags,
            pdptrs,
        } = saved;
        let [cs, ds, es, fs, gs, ss, tr, ldt] = segments.map(|Blob(segment)| segment);
        let [cr0, cr2, cr3, cr4, cr8] = control;
        kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt: gdt.0,
            idt: idt.0,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }
}

impl VcpuState {
    /// Encodes the state as a section's payload of [`VERSION`].
    ///
    /// # Errors
    ///
    /// [`StateError::Malformed`] when postcard refuses, which it does not for this type.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StateError> {
        let Self {
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
        } = self;
        let saved = SavedVcpu {
            mp_state: mp_state.mp_state,
            regs: Blob(*regs),
            sregs: (*sregs).into(),
            xsave: Bytes(xsave.clone()),
            xcrs: Blob(*xcrs),
            debugregs: Blob(*debugregs),
            lapic: Blob(*lapic),
            tsc_khz: *tsc_khz,
            tsc_offset: *tsc_offset,
            tsc: *tsc,
            msrs: msrs.clone(),
            events: Blob(*events),
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    /// Parses a section's payload of `version`, from beyond that gap, into a state for a vCPU of this VM.
    ///
    /// # Errors
    ///
    /// [`StateError`] with the field that no vCPU of this VM can have.
    pub(crate) fn parse(
        version: u16,
        bytes: &[u8],
        inventory: &Inventory,
        gap: Gap,
    ) -> Result<Self, StateError> {
        if version != VERSION {
            return Err(StateError::Version {
                found: version,
                supported: VERSION,
            });
        }
        let saved: SavedVcpu =
            match postcard::take_from_bytes(bytes).map_err(StateError::Malformed)? {
                (saved, []) => saved,
                (_, rest) => return Err(StateError::Trailing(rest.len())),
            };
        let SavedVcpu {
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
        } = saved;
        if mp_state > KVM_MP_STATE_SIPI_RECEIVED {
            return Err(StateError::field(
                "mp_state",
                mp_state,
                "not a state of an x86 vCPU (0 to 4)",
            ));
        }
        if sregs.flags & !u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
            return Err(StateError::field("sregs.flags", sregs.flags, "not 0 or 1"));
        }
        if xsave.0.len() != inventory.xsave() {
            return Err(StateError::field(
                "xsave.len",
                xsave.0.len() as u64,
                "not the size of this VM's XSAVE area",
            ));
        }
        if !gap.allows(tsc_khz, inventory.tsc_khz()) {
            return Err(StateError::field(
                "tsc_khz",
                tsc_khz,
                "not this host's frequency",
            ));
        }
        for (position, (index, _)) in msrs.iter().enumerate() {
            if inventory.msrs().binary_search(index).is_err() {
                return Err(StateError::field("msr", *index, "not one that is saved"));
            }
            if msrs
                .iter()
                .take(position)
                .any(|(earlier, _)| earlier == index)
            {
                return Err(StateError::field("msr", *index, "there twice"));
            }
        }
        Ok(Self {
            mp_state: kvm_mp_state { mp_state },
            regs: regs.0,
            sregs: sregs.into(),
            xsave: xsave.0,
            xcrs: xcrs.0,
            debugregs: debugregs.0,
            lapic: lapic.0,
            tsc_khz,
            tsc_offset,
            tsc,
            msrs,
            events: events.0,
        })
    }
}

#[cfg(test)]
mod tests;
