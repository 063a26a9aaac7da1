//! What the VMM says at boot: the zero page (Documentation/arch/x86/zero-page.rst), and the CPUID leaves that `entry`
//! read while it was at CPL0, where the guest's own values are returned under kvm-pvm too.

use core::ptr;

use crate::heartbeat::tsc;
use crate::layout::*;
use crate::memory::{Range, Ranges};

/// zero-page.rst: `e820_entries`, `cmd_line_ptr` (of the setup header) and `e820_table`.
const E820_ENTRIES: u64 = 0x1e8;
const COMMAND_LINE_POINTER: u64 = 0x228;
const E820_TABLE: u64 = 0x2d0;
/// uapi/asm/setup_data.h: `E820_MAX_ENTRIES_ZEROPAGE`, and the packed size of an entry in bytes.
const E820_MAX_ENTRIES: u8 = 128;
const E820_ENTRY_SIZE: u64 = 20;
/// uapi/asm/e820.h: usable RAM.
const E820_TYPE_RAM: u32 = 1;
/// The longest command line that is read, in bytes.
const COMMAND_LINE_MAX: usize = 2048;

unsafe extern "C" {
    /// `entry`: EAX of leaves 0x4000_0000, 0x4000_0010 and 0; EAX, EBX and ECX of leaf 0x15.
    static timing_leaves: [u32; 6];
}

pub struct BootParameters(u64);

impl BootParameters {
    pub fn new(zero_page: u64) -> Self {
        Self(zero_page)
    }

    fn read<T: Copy>(&self, offset: u64) -> T {
        // SAFETY: the zero page lies where the boot protocol says, below 4 GiB, all of which is mapped.
        unsafe { ptr::read_unaligned((self.0 + offset) as *const T) }
    }

    /// The command line's bytes, up to the terminating zero.
    pub fn command_line(&self) -> &'static [u8] {
        let start = self.read::<u32>(COMMAND_LINE_POINTER) as *const u8;
        if start.is_null() {
            return &[];
        }
        let mut length = 0;
        // SAFETY: below 4 GiB, all of which is mapped; nothing writes there while the guest boots.
        while length < COMMAND_LINE_MAX && unsafe { ptr::read(start.add(length)) } != 0 {
            length += 1;
        }
        // SAFETY: just read.
        unsafe { core::slice::from_raw_parts(start, length) }
    }

    /// Whole pages of usable RAM above the image, up to `limit` bytes in all.
    pub fn usable_memory(&self, limit: u64) -> Ranges {
        let mut ranges = Ranges::new();
        let mut left = limit / PAGE_SIZE * PAGE_SIZE;
        for entry in 0..u64::from(self.read::<u8>(E820_ENTRIES).min(E820_MAX_ENTRIES)) {
            let at = E820_TABLE + entry * E820_ENTRY_SIZE;
            let (address, length, kind): (u64, u64, u32) =
                (self.read(at), self.read(at + 8), self.read(at + 16));
            if kind != E820_TYPE_RAM {
                continue;
            }
            let start = address.max(WALK_ADDRESS).next_multiple_of(PAGE_SIZE);
            let end = address.saturating_add(length) / PAGE_SIZE * PAGE_SIZE;
            if start < end {
                let end = end.min(start.saturating_add(left));
                left -= end - start;
                ranges.push(Range { start, end });
            }
        }
        ranges
    }
}

/// The TSC's frequency in kHz, and who said so.
pub fn tsc_frequency(command_line: Option<u64>) -> (u64, u64) {
    // SAFETY: `entry` wrote it before any Rust ran.
    let [
        hypervisor_max,
        hypervisor_khz,
        max,
        denominator,
        numerator,
        crystal_hz,
    ] = unsafe { timing_leaves };
    if let Some(khz) = command_line {
        return (khz, TSC_FROM_COMMAND_LINE);
    }
    if (0x4000_0010..0x4001_0000).contains(&hypervisor_max) && hypervisor_khz != 0 {
        return (u64::from(hypervisor_khz), TSC_FROM_HYPERVISOR);
    }
    if max >= 0x15 && denominator != 0 && numerator != 0 && crystal_hz != 0 {
        let hertz = u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator);
        return (hertz / 1000, TSC_FROM_CRYSTAL);
    }
    (TSC_ASSUMED_KHZ, TSC_ASSUMED)
}

/// A number for this boot: the TSC at two points of it, mixed. Never zero.
pub fn nonce(start: u64) -> u64 {
    let nonce = seal(tsc(), start, start.rotate_left(32) ^ tsc());
    if nonce == 0 { 1 } else { nonce }
}
