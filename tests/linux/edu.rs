//! Drives QEMU's edu device (QEMU, `docs/specs/edu.rst`) in a guest of one processor, from user space: sends a page of numbers into the
//! device's memory by DMA, has the device write it to another page, compares the two, and again. Each transfer takes the device
//! 100 ms, and ends with an MSI.
//!
//! No driver of Linux takes that MSI: it is a vector by which Linux' processors ask each other to schedule, which one by itself never
//! uses, and which Linux counts.
//!
//! It runs until something is wrong, and says on the console how each round was, whatever its arguments are: `edu ROUND interrupts COUNT`,
//! or a line that begins with `EDU-ERROR`.

use std::arch::asm;
use std::fmt::{Arguments, Display};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

/// A transfer that has not interrupted by then has lost its interrupt: an emulated host may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

const PAGE: usize = 4096;

/// Linux' `RESCHEDULE_VECTOR` (`arch/x86/include/asm/irq_vectors.h`), and how /proc/interrupts calls it.
const VECTOR: u16 = 0xfd;
const COUNTED_AS: &str = "RES:";
/// The local APIC with the number 0 (Intel SDM, volume 3, "Message Address Register Format").
const LOCAL_APIC: u32 = 0xFEE0_0000;

// Configuration space (PCI Local Bus 3.0, 6.1, 6.7, 6.8.1).
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 2 | 4;
const CAPABILITIES: u64 = 0x34;
const MSI: u8 = 5;
const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;

// The device's registers in its BAR, and its memory as its DMA engine has it.
const BAR: usize = 1 << 20;
const ID: usize = 0x00;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const INTERRUPT_STATUS: usize = 0x24;
const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const DMA_FROM: usize = 0x80;
const DMA_TO: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;
const DMA_START: u64 = 1;
const DMA_TO_RAM: u64 = 2;
const DMA_INTERRUPT: u64 = 4;
const DMA_DONE: u32 = 0x100;
const BUFFER: u64 = 0x40000;

// mmap(2).
const SHARED: i32 = 0x1;
const PRIVATE_ANONYMOUS_LOCKED: i32 = 0x2 | 0x20 | 0x2000;

unsafe extern "C" {
    fn mmap(at: *mut u8, length: usize, prot: i32, flags: i32, fd: RawFd, offset: i64) -> *mut u8;
}

fn mapped(length: usize, flags: i32, fd: RawFd) -> io::Result<*mut u8> {
    // Readable and writable, where the kernel has room.
    let at = unsafe { mmap(ptr::null_mut(), length, 1 | 2, flags, fd, 0) };
    match at.addr() {
        usize::MAX => Err(io::Error::last_os_error()),
        _ => Ok(at),
    }
}

fn other(what: impl Display) -> io::Error {
    io::Error::other(what.to_string())
}

/// A page that stays where it is, and where that is.
fn page() -> io::Result<(&'static mut [u64; PAGE / 8], u64)> {
    let at = mapped(PAGE, PRIVATE_ANONYMOUS_LOCKED, -1)?;
    let mut entry = [0; 8];
    // Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page, its frame in the lowest 55 bits.
    let index = at.addr() / PAGE * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, index as u64)?;
    let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
    let page = unsafe { &mut *at.cast() };
    Ok((page, frame * PAGE as u64))
}

/// How often the vector has interrupted.
fn interrupts() -> io::Result<u64> {
    let table = fs::read_to_string("/proc/interrupts")?;
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(COUNTED_AS));
    let count = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
    count.ok_or_else(|| other("/proc/interrupts does not count the vector"))
}

struct Edu {
    registers: *mut u8,
    /// Of the vector, before the first transfer, and since.
    before: u64,
    interrupts: u64,
}

