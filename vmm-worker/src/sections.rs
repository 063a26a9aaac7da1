//! The sections of the state stream: which there are, in what order and versions, and how a stream is taken apart.
//!
//! ```text
//! kind      instance         what
//! 0x8001    index of vCPU    one vCPU
//! 0x8002    0                interrupt controllers, timer, clock
//! 1 …       as the device    a device (`devices::id`), in the devices' order
//! ```

use baton_ipc::StateDigest;
use baton_ipc::VmId;
use baton_ipc::state_stream::CONTAINER_VERSION;
use baton_ipc::state_stream::Encoder;
use baton_ipc::state_stream::Machine;
use baton_ipc::state_stream::Offer;
use baton_ipc::state_stream::Section;
use baton_ipc::state_stream::SectionId;
use baton_ipc::state_stream::SectionSupport;
use baton_ipc::state_stream::StateStream;
use baton_ipc::state_stream::StreamError;
use baton_ipc::worker::WorkerConfig;
use kvm_ioctls::VmFd;
use thiserror::Error;

use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::state::SavedSection;
use crate::devices::state::StateError;
use crate::gap::Gap;
use crate::gap::GapError;
use crate::vcpu;
use crate::vcpu::Inventory;
use crate::vcpu::VcpuState;
use crate::vm_state;
use crate::vm_state::VmState;

const VCPU: u16 = 0x8001;
const VM: u16 = 0x8002;
/// Kinds below this are devices'.
const FIRST_OWN: u16 = 0x8000;

