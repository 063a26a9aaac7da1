//! The CPUID tables of a VM's vCPUs: what KVM can give, less what the VM's description hides, with each vCPU's place in
//! one package of cores.
//!
//! Both workers of an upgrade compute the tables from the same KVM and the same description, and compare them before the
//! pause: the guest never sees a different processor.

use std::fmt;

use baton_ipc::CpuFeature;
use baton_ipc::CpuidRegister;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
use kvm_bindings::kvm_cpuid_entry2;
use serde::Deserialize;
use serde::Serialize;

use crate::gap::Gap;

// Leaves and bits: Intel SDM volume 2A (CPUID); AMD APM volume 3, appendix E; for 0x4000_0000 and up,
// Documentation/virt/kvm/x86/cpuid.rst.
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const HYPERVISOR: u32 = 0x4000_0000;
/// TSC frequency in EAX, APIC bus frequency in EBX, both in kHz (VMware's; QEMU's KVM guests have it too).
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_SVM: u32 = 1 << 2;
/// KVM's local APIC timers count nanoseconds (`APIC_BUS_CYCLE_NS_DEFAULT`, `arch/x86/kvm/lapic.h`): 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What the tables are made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Processors<'a> {
    /// Number of vCPUs, at least 1; their APIC ids are 0 and up.
    pub(crate) count: u8,
    /// Features that the guest does not see.
    pub(crate) hide: &'a [CpuFeature],
    /// Frequency of the TSC in kHz.
    pub(crate) tsc_khz: u32,
    /// Whether the local APICs' timers have a TSC-deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// The tables, one for each vCPU, of what `supported` allows.
pub(crate) fn tables(
    supported: &[kvm_cpuid_entry2],
    processors: Processors<'_>,
) -> Vec<Vec<kvm_cpuid_entry2>> {
    (0..processors.count)
        .map(|apic_id| table(supported, processors, u32::from(apic_id)))
        .collect()
}

fn table(
    supported: &[kvm_cpuid_entry2],
    processors: Processors<'_>,
    apic_id: u32,
) -> Vec<kvm_cpuid_entry2> {
    let count = u32::from(processors.count.max(1));
    // Bits of an APIC id that number the cores of the package.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut table = Vec::with_capacity(supported.len() + 4);
    for entry in supported
        .iter()
        .filter(|entry| entry.function != HYPERVISOR_TIMING)
    {
        let mut entry = *entry;
        match entry.function {
            FEATURES => {
                let addressable = if count > 1 { 1 << core_bits } else { 1 };
                entry.ebx = (entry.ebx & 0xffff) | addressable << 16 | apic_id << 24;
                entry.ecx = (entry.ecx | ECX_HYPERVISOR) & !(ECX_VMX | ECX_OSXSAVE);
                if processors.tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
                if count > 1 {
                    entry.edx |= EDX_HTT;
                }
            }
            CACHES | AMD_CACHES if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14;
                if entry.function == CACHES {
                    entry.eax |= (count - 1) << 26;
                }
            }
            function if TOPOLOGY.contains(&function) => {
                if entry.index == 0 {
                    table.extend(topology(function, count, core_bits, apic_id));
                }
                continue;
            }
            HYPERVISOR => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
            // Nested guests are not saved, so a guest cannot have any.
            AMD_FEATURES => entry.ecx &= !AMD_ECX_SVM,
            AMD_SIZES => entry.ecx = core_bits << 12 | (count - 1),
            AMD_TOPOLOGY => {
                (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0);
            }
            _ => {}
        }
        hide(&mut entry, processors.hide);
        table.push(entry);
    }
    if supported.iter().any(|entry| entry.function == HYPERVISOR) {
        table.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: processors.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..kvm_cpuid_entry2::default()
        });
    }
    table
}

fn hide(entry: &mut kvm_cpuid_entry2, features: &[CpuFeature]) {
    for feature in features
        .iter()
        .filter(|feature| feature.leaf() == entry.function && entry.index == 0)
    {
        let register = match feature.register() {
            CpuidRegister::Ebx => &mut entry.ebx,
            CpuidRegister::Ecx => &mut entry.ecx,
            CpuidRegister::Edx => &mut entry.edx,
        };
        *register &= !feature.mask();
    }
}

/// Extended topology: one thread a core, all cores in one package, and the end of the list.
fn topology(function: u32, count: u32, core_bits: u32, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
    [(0, 1, 1), (core_bits, count, 2), (0, 0, 0)].map({
        let mut next = 0..;
        move |(eax, ebx, level)| {
            let index = next.next().unwrap_or(0);
            kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: level << 8 | index,
                edx: apic_id,
                ..kvm_cpuid_entry2::default()
            }
        }
    })
}

/// The tables as the workers tell each other: function, index, EAX, EBX, ECX, EDX.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told(Vec<Vec<[u32; 6]>>);

impl Told {
    pub(crate) fn of(tables: &[Vec<kvm_cpuid_entry2>]) -> Self {
        let entry = |entry: &kvm_cpuid_entry2| {
            [
                entry.function,
                entry.index,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
            ]
        };
        Self(
            tables
                .iter()
                .map(|table| table.iter().map(entry).collect())
                .collect(),
        )
    }

