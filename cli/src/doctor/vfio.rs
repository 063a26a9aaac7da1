//! Whether guests can have PCI devices of the host (`[[vfio]]`). All of it is optional.
//!
//! What VFIO itself can do (`VFIO_UPDATE_VADDR`) takes an ioctl; `baton run` asks.

use crate::doctor::Check;
use crate::doctor::Host;

pub(super) fn examine(host: &Host) -> Vec<Check> {
    vec![devices(host), interrupts(host)]
}

fn devices(host: &Host) -> Check {
    const ID: &str = "vfio";
    let names = |path: &str| {
        let entries = std::fs::read_dir(host.path(path)).into_iter().flatten();
        let name =
            |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
        entries.filter_map(name).collect::<Vec<_>>()
    };
    if names("sys/kernel/iommu_groups").is_empty() {
        return Check::warn(
            ID,
            "no IOMMU: [[vfio]] cannot be used",
            "switch the IOMMU on in the firmware, and boot with intel_iommu=on where it is Intel's",
        );
    }
    let module = |name: &str| host.exists(&format!("sys/module/{name}"));
    if !host.exists("dev/vfio/vfio") || !module("vfio_iommu_type1") || !module("vfio_pci") {
        return Check::warn(
            ID,
            "VFIO is not loaded: [[vfio]] cannot be used",
            "modprobe -a vfio-pci vfio_iommu_type1",
        );
    }
    // The driver's directory has a link for each device, which is named by its address.
    let mut bound = names("sys/bus/pci/drivers/vfio-pci");
    bound.retain(|name| name.contains(':'));
    bound.sort();
    match bound.as_slice() {
        [] => Check::ok(ID, "there is an IOMMU; no device is bound to vfio-pci"),
        bound => Check::ok(
            ID,
            format!("there is an IOMMU; guests could have {}", bound.join(", ")),
        ),
    }
}

/// VFIO gives no device out whose interrupts are not remapped, unless it was told to.
fn interrupts(host: &Host) -> Check {
    const ID: &str = "vfio-interrupts";
    match host.read("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") {
        Some(unsafe_too) if unsafe_too == "Y" => Check::warn(
            ID,
            "allow_unsafe_interrupts=Y: a guest with a device of the host can write any interrupt of the host",
            "load vfio_iommu_type1 without it, on a host with interrupt remapping",
        ),
        _ => Check::ok(ID, "devices write their own interrupts only"),
    }
}

#[cfg(test)]
mod tests {
    use crate::doctor::Level;
    use crate::doctor::tests::host;

    use super::*;

    const LOADED: [(&str, &str); 4] = [
        ("sys/kernel/iommu_groups/0/type", "DMA"),
        ("sys/module/vfio_iommu_type1/refcnt", "0"),
        ("sys/module/vfio_pci/refcnt", "0"),
        ("dev/vfio/vfio", ""),
    ];

    #[test]
    fn an_iommu_and_three_modules_are_needed() {
        for left_out in 0..=LOADED.len() {
            let files: Vec<_> = LOADED
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != left_out)
                .map(|(_, file)| *file)
                .collect();
            let (_directory, host) = host(&files);
            let expected = match left_out == LOADED.len() {
                true => Level::Ok,
                false => Level::Warn,
            };
            assert_eq!(devices(&host).level, expected, "{left_out}");
        }
    }

    #[test]
    fn devices_are_named_by_their_addresses() {
        let bound = [
            ("sys/bus/pci/drivers/vfio-pci/bind", ""),
            ("sys/bus/pci/drivers/vfio-pci/0000:00:04.0", ""),
        ];
        let (_directory, host) = host(&[&LOADED[..], &bound].concat());
        assert!(
            devices(&host)
                .found
                .ends_with("guests could have 0000:00:04.0")
        );
    }

    #[test]
    fn interrupts_that_are_not_remapped_are_said() {
        let file = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
        for (value, expected) in [("Y", Level::Warn), ("N", Level::Ok)] {
            let (_directory, host) = host(&[(file, value)]);
            assert_eq!(interrupts(&host).level, expected);
        }
    }
}
