//! What the guest says of the device that it loads.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The load's part of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadReport {
    /// How far the guest is with the device.
    pub state: DriverState,
    /// Requests or frames that are done.
    pub done: u64,
    /// Requests that the device said had failed.
    pub errors: u64,
}

impl LoadReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            state: DriverState::parse(word(bytes, LOAD_STATE_OFFSET)),
            done: word(bytes, LOAD_DONE_OFFSET),
            errors: word(bytes, LOAD_ERRORS_OFFSET),
        }
    }
}
