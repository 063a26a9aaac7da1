//! Lines for people and tests on the serial port: a start line, a status line each period, and an answer to each
//! command. A byte a turn at most, so that printing does not look like a gap.

use core::fmt::{self, Write};

use crate::heartbeat::Turn;
use crate::layout::*;
use crate::options::Options;
use crate::power;
use crate::report::{self, Slot};
use crate::serial::Serial;

/// The longest line to print, and the longest command, in bytes.
const LINE_MAX: usize = 512;
const COMMAND_MAX: usize = 32;
/// How often the port is asked for a command, in ms.
const POLL_MS: u64 = 10;

pub struct Console {
    serial: Option<Serial>,
    nonce: u64,
    boots: u64,
    vcpus: usize,
    ticks_per_ms: u64,
    period: u64,
    next_line: u64,
    next_poll: u64,
    lines: u64,
    output: Line,
    printed: usize,
    command: [u8; COMMAND_MAX],
    typed: usize,
    after_output: u64,
    reset_after: Option<u64>,
    off_after: Option<u64>,
}

impl Console {
    pub fn new(options: &Options, nonce: u64) -> Self {
        let ticks_per_ms = report::read(TSC_KHZ_OFFSET);
        let now = crate::heartbeat::tsc();
        let period = ticks_per_ms.saturating_mul(options.period_ms);
        let mut console = Self {
            serial: options.console.then(Serial::new),
            nonce,
            boots: report::read(BOOTS_OFFSET),
            vcpus: options.vcpus,
            ticks_per_ms,
            period,
            next_line: now.wrapping_add(period),
            next_poll: now,
            lines: 0,
            output: Line::new(),
            printed: 0,
            command: [0; COMMAND_MAX],
            typed: 0,
            after_output: COMMAND_NONE,
            reset_after: options.reset_after_lines,
            off_after: options.off_after_lines,
        };
        console.start_line();
        console
    }

    fn start_line(&mut self) {
        let running = report::read(VCPUS_RUNNING_OFFSET);
        let walk = report::read(WALK_BYTES_OFFSET);
        // A line that does not fit is cut, which its reader sees.
        let _ = writeln!(
            self.output,
            "baton-guest start version={VERSION} nonce={:016x} boot={} cpus={}/{} walk={walk} tsc_khz={}",
            self.nonce, self.boots, running, self.vcpus, self.ticks_per_ms
        );
    }

    fn status_line(&mut self) {
        let (mut sweeps, mut errors, mut backwards, mut gap) = (u64::MAX, 0, 0, 0);
        for slot in (0..self.vcpus).map(Slot::new) {
            sweeps = sweeps.min(slot.read(SWEEPS_OFFSET));
            errors += slot.read(ERRORS_OFFSET) + slot.read(BREAKS_OFFSET);
            backwards += slot.read(BACKWARDS_OFFSET);
            gap = gap.max(slot.read(CLEARED_MAX_GAP_OFFSET));
        }
        self.lines += 1;
        let sequence = Slot::new(0).read(SEQUENCE_OFFSET);
        let _ = writeln!(
            self.output,
            "baton-guest nonce={:016x} boot={} line={} seq={sequence} sweeps={sweeps} errors={errors} back={backwards} maxgap_ticks={gap} tsc_khz={}",
            self.nonce, self.boots, self.lines, self.ticks_per_ms
        );
        report::write(LINES_OFFSET, self.lines);
        if self.reset_after == Some(self.lines) {
            self.after_output = COMMAND_RESET;
        } else if self.off_after == Some(self.lines) {
            self.after_output = COMMAND_ACPI_OFF;
        }
    }

    /// One byte out, or whatever is due.
    pub fn step(&mut self, turn: &Turn) {
        let Some(serial) = &mut self.serial else {
            return;
        };
        if let Some(byte) = self.output.bytes().get(self.printed) {
            if serial.send(*byte) {
                self.printed += 1;
            }
            return;
        }
        self.output.clear();
        self.printed = 0;
        power::obey(core::mem::replace(&mut self.after_output, COMMAND_NONE));

        if reached(turn.now, self.next_line) {
            self.next_line = turn.now.wrapping_add(self.period);
            self.status_line();
        } else if reached(turn.now, self.next_poll) {
            match serial.receive() {
                Some(byte) => self.typed(byte),
                None => self.next_poll = turn.now.wrapping_add(self.ticks_per_ms * POLL_MS),
            }
        }
    }

    fn typed(&mut self, byte: u8) {
        if byte != b'\n' && byte != b'\r' {
            // Too long a command stays too long, and so unknown.
            if let Some(free) = self.command.get_mut(self.typed) {
                *free = byte;
            }
            self.typed = (self.typed + 1).min(COMMAND_MAX + 1);
            return;
        }
        let typed = self.command.get(..self.typed);
        self.typed = 0;
        if typed == Some(&[]) {
            return;
        }
        let known = COMMANDS
            .iter()
            .find(|(name, _)| Some(name.as_bytes()) == typed);
        let _ = match known {
            Some((name, _)) => writeln!(self.output, "baton-guest command={name}"),
            None => writeln!(self.output, "baton-guest command=unknown"),
        };
        self.after_output = known.map_or(COMMAND_NONE, |(_, number)| *number);
    }
}

/// Whether `now` is at or after `due`, also when the TSC stepped.
fn reached(now: u64, due: u64) -> bool {
    now.wrapping_sub(due) < 1 << 63
}

struct Line {
    bytes: [u8; LINE_MAX],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self {
            bytes: [0; LINE_MAX],
            length: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn clear(&mut self) {
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            *self.bytes.get_mut(self.length).ok_or(fmt::Error)? = byte;
            self.length += 1;
        }
        Ok(())
    }
}
