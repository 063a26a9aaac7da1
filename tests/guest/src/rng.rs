//! What the guest says of its entropy device.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The entropy device's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Requests that it has answered.
    pub done: u64,
    /// Answers to none, answers that are not random, or not whole.
    pub wrong: u64,
}

impl RngReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(RNG_STATE_OFFSET)),
            done: word(RNG_DONE_OFFSET),
            wrong: word(RNG_WRONG_OFFSET),
        }
    }
}
