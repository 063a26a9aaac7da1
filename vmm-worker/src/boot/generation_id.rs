//! The VM generation id (Microsoft, "Virtual Machine Generation ID", 2012): 16 bytes by which a guest knows whether it is
//! the one that it was. It is chosen with the VM and never changes: an upgrade makes no second guest of the first, so
//! there is nothing to notify, and a reset keeps it.

use acpi_tables::Aml;
use acpi_tables::aml;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::acpi_pci::Bytes;
use super::layout;

/// The device that says where the id is.
#[must_use]
pub fn generation_id_device() -> Box<dyn Aml> {
    let address = aml::Package::new(vec![&layout::GENERATION_ID, &aml::ZERO]);
    let mut bytes = Vec::new();
    aml::Scope::new(
        "\\_SB_".into(),
        vec![&aml::Device::new(
            "VGEN".into(),
            vec![
                // Drivers know it by the compatible id; this one is QEMU's (`docs/specs/vmgenid.rst`).
                &aml::Name::new("_HID".into(), &"QEMUVGID"),
                &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
                &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &aml::Name::new("ADDR".into(), &address),
            ],
        )],
    )
    .to_aml_bytes(&mut bytes);
    Box::new(Bytes(bytes))
}

/// Writes the id where the device says.
///
/// # Errors
///
/// [`BootError::Write`].
pub fn write_generation_id(mem: &GuestMemoryMmap, id: [u8; 16]) -> Result<(), BootError> {
    let address = layout::GENERATION_ID;
    mem.write_slice(&id, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what: "VM generation id",
            address,
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_where_the_device_says() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        write_generation_id(&mem, [7; 16]).unwrap();
        let mut id = [0; 16];
        mem.read_slice(&mut id, GuestAddress(layout::GENERATION_ID))
            .unwrap();
        assert_eq!(id, [7; 16]);
        let mut aml = Vec::new();
        generation_id_device().to_aml_bytes(&mut aml);
        // ADDR: a package of two, a DWord and zero (ACPI 6.5, 20.2.3, 20.2.5.4).
        let address = u32::try_from(layout::GENERATION_ID).unwrap().to_le_bytes();
        let expected = [&b"ADDR\x12\x08\x02\x0c"[..], &address, &[0]].concat();
        assert!(
            aml.windows(expected.len()).any(|window| window == expected),
            "{aml:x?}"
        );
        assert_eq!(layout::GENERATION_ID % 4096, 0);
    }
}
