//! What the guest says of its balloon.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The balloon's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// How often the guest has filled the memory.
    pub filled: u64,
    /// How often the device has dealt with a report of it.
    pub reported: u64,
}

impl BalloonReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            state: DriverState::parse(word(bytes, BALLOON_STATE_OFFSET)),
            filled: word(bytes, BALLOON_FILLED_OFFSET),
            reported: word(bytes, BALLOON_REPORTED_OFFSET),
        }
    }
}
