//! What ACPI says of PCI: the host bridge with its windows, and where ECAM is (PCI Firmware Specification 3.3, chapter 4).
//!
//! No interrupt routing: functions here have no interrupt pin, only MSI-X.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml;
use acpi_tables::mcfg::MCFG;

use super::acpi::OEM;
use super::acpi::OEM_REVISION;
use super::acpi::OEM_TABLE;
use super::layout;

/// AML that was put together already.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The table that says where ECAM is: bus 0 of segment 0.
#[must_use]
pub fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    mcfg
}

/// The host bridge: bus 0, the ports that nobody else has, and the 32-bit memory window. A second device reserves ECAM, as
/// the firmware specification (4.1.2) wants.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "constants below 4 GiB")]
pub fn pci_host_bridge() -> Box<dyn Aml> {
    let window = layout::PCI_WINDOW_32 as u32;
    let last = window + (layout::PCI_WINDOW_32_SIZE - 1) as u32;
    let config = layout::PCI_CONFIG_PORT;
    let buses = aml::AddressSpace::new_bus_number(0_u16, 0);
    let config_ports = aml::IO::new(config, config, 1, layout::PCI_CONFIG_PORTS as u8);
    let ports_below = aml::AddressSpace::new_io(0_u16, config - 1, None);
    let ports_above = aml::AddressSpace::new_io(config + layout::PCI_CONFIG_PORTS, 0xFFFF, None);
    let memory = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        window,
        last,
        None,
    );
    let ecam = aml::Memory32Fixed::new(true, layout::PCI_ECAM as u32, 1 << 20);
    let mut bytes = Vec::new();
    aml::Scope::new(
        "\\_SB_".into(),
        vec![
            &aml::Device::new(
                "PCI0".into(),
                vec![
                    &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A03")),
                    &aml::Name::new("_UID".into(), &aml::ZERO),
                    &aml::Name::new("_SEG".into(), &aml::ZERO),
                    &aml::Name::new("_BBN".into(), &aml::ZERO),
                    &aml::Name::new(
                        "_CRS".into(),
                        &aml::ResourceTemplate::new(vec![
                            &buses,
                            &config_ports,
                            &ports_below,
                            &ports_above,
                            &memory,
                        ]),
                    ),
                ],
            ),
            &aml::Device::new(
                "MRES".into(),
                vec![
                    &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
                    &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ecam])),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    Box::new(Bytes(bytes))
}
