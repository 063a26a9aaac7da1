//! What firmware does for PCI on a machine that has none: opens the configuration space of QEMU's q35, and gives each BAR a
//! place. Baton's machine comes with both done.
//!
//! Touches the registers of PCI devices, and the ports of PCI configuration mechanism 1.

use crate::power::out32;
use crate::virtio::{BAR0, ECAM, SLOTS, read, write};

/// Configuration mechanism 1 (PCI Local Bus specification 3.0, 3.2.2.3.2): address and data ports, and the enable bit.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;
/// PCIEXBAR of the host bridge (Intel 3 Series chipset datasheet, 5.1.16): enabled, 256 MiB.
const PCIEXBAR: u32 = 0x60;
const PCIEXBAR_ENABLE: u32 = 1;
/// Where BARs may lie: between the RAM below 4 GiB and the configuration space.
const BARS_AT: u32 = 0xc000_0000;
/// No two BARs of this machine are closer.
const BAR_STEP: u32 = 1 << 20;
/// BARs of a function; bits of one: an I/O port, 64 bits wide.
const BARS: u64 = 6;
const IO: u32 = 1;
const WIDE: u32 = 0b100;
const ABSENT: u32 = u32::MAX;

pub fn set_up() {
    out32(CONFIG_ADDRESS, CONFIG_ENABLE | PCIEXBAR);
    out32(CONFIG_DATA, ECAM as u32 | PCIEXBAR_ENABLE);
    let mut next = BARS_AT;
    for slot in 0..SLOTS {
        let function = ECAM + (slot << 15);
        if read::<u32>(function) == ABSENT {
            continue;
        }
        let mut bar = 0;
        while bar < BARS {
            let at = function + BAR0 + 4 * bar;
            bar += 1;
            // The bits that stay clear are its size (PCI 3.0, 6.2.5.1).
            write(at, u32::MAX);
            let size = read::<u32>(at);
            if size == 0 || size & IO != 0 {
                write(at, 0_u32);
                continue;
            }
            write(at, next);
            next += BAR_STEP;
            if size & WIDE != 0 {
                write(at + 4, 0_u32);
                bar += 1;
            }
        }
    }
}
