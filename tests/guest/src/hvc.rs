//! What the guest says of its virtio console.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The virtio console's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HvcReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Bytes that were typed, which it sends back.
    pub echoed: u64,
    /// Buffers that came back and that were not under way.
    pub wrong: u64,
}

impl HvcReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(HVC_STATE_OFFSET)),
            echoed: word(HVC_ECHOED_OFFSET),
            wrong: word(HVC_WRONG_OFFSET),
        }
    }
}