/// Why a stream's sections are refused.
#[derive(Debug, Error)]
pub(crate) enum SectionError {
    /// A section's content.
    #[error("section {id}: {source}")]
    State {
        /// Which.
        id: SectionId,
        /// What is wrong.
        source: StateError,
    },
    /// A section that this worker must not ignore and does not know.
    #[error("unknown section {0}")]
    Unknown(SectionId),
    /// No section where there must be one.
    #[error("section {0} is missing")]
    Missing(SectionId),
    /// The stream's frame.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// What two workers must agree on of the machine of `config`.
pub(crate) fn machine(config: &WorkerConfig, devices: &[DeviceId]) -> Machine {
    let mut hidden: Vec<_> = config.hide.iter().map(ToString::to_string).collect();
    hidden.sort_unstable();
    hidden.dedup();
    Machine {
        cpus: config.cpus,
        ram: config
            .ram
            .iter()
            .map(|region| (region.address, region.size))
            .collect(),
        hidden,
        devices: ids(devices.iter().copied()),
    }
}

/// The names of devices, in the order in which their states go over.
pub(crate) fn ids(devices: impl Iterator<Item = DeviceId>) -> Vec<SectionId> {
    devices.map(id).collect()
}

/// The kinds of sections of a machine with these devices, and the versions that this build reads; it writes the newest.
fn support(devices: &[SectionId]) -> Vec<SectionSupport> {
    let one = |kind, version| SectionSupport {
        kind,
        oldest: version,
        newest: version,
    };
    let mut support = vec![one(VCPU, vcpu::VERSION), one(VM, vm_state::VERSION)];
    for device in devices {
        if !support.iter().any(|known| known.kind == device.kind) {
            let (oldest, newest) = DeviceKind(device.kind).versions().into_inner();
            support.push(SectionSupport {
                kind: device.kind,
                oldest,
                newest,
            });
        }
    }
    support
}

/// What a new worker offers.
pub(crate) fn offer(machine: Machine, build: &str) -> Offer {
    Offer {
        container: CONTAINER_VERSION,
        sections: support(&machine.devices),
        machine,
        build: build.to_owned(),
    }
}

/// Whether the old worker, whose machine is `ours`, can save what `offer` can load; why not.
pub(crate) fn judge(ours: &Machine, offer: &Offer) -> Result<(), String> {
    let Machine {
        cpus,
        ram,
        hidden,
        devices,
    } = &offer.machine;
    if offer.container < CONTAINER_VERSION {
        return Err(format!(
            "the new worker reads container version {}, this one writes {CONTAINER_VERSION}",
            offer.container
        ));
    }
    if *cpus != ours.cpus {
        return Err(format!(
            "the new worker has {cpus} vCPUs, this one {}",
            ours.cpus
        ));
    }
    if *ram != ours.ram {
        return Err(format!(
            "the new worker has RAM {ram:x?}, this one {:x?}",
            ours.ram
        ));
    }
    if *hidden != ours.hidden {
        return Err(format!(
            "the new worker hides the CPU features {hidden:?}, this one {:?}",
            ours.hidden
        ));
    }
    for position in 0..devices.len().max(ours.devices.len()) {
        let (theirs, ours) = (devices.get(position), ours.devices.get(position));
        if theirs != ours {
            let name = |device: Option<&SectionId>| match device {
                Some(device) => DeviceId::new(DeviceKind(device.kind), device.instance).to_string(),
                None => "nothing".to_owned(),
            };
            return Err(format!(
                "device {position} of the new worker is {}, of this one {}",
                name(theirs),
                name(ours)
            ));
        }
    }
    for written in support(&ours.devices) {
        let (kind, version) = (written.kind, written.newest);
        let read = offer.sections.iter().find(|read| read.kind == kind);
        if !read.is_some_and(|read| (read.oldest..=read.newest).contains(&version)) {
            return Err(format!(
                "the new worker does not load version {version} of section kind {kind:#06x}"
            ));
        }
    }
    Ok(())
}

fn id(device: DeviceId) -> SectionId {
    SectionId {
        kind: device.kind.0,
        instance: device.instance,
    }
}

fn own(kind: u16, instance: usize) -> SectionId {
    SectionId {
        kind,
        instance: u16::try_from(instance).unwrap_or(u16::MAX),
    }
}

/// The stream that brings `generation` of `vm` its state.
///
/// # Errors
///
/// [`SectionError`]; what no reader would take is not written.
pub(crate) fn encode(
    vm: VmId,
    generation: u32,
    vcpus: &[VcpuState],
    state: &VmState,
    devices: Vec<SavedSection>,
) -> Result<(Vec<u8>, StateDigest), SectionError> {
    let mut encoder = Encoder::new(vm, generation);
    let mut put = |id, version, payload: Result<Vec<u8>, StateError>| -> Result<(), SectionError> {
        let payload = payload.map_err(|source| SectionError::State { id, source })?;
        Ok(encoder.section(&Section {
            id,
            version,
            mandatory: true,
            payload,
        })?)
    };
    for (index, vcpu) in vcpus.iter().enumerate() {
        put(own(VCPU, index), vcpu::VERSION, vcpu.encode())?;
    }
    put(own(VM, 0), vm_state::VERSION, state.encode())?;
    for SavedSection {
        id: device,
        version,
        bytes,
    } in devices
    {
        put(id(device), version, Ok(bytes))?;
    }
    Ok(encoder.finish())
}

/// A stream taken apart; devices judge their own sections.
pub(crate) struct Parsed {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: VmState,
    pub(crate) devices: Vec<SavedSection>,
}

impl Parsed {
    /// Gets the guest's clocks over the gap, in the VM that it will be loaded into.
    ///
    /// # Errors
    ///
    /// [`GapError`].
    pub(crate) fn cross(&mut self, gap: Gap, vm: &VmFd) -> Result<(), GapError> {
        let tsc_khz = self.vcpus.first().map_or(0, |vcpu| vcpu.tsc_khz);
        if let Some(forward) = gap.forward(vm, tsc_khz)? {
            self.vm.forward(forward);
            for vcpu in &mut self.vcpus {
                vcpu.forward(forward);
            }
        }
        Ok(())
    }
}

/// Takes a stream from beyond a gap apart, for a VM with `cpus` vCPUs.
///
/// # Errors
///
/// [`SectionError`] with the section that does not belong, or is not there.
pub(crate) fn parse(
    stream: StateStream,
    cpus: usize,
    inventory: &Inventory,
    gap: Gap,
) -> Result<Parsed, SectionError> {
    let mut vcpus: Vec<Option<VcpuState>> = (0..cpus).map(|_| None).collect();
    let (mut vm, mut devices) = (None, Vec::new());
    for Section {
        id,
        version,
        mandatory,
        payload,
    } in stream.sections
    {
        let wrong = |source| SectionError::State { id, source };
        match id.kind {
            VCPU => {
                let slot = vcpus
                    .get_mut(usize::from(id.instance))
                    .ok_or(SectionError::Unknown(id))?;
                *slot = Some(VcpuState::parse(version, &payload, inventory, gap).map_err(wrong)?);
            }
            VM if id.instance == 0 => {
                vm = Some(VmState::parse(version, &payload, gap).map_err(wrong)?);
            }
            kind if kind < FIRST_OWN => {
                let id = DeviceId::new(DeviceKind(kind), id.instance);
                devices.push(SavedSection {
                    id,
                    version,
                    bytes: payload,
                });
            }
            _ if mandatory => return Err(SectionError::Unknown(id)),
            _ => {}
        }
    }
    let vcpus = vcpus
        .into_iter()
        .enumerate()
        .map(|(index, vcpu)| vcpu.ok_or(SectionError::Missing(own(VCPU, index))))
        .collect::<Result<_, _>>()?;
    let vm = vm.ok_or(SectionError::Missing(own(VM, 0)))?;
    Ok(Parsed { vcpus, vm, devices })
}

#[cfg(test)]
mod tests {
    use baton_ipc::StartMode;
    use baton_ipc::worker::Filters;
    use baton_ipc::worker::Pages;
    use baton_ipc::worker::RamBacking;
    use baton_ipc::worker::RamRegion;

