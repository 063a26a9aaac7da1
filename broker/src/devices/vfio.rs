//! PCI devices of the host: taken from VFIO once, by their addresses, and described to the worker.
//!
//! ```text
//! /dev/vfio/vfio   container   one a VM: what its devices may reach, and by which addresses
//! /dev/vfio/N      group       what the IOMMU cannot tell apart; attached, asked for the device, and closed again, since
//!                              the device's descriptor holds it (Linux, `drivers/vfio/group.c`)
//! [vfio-device]    device      configuration space, BARs, interrupts
//! ```
//!
//! The worker pins guest RAM, in its own memory lock limit: the broker never maps any.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::descriptor;
use baton_ipc::worker::MAX_VFIO_VECTORS;
use baton_ipc::worker::VFIO_BARS;
use baton_ipc::worker::VFIO_CONFIG;
use baton_ipc::worker::VfioBar;
use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VfioInterrupts;
use baton_policy::Policy;
use baton_policy::Resource;
use baton_policy::kernel::vfio;
use nix::libc;

use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::vm_file::VmFile;
use crate::vm_file::vfio::Vfio;

/// Where containers are made.
pub(crate) const CONTAINER: &str = "/dev/vfio/vfio";
/// Where groups are, by their numbers.
const GROUPS: &str = "/dev/vfio";
/// Where the host's PCI devices are (Documentation/ABI/testing/sysfs-bus-pci).
const SYSFS: &str = "/sys/bus/pci/devices";

/// A device that is open.
#[derive(Debug)]
pub(crate) struct OpenDevice {
    pub(crate) file: OwnedFd,
    pub(crate) config: VfioConfig,
    /// Its place in sysfs, as policy is asked.
    pub(crate) place: PathBuf,
}

/// Makes a container, which has no IOMMU before it has a group.
pub(crate) fn container() -> Result<OwnedFd> {
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    let container = open(CONTAINER).map_err(|e| {
        unfit(
            format_args!("cannot open {CONTAINER}: {e}"),
            "load the modules vfio-pci and vfio_iommu_type1, and let this user read and write it",
        )
    })?;
    match vfio::api_version(container.as_fd()) {
        Ok(vfio::API_VERSION) => Ok(container.into()),
        other => Err(unfit(
            format_args!(
                "{CONTAINER} has the interface {other:?}, not {}",
                vfio::API_VERSION
            ),
            "",
        )),
    }
}

/// Whether a VM has no device that has to stay with the broker that opened it: fstat(2) tells none from another, so that another
/// broker could not check what arrives.
pub(crate) fn check_stays(vm: &VmFile) -> Result<()> {
    match vm.vfio.0.first() {
        None => Ok(()),
        Some(device) => Err(unfit(
            format_args!(
                "vfio {}: a guest with a PCI device of the host stays with its broker",
                device.id.0
            ),
            "replace its worker: baton upgrade; for another broker, stop the VM and start it again",
        )),
    }
}

/// Whether a worker can pin this many bytes of guest RAM.
pub(crate) fn check_limit(policy: &Policy, pinned: u64) -> Result<()> {
    let needed = policy.rlimits(1, pinned).get(Resource::Memlock);
    let Some(baton_policy::Limit::At(needed)) = needed else {
        return Ok(());
    };
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).maximum {
        Some(most) if most < needed => Err(unfit(
            format_args!(
                "guest RAM is pinned for the DMA of [[vfio]]: {needed} bytes, and RLIMIT_MEMLOCK is {most}"
            ),
            "start the broker with more: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in its unit",
        )),
        _ => Ok(()),
    }
}

/// Where a device is in sysfs.
pub(crate) fn sysfs(device: &Vfio) -> PathBuf {
    Path::new(SYSFS).join(device.device.as_str())
}

/// The same, if policy grants it and the host has it.
pub(crate) fn place(device: &Vfio, policy: &Policy) -> Result<PathBuf> {
    let (id, address) = (&device.id.0, &device.device);
    let place = sysfs(device);
    let grant = policy.grant(descriptor::VFIO_DEVICE);
    if grant.is_some_and(|grant| grant.permits_path(&place)) {
        if place.exists() {
            return Ok(place);
        }
        return Err(unfit(
            format_args!("vfio {id}: {address}: the host has no such device"),
            "`lspci -D` lists them",
        ));
    }
    Err(refused(
        format_args!(
            "policy {} does not grant the host's PCI device {address} (vfio {id})",
            policy.name
        ),
        format_args!(
            "if the guest may have it, add \"{}\" to the paths of its descriptor `vfio-device`",
            place.display()
        ),
    ))
}

/// Opens a device at its place, and attaches it to the container.
pub(crate) fn open(
    slot: u8,
    device: &Vfio,
    place: PathBuf,
    container: &OwnedFd,
) -> Result<OpenDevice> {
    Opening {
        id: &device.id.0,
        address: device.device.as_str(),
        place,
    }
    .open(slot, container)
}

struct Opening<'a> {
    id: &'a str,
    address: &'a str,
    place: PathBuf,
}

