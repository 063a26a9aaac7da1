//! What the guest says of its file system, and what has to be in its file then.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The file system's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Requests that failed, or replies to none.
    pub errors: u64,
    /// The number of the last record that each lane has written.
    pub written: Vec<u64>,
}

impl FsReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            state: DriverState::parse(word(bytes, FS_STATE_OFFSET)),
            errors: word(bytes, FS_ERRORS_OFFSET),
            written: (0..FS_LANES)
                .map(|lane| word(bytes, fs_lane_offset(lane)))
                .collect(),
        }
    }

    /// All records that were written.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.written.iter().sum()
    }

    /// Compares the file with what the resting guest of this boot nonce wrote into it: how many records were checked, or the
    /// first that is not as it should be.
    ///
    /// # Errors
    ///
    /// Which record, in words.
    pub fn check(&self, nonce: u64, file: &[u8]) -> Result<u64, String> {
        let mut checked = 0;
        for (lane, last) in (0_u64..).zip(&self.written) {
            // Each place holds the highest number that belongs there.
            let first = last.saturating_sub(FS_LANE_RECORDS) + 1;
            for number in first..=*last {
                let place = fs_place(lane, number);
                let start = usize::try_from(place * FS_RECORD).unwrap_or(usize::MAX);
                for (word, at) in (0..FS_RECORD / 8).zip((start..).step_by(8)) {
                    let found = file
                        .get(at..at + 8)
                        .and_then(|bytes| bytes.try_into().ok())
                        .map(u64::from_le_bytes);
                    if found != Some(disk_word(lane, number, nonce, word)) {
                        return Err(format!(
                            "record {place}, word {word}: {found:x?}, which is not of number {number} of lane {lane}"
                        ));
                    }
                }
                checked += 1;
            }
        }
        Ok(checked)
    }
}
