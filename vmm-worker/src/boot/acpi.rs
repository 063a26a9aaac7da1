//! ACPI tables: enough for Linux to find its processors, interrupt controllers, serial port and power button, and to
//! shut down and reset. (ACPI 6.5; section numbers below are its.) There is no MP table: every kernel that could use
//! one reads the MADT.
//!
//! ```text
//! RSDP ─► XSDT ─► FADT ─► FACS, DSDT
//!              ├► MADT
//!              └► tables that the caller brings
//! ```

use acpi_tables::Aml;
use acpi_tables::aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::fadt::Flags;
use acpi_tables::gas::AccessSize;
use acpi_tables::gas::AddressSpace;
use acpi_tables::gas::GAS;
use acpi_tables::madt::EnabledStatus;
use acpi_tables::madt::IoApic;
use acpi_tables::madt::ProcessorLocalApic;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::BootError;
use super::layout;
use crate::devices::acpi_pm;
use crate::devices::pci::hotplug;
use crate::devices::rtc;

pub(super) const OEM: [u8; 6] = *b"BATON ";
pub(super) const OEM_TABLE: [u8; 8] = *b"BATONVM ";
pub(super) const OEM_REVISION: u32 = 1;
/// Length of a system description table's header (5.2.6).
const HEADER_LEN: u32 = 36;

/// FADT `IAPC_BOOT_ARCH` (5.2.9.3): devices on the ISA bus, that is COM1.
const LEGACY_DEVICES: u16 = 1 << 0;
/// FADT `IAPC_BOOT_ARCH`: no VGA to probe for. That there is no i8042 keyboard is said by the absence of bit 1.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// MADT flags (5.2.12): there are two 8259s, too.
const PCAT_COMPAT: u32 = 1;
/// MPS INTI flags (5.2.12.5): active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// What other devices add to the tables.
#[derive(Clone, Copy, Default)]
pub struct AcpiExtras<'a> {
    /// AML for the end of the DSDT, outside any scope: a PCI host bridge, virtio-mmio devices.
    pub dsdt: &'a [&'a dyn Aml],
    /// Complete tables, header and checksum included, that the XSDT shall name: MCFG and kin.
    pub tables: &'a [&'a dyn Aml],
}

impl std::fmt::Debug for AcpiExtras<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "AcpiExtras({} AML fragments, {} tables)",
            self.dsdt.len(),
            self.tables.len()
        )
    }
}

/// Writes all tables for `cpus` vCPUs (APIC ids 0 and up) into the ACPI area; the RSDP is at its start.
pub(super) fn write_tables(
    mem: &GuestMemoryMmap,
    cpus: u8,
    extras: AcpiExtras<'_>,
) -> Result<(), BootError> {
    let area = build(cpus, extras)?;
    let address = layout::ACPI_START;
    mem.write_slice(&area, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what: "ACPI tables",
            address,
            source,
        })
}

/// The bytes of the whole ACPI area, zeroes after the last table: a guest's reset leaves nothing of the old ones.
fn build(cpus: u8, extras: AcpiExtras<'_>) -> Result<Vec<u8>, BootError> {
    let mut area = Area {
        bytes: vec![0; Rsdp::len()],
    };
    let facs = area.append(&FACS::new())?;
    let dsdt = area.append(&dsdt(extras.dsdt))?;
    let fadt = area.append(&fadt(facs, dsdt).finalize())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    xsdt.add_entry(area.append(&madt(cpus))?.into());
    for table in extras.tables {
        xsdt.add_entry(area.append(*table)?.into());
    }
    let xsdt = area.append(&xsdt)?;

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt.into()).to_aml_bytes(&mut rsdp);
    let Area { mut bytes } = area;
    bytes.splice(..rsdp.len(), rsdp);
    bytes.resize(AREA_LEN, 0);
    Ok(bytes)
}

#[expect(clippy::cast_possible_truncation, reason = "a constant, 128 KiB")]
const AREA_LEN: usize = (layout::ACPI_END - layout::ACPI_START) as usize;
/// The part of the area that is for tables.
#[expect(clippy::cast_possible_truncation, reason = "a constant, 124 KiB")]
const TABLES_LEN: usize = (layout::GENERATION_ID - layout::ACPI_START) as usize;

/// The area while it is being filled.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table on a 64-byte boundary, which the FACS needs (5.2.10), and gives its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> Result<u32, BootError> {
        let start = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        if self.bytes.len() > TABLES_LEN {
            return Err(BootError::AcpiSize(self.bytes.len()));
        }
        u32::try_from(layout::ACPI_START + start as u64).map_err(|_| BootError::AcpiSize(start))
    }
}

fn io_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