impl Opening<'_> {
    fn cannot(
        &self,
        what: impl std::fmt::Display,
        remedy: impl std::fmt::Display,
    ) -> baton_ipc::control::Refusal {
        let Self { id, address, .. } = self;
        unfit(format_args!("vfio {id}: {address}: {what}"), remedy)
    }

    /// The name of what a link in the device's directory of sysfs leads to.
    fn linked(&self, name: &str) -> Option<String> {
        let target = std::fs::read_link(self.place.join(name)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn open(self, slot: u8, container: &OwnedFd) -> Result<OpenDevice> {
        let group = self.group()?;
        self.attach(&group, container)?;
        let device = vfio::device(group.as_fd(), self.address)
            .map_err(|e| self.cannot(format_args!("VFIO does not give it out: {e}"), ""))?;
        let device = File::from(device);
        let config = self
            .describe(slot, &device)
            .map_err(|e| self.cannot(format_args!("cannot examine it: {e}"), ""))??;
        Ok(OpenDevice {
            file: device.into(),
            config,
            place: self.place,
        })
    }

    fn group(&self) -> Result<File> {
        let address = self.address;
        let Some(number) = self.linked("iommu_group") else {
            return Err(self.cannot(
                "no IOMMU keeps its DMA to the guest's memory",
                "switch the IOMMU on in the firmware, and boot with intel_iommu=on where it is Intel's",
            ));
        };
        let driver = self.linked("driver").unwrap_or_else(|| "none".to_owned());
        if !driver.starts_with("vfio") {
            return Err(self.cannot(
                format_args!("its driver is {driver}, not vfio-pci"),
                format_args!(
                    "unbind it, echo vfio-pci >{place}/driver_override, echo {address} >/sys/bus/pci/drivers_probe",
                    place = self.place.display()
                ),
            ));
        }
        let path = Path::new(GROUPS).join(&number);
        let group = OpenOptions::new().read(true).write(true).open(&path);
        group.map_err(|e| {
            let remedy = match e.raw_os_error() {
                Some(libc::EBUSY) => "end what uses its group: all devices of a group go to one VM, and Baton gives it one of them",
                Some(libc::EACCES) => "let this user read and write it",
                _ => "load the module vfio-pci",
            };
            self.cannot(format_args!("cannot open {}: {e}", path.display()), remedy)
        })
    }

    fn attach(&self, group: &File, container: &OwnedFd) -> Result<()> {
        let cannot =
            |what: &str, e: io::Error, remedy| self.cannot(format_args!("{what}: {e}"), remedy);
        let examined = |e| cannot("cannot examine its group", e, "");
        if !vfio::is_viable(group.as_fd()).map_err(examined)? {
            return Err(self.cannot(
                "another device of its IOMMU group has a driver of the host's",
                format_args!(
                    "bind all of {}/iommu_group/devices to vfio-pci, or to no driver",
                    self.place.display()
                ),
            ));
        }
        vfio::set_container(group.as_fd(), container.as_fd())
            .map_err(|e| cannot("cannot attach its group to the VM's container", e, ""))?;
        let container = container.as_fd();
        match vfio::set_iommu(container, vfio::TYPE1V2_IOMMU) {
            Ok(()) => {}
            // It has one, by the device before.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => {
                let remedy = match e.raw_os_error() {
                    Some(libc::EPERM) => {
                        "its interrupts are not remapped: switch that on in the firmware; `dmesg` says whether the kernel has it"
                    }
                    _ => "load the module vfio_iommu_type1",
                };
                return Err(cannot("VFIO gives its group no IOMMU", e, remedy));
            }
        }
        for (extension, name) in [
            (vfio::TYPE1V2_IOMMU, "VFIO_TYPE1v2_IOMMU"),
            (vfio::UNMAP_ALL, "VFIO_UNMAP_ALL"),
            (vfio::UPDATE_VADDR, "VFIO_UPDATE_VADDR"),
        ] {
            if !vfio::has_extension(container, extension).map_err(examined)? {
                // QEMU's words (`hw/vfio/cpr-legacy.c`). Without these the worker could never be replaced.
                return Err(self.cannot(
                    format_args!("VFIO container does not support {name}"),
                    "boot a kernel that has it: Linux 6.12 or newer, with CONFIG_VFIO_IOMMU_TYPE1",
                ));
            }
        }
        Ok(())
    }

    /// What the worker is told of it: it asks VFIO nothing.
    fn describe(&self, slot: u8, file: &File) -> io::Result<Result<VfioConfig>> {
        let device = file.as_fd();
        let info = vfio::info(device)?;
        if !info.pci {
            return Ok(Err(self.cannot("it is no PCI device", "")));
        }
        let space = vfio::region(device, vfio::CONFIG_REGION)?;
        let mut bytes = vec![0; VFIO_CONFIG];
        file.read_exact_at(&mut bytes, space.at)?;
        let bars = (0..).take(VFIO_BARS).map(|index| {
            let region = vfio::region(device, index)?;
            Ok(VfioBar {
                at: region.at,
                size: region.size,
            })
        });
        let bars = bars.collect::<io::Result<_>>()?;
        let count = |index| -> io::Result<u16> {
            let count = vfio::interrupts(device, index)?;
            Ok(u16::try_from(count)
                .unwrap_or(u16::MAX)
                .min(MAX_VFIO_VECTORS))
        };
        let (interrupts, vectors) = match (count(vfio::MSIX)?, count(vfio::MSI)?) {
            (0, 0) => {
                return Ok(Err(self.cannot(
                    "it has neither MSI-X nor MSI, and INTx is not passed on",
                    "",
                )));
            }
            // Several of MSI are one block of vectors, which few hosts give; drivers do with one.
            (0, _) => (VfioInterrupts::Msi, 1),
            (vectors, _) => (VfioInterrupts::MsiX, vectors),
        };
        Ok(Ok(VfioConfig {
            slot,
            space: bytes,
            space_at: space.at,
            bars,
            interrupts,
            vectors,
            resets: info.resets,
        }))
    }
}
