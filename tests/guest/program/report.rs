//! The words of the report in guest RAM, at the addresses that `layout` gives. The host reads them at any time, so every
//! access is volatile and a whole aligned word.

use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::layout::*;

fn word(offset: usize) -> *mut u64 {
    (REPORT_ADDRESS as usize + offset) as *mut u64
}

pub fn read(offset: usize) -> u64 {
    // SAFETY: `offset` is one of `layout`'s, so the word lies in the report, which nothing else uses.
    unsafe { ptr::read_volatile(word(offset)) }
}

pub fn write(offset: usize, value: u64) {
    // SAFETY: as in `read`.
    unsafe { ptr::write_volatile(word(offset), value) }
}

/// What the header says from the boot on.
pub struct Boot {
    pub nonce: u64,
    pub start: u64,
    pub tsc_khz: u64,
    pub tsc_source: u64,
    pub gap_ticks: u64,
    pub vcpus: usize,
    pub walk_bytes: u64,
}

/// Blanks the report but for the count of boots, which lives on in RAM over a reset, and fills in the header.
pub fn boot(boot: &Boot) {
    let survived = read(MAGIC_OFFSET) == MAGIC && read(VERSION_OFFSET) == VERSION;
    let boots = if survived {
        read(BOOTS_OFFSET).wrapping_add(1)
    } else {
        1
    };
    for offset in (0..REPORT_SIZE).step_by(8) {
        write(offset, 0);
    }
    write(VERSION_OFFSET, VERSION);
    write(NONCE_OFFSET, boot.nonce);
    write(BOOTS_OFFSET, boots);
    write(VCPUS_OFFSET, boot.vcpus as u64);
    write(VCPUS_RUNNING_OFFSET, 1);
    write(TSC_KHZ_OFFSET, boot.tsc_khz);
    write(TSC_SOURCE_OFFSET, boot.tsc_source);
    write(GAP_TICKS_OFFSET, boot.gap_ticks);
    write(WALK_BYTES_OFFSET, boot.walk_bytes);
    write(BOOT_TSC_OFFSET, boot.start);
}

/// Says that the header is whole.
pub fn publish() {
    compiler_fence(Ordering::Release);
    write(MAGIC_OFFSET, MAGIC);
}

/// The host's command, once.
pub fn take_mailbox() -> u64 {
    let command = read(MAILBOX_OFFSET);
    if command != COMMAND_NONE {
        write(MAILBOX_OFFSET, COMMAND_NONE);
    }
    command
}

pub fn clear_statistics() {
    write(CLEARS_OFFSET, read(CLEARS_OFFSET).wrapping_add(1));
}

pub fn increment(offset: usize) {
    write(offset, read(offset).wrapping_add(1));
}

pub fn panicked(line: u64) {
    write(PANIC_OFFSET, line);
}

/// One vCPU's slot.
#[derive(Clone, Copy)]
pub struct Slot(usize);

impl Slot {
    pub fn new(vcpu: usize) -> Self {
        Self(slot_offset(vcpu))
    }

    pub fn read(self, offset: usize) -> u64 {
        read(self.0 + offset)
    }

    pub fn write(self, offset: usize, value: u64) {
        write(self.0 + offset, value);
    }

    pub fn increment(self, offset: usize) {
        self.write(offset, self.read(offset).wrapping_add(1));
    }

    /// Raises the word to `value`; says whether it had been lower.
    pub fn raise(self, offset: usize, value: u64) -> bool {
        let higher = value > self.read(offset);
        if higher {
            self.write(offset, value);
        }
        higher
    }
}