/// FADT (5.2.9). No SMI command: the hardware is always in ACPI mode. No PM timer, and one block of
/// general-purpose events.
fn fadt(facs: u32, dsdt: u32) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs)
        // Bits that say "there is none": sleep button, and wake-up alarm in the fixed registers.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    #[expect(clippy::cast_possible_truncation, reason = "a constant 9")]
    {
        fadt.sci_int = (layout::SCI_IRQ as u16).into();
    }
    let event = layout::ACPI_PM_PORT + acpi_pm::PM1_STATUS;
    let control = layout::ACPI_PM_PORT + acpi_pm::PM1_CONTROL;
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io_register(event, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io_register(control, 16, AccessSize::WordAccess);
    let events = layout::PCI_HOTPLUG_PORT + hotplug::GPE0;
    fadt.gpe0_blk = u32::from(events).into();
    fadt.gpe0_blk_len = 2;
    fadt.x_gpe0_blk = io_register(events, 16, AccessSize::ByteAccess);
    fadt.reset_reg = io_register(
        layout::ACPI_PM_PORT + acpi_pm::RESET,
        8,
        AccessSize::ByteAccess,
    );
    fadt.reset_value = acpi_pm::RESET_VALUE;
    // No C2 and C3 states: latencies above their limits (table 5.9).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt
}

/// MADT (5.2.12).
fn madt(cpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, 5, OEM, OEM_TABLE, OEM_REVISION);
    let mut body = Vec::new();
    #[expect(clippy::cast_possible_truncation, reason = "constants below 4 GiB")]
    let (local_apic, io_apic) = (layout::LOCAL_APIC as u32, layout::IO_APIC as u32);
    body.extend(local_apic.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, io_apic, 0).to_aml_bytes(&mut body);
    // KVM's default routing wires ISA interrupt N, the PIT's 0 included, to pin N (`default_routing`,
    // arch/x86/kvm/irq_comm.c). So there is no override of 0 by 2, which PCs have.
    body.extend(source_override(9, layout::SCI_IRQ, ACTIVE_HIGH_LEVEL));
    // Local APIC NMI (5.2.12.7): all processors, default polarity and trigger, LINT1.
    body.extend([4, 6, 0xFF, 0, 0, 1]);
    madt.append_slice(&body);
    madt
}

/// Interrupt source override (5.2.12.5): ISA interrupt `source` is global interrupt `gsi`.
fn source_override(source: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let [g0, g1, g2, g3] = gsi.to_le_bytes();
    let [f0, f1] = flags.to_le_bytes();
    [2, 10, 0, source, g0, g1, g2, g3, f0, f1]
}

/// DSDT (5.2.11.1): the S5 state, COM1, the clock and the pvpanic port, then what the caller brings.
fn dsdt(fragments: &[&dyn Aml]) -> Sdt {
    let mut body = Vec::new();
    // \_S5 (7.4.2.6): the value for SLP_TYP in PM1a and PM1b control; two reserved.
    let sleep_type = acpi_pm::SLEEP_TYPE_S5;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&sleep_type, &sleep_type, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);

    let com1 = layout::COM1_PORT;
    let com1_ports = aml::IO::new(com1, com1, 1, 8);
    let com1_irq = aml::Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    let clock = layout::RTC_PORT;
    let clock_ports = aml::IO::new(clock, clock, 1, 2);
    let panic = layout::PVPANIC_PORT;
    let panic_ports = aml::IO::new(panic, panic, 1, 1);
    // Present, enabled, shown, working (6.3.7), as QEMU has it.
    let panic_status: u8 = 0b1111;
    aml::Scope::new(
        "\\_SB_".into(),
        vec![
            &aml::Device::new(
                "COM1".into(),
                vec![
                    &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
                    &aml::Name::new("_UID".into(), &aml::ONE),
                    &aml::Name::new(
                        "_CRS".into(),
                        &aml::ResourceTemplate::new(vec![&com1_ports, &com1_irq]),
                    ),
                ],
            ),
            &aml::Device::new(
                "RTC_".into(),
                vec![
                    &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00")),
                    &aml::Name::new(
                        "_CRS".into(),
                        &aml::ResourceTemplate::new(vec![&clock_ports]),
                    ),
                ],
            ),
            &aml::Device::new(
                "PEVT".into(),
                vec![
                    &aml::Name::new("_HID".into(), &"QEMU0001"),
                    &aml::Name::new("_STA".into(), &panic_status),
                    &aml::Name::new(
                        "_CRS".into(),
                        &aml::ResourceTemplate::new(vec![&panic_ports]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut body);
    for fragment in fragments {
        fragment.to_aml_bytes(&mut body);
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}
