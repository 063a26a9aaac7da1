//! The keyboard controller, for the one thing that it is still used for: resetting the machine.
//!
//! There is no keyboard. The status says "a byte is waiting" for ever, so that Linux's probe, which empties the buffer
//! first, gives up after 16 reads (`i8042_flush`), and never "busy", so that its reset does not wait.

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
use super::state;
use super::state::SavedSection;

/// Offset of the data port from 0x60.
const DATA: u64 = 0;
/// Offset of the command and status port from 0x60.
const COMMAND: u64 = 4;
/// Status: output buffer full.
const OUTPUT_FULL: u8 = 1 << 0;
/// Commands from here pulse the output lines whose bit is clear, for 6 µs (IBM PC/AT technical reference).
const PULSE: u8 = 0xF0;
/// Command: the next data byte is the output port's.
const WRITE_OUTPUT_PORT: u8 = 0xD1;
/// Output port: the reset line, active low.
const RESET_LINE: u8 = 1 << 0;

/// The controller: ports 0x60 and 0x64.
#[derive(Debug)]
pub struct I8042 {
    power: Arc<PowerLatch>,
    /// A `WRITE_OUTPUT_PORT` waits for its byte.
    output_port_next: bool,
}

impl I8042 {
    /// A controller that raises [`PowerEvent::Reset`] at `power`.
    #[must_use]
    pub fn new(power: Arc<PowerLatch>) -> Self {
        I8042 {
            power,
            output_port_next: false,
        }
    }

    fn lines(&self, levels: u8) {
        if levels & RESET_LINE == 0 {
            self.power.raise(PowerEvent::Reset);
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            if port == COMMAND {
                *byte = OUTPUT_FULL;
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            match port {
                DATA if self.output_port_next => {
                    self.output_port_next = false;
                    self.lines(*byte);
                }
                COMMAND => {
                    self.output_port_next = *byte == WRITE_OUTPUT_PORT;
                    if *byte >= PULSE {
                        self.lines(*byte);
                    }
                }
                _ => {}
            }
        }
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedI8042 {
    output_port_next: bool,
}

impl Device for I8042 {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::I8042, 0)
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.output_port_next = false;
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let I8042 {
            power: _,
            output_port_next,
        } = self;
        let saved = SavedI8042 {
            output_port_next: *output_port_next,
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedI8042 { output_port_next } = state::decode(section, VERSION)?;
        self.output_port_next = output_port_next;
        Ok(())
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::power::Power;

    fn device() -> (I8042, Arc<PowerLatch>) {
        let power = PowerLatch::new(Arc::new(|| {}));
        Power::new(Arc::clone(&power))
            .resume(StartMode::None)
            .unwrap();
        (I8042::new(Arc::clone(&power)), power)
    }

    #[test]
    fn the_pulse_resets() {
        let (mut device, power) = device();
        device.write(COMMAND, &[0xFE]);
        assert_eq!(power.take(), Some(PowerEvent::Reset));
        for command in [0xFF, 0xFD, 0xF1, 0xAD, 0x20, 0x60, 0xD0] {
            device.write(COMMAND, &[command]);
            device.write(DATA, &[0]);
        }
        assert_eq!(power.take(), None);
    }

    #[test]
    fn the_output_port_resets_also_after_an_upgrade() {
        let (mut old, _) = device();
        old.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        let section = old.save(StartMode::CprTransfer).unwrap();
        let (mut new, power) = device();
        new.load(StartMode::CprTransfer, &section).unwrap();
        assert_eq!(new.save(StartMode::CprTransfer).unwrap(), section);
        new.write(DATA, &[0xFE]);
        assert_eq!(power.take(), Some(PowerEvent::Reset));
        new.write(DATA, &[0]);
        assert_eq!(power.take(), None, "only the byte after the command");
    }

    #[test]
    fn a_probe_gives_up_and_a_reset_does_not_wait() {
        let (mut device, _) = device();
        for _ in 0..100 {
            let mut status = [0xFF];
            device.read(COMMAND, &mut status);
            assert_eq!(status[0] & 0b11, 0b01, "output full, input not");
            let mut data = [0xFF];
            device.read(DATA, &mut data);
            assert_eq!(data, [0xFF]);
        }
    }

    #[test]
    fn a_flag_that_is_neither_is_refused() {
        let (mut device, _) = device();
        let mut section = device.save(StartMode::CprTransfer).unwrap();
        section.bytes = vec![2];
        assert!(device.load(StartMode::CprTransfer, &section).is_err());
    }
}
