//! State that belongs to the VM and to none of its vCPUs: the interrupt controllers, the timer, the paravirtual clock.
//!
//! The clock runs through the pause: what goes over is its value and the moment at which it had it, on a clock of this
//! host that both workers read. The routing of interrupts is KVM's default and never changes, so it is no state.

use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KVM_IRQCHIP_PIC_MASTER;
use kvm_bindings::KVM_IRQCHIP_PIC_SLAVE;
use kvm_bindings::kvm_irqchip;
use kvm_bindings::kvm_pit_state2;
use kvm_ioctls::VmFd;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;
use vmm_sys_util::errno;

use crate::blob::Blob;
use crate::boot::layout;
use crate::clock;
use crate::devices::state::StateError;
use crate::gap::Forward;
use crate::gap::Gap;
use crate::kvmclock;
use crate::kvmclock::Reading;
use crate::vcpu::Purpose;

/// The version of [`SavedVm`].
pub(crate) const VERSION: u16 = 1;

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];
/// `base_address` of `struct kvm_ioapic_state`, in bytes from the start of `struct kvm_irqchip`'s union, which is 8 bytes
/// in (Linux, `arch/x86/include/uapi/asm/kvm.h`).
const IOAPIC_BASE: std::ops::Range<usize> = 8..16;
/// The largest count of an 8254 channel: 0 means this.
const PIT_COUNT_MAX: u32 = 0x1_0000;
/// Modes have 3 bits (Intel 8254 data sheet, control word).
const PIT_MODE_MAX: u8 = 7;
/// What a channel's mode is until the guest programs it (`kvm_pit_reset`, arch/x86/kvm/i8254.c).
const PIT_MODE_UNSET: u8 = 0xff;

/// Why the VM's own state cannot be saved or loaded.
#[derive(Debug, Error)]
#[error("{call}: {source}")]
pub(crate) struct VmStateError {
    call: &'static str,
    source: errno::Error,
}

fn ioctl(call: &'static str) -> impl Fn(errno::Error) -> VmStateError {
    move |source| VmStateError { call, source }
}

/// The state, as KVM's own structures.
#[derive(Clone)]
pub(crate) struct VmState {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: Reading,
}

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedVm {
    chips: [Blob<kvm_irqchip>; 3],
    pit: Blob<kvm_pit_state2>,
    clock_ns: u64,
    /// CLOCK_MONOTONIC_RAW when the clock had that value.
    clock_at_ns: u64,
}

