//! The fixed ACPI registers (ACPI 6.5, 4.8.3): power button, shutdown, reset.
//!
//! ```text
//! +0x00 PM1 status (write 1 to clear)   +0x04 PM1 control     the rest of the 0x14 ports reads as ones
//! +0x02 PM1 enable                      +0x12 reset register
//! ```
//!
//! The hardware is always in ACPI mode. The SCI is level-triggered: high while a status bit is set that is enabled.

use std::sync::Arc;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::bus::BusDevice;
use super::id::DeviceId;
use super::id::DeviceKind;
use super::lifecycle::Device;
use super::lifecycle::DeviceError;
use super::power::PowerEvent;
use super::power::PowerLatch;
use super::signal::IrqLine;
use super::state;
use super::state::SavedSection;
use super::state::StateError;

/// Offset of PM1 status, with which the event block of 4 bytes begins.
pub const PM1_STATUS: u16 = 0x00;
/// Offset of PM1 enable.
pub const PM1_ENABLE: u16 = 0x02;
/// Offset of the PM1 control block, 2 bytes.
pub const PM1_CONTROL: u16 = 0x04;
/// Offset of the reset register, 1 byte.
pub const RESET: u16 = 0x12;
/// What to write to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the S5 state (soft off), as the `\_S5` package says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// PM1 status and enable (4.8.3.1): the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Status bits of sources that are here.
const STATUS_BITS: u16 = POWER_BUTTON;
/// Enable bits that a guest may set: global lock, power button, sleep button, RTC.
const ENABLE_BITS: u16 = 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
/// PM1 control (4.8.3.2): always in ACPI mode.
const SCI_ENABLE: u16 = 1 << 0;
/// PM1 control: SLP_TYP, 3 bits.
const SLEEP_TYPE: u16 = 0b111 << 10;
/// PM1 control: SLP_EN, which always reads as 0.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control bits that keep what is written: BM_RLD and SLP_TYP.
const CONTROL_BITS: u16 = 1 << 1 | SLEEP_TYPE;

/// The registers.
pub struct AcpiPm {
    power: Arc<PowerLatch>,
    sci: Arc<dyn IrqLine>,
    status: u16,
    enable: u16,
    control: u16,
    /// Parked: the line keeps its level.
    parked: bool,
}

impl AcpiPm {
    /// Registers that raise events at `power` and drive `sci`.
    #[must_use]
    pub fn new(power: Arc<PowerLatch>, sci: Arc<dyn IrqLine>) -> Self {
        AcpiPm {
            power,
            sci,
            status: 0,
            enable: 0,
            control: 0,
            parked: true,
        }
    }

    /// Presses the power button: a guest that listens shuts down. While parked it is remembered.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.drive();
    }

    /// Whether the guest has asked to be told of the power button.
    #[must_use]
    pub fn power_button_enabled(&self) -> bool {
        self.enable & POWER_BUTTON != 0
    }

    fn drive(&self) {
        if !self.parked {
            self.sci.set(self.status & self.enable != 0);
        }
    }

    /// The register at an even offset.
    fn register(&self, offset: u16) -> Option<u16> {
        match offset {
            PM1_STATUS => Some(self.status),
            PM1_ENABLE => Some(self.enable),
            PM1_CONTROL => Some(self.control | SCI_ENABLE),
            _ => None,
        }
    }

    /// Writes the bits of `mask` of the register at an even offset.
    fn set_register(&mut self, offset: u16, value: u16, mask: u16) {
        match offset {
            PM1_STATUS => self.status &= !(value & mask),
            PM1_ENABLE => self.enable = (self.enable & !mask | value & mask) & ENABLE_BITS,
            PM1_CONTROL => {
                self.control = (self.control & !mask | value & mask) & CONTROL_BITS;
                let sleep_type = (self.control & SLEEP_TYPE) >> SLEEP_TYPE.trailing_zeros();
                if value & mask & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    self.power.raise(PowerEvent::Shutdown);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            let port = u16::try_from(port).unwrap_or(u16::MAX);
            if let Some(value) = self.register(port & !1) {
                let [low, high] = value.to_le_bytes();
                *byte = if port & 1 == 0 { low } else { high };
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The bytes of one register act together: SLP_TYP and SLP_EN come in one write.
        let mut bytes = (offset..).zip(data).peekable();
        while let Some((port, byte)) = bytes.next() {
            let port = u16::try_from(port).unwrap_or(u16::MAX);
            if port == RESET && *byte == RESET_VALUE {
                self.power.raise(PowerEvent::Reset);
            }
            let (mut value, mut mask) = ([0; 2], [0; 2]);
            if port & 1 == 1 {
                (value[1], mask[1]) = (*byte, 0xFF);
            } else {
                (value[0], mask[0]) = (*byte, 0xFF);
                if let Some((_, high)) = bytes.next() {
                    (value[1], mask[1]) = (*high, 0xFF);
                }
            }
            self.set_register(
                port & !1,
                u16::from_le_bytes(value),
                u16::from_le_bytes(mask),
            );
        }
        self.drive();
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedAcpiPm {
    status: u16,
    enable: u16,
    control: u16,
}

impl Device for AcpiPm {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::ACPI_PM, 0)
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        (self.status, self.enable, self.control, self.parked) = (0, 0, 0, true);
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.parked = true;
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let AcpiPm {
            power: _,
            sci: _,
            status,
            enable,
            control,
            parked: _,
        } = self;
        let saved = SavedAcpiPm {
            status: *status,
            enable: *enable,
            control: *control,
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedAcpiPm {
            status,
            enable,
            control,
        } = state::decode(section, VERSION)?;
        for (name, value, possible) in [
            ("status", status, STATUS_BITS),
            ("enable", enable, ENABLE_BITS),
            ("control", control, CONTROL_BITS),
        ] {
            if value & !possible != 0 {
                return Err(
                    StateError::field(name, value, "has bits that the register does not").into(),
                );
            }
        }
        (self.status, self.enable, self.control) = (status, enable, control);
        Ok(())
    }

    /// The irqchip's saved state has no memory of who held a line up, so the level is driven anew.
    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.parked = false;
        self.drive();
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "AcpiPm(status {:#x}, enable {:#x}, control {:#x})",
            self.status, self.enable, self.control
        )
    }
}

#[cfg(test)]
mod tests;
