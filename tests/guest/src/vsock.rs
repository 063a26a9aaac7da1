//! What the guest says of its socket device.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The socket device's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Connections that there are.
    pub open: u64,
    /// Bytes that the guest has sent back.
    pub echoed: u64,
    /// How often the host refused it.
    pub refused: u64,
    /// Packets that came and that no device may send.
    pub wrong: u64,
    /// Connections of the host that it had no room for.
    pub turned_away: u64,
}

impl VsockReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(VSOCK_STATE_OFFSET)),
            open: word(VSOCK_OPEN_OFFSET),
            echoed: word(VSOCK_ECHOED_OFFSET),
            refused: word(VSOCK_REFUSED_OFFSET),
            wrong: word(VSOCK_WRONG_OFFSET),
            turned_away: word(VSOCK_TURNED_AWAY_OFFSET),
        }
    }
}