    use super::*;

    fn config() -> WorkerConfig {
        WorkerConfig {
            vm: VmId([1; 16]),
            generation: 1,
            mode: StartMode::None,
            cpus: 2,
            hide: vec!["smap".parse().unwrap(), "cx16".parse().unwrap()],
            ram: vec![RamRegion {
                address: 0,
                size: 1 << 20,
            }],
            pages: Pages::Small,
            backing: RamBacking::Shared,
            boot: [0; 16],
            cmdline: String::new(),
            initrd: false,
            filters: Filters {
                control: vec![],
                vcpu: vec![],
                io: vec![],
            },
            virtio: Vec::new(),
            vfio: Vec::new(),
            io_threads: 1,
            drain_ms: 40,
            on_panic: baton_ipc::worker::PanicAction::default(),
            removable: 0,
        }
    }

    const DEVICES: [DeviceId; 2] = [
        DeviceId::new(DeviceKind::POWER, 0),
        DeviceId::new(DeviceKind::SERIAL, 0),
    ];

    #[test]
    fn the_same_machine_is_accepted() {
        let ours = machine(&config(), &DEVICES);
        assert_eq!(ours.hidden, ["cx16", "smap"]);
        assert_eq!(judge(&ours, &offer(ours.clone(), "test")), Ok(()));
    }

    #[test]
    fn the_first_difference_is_the_reason() {
        let ours = machine(&config(), &DEVICES);
        let refusal = |change: &dyn Fn(&mut Offer)| {
            let mut offer = offer(ours.clone(), "test");
            change(&mut offer);
            judge(&ours, &offer).unwrap_err()
        };
        for (change, reason) in [
            (
                &(|offer: &mut Offer| offer.container = 0) as &dyn Fn(&mut Offer),
                "container version 0",
            ),
            (&|offer| offer.machine.cpus = 3, "3 vCPUs, this one 2"),
            (
                &|offer| offer.machine.ram[0].1 = 2 << 20,
                "RAM [(0, 200000)]",
            ),
            (
                &|offer| drop(offer.machine.hidden.pop()),
                "hides the CPU features [\"cx16\"]",
            ),
            (
                &|offer| offer.machine.devices.swap(0, 1),
                "device 0 of the new worker is serial",
            ),
            (
                &|offer| offer.machine.devices.truncate(1),
                "device 1 of the new worker is nothing",
            ),
            (
                &|offer| offer.sections[0].newest = 0,
                "version 1 of section kind 0x8001",
            ),
            (&|offer| offer.sections[1].kind = 7, "section kind 0x8002"),
            (&|offer| offer.sections[2].oldest = 2, "section kind 0x0001"),
        ] {
            let refusal = refusal(change);
            assert!(refusal.contains(reason), "{refusal}");
        }
    }
}
