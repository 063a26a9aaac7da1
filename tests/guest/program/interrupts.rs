//! Interrupts: the descriptor table, what each vCPU keeps at CPL0, the local timer and interrupts between vCPUs.
//!
//! A handler runs at CPL0, which kvm-pvm emulates, so it only counts and ends the interrupt; what the count means is
//! found out at CPL3, a turn at a time. There are no handlers for exceptions: one is a triple fault, which the VMM sees.
//!
//! Touches the vCPUs' areas, a fixed range between the image and the walked RAM, and the local APIC's registers (Intel
//! SDM volume 3A, chapter 11, table 11-1).

use core::arch::global_asm;
use core::ptr;

use crate::heartbeat::{Turn, tsc};
use crate::layout::*;
use crate::options::Options;
use crate::report::{self, Slot};

/// The vCPUs' areas: guest-physical start, and bytes each. An area is a TSS with its I/O permission bitmap, a page that
/// begins with counters and ends in the stack of CPL0, and the stack of CPL3.
pub const AREAS: usize = 0x38_0000;
pub const AREA_SIZE: usize = 0x8000;
const COUNTERS: usize = 0x3000;
const COUNTERS_SIZE: usize = 0x1000;

/// Vectors: the local timer, an interrupt from another vCPU, the disk's queue and its configuration, and the local APIC's
/// excuse for having none.
const TIMER_VECTOR: u32 = 0x40;
const IPI_VECTOR: u32 = 0x41;
pub const DISK_VECTOR: u32 = 0x42;
pub const DISK_CHANGE_VECTOR: u32 = 0x43;
const SPURIOUS_VECTOR: u32 = 0x4f;
const VECTORS: usize = 0x50;
/// Offset of the descriptor table's last byte.
pub const IDT_LIMIT: usize = VECTORS * 16 - 1;
/// Code segment of the handlers (`entry`), and the type of a 64-bit interrupt gate, present, DPL 0.
const KERNEL_CODE: u64 = 0x10;
const INTERRUPT_GATE: u64 = 0x8e;

/// The local APIC's registers.
const SPURIOUS: u64 = 0xfee0_00f0;
const COMMAND_LOW: u64 = 0xfee0_0300;
const COMMAND_HIGH: u64 = 0xfee0_0310;
const TIMER: u64 = 0xfee0_0320;
const TIMER_COUNT: u64 = 0xfee0_0380;
const TIMER_DIVIDE: u64 = 0xfee0_03e0;
/// Spurious vector register: the APIC is enabled by software. Timer: periodic. Divide configuration: by 1. Command:
/// fixed, edge, assert.
const ENABLE: u32 = 0x100;
const PERIODIC: u32 = 0x2_0000;
const DIVIDE_BY_1: u32 = 0b1011;
const FIXED: u32 = 0x4000;
/// KVM's default: the timer counts nanoseconds (Documentation/virt/kvm/api.rst, `KVM_CAP_X86_APIC_BUS_CYCLES_NS`).
const TIMER_PER_US: u64 = 1000;

#[repr(C, align(16))]
pub struct Idt([[u64; 2]; VECTORS]);

pub static mut IDT: Idt = Idt([[0; 2]; VECTORS]);

global_asm!(
    r#"
    .section .text
    .macro counting_handler name, counter
    .globl \name
    \name:
    push rax
    mov rax, rsp
    and rax, -{counters_size}
    inc qword ptr [rax + \counter]
    mov eax, 0xfee000b0             // end of interrupt
    mov dword ptr [rax], 0
    pop rax
    iretq
    .endm
    counting_handler timer_interrupt, 0
    counting_handler ipi_interrupt, 8
    counting_handler disk_interrupt, 16
    counting_handler disk_change_interrupt, 24
    .globl spurious_interrupt
    spurious_interrupt:
    iretq
    "#,
    counters_size = const COUNTERS_SIZE,
);

unsafe extern "C" {
    fn timer_interrupt();
    fn ipi_interrupt();
    fn disk_interrupt();
    fn disk_change_interrupt();
    fn spurious_interrupt();
}

#[derive(Clone, Copy)]
enum Counter {
    Timer = 0,
    Ipi = 1,
    Disk = 2,
    DiskChange = 3,
}

/// Interrupts of the disk, all of them on the first vCPU.
pub fn disk_interrupts() -> u64 {
    count(0, Counter::Disk)
}

/// The disk's configuration interrupts, on the first vCPU too.
pub fn disk_changes() -> u64 {
    count(0, Counter::DiskChange)
}

pub fn write_register(register: u64, value: u32) {
    // SAFETY: a register of the local APIC, mapped by `entry`; what it starts runs on memory of its own.
    unsafe { ptr::write_volatile(register as *mut u32, value) };
}

/// Sends the command to the vCPU whose APIC id that is.
pub fn send(vcpu: usize, command: u32) {
    write_register(COMMAND_HIGH, (vcpu as u32) << 24);
    write_register(COMMAND_LOW, command);
}

