//! COM1: vm-superio's 16550, with its output kept for the control thread.
//!
//! A vCPU thread writes into a bounded queue ([`ConsoleOut`]) and goes on. The control thread is woken when the queue
//! stops being empty, and drains it to wherever the console is; it is also woken when the receive FIFO has room again,
//! and feeds it no more than fits, so that unread input stays in its socket and is there for the next worker.
//!
//! Between `park` and `resume` nothing is drained, nothing is fed, and an interrupt that becomes due is raised at
//! `resume`, by whichever worker that is.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;
use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vm_superio::serial::SerialState;

use super::bus::BusDevice;
use super::console::CONSOLE_OUT_MAX;
use super::console::ConsoleOut;
use super::id::DeviceId;
use super::id::DeviceKind;
use super::lifecycle::Device;
use super::lifecycle::DeviceError;
use super::signal::Trigger;
use super::state;
use super::state::SavedSection;
use super::state::StateError;

/// Offset of the modem control register (16550 data sheet).
const MODEM_CONTROL: u8 = 4;
/// Modem control: what is sent is received.
const LOOPBACK: u8 = 1 << 4;
/// Interrupt enable register: the four sources of a 16550.
const INTERRUPT_SOURCES: u8 = 0x0F;
/// Line status: data ready.
const DATA_READY: u8 = 1 << 0;
/// Line status: the transmitter is empty, as it always is here.
const TRANSMITTER_EMPTY: u8 = 0x60;
/// Modem status: carrier, data set ready, clear to send; nothing here changes it.
const MODEM_STATUS: u8 = 0xB0;
/// Bytes that the receive FIFO of vm-superio holds.
const RECEIVE_FIFO: usize = 64;

/// The interrupt line, closed between `park` and `resume`.
#[derive(Clone)]
struct Gate(Arc<GateState>);

struct GateState {
    irq: Arc<dyn Trigger>,
    open: AtomicBool,
    missed: AtomicBool,
}

impl Gate {
    fn open(&self) {
        self.0.open.store(true, Ordering::SeqCst);
        if self.0.missed.swap(false, Ordering::SeqCst) {
            self.0.irq.trigger();
        }
    }

    fn close(&self) {
        self.0.open.store(false, Ordering::SeqCst);
    }

    fn is_open(&self) -> bool {
        self.0.open.load(Ordering::SeqCst)
    }

    fn forget(&self) {
        self.0.missed.store(false, Ordering::SeqCst);
    }
}

impl vm_superio::Trigger for Gate {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if self.is_open() {
            self.0.irq.trigger();
        } else {
            self.0.missed.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A serial port of 8 I/O ports.
pub struct SerialPort {
    id: DeviceId,
    uart: Serial<Gate, NoEvents, ConsoleOut>,
    gate: Gate,
    wake: Arc<dyn Trigger>,
    /// Shadow of the modem control register's bit: the FIFO takes no input from outside then.
    loopback: bool,
}

impl SerialPort {
    /// The `instance`th serial port. `irq` is its edge-triggered interrupt; `wake` tells the control thread that there
    /// is output to drain, or room to feed input.
    #[must_use]
    pub fn new(instance: u16, irq: Arc<dyn Trigger>, wake: Arc<dyn Trigger>) -> Self {
        let gate = Gate(Arc::new(GateState {
            irq,
            open: AtomicBool::new(false),
            missed: AtomicBool::new(false),
        }));
        let uart = Serial::new(gate.clone(), ConsoleOut::new());
        SerialPort {
            id: DeviceId::new(DeviceKind::SERIAL, instance),
            uart,
            gate,
            wake,
            loopback: false,
        }
    }

    /// How many bytes [`SerialPort::feed`] takes now. Poll the console for input only while this is not 0.
    #[must_use]
    pub fn receive_room(&self) -> usize {
        if self.loopback || !self.gate.is_open() {
            0
        } else {
            self.uart.fifo_capacity()
        }
    }

    /// Gives the guest input, as much as the receive FIFO takes; says how much that was.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        let input = input
            .get(..input.len().min(self.receive_room()))
            .unwrap_or_default();
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Whether there is output to drain.
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.gate.is_open() && !self.uart.writer().is_empty()
    }

    /// Gives output to `write`, oldest first, and forgets what it says it took, until there is no more or `write` takes
    /// nothing or would block. `write` must not block: the device is locked. Says how many bytes it took.
    ///
    /// # Errors
    ///
    /// Those of `write`, except that a call would block or was interrupted.
    pub fn drain(&mut self, write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
        if self.gate.is_open() {
            self.uart.writer_mut().drain(write)
        } else {
            Ok(0)
        }
    }

    /// How many bytes of output were dropped, since the VM's start, because nobody drained them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.uart.writer().dropped()
    }