impl Edu {
    fn open() -> io::Result<Self> {
        let place = find()?;
        fs::write(place.join("enable"), "1")?;
        let open = |name| OpenOptions::new().read(true).write(true).open(place.join(name));
        let space = open("config")?;
        space.write_all_at(&MEMORY_AND_MASTER.to_le_bytes(), COMMAND)?;
        let byte = |at| {
            let mut byte = [0];
            space.read_exact_at(&mut byte, at).map(|()| byte[0])
        };
        let mut at = u64::from(byte(CAPABILITIES)?);
        while at != 0 && byte(at)? != MSI {
            at = u64::from(byte(at + 1)?);
        }
        if at == 0 {
            return Err(other("the device has no MSI"));
        }
        space.write_all_at(&LOCAL_APIC.to_le_bytes(), at + 4)?;
        space.write_all_at(&0_u32.to_le_bytes(), at + 8)?;
        space.write_all_at(&VECTOR.to_le_bytes(), at + 12)?;
        space.write_all_at(&(MSI_WIDE | MSI_ENABLE).to_le_bytes(), at + 2)?;
        let registers = mapped(BAR, SHARED, open("resource0")?.as_raw_fd())?;
        let before = interrupts()?;
        Ok(Self { registers, before, interrupts: 0 })
    }

    // One plain instruction each: what emulates them reads no others.
    fn read(&self, register: usize) -> u32 {
        let value: u32;
        unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) self.registers.add(register)) };
        value
    }

    fn write(&self, register: usize, value: u32) {
        unsafe { asm!("mov [{}], {:e}", in(reg) self.registers.add(register), in(reg) value) };
    }

    fn write_wide(&self, register: usize, value: u64) {
        unsafe { asm!("mov [{}], {}", in(reg) self.registers.add(register), in(reg) value) };
    }

    /// Has the device move a page, and waits for its interrupt.
    fn transfer(&mut self, from: u64, to: u64, direction: u64) -> io::Result<()> {
        self.write_wide(DMA_FROM, from);
        self.write_wide(DMA_TO, to);
        self.write_wide(DMA_COUNT, PAGE as u64);
        self.write_wide(DMA_COMMAND, DMA_START | direction | DMA_INTERRUPT);
        let (begun, expected) = (Instant::now(), self.interrupts + 1);
        while self.interrupts < expected {
            if begun.elapsed() > PATIENCE {
                let status = self.read(INTERRUPT_STATUS);
                return Err(other(format_args!("no interrupt came; its status is {status:#x}")));
            }
            thread::sleep(Duration::from_millis(2));
            self.interrupts = interrupts()? - self.before;
        }
        let status = self.read(INTERRUPT_STATUS);
        if (self.interrupts, status) != (expected, DMA_DONE) {
            let interrupts = self.interrupts;
            return Err(other(format_args!("{interrupts} interrupts, not {expected}, with the status {status:#x}")));
        }
        self.write(INTERRUPT_ACKNOWLEDGE, status);
        Ok(())
    }
}

fn find() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let place = entry?.path();
        if fs::read_to_string(place.join("device"))?.trim() == "0x11e8" {
            return Ok(place);
        }
    }
    Err(other("there is no edu device"))
}

/// Writes a line to the console, in one piece.
fn say(what: Arguments<'_>) -> io::Result<()> {
    let line = format!("{what}\n");
    let mut console = OpenOptions::new().write(true).open(Path::new("/dev/console"))?;
    console.write_all(line.as_bytes())
}

fn run() -> io::Result<()> {
    let mut edu = Edu::open()?;
    edu.write(FACTORIAL, 5);
    while edu.read(STATUS) & 1 != 0 {}
    let (id, factorial) = (edu.read(ID), edu.read(FACTORIAL));
    say(format_args!("edu: id {id:#x}, factorial of 5 is {factorial}"))?;
    let ((sent, from), (back, to)) = (page()?, page()?);
    for round in 1_u64.. {
        for (number, index) in sent.iter_mut().zip(0_u64..) {
            // Seen by the device, behind the compiler's back.
            unsafe { ptr::from_mut(number).write_volatile(round << 32 | index) };
        }
        back.fill(!0);
        edu.transfer(from, BUFFER, 0)?;
        edu.transfer(BUFFER, to, DMA_TO_RAM)?;
        let seen: Vec<u64> = back.iter().map(|word| unsafe { ptr::from_ref(word).read_volatile() }).collect();
        if seen != *sent {
            let at = seen.iter().zip(&*sent).position(|(seen, sent)| seen != sent);
            return Err(other(format_args!("round {round} differs at word {at:?}")));
        }
        say(format_args!("edu {round} interrupts {}", edu.interrupts))?;
    }
    Ok(())
}

fn main() {
    if let Err(error) = run() {
        let said = say(format_args!("EDU-ERROR {error}"));
        std::process::exit(if said.is_ok() { 1 } else { 2 });
    }
}
