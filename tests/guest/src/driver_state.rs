//! What the guest says of any of its devices.

use crate::layout::*;

/// How far the guest is with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverState {
    /// It was not asked to drive one, or has not come to it.
    Idle,
    /// It drives it.
    Working,
    /// It was told to rest, and nothing is under way.
    Resting,
    /// There is none, or none with what a modern one has.
    Absent,
    /// The device refuses its features or its queues.
    Refused,
    /// The device says that it needs a reset.
    Broken,
    /// Something that no guest says.
    Impossible(u64),
}

impl DriverState {
    pub(crate) fn parse(word: u64) -> Self {
        match word {
            0 => Self::Idle,
            DRIVER_WORKING => Self::Working,
            DRIVER_RESTING => Self::Resting,
            DRIVER_ABSENT => Self::Absent,
            DRIVER_REFUSED => Self::Refused,
            DRIVER_BROKEN => Self::Broken,
            other => Self::Impossible(other),
        }
    }
}

/// A word of a report; 0 beyond its end.
pub(crate) fn word(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
