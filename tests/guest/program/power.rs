//! Ways to end: resets, soft-off, a crash, and what a kernel's panic says. Each is a request to the VMM; where it does not come true, the guest goes
//! on counting.

use core::arch::asm;

use crate::layout::*;
use crate::report;

/// The 8042's command port, and its command "pulse the reset line".
const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
/// The VMM's ACPI ports: PM1a control (16 bits), and the reset register with its value.
const PM1A_CONTROL: u16 = 0x604;
const RESET_REGISTER: u16 = 0x612;
const RESET_VALUE: u8 = 0x01;
/// The pvpanic port, and its bits (QEMU's `docs/specs/pvpanic.rst`).
const PVPANIC: u16 = 0x505;
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
const PV_SHUTDOWN: u8 = 1 << 2;
/// ACPI specification 4.8.3.2.1: SLP_EN (bit 13), and SLP_TYP (bits 10 to 12), 5 here for S5.
const SOFT_OFF: u16 = 1 << 13 | 5 << 10;

pub fn out8(port: u16, value: u8) {
    // SAFETY: the TSS permits every port (`entry`); the device behind it writes no memory of this program.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as in `out8`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    };
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
    }
}

pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `in8`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    }
    value
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `out8`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Does what one of `layout`'s commands says.
pub fn obey(command: u64) {
    match command {
        COMMAND_CLEAR => report::clear_statistics(),
        COMMAND_RESET => out8(KEYBOARD_CONTROLLER, PULSE_RESET),
        COMMAND_ACPI_RESET => out8(RESET_REGISTER, RESET_VALUE),
        COMMAND_ACPI_OFF => out16(PM1A_CONTROL, SOFT_OFF),
        COMMAND_CRASH => crash(),
        COMMAND_PANIC => out8(PVPANIC, PANICKED),
        COMMAND_CRASH_LOADED => out8(PVPANIC, CRASH_LOADED),
        COMMAND_PV_SHUTDOWN => out8(PVPANIC, PV_SHUTDOWN),
        COMMAND_PANIC_RESET => {
            out8(PVPANIC, PANICKED);
            out8(KEYBOARD_CONTROLLER, PULSE_RESET);
        }
        _ => {}
    }
}

/// Triple fault: an exception, without an IDT to deliver it or its followers by.
pub fn crash() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("ud2", options(noreturn)) }
}
