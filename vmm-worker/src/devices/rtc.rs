//! The CMOS clock (MC146818): the host's wall clock, which the guest can read and not set, and 114 bytes of memory.
//!
//! It has no alarm and raises no interrupt. What a guest writes to the time registers is ignored.

use std::time::Duration;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::bus::BusDevice;
use super::id::DeviceId;
use super::id::DeviceKind;
use super::lifecycle::Device;
use super::lifecycle::DeviceError;
use super::state;
use super::state::SavedSection;
use super::state::StateError;

/// Index of the century, as the FADT says (ACPI 6.5, 5.2.9).
pub const CENTURY: u8 = 0x32;

// Register indices (MC146818 data sheet).
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
/// The first byte of memory; the last is 0x7F.
const MEMORY: u8 = 0x0E;
const MEMORY_LEN: usize = 0x80 - MEMORY as usize;

/// Register A: an update is about to happen.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// That bit is set this long before each second (data sheet: 244 µs).
const UPDATE_WARNING: Duration = Duration::from_micros(244);
/// Register A at reset: 32768 Hz time base, 1024 Hz periodic rate.
const REGISTER_A_RESET: u8 = 0x26;
/// Register B: time registers in binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Register B: hours from 0 to 23, not 1 to 12.
const HOURS_24: u8 = 1 << 1;
/// Register B bits that keep what is written: SET, DM, 24/12, DSE. No interrupt can be enabled.
const REGISTER_B_BITS: u8 = 1 << 7 | BINARY | HOURS_24 | 1;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;
/// In 12-hour mode: afternoon.
const PM: u8 = 1 << 7;
/// Index port: NMI off, which nothing here can raise.
const INDEX: u8 = 0x7F;

/// The clock: ports 0x70 (index) and 0x71 (data).
pub struct Rtc {
    clock: fn() -> Duration,
    index: u8,
    register_a: u8,
    register_b: u8,
    memory: [u8; MEMORY_LEN],
}

/// Time since 1970 by CLOCK_REALTIME; a host clock before that reads as 1970.
fn wall_clock() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl Rtc {
    /// A clock that shows the host's wall clock, in UTC.
    #[must_use]
    pub fn new() -> Self {
        Rtc::with_clock(wall_clock)
    }

    /// A clock that shows what `clock` says: the time since 1970-01-01 UTC.
    #[must_use]
    pub fn with_clock(clock: fn() -> Duration) -> Self {
        Rtc {
            clock,
            index: 0,
            register_a: REGISTER_A_RESET,
            register_b: HOURS_24,
            memory: [0; MEMORY_LEN],
        }
    }

    fn number(&self, value: u64) -> u8 {
        let value = u8::try_from(value).unwrap_or(0);
        if self.register_b & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn hours(&self, hour: u64) -> u8 {
        if self.register_b & HOURS_24 != 0 {
            return self.number(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.number((hour + 11) % 12 + 1) | pm
    }

    fn get(&self) -> u8 {
        let now = (self.clock)();
        let date = Date::of(now.as_secs());
        match self.index {
            SECONDS => self.number(date.second),
            MINUTES => self.number(date.minute),
            HOURS => self.hours(date.hour),
            DAY_OF_WEEK => self.number(date.day_of_week),
            DAY => self.number(date.day),
            MONTH => self.number(date.month),
            YEAR => self.number(date.year % 100),
            CENTURY => self.number(date.year / 100),
            REGISTER_A => {
                let soon = Duration::from_nanos(now.subsec_nanos().into())
                    >= Duration::from_secs(1) - UPDATE_WARNING;
                self.register_a | if soon { UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_B => self.register_b,
            REGISTER_D => VALID,
            index => self
                .memory
                .get(usize::from(index.wrapping_sub(MEMORY)))
                .copied()
                .unwrap_or(0),
        }
    }

    fn set(&mut self, value: u8) {
        match self.index {
            REGISTER_A => self.register_a = value & !UPDATE_IN_PROGRESS,
            REGISTER_B => self.register_b = value & REGISTER_B_BITS,
            REGISTER_C | REGISTER_D | CENTURY => {}
            index => {
                if let Some(byte) = self.memory.get_mut(usize::from(index.wrapping_sub(MEMORY))) {
                    *byte = value;
                }
            }
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc::new()
    }
}

/// A UTC date, in the proleptic Gregorian calendar.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    second: u64,
    minute: u64,
    hour: u64,
    /// 1 is Sunday.
    day_of_week: u64,
    day: u64,
    month: u64,
    year: u64,
}

impl Date {
    fn of(seconds: u64) -> Date {
        let days = seconds / 86_400;
        // Count from 1 March 0000 in cycles of 400 years, so that leap days come last.
        let since_march = days + 719_468;
        let (cycle, day_of_cycle) = (since_march / 146_097, since_march % 146_097);
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
            - day_of_cycle / 146_096)
            / 365;
        let day_of_year =
            day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march + 2) % 12 + 1;
        Date {
            second: seconds % 60,
            minute: seconds / 60 % 60,
            hour: seconds / 3600 % 24,
            // 1 January 1970 was a Thursday.
            day_of_week: (days + 4) % 7 + 1,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            month,
            year: cycle * 400 + year_of_cycle + u64::from(month <= 2),
        }
    }
}

impl BusDevice for Rtc {
    /// The index port cannot be read.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            if port == 1 {
                *byte = self.get();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            match port {
                0 => self.index = byte & INDEX,
                1 => self.set(*byte),
                _ => {}
            }
        }
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedRtc {
    index: u8,
    register_a: u8,
    register_b: u8,
    memory: Vec<u8>,
}

impl Device for Rtc {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::RTC, 0)
    }

    /// The memory and the registers have a battery; a reset leaves them.
    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.index = 0;
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let Rtc {
            clock: _,
            index,
            register_a,
            register_b,
            memory,
        } = self;
        let saved = SavedRtc {
            index: *index,
            register_a: *register_a,
            register_b: *register_b,
            memory: memory.to_vec(),
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedRtc {
            index,
            register_a,
            register_b,
            memory,
        } = state::decode(section, VERSION)?;
        if index & !INDEX != 0 {
            return Err(StateError::field("index", index, "not 0 to 0x7f").into());
        }
        if register_a & UPDATE_IN_PROGRESS != 0 {
            return Err(StateError::field(
                "register_a",
                register_a,
                "has the bit of the clock itself",
            )
            .into());
        }
        if register_b & !REGISTER_B_BITS != 0 {
            return Err(StateError::field(
                "register_b",
                register_b,
                "has bits that the register does not",
            )
            .into());
        }
        let len = memory.len() as u64;
        let memory = memory
            .try_into()
            .map_err(|_| StateError::field("memory", len, "not 114 bytes"))?;
        (self.index, self.register_a, self.register_b, self.memory) =
            (index, register_a, register_b, memory);
        Ok(())
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for Rtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Rtc(index {:#x}, a {:#x}, b {:#x})",
            self.index, self.register_a, self.register_b
        )
    }
}

#[cfg(test)]
mod tests;