impl VmState {
    /// Saves the VM's own state; all vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`VmStateError`].
    pub(crate) fn save(vm: &VmFd) -> Result<Self, VmStateError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
        }
        let pit = vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?;
        let clock = kvmclock::read(vm).map_err(ioctl("KVM_GET_CLOCK"))?;
        Ok(Self { chips, pit, clock })
    }

    /// Loads it; all vCPUs are stopped and have their state.
    ///
    /// # Errors
    ///
    /// [`VmStateError`].
    pub(crate) fn load(&self, vm: &VmFd, purpose: Purpose) -> Result<(), VmStateError> {
        let Self { chips, pit, clock } = self;
        vm.set_pit2(pit).map_err(ioctl("KVM_SET_PIT2"))?;
        if purpose == Purpose::Transfer {
            kvmclock::go_on(vm, *clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        }
        chips
            .iter()
            .try_for_each(|chip| vm.set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP")))
    }

    /// Encodes the state as a section's payload of [`VERSION`].
    ///
    /// # Errors
    ///
    /// [`StateError::Malformed`] when postcard refuses, which it does not for this type.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StateError> {
        let Self { chips, pit, clock } = self;
        let Reading { ns, at_raw_ns } = *clock;
        let saved = SavedVm {
            chips: chips.map(Blob),
            pit: Blob(*pit),
            clock_ns: ns,
            clock_at_ns: at_raw_ns,
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    /// Puts the clock forward, over a boot of the host.
    pub(crate) fn forward(&mut self, forward: Forward) {
        self.clock = forward.clock;
    }

    /// Parses a section's payload of `version`, from beyond that gap.
    ///
    /// # Errors
    ///
    /// [`StateError`] with the field that no VM of this kind can have.
    pub(crate) fn parse(version: u16, bytes: &[u8], gap: Gap) -> Result<Self, StateError> {
        Self::parse_at(version, bytes, gap, clock::raw_ns())
    }

    /// [`VmState::parse`], when CLOCK_MONOTONIC_RAW is `now`.
    fn parse_at(version: u16, bytes: &[u8], gap: Gap, now: u64) -> Result<Self, StateError> {
        if version != VERSION {
            return Err(StateError::Version {
                found: version,
                supported: VERSION,
            });
        }
        let saved: SavedVm =
            match postcard::take_from_bytes(bytes).map_err(StateError::Malformed)? {
                (saved, []) => saved,
                (_, rest) => return Err(StateError::Trailing(rest.len())),
            };
        let SavedVm {
            chips,
            pit,
            clock_ns,
            clock_at_ns,
        } = saved;
        let chips = chips.map(|Blob(chip)| chip);
        for (chip, expected) in chips.iter().zip(CHIPS) {
            if chip.chip_id != expected {
                return Err(StateError::field(
                    "irqchip.chip_id",
                    chip.chip_id,
                    "not the one whose turn it is",
                ));
            }
        }
        let [_, _, ioapic] = &chips;
        let base = zerocopy::IntoBytes::as_bytes(ioapic)
            .get(IOAPIC_BASE)
            .and_then(|bytes| bytes.first_chunk::<8>())
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if base != layout::IO_APIC {
            return Err(StateError::field(
                "ioapic.base_address",
                base,
                "not 0xfec00000, which no guest can change",
            ));
        }
        for channel in &pit.0.channels {
            if channel.count > PIT_COUNT_MAX {
                return Err(StateError::field(
                    "pit.count",
                    channel.count,
                    "more than 65536",
                ));
            }
            if channel.mode > PIT_MODE_MAX && channel.mode != PIT_MODE_UNSET {
                return Err(StateError::field(
                    "pit.mode",
                    channel.mode,
                    "not 0 to 7, nor unset",
                ));
            }
        }
        let longest = u64::try_from(gap.longest().as_nanos()).unwrap_or(u64::MAX);
        // Another boot's clock says nothing here.
        let of_this_boot = !matches!(gap, Gap::Boot(_));
        if of_this_boot && (clock_at_ns > now || now - clock_at_ns > longest) {
            return Err(StateError::field(
                "clock_at_ns",
                clock_at_ns,
                "not a moment ago",
            ));
        }
        // KVM takes the clock as a signed offset of its own (`kvm_vm_ioctl_set_clock`).
        if i64::try_from(clock_ns.saturating_add(longest)).is_err() {
            return Err(StateError::field("clock_ns", clock_ns, "out of range"));
        }
        Ok(Self {
            chips,
            pit: pit.0,
            clock: Reading {
                ns: clock_ns,
                at_raw_ns: clock_at_ns,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> SavedVm {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        });
        let ioapic = kvm_bindings::kvm_ioapic_state {
            base_address: layout::IO_APIC,
            ..Default::default()
        };
        chips[2].chip.ioapic = ioapic;
        let pit = kvm_pit_state2::default();
        SavedVm {
            chips: chips.map(Blob),
            pit: Blob(pit),
            clock_ns: 5_000_000_000,
            clock_at_ns: clock::raw_ns(),
        }
    }

    fn parse(saved: &SavedVm) -> Result<VmState, StateError> {
        VmState::parse(VERSION, &postcard::to_stdvec(saved).unwrap(), Gap::Pause)
    }

    #[track_caller]
    fn refused(saved: &SavedVm, field: &str) {
        match parse(saved).err() {
            Some(StateError::Field { name, .. }) => assert_eq!(name, field),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_state_survives_its_encoding() {
        let bytes = postcard::to_stdvec(&saved()).unwrap();
        let state = VmState::parse(VERSION, &bytes, Gap::Pause).unwrap();
        let again = VmState::parse(VERSION, &state.encode().unwrap(), Gap::Pause).unwrap();
        assert_eq!(again.clock, state.clock);
    }

    #[test]
    fn every_wrong_field_is_named() {
        let mut wrong = saved();
        wrong.chips.swap(0, 1);
        refused(&wrong, "irqchip.chip_id");
        let mut wrong = saved();
        wrong.chips[2].0.chip.ioapic = kvm_bindings::kvm_ioapic_state::default();
        refused(&wrong, "ioapic.base_address");
        let mut wrong = saved();
        wrong.pit.0.channels[1].count = PIT_COUNT_MAX + 1;
        refused(&wrong, "pit.count");
        let mut wrong = saved();
        wrong.pit.0.channels[2].mode = 8;
        refused(&wrong, "pit.mode");
        let now = 1 << 40;
        for at in [u64::MAX, now + 1, now - 60_000_000_001, 0] {
            let wrong = SavedVm {
                clock_at_ns: at,
                ..saved()
            };
            let bytes = postcard::to_stdvec(&wrong).unwrap();
            match VmState::parse_at(VERSION, &bytes, Gap::Pause, now).err() {
                Some(StateError::Field { name, .. }) => assert_eq!(name, "clock_at_ns"),
                other => panic!("{other:?}"),
            }
        }
        refused(
            &SavedVm {
                clock_ns: u64::MAX - 5,
                ..saved()
            },
            "clock_ns",
        );
    }

    #[test]
    fn wrong_versions_lengths_and_rests_are_refused() {
        let bytes = postcard::to_stdvec(&saved()).unwrap();
        assert!(matches!(
            VmState::parse(2, &bytes, Gap::Pause),
            Err(StateError::Version { found: 2, .. })
        ));
        assert!(matches!(
            VmState::parse(VERSION, &bytes[..bytes.len() - 1], Gap::Pause),
            Err(StateError::Malformed(_))
        ));
        let long = [bytes, vec![0]].concat();
        assert!(matches!(
            VmState::parse(VERSION, &long, Gap::Pause),
            Err(StateError::Trailing(1))
        ));
    }
}