    /// Puts the UART into `registers`, with `out` as its output.
    fn replace(&mut self, registers: &SerialState, out: ConsoleOut) -> Result<(), StateError> {
        self.gate.forget();
        self.uart =
            Serial::from_state(registers, self.gate.clone(), NoEvents, out).map_err(|_| {
                StateError::field(
                    "in_buffer",
                    registers.in_buffer.len() as u64,
                    "more than the FIFO holds",
                )
            })?;
        self.loopback = registers.modem_control & LOOPBACK != 0;
        Ok(())
    }

    fn wake_after(&mut self, access: impl FnOnce(&mut Serial<Gate, NoEvents, ConsoleOut>)) {
        let (had_output, had_room) = (
            !self.uart.writer().is_empty(),
            self.uart.fifo_capacity() > 0 && !self.loopback,
        );
        access(&mut self.uart);
        let (output, room) = (
            !self.uart.writer().is_empty(),
            self.uart.fifo_capacity() > 0 && !self.loopback,
        );
        if (output && !had_output) || (room && !had_room) {
            self.wake.trigger();
        }
    }
}

impl BusDevice for SerialPort {
    /// Registers are a byte wide; a wider access is one of each.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.wake_after(|uart| {
            for (port, byte) in (offset..).zip(data) {
                *byte = uart.read(u8::try_from(port).unwrap_or(u8::MAX));
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..).zip(data) {
            let port = u8::try_from(port).unwrap_or(u8::MAX);
            let was_loopback = self.loopback;
            self.wake_after(|uart| {
                // Fails only when the output or the interrupt does, and neither can.
                let _ = uart.write(port, *byte);
            });
            if port == MODEM_CONTROL {
                self.loopback = byte & LOOPBACK != 0;
                if was_loopback && !self.loopback {
                    self.wake.trigger();
                }
            }
        }
    }
}

const VERSION: u16 = 1;

/// Version 1: vm-superio's registers by their names there, and the output that nobody has read.
#[derive(Debug, Serialize, Deserialize)]
struct SavedSerial {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
    out: Vec<u8>,
    out_dropped: u64,
}

impl SavedSerial {
    fn of(registers: SerialState, out: &ConsoleOut) -> Self {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = registers;
        SavedSerial {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
            out: out.bytes(),
            out_dropped: out.dropped(),
        }
    }
}

impl TryFrom<SavedSerial> for (SerialState, ConsoleOut) {
    type Error = StateError;

    fn try_from(saved: SavedSerial) -> Result<Self, StateError> {
        let SavedSerial {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
            out,
            out_dropped,
        } = saved;
        if interrupt_enable & !INTERRUPT_SOURCES != 0 {
            return Err(StateError::field(
                "interrupt_enable",
                interrupt_enable,
                "not 0 to 0xf",
            ));
        }
        // Nothing, or transmitter empty and received data in any combination.
        if !matches!(interrupt_identification, 0b001 | 0b010 | 0b100 | 0b110) {
            return Err(StateError::field(
                "interrupt_identification",
                interrupt_identification,
                "not 1, 2, 4 or 6",
            ));
        }
        if in_buffer.len() > RECEIVE_FIFO {
            return Err(StateError::field(
                "in_buffer",
                in_buffer.len() as u64,
                "more than the FIFO holds",
            ));
        }
        let ready = if in_buffer.is_empty() { 0 } else { DATA_READY };
        if line_status != TRANSMITTER_EMPTY | ready {
            return Err(StateError::field(
                "line_status",
                line_status,
                "not what the FIFO says",
            ));
        }
        if modem_status != MODEM_STATUS {
            return Err(StateError::field("modem_status", modem_status, "not 0xb0"));
        }
        if out.len() > CONSOLE_OUT_MAX {
            return Err(StateError::field(
                "out",
                out.len() as u64,
                "more than the queue holds",
            ));
        }
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        Ok((registers, ConsoleOut::with(&out, out_dropped)))
    }
}

impl Device for SerialPort {
    fn id(&self) -> DeviceId {
        self.id
    }

    /// Output that is still to be drained survives a guest's reset.
    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.gate.close();
        let out = std::mem::replace(self.uart.writer_mut(), ConsoleOut::hollow());
        Ok(self.replace(&SerialState::default(), out)?)
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.gate.close();
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let saved = SavedSerial::of(self.uart.state(), self.uart.writer());
        Ok(state::encode(self.id, VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let (registers, out) = state::decode::<SavedSerial>(section, VERSION)?.try_into()?;
        Ok(self.replace(&registers, out)?)
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.gate.open();
        // There may be output to drain, and input waiting for the room that there is.
        self.wake.trigger();
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort")
            .field("id", &self.id)
            .field("registers", &self.uart.state())
            .finish()
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests;