/// Fills the descriptor table. Before any vCPU's [`prepare`].
pub fn fill_table() {
    for (vector, handler) in [
        (TIMER_VECTOR, timer_interrupt as *const () as u64),
        (IPI_VECTOR, ipi_interrupt as *const () as u64),
        (DISK_VECTOR, disk_interrupt as *const () as u64),
        (
            DISK_CHANGE_VECTOR,
            disk_change_interrupt as *const () as u64,
        ),
        (SPURIOUS_VECTOR, spurious_interrupt as *const () as u64),
    ] {
        let low = handler & 0xffff | KERNEL_CODE << 16 | INTERRUPT_GATE << 40 | handler >> 16 << 48;
        // SAFETY: the boot vCPU alone runs, and no interrupt source is enabled.
        unsafe { IDT.0[vector as usize] = [low, handler >> 32] };
    }
}

/// Fills a vCPU's area, but for the stack on which this runs. Before that vCPU's first use of a port.
pub fn prepare(vcpu: usize) {
    let area = AREAS + vcpu * AREA_SIZE;
    // SAFETY: this vCPU's own area. The processor reads the TSS only at an interrupt or an access to a port.
    unsafe {
        ptr::write_bytes(area as *mut u8, 0, COUNTERS + COUNTERS_SIZE);
        // A 64-bit TSS: RSP0 at 4; at 102, where the bitmap begins; the byte after the bitmap has all bits set.
        ptr::write_unaligned(
            (area + 4) as *mut u64,
            (area + COUNTERS + COUNTERS_SIZE) as u64,
        );
        ptr::write((area + 102) as *mut u16, 104);
        ptr::write((area + 104 + 0x2000) as *mut u8, 0xff);
    }
    write_register(SPURIOUS, ENABLE | SPURIOUS_VECTOR);
}

fn count(vcpu: usize, counter: Counter) -> u64 {
    let address = AREAS + vcpu * AREA_SIZE + COUNTERS + 8 * counter as usize;
    // SAFETY: a counter in the area of a vCPU that exists.
    unsafe { ptr::read_volatile(address as *const u64) }
}

/// What one vCPU asks of its local APIC, and what comes of it.
pub struct Interrupts {
    vcpu: usize,
    slot: Slot,
    timer: bool,
    ticks: u64,
    tick_at: u64,
    // The vCPU that this one interrupts: the next of a ring, or itself when it is alone.
    target: usize,
    ipi_period: Option<u64>,
    sent: u64,
    sent_at: u64,
    outstanding: bool,
}

impl Interrupts {
    pub fn new(vcpu: usize, options: &Options) -> Self {
        let now = tsc();
        if let Some(us) = options.timer_us {
            write_register(TIMER_DIVIDE, DIVIDE_BY_1);
            write_register(TIMER, PERIODIC | TIMER_VECTOR);
            write_register(
                TIMER_COUNT,
                (us * TIMER_PER_US).min(u64::from(u32::MAX)) as u32,
            );
        }
        let per_us = |us| report::read(TSC_KHZ_OFFSET).saturating_mul(us) / 1000;
        Self {
            vcpu,
            slot: Slot::new(vcpu),
            timer: options.timer_us.is_some(),
            ticks: 0,
            tick_at: now,
            target: (vcpu + 1) % options.vcpus,
            ipi_period: options.ipi_us.map(per_us),
            sent: 0,
            sent_at: now,
            outstanding: false,
        }
    }

    #[inline]
    pub fn step(&mut self, turn: &Turn) {
        if self.timer {
            self.look_at_timer(turn.now);
        }
        if let Some(period) = self.ipi_period {
            self.look_at_ipis(turn.now, period);
        }
    }

    fn look_at_timer(&mut self, now: u64) {
        let ticks = count(self.vcpu, Counter::Timer);
        if ticks != self.ticks {
            self.ticks = ticks;
            self.slot
                .raise(TIMER_MAX_GAP_OFFSET, now.saturating_sub(self.tick_at));
            self.tick_at = now;
            self.slot.write(TIMER_TSC_OFFSET, now);
            self.slot.write(TIMER_TICKS_OFFSET, ticks);
        }
    }

    /// Sends the next one when the last has arrived, so that each lost or doubled one shows.
    fn look_at_ipis(&mut self, now: u64, period: u64) {
        let arrived = count(self.target, Counter::Ipi);
        if arrived > self.sent {
            self.slot.write(IPIS_EXTRA_OFFSET, arrived - self.sent);
        }
        let age = now.saturating_sub(self.sent_at);
        if self.outstanding && arrived >= self.sent {
            self.outstanding = false;
            self.slot.write(IPIS_ARRIVED_OFFSET, self.sent);
            self.slot.raise(IPI_MAX_OFFSET, age);
        }
        let target_runs = Slot::new(self.target).read(STATE_OFFSET) == STATE_RUNNING;
        if !self.outstanding && age >= period && target_runs {
            self.outstanding = true;
            self.sent += 1;
            self.sent_at = now;
            self.slot.write(IPIS_SENT_OFFSET, self.sent);
            send(self.target, FIXED | IPI_VECTOR);
        }
    }
}
