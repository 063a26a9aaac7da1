//! Starts the other vCPUs with INIT and start-up interrupts (Intel SDM volume 3A, 9.4.4), one after the other, on a copy
//! of `entry`'s trampoline below 1 MiB.

use core::ptr;

use crate::heartbeat::tsc;
use crate::interrupts::send;
use crate::layout::*;
use crate::report::{self, Slot};

/// INIT, level, assert; start-up, level, assert.
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
/// How long a vCPU may take to its first turn, in ms.
const START_MS: u64 = 2000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static mut starting_vcpu: u64;
}

fn wait(ticks: u64) {
    let start = tsc();
    while tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Starts vCPUs 1 to `vcpus` - 1, whose APIC ids are those numbers. One that does not come is left out of the count of
/// running ones.
pub fn start_others(vcpus: usize, tsc_khz: u64) {
    if vcpus <= 1 {
        return;
    }
    // SAFETY: both ends are of `entry`'s text; the page below 1 MiB is ours, the boot parameters have been read.
    unsafe {
        let start = &raw const trampoline;
        let length = (&raw const trampoline_end).offset_from(start) as usize;
        ptr::copy_nonoverlapping(start, TRAMPOLINE_ADDRESS as *mut u8, length);
    }
    for vcpu in 1..vcpus {
        // SAFETY: read by the vCPU that is started next, by nobody else.
        unsafe { ptr::write_volatile(&raw mut starting_vcpu, vcpu as u64) };
        send(vcpu, INIT);
        wait(tsc_khz * 10);
        send(vcpu, START_UP | (TRAMPOLINE_ADDRESS >> 12) as u32);
        let (slot, start) = (Slot::new(vcpu), tsc());
        while slot.read(STATE_OFFSET) != STATE_RUNNING {
            if tsc().wrapping_sub(start) > tsc_khz * START_MS {
                return;
            }
            core::hint::spin_loop();
        }
        report::write(VCPUS_RUNNING_OFFSET, vcpu as u64 + 1);
    }
}
