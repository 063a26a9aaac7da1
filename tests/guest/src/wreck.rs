//! What the guest says of the devices that it drives as no driver should.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// Those devices' part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WreckReport {
    /// How far the guest is with them.
    pub state: DriverState,
    /// How many there are.
    pub devices: u64,
    /// What was done to them.
    pub turns: u64,
    /// How often one of them said that it needs a reset.
    pub broken: u64,
    /// Those that serve a driver that behaves, at rest.
    pub well: u64,
}

impl WreckReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(WRECK_STATE_OFFSET)),
            devices: word(WRECK_DEVICES_OFFSET),
            turns: word(WRECK_TURNS_OFFSET),
            broken: word(WRECK_BROKEN_OFFSET),
            well: word(WRECK_WELL_OFFSET),
        }
    }
}
