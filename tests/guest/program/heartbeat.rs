//! The heartbeat: a numbered, stamped turn, and what lies between two of them.

use core::arch::x86_64::_rdtsc;

use crate::layout::*;
use crate::report::{self, Slot};

/// The time stamp counter. Not serialising: a turn is long enough.
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear (`entry`), so CPL3 may read it.
    unsafe { _rdtsc() }
}

/// What a turn found.
pub struct Turn {
    pub now: u64,
    /// Ticks since the turn before, when they are enough to count as a gap.
    pub gap: Option<u64>,
}

pub struct Heartbeat {
    slot: Slot,
    gap_ticks: u64,
    // What memory must hold: it and the registers travel separately, so each is checked against the other.
    sequence: u64,
    chain: u64,
    last: u64,
    clears: u64,
}

impl Heartbeat {
    pub fn new(vcpu: usize, gap_ticks: u64) -> Self {
        let slot = Slot::new(vcpu);
        let last = tsc();
        slot.write(LAST_TSC_OFFSET, last);
        slot.write(STATE_OFFSET, STATE_RUNNING);
        Self {
            slot,
            gap_ticks,
            sequence: 0,
            chain: 0,
            last,
            clears: 0,
        }
    }

    #[inline]
    pub fn turn(&mut self) -> Turn {
        let slot = self.slot;
        let kept = slot.read(SEQUENCE_OFFSET) == self.sequence
            && slot.read(SEQUENCE_DONE_OFFSET) == self.sequence
            && slot.read(CHAIN_OFFSET) == self.chain
            && slot.read(LAST_TSC_OFFSET) == self.last;
        if !kept {
            slot.increment(BREAKS_OFFSET);
        }
        self.sequence = self.sequence.wrapping_add(1);
        self.chain = self.chain.wrapping_add(chain_link(self.sequence));
        slot.write(SEQUENCE_OFFSET, self.sequence);
        slot.write(CHAIN_OFFSET, self.chain);

        let clears = report::read(CLEARS_OFFSET);
        if clears != self.clears {
            self.clear(clears);
        }

        let now = tsc();
        let mut gap = None;
        match now.checked_sub(self.last) {
            Some(ticks) => {
                slot.raise(MAX_GAP_OFFSET, ticks);
                if slot.raise(CLEARED_MAX_GAP_OFFSET, ticks) {
                    slot.write(CLEARED_MAX_GAP_START_OFFSET, self.last);
                }
                if ticks >= self.gap_ticks {
                    slot.increment(GAPS_OFFSET);
                    slot.increment(CLEARED_GAPS_OFFSET);
                    slot.write(LAST_GAP_START_OFFSET, self.last);
                    slot.write(LAST_GAP_OFFSET, ticks);
                    gap = Some(ticks);
                }
            }
            None => {
                slot.increment(BACKWARDS_OFFSET);
                slot.raise(MAX_BACKWARDS_OFFSET, self.last.wrapping_sub(now));
            }
        }
        self.last = now;
        slot.write(LAST_TSC_OFFSET, now);
        slot.write(SEQUENCE_DONE_OFFSET, self.sequence);
        Turn { now, gap }
    }

    fn clear(&mut self, clears: u64) {
        for offset in [
            CLEARED_MAX_GAP_OFFSET,
            CLEARED_GAPS_OFFSET,
            CLEARED_MAX_GAP_START_OFFSET,
            CLEARED_MAX_GAP_ROUND_OFFSET,
        ] {
            self.slot.write(offset, 0);
        }
        self.clears = clears;
        self.slot.write(SLOT_CLEARS_OFFSET, clears);
    }
}
