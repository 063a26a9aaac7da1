//! The 16550 at the first serial port: bytes out when it has room, bytes in when it has some. Never waits.

use crate::power::{in8, out8};

/// The first serial port, and its registers' offsets (PC16550D data sheet, table 1).
const PORT: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const INTERRUPT_IDENTITY: u16 = 2;
const LINE_STATUS: u16 = 5;
/// Line status: a byte is there; the transmitter's FIFO is empty.
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// FIFO control: enable, blank both. Interrupt identity: both bits set when the FIFOs are enabled.
const FIFO_ENABLE: u8 = 0x07;
const FIFO_ENABLED: u8 = 0xc0;
/// Bytes that the transmitter takes when its FIFO is empty.
const FIFO_SIZE: u8 = 16;

pub struct Serial {
    burst: u8,
    room: u8,
}

impl Serial {
    pub fn new() -> Self {
        out8(PORT + INTERRUPT_ENABLE, 0);
        out8(PORT + FIFO_CONTROL, FIFO_ENABLE);
        let fifo = in8(PORT + INTERRUPT_IDENTITY) & FIFO_ENABLED == FIFO_ENABLED;
        Self {
            burst: if fifo { FIFO_SIZE } else { 1 },
            room: 0,
        }
    }

    /// Sends the byte if there is room for it.
    pub fn send(&mut self, byte: u8) -> bool {
        if self.room == 0 {
            if in8(PORT + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                return false;
            }
            self.room = self.burst;
        }
        out8(PORT, byte);
        self.room -= 1;
        true
    }

    pub fn receive(&mut self) -> Option<u8> {
        (in8(PORT + LINE_STATUS) & DATA_READY != 0).then(|| in8(PORT))
    }
}
