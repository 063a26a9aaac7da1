//! The guest's console as the control thread serves it: the serial port's bytes out to a stream socket, and the socket's
//! bytes in as far as the serial port has room.
//!
//! The socket is shared with the other worker of an upgrade. It is read and written only between a device's `resume` and
//! its `park`, and what the guest has no room for stays in it.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;

use crate::devices::serial::SerialPort;

/// What the console waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interest {
    /// Input: the guest has room for it.
    pub(crate) input: bool,
    /// Room for output.
    pub(crate) output: bool,
}

/// The console.
pub(crate) struct Console {
    socket: OwnedFd,
    serial: Arc<Mutex<SerialPort>>,
    /// The other side has closed, or broke; nobody reads or writes any more.
    gone: bool,
    /// The socket took no more output.
    full: bool,
}

impl Console {
    pub(crate) fn new(socket: OwnedFd, serial: Arc<Mutex<SerialPort>>) -> Self {
        Self {
            socket,
            serial,
            gone: false,
            full: false,
        }
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to wait for now. Nothing while the serial port is parked.
    pub(crate) fn interest(&self) -> Interest {
        if self.gone {
            return Interest::default();
        }
        let serial = self.serial();
        Interest {
            input: serial.receive_room() > 0,
            output: self.full && serial.has_output(),
        }
    }

    /// Bytes that were dropped because nobody took them.
    pub(crate) fn dropped(&self) -> u64 {
        self.serial().dropped()
    }

    /// Gives the socket what the guest wrote, as much as it takes.
    pub(crate) fn drain(&mut self) {
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        if self.gone || !serial.has_output() {
            return;
        }
        let socket = &self.socket;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let outcome =
            serial.drain(|bytes| rustix::net::send(socket, bytes, flags).map_err(io::Error::from));
        self.full = serial.has_output();
        if outcome.is_err() {
            self.gone = true;
        }
    }

    /// Gives the guest what is in the socket, as much as it has room for.
    pub(crate) fn feed(&mut self) {
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; 256];
        let room = serial.receive_room().min(buffer.len());
        let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
            return;
        };
        match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.gone = true,
            Ok((_, count)) => {
                serial.feed(buffer.get(..count).unwrap_or_default());
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.gone = true,
        }
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
