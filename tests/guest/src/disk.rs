//! What the guest says of its disk, and what has to be on it then.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The disk's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Requests that the device has completed.
    pub done: u64,
    /// Those of them that it said had failed.
    pub errors: u64,
    /// Blocks that were read back as something else than was written.
    pub wrong: u64,
    /// Completions of requests that were not under way.
    pub extra: u64,
    /// Requests under way.
    pub flying: u64,
    /// Interrupts, with `disk_irq`.
    pub interrupts: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its block size in bytes.
    pub block_size: u64,
    /// How often it said that its size has changed, with `disk_irq`.
    pub changes: u64,
    /// Devices that have come, with `hotplug`.
    pub came: u64,
    /// Devices that it has let go, with `hotplug`.
    pub went: u64,
    /// Blocks that each lane has.
    pub lane_blocks: u64,
    /// The number of the last block that each lane has written.
    pub written: Vec<u64>,
}

impl DiskReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(DISK_STATE_OFFSET)),
            done: word(DISK_DONE_OFFSET),
            errors: word(DISK_ERRORS_OFFSET),
            wrong: word(DISK_WRONG_OFFSET),
            extra: word(DISK_EXTRA_OFFSET),
            flying: word(DISK_FLYING_OFFSET),
            interrupts: word(DISK_INTERRUPTS_OFFSET),
            bytes: word(DISK_BYTES_OFFSET),
            block_size: word(DISK_BLOCK_SIZE_OFFSET),
            changes: word(DISK_CHANGES_OFFSET),
            came: word(HOTPLUG_CAME_OFFSET),
            went: word(HOTPLUG_WENT_OFFSET),
            lane_blocks: word(DISK_LANE_BLOCKS_OFFSET),
            written: (0..DISK_LANES)
                .map(|lane| word(disk_lane_offset(lane)))
                .collect(),
        }
    }

    /// Requests that failed, were mixed up, or were completed without being under way.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.errors + self.wrong + self.extra
    }

    /// Compares a disk with what the resting guest of this boot nonce wrote on it: how many blocks were checked, or the
    /// first that is not as it should be.
    ///
    /// # Errors
    ///
    /// Which block, in words.
    pub fn check(&self, nonce: u64, disk: &[u8]) -> Result<u64, String> {
        let mut checked = 0;
        for (lane, last) in (0_u64..).zip(&self.written) {
            // Each place holds the highest number that belongs there.
            let first = last.saturating_sub(self.lane_blocks) + 1;
            for number in first..=*last {
                let block = lane + DISK_LANES as u64 * (number % self.lane_blocks.max(1));
                let start = usize::try_from(block * DISK_BLOCK).unwrap_or(usize::MAX);
                for (word, at) in (0..DISK_BLOCK / 8).zip((start..).step_by(8)) {
                    let found = disk
                        .get(at..at + 8)
                        .and_then(|bytes| bytes.try_into().ok())
                        .map(u64::from_le_bytes);
                    if found != Some(disk_word(lane, number, nonce, word)) {
                        return Err(format!(
                            "block {block}, word {word}: {found:x?}, which is not of number {number} of lane {lane}"
                        ));
                    }
                }
                checked += 1;
            }
        }
        Ok(checked)
    }
}
