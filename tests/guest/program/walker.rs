//! The memory walker: each page of its share holds a record that it verifies and rewrites, sweep after sweep.
//!
//! It touches RAM that nothing else uses: above the image and the vCPUs' areas, usable by the VMM's own map.

use core::ptr;

use crate::heartbeat::Turn;
use crate::layout::*;
use crate::memory::Ranges;
use crate::report::Slot;

/// Sweeps that the median is taken over.
const RECENT: usize = 15;

/// The round that began at a gap.
struct Round {
    start: u64,
    gap: u64,
    left: u64,
}

pub struct Walker {
    slot: Slot,
    nonce: u64,
    share: Ranges,
    pages: u64,
    // Where the sweep stands: page number in the share, its address, and the end of its range.
    page: u64,
    address: u64,
    range_end: u64,
    range: usize,
    generation: u64,
    sweep_start: u64,
    sweep_gap: bool,
    recent: [u64; RECENT],
    kept: usize,
    round: Option<Round>,
}

impl Walker {
    /// The share of vCPU `vcpu` of `vcpus`.
    pub fn new(vcpu: usize, vcpus: usize, nonce: u64, memory: &Ranges) -> Self {
        let all = memory.bytes() / PAGE_SIZE;
        let (vcpu, vcpus) = (vcpu as u64, vcpus as u64);
        let first = all * vcpu / vcpus;
        let pages = all * (vcpu + 1) / vcpus - first;
        let slot = Slot::new(vcpu as usize);
        slot.write(PAGES_OFFSET, pages);
        let mut walker = Self {
            slot,
            nonce,
            share: memory.pages(first, pages),
            pages,
            page: 0,
            address: 0,
            range_end: 0,
            range: 0,
            generation: 0,
            sweep_start: crate::heartbeat::tsc(),
            sweep_gap: true,
            recent: [0; RECENT],
            kept: 0,
            round: None,
        };
        walker.rewind();
        walker
    }

    fn rewind(&mut self) {
        self.page = 0;
        self.range = 0;
        self.enter_range();
        self.generation += 1;
    }

    fn enter_range(&mut self) {
        if let Some(range) = self.share.iter().nth(self.range) {
            self.address = range.start;
            self.range_end = range.end;
        }
    }

    /// One page.
    #[inline]
    pub fn step(&mut self, turn: &Turn) {
        if self.pages == 0 {
            core::hint::spin_loop();
            return;
        }
        if turn.gap.is_some() {
            self.gap(turn);
        }
        if self.page == self.pages {
            self.end_sweep(turn.now);
        }
        if let Some(round) = &mut self.round {
            if round.left == 0 {
                self.end_round(turn.now);
            } else {
                round.left -= 1;
            }
        }
        if self.address == self.range_end {
            self.range += 1;
            self.enter_range();
        }
        self.visit(self.address);
        self.address += PAGE_SIZE;
        self.page += 1;
    }

    fn visit(&mut self, page: u64) {
        let word = |offset| (page + offset) as *mut u64;
        let sealed = seal(page, self.generation, self.nonce);
        // SAFETY: `page` is whole, mapped (`paging`) and of this vCPU's share, above the image.
        unsafe {
            if self.generation > 1 {
                let expected = self.generation - 1;
                let generation = ptr::read_volatile(word(PAGE_GENERATION_OFFSET));
                let good = generation == expected
                    && ptr::read_volatile(word(PAGE_ADDRESS_OFFSET)) == page
                    && ptr::read_volatile(word(PAGE_NONCE_OFFSET)) == self.nonce
                    && ptr::read_volatile(word(PAGE_SEAL_OFFSET))
                        == seal(page, expected, self.nonce);
                if !good {
                    self.slot.write(ERROR_ADDRESS_OFFSET, page);
                    self.slot.write(ERROR_FOUND_OFFSET, generation);
                    self.slot.write(ERROR_EXPECTED_OFFSET, expected);
                    self.slot.increment(ERRORS_OFFSET);
                }
            }
            ptr::write_volatile(word(PAGE_ADDRESS_OFFSET), page);
            ptr::write_volatile(word(PAGE_GENERATION_OFFSET), self.generation);
            ptr::write_volatile(word(PAGE_NONCE_OFFSET), self.nonce);
            ptr::write_volatile(word(PAGE_SEAL_OFFSET), sealed);
        }
    }

    #[cold]
    fn end_sweep(&mut self, now: u64) {
        let ticks = now.wrapping_sub(self.sweep_start);
        self.slot.write(LAST_SWEEP_OFFSET, ticks);
        if self.generation == 1 {
            self.slot.write(FIRST_SWEEP_OFFSET, ticks);
        } else {
            let fastest = self.slot.read(MIN_SWEEP_OFFSET);
            if fastest == 0 || ticks < fastest {
                self.slot.write(MIN_SWEEP_OFFSET, ticks);
            }
            if !self.sweep_gap {
                self.recent[self.kept % RECENT] = ticks;
                self.kept += 1;
                self.slot.write(MEDIAN_SWEEP_OFFSET, self.median());
            }
        }
        self.slot.increment(SWEEPS_OFFSET);
        self.sweep_start = now;
        self.sweep_gap = false;
        self.rewind();
    }

    fn median(&self) -> u64 {
        let mut sorted = self.recent;
        let sorted = &mut sorted[..self.kept.min(RECENT)];
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    }

    #[cold]
    fn gap(&mut self, turn: &Turn) {
        self.sweep_gap = true;
        let gap = turn.gap.unwrap_or_default();
        if self.round.as_ref().is_none_or(|round| gap > round.gap) {
            self.round = Some(Round {
                start: turn.now,
                gap,
                left: self.pages,
            });
        }
    }

    #[cold]
    fn end_round(&mut self, now: u64) {
        let Some(round) = self.round.take() else {
            return;
        };
        let ticks = now.wrapping_sub(round.start);
        self.slot.write(LAST_GAP_ROUND_OFFSET, ticks);
        self.slot.write(LAST_GAP_ROUND_GAP_OFFSET, round.gap);
        self.slot.raise(CLEARED_MAX_GAP_ROUND_OFFSET, ticks);
        self.slot.increment(GAP_ROUNDS_OFFSET);
    }
}