    /// The first thing in which the guest of `other` sees another processor, beyond that gap, than the guest of `self`. After
    /// a boot the TSC was measured anew: the guest, which has read its frequency long ago, sees another one if it asks again.
    pub(crate) fn first_difference(&self, other: &Self, gap: Gap) -> Option<Difference> {
        if self.0.len() != other.0.len() {
            return Some(Difference::Count(self.0.len(), other.0.len()));
        }
        for (vcpu, (ours, theirs)) in self.0.iter().zip(&other.0).enumerate() {
            for position in 0..ours.len().max(theirs.len()) {
                let (ours, theirs) = (ours.get(position).copied(), theirs.get(position).copied());
                let same = match (ours, theirs) {
                    (
                        Some([HYPERVISOR_TIMING, index, here, ours @ ..]),
                        Some([HYPERVISOR_TIMING, other, saved, theirs @ ..]),
                    ) => (index, ours) == (other, theirs) && gap.allows(saved, here),
                    _ => ours == theirs,
                };
                if !same {
                    return Some(Difference::Entry { vcpu, ours, theirs });
                }
            }
        }
        None
    }
}

/// A difference between two sets of tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// Another number of vCPUs.
    Count(usize, usize),
    /// An entry.
    Entry {
        vcpu: usize,
        ours: Option<[u32; 6]>,
        theirs: Option<[u32; 6]>,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(ours, theirs) => write!(f, "CPUID of {ours} vCPUs here, of {theirs} there"),
            Self::Entry { vcpu, ours, theirs } => {
                write!(f, "CPUID of vCPU {vcpu} differs: here ")?;
                for (entry, end) in [(ours, ", there "), (theirs, "")] {
                    match entry {
                        Some([function, index, eax, ebx, ecx, edx]) => {
                            write!(
                                f,
                                "leaf {function:#x}.{index:#x} = {eax:#x} {ebx:#x} {ecx:#x} {edx:#x}{end}"
                            )?;
                        }
                        None => write!(f, "no further leaf{end}")?,
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x1f, 1, 2, 3]),
            entry(
                1,
                0,
                [0x806f8, 0x7700_0800 | 0xff_0000, u32::MAX, 0x0fff_ffff],
            ),
            entry(4, 3, [0xfc1f_c163, 0, 0, 0]),
            entry(7, 0, [0, u32::MAX, 0, 0]),
            entry(0xb, 0, [1, 2, 0x100, 0x55]),
            entry(0xb, 1, [7, 0x80, 0x201, 0x55]),
            entry(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            entry(0x8000_001e, 0, [9, 9, 9, 9]),
        ]
    }

    fn make(count: u8, hide: &[CpuFeature]) -> Vec<Vec<kvm_cpuid_entry2>> {
        tables(
            &supported(),
            Processors {
                count,
                hide,
                tsc_khz: 2_100_000,
                tsc_deadline: true,
            },
        )
    }

    fn leaf(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_with_its_own_apic_id() {
        for (apic_id, table) in make(3, &[]).iter().enumerate() {
            let apic_id = u32::try_from(apic_id).unwrap();
            let features = leaf(table, 1, 0);
            assert_eq!(features.ebx, apic_id << 24 | 4 << 16 | 0x0800);
            assert_ne!(features.edx & EDX_HTT, 0);
            assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
            assert_eq!(features.ecx & (ECX_VMX | ECX_OSXSAVE), 0);
            let (thread, core) = (leaf(table, 0xb, 0), leaf(table, 0xb, 1));
            assert_eq!(
                (thread.eax, thread.ebx, thread.ecx, thread.edx),
                (0, 1, 0x100, apic_id)
            );
            assert_eq!(
                (core.eax, core.ebx, core.ecx, core.edx),
                (2, 3, 0x201, apic_id)
            );
            assert_eq!(leaf(table, 0xb, 2).ebx, 0);
            assert_eq!(leaf(table, 4, 3).eax, 2 << 26 | 2 << 14 | 0x0163);
            assert_eq!(leaf(table, 0x8000_001e, 0).eax, apic_id);
        }
    }

    #[test]
    fn nested_guests_are_impossible_and_the_frequency_is_told() {
        let tables = make(1, &[]);
        assert_eq!(leaf(&tables[0], 0x8000_0001, 0).ecx & AMD_ECX_SVM, 0);
        assert_eq!(leaf(&tables[0], 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(leaf(&tables[0], 0x4000_0010, 0).eax, 2_100_000);
        assert_eq!(leaf(&tables[0], 1, 0).ebx >> 16, 1);
    }

    #[test]
    fn what_is_hidden_is_not_there() {
        let hide =
            ["cx16", "smap", "tsc_deadline_timer"].map(|name| name.parse::<CpuFeature>().unwrap());
        let tables = make(1, &hide);
        assert_eq!(leaf(&tables[0], 1, 0).ecx & (1 << 13 | ECX_TSC_DEADLINE), 0);
        assert_eq!(leaf(&tables[0], 7, 0).ebx, !(1 << 20));
    }

    #[test]
    fn the_first_difference_is_named() {
        let (one, two) = (make(2, &[]), make(2, &["sha_ni".parse().unwrap()]));
        assert_eq!(
            Told::of(&one).first_difference(&Told::of(&one), Gap::Pause),
            None
        );
        let difference = Told::of(&one)
            .first_difference(&Told::of(&two), Gap::Pause)
            .unwrap()
            .to_string();
        assert!(
            difference.contains("vCPU 0") && difference.contains("leaf 0x7.0x0"),
            "{difference}"
        );
        let moment = baton_ipc::state_file::Moment {
            clock_ns: 1,
            real_ns: 2,
            host_tsc: 3,
        };
        let mut measured_anew = one.clone();
        for entry in measured_anew.iter_mut().flatten() {
            if entry.function == HYPERVISOR_TIMING {
                entry.eax += 1;
            }
        }
        let of = |gap| Told::of(&one).first_difference(&Told::of(&measured_anew), gap);
        assert!(of(Gap::Pause).is_some() && of(Gap::Boot(moment)).is_none());
        assert_eq!(
            Told::of(&one).first_difference(&Told::of(&make(1, &[])), Gap::Pause),
            Some(Difference::Count(2, 1))
        );
    }
}
