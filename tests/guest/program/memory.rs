//! Ranges of RAM, and the functions that compiled code expects of a C library (`core` calls them by name).

use core::arch::asm;

use crate::layout::PAGE_SIZE;

/// More than any VMM's map has entries of usable RAM.
const MAX_RANGES: usize = 8;

/// Guest-physical bytes, page-aligned.
#[derive(Clone, Copy)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// The RAM to walk; further ranges than [`MAX_RANGES`] are left alone.
#[derive(Clone, Copy)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    pub fn new() -> Self {
        Self {
            ranges: [Range { start: 0, end: 0 }; MAX_RANGES],
            count: 0,
        }
    }

    pub fn push(&mut self, range: Range) {
        if let Some(free) = self.ranges.get_mut(self.count) {
            *free = range;
            self.count += 1;
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Range> {
        self.ranges.iter().take(self.count)
    }

    pub fn bytes(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// The pages from number `first` on, `count` of them, counted over all ranges.
    pub fn pages(&self, first: u64, count: u64) -> Self {
        let mut part = Self::new();
        let (mut skip, mut left) = (first, count);
        for range in self.iter() {
            let pages = (range.end - range.start) / PAGE_SIZE;
            let skipped = skip.min(pages);
            skip -= skipped;
            let taken = left.min(pages - skipped);
            left -= taken;
            if taken > 0 {
                let start = range.start + skipped * PAGE_SIZE;
                part.push(Range {
                    start,
                    end: start + taken * PAGE_SIZE,
                });
            }
        }
        part
    }
}

/// The C function.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags))
    };
    to
}

/// The C function.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: copying upwards overwrites nothing that is still to be read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: copying downwards overwrites nothing that is still to be read; the last bytes exist, as `bytes` > 0 here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _, inout("rdi") to.add(bytes - 1) => _, inout("rsi") from.add(bytes - 1) => _, options(nostack));
    }
    to
}

/// The C function.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags))
    };
    to
}

/// The C function.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for at in 0..bytes {
        // SAFETY: the caller's promise.
        let (l, r) = unsafe { (*left.add(at), *right.add(at)) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// The C function.
///
/// # Safety
///
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, bytes) }
}
