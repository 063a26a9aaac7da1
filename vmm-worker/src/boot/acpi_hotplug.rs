//! What ACPI says of PCI devices that come and go: an object of each slot that they may come to, with the method by which a
//! guest lets its device go, and the event's method, which says which slots have changed (ACPI 6.5, 5.6.6, 6.3.3). The
//! registers are [`crate::devices::pci::hotplug`]'s.

use acpi_tables::Aml;
use acpi_tables::aml;

use super::acpi_pci::Bytes;
use super::layout;
use crate::devices::pci::hotplug;

/// Values of Notify (5.6.6, table 5.189): look for a new device; let the device go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// One name a slot: `S01_` to `S1F_`.
fn name(slot: u32) -> String {
    format!("S{slot:02X}_")
}

/// The slots `removable`, one bit each, of the host bridge.
#[must_use]
pub fn pci_hotplug(removable: u32) -> Box<dyn Aml> {
    let slots = || (1..32_u32).filter(|slot| removable & 1 << slot != 0);
    let mut devices = Vec::new();
    let mut notices = Vec::new();
    for slot in slots() {
        let bit = 1_u32 << slot;
        aml::Device::new(
            name(slot).as_str().into(),
            vec![
                // Device number and function (6.1.1, table 6.2).
                &aml::Name::new("_ADR".into(), &(slot << 16)),
                &aml::Name::new("_SUN".into(), &slot),
                &aml::Method::new(
                    "_EJ0".into(),
                    1,
                    false,
                    vec![&aml::Store::new(&aml::Path::new("PEJ0"), &bit)],
                ),
            ],
        )
        .to_aml_bytes(&mut devices);
        for (slots, value) in [
            (aml::Local(0), DEVICE_CHECK),
            (aml::Local(1), EJECT_REQUEST),
        ] {
            aml::If::new(
                &aml::And::new(&aml::ZERO, &slots, &bit),
                vec![&aml::Notify::new(&aml::Path::new(&name(slot)), &value)],
            )
            .to_aml_bytes(&mut notices);
        }
    }
    let port = layout::PCI_HOTPLUG_PORT;
    let registers = aml::FieldAccessType::DWord;
    let field = |name: &[u8; 4]| aml::FieldEntry::Named(*name, 32);
    let count = u8::try_from(layout::PCI_HOTPLUG_PORTS).unwrap_or(0);
    let ports = aml::IO::new(port, port, 1, count);
    let mut bytes = Vec::new();
    aml::Scope::new(
        "\\_SB_.PCI0".into(),
        vec![
            &aml::OpRegion::new(
                "PHPR".into(),
                aml::OpRegionSpace::SystemIO,
                &port,
                &hotplug::GPE0,
            ),
            &aml::Field::new(
                "PHPR".into(),
                registers,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![field(b"PCIU"), field(b"PCID"), field(b"PEJ0")],
            ),
            &Bytes(devices),
            &aml::Method::new(
                "PCNT".into(),
                0,
                true,
                vec![
                    &aml::Store::new(&aml::Local(0), &aml::Path::new("PCIU")),
                    &aml::Store::new(&aml::Local(1), &aml::Path::new("PCID")),
                    &Bytes(notices),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    // Its ports are within what the host bridge passes on: they are nobody else's.
    aml::Scope::new(
        "\\_SB_".into(),
        vec![&aml::Device::new(
            "PHPD".into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A06")),
                &aml::Name::new("_UID".into(), &"PCI Hotplug resources"),
                &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ports])),
            ],
        )],
    )
    .to_aml_bytes(&mut bytes);
    aml::Scope::new(
        "\\_GPE".into(),
        vec![&aml::Method::new(
            "_E01".into(),
            0,
            false,
            vec![&aml::MethodCall::new("\\_SB_.PCI0.PCNT".into(), vec![])],
        )],
    )
    .to_aml_bytes(&mut bytes);
    Box::new(Bytes(bytes))
}
