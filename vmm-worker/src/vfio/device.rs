//! A device of the host on the guest's bus: what the guest reads and writes there, and what becomes of it over an upgrade.
#![expect(unsafe_code, reason = "an ioctl of VFIO without an argument")]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use baton_ipc::StartMode;
use baton_ipc::worker::VfioBar;
use serde::Deserialize;
use serde::Serialize;

use super::VfioError;
use super::config::Shape;
use super::config::Signal;
use super::container::Container;
use super::interrupts::Vectors;
use super::request;
use crate::devices::Device;
use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::lifecycle::DeviceError;
use crate::devices::pci::Function;
use crate::devices::pci::config_space::BUS_MASTER;
use crate::devices::pci::config_space::ConfigSpace;
use crate::devices::pci::config_space::INTX_DISABLE;
use crate::devices::pci::config_space::MEMORY_SPACE;
use crate::devices::pci::config_space::SavedConfigSpace;
use crate::devices::pci::msix::Msix;
use crate::devices::pci::msix::SavedMsix;
use crate::devices::state;
use crate::devices::state::SavedSection;
use crate::diagnostics::log;

const VFIO_DEVICE_RESET: libc::c_ulong = request(11);
/// Where the command register is (PCI Local Bus 3.0, 6.1).
const COMMAND: u64 = 4;
/// Bits of it that reach the device.
const COMMAND_BITS: u16 = MEMORY_SPACE | BUS_MASTER;

const VERSION: u16 = 1;

/// Version 1. What the device itself is doing is in the device.
#[derive(Debug, Serialize, Deserialize)]
struct SavedHostDevice {
    config: SavedConfigSpace,
    msix: SavedMsix,
}

/// What a device is made with.
pub(crate) struct Parts {
    pub(crate) slot: u8,
    pub(crate) file: OwnedFd,
    /// Where in it configuration space begins.
    pub(crate) space_at: u64,
    /// What is behind each BAR.
    pub(crate) bars: Vec<VfioBar>,
    /// What the guest sees at power-on.
    pub(crate) shape: Shape,
    /// It can be reset by itself.
    pub(crate) resets: bool,
    pub(crate) msix: Msix,
    pub(crate) vectors: Vectors,
    pub(crate) container: Arc<Mutex<Container>>,
}

/// A device of the host that the guest has.
pub(crate) struct HostDevice {
    slot: u8,
    file: OwnedFd,
    space_at: u64,
    bars: Vec<VfioBar>,
    power_on: ConfigSpace,
    space: ConfigSpace,
    signal: Signal,
    resets: bool,
    msix: Msix,
    vectors: Vectors,
    container: Arc<Mutex<Container>>,
    /// The guest has run in this worker: the device is this worker's to use.
    owned: bool,
}

impl HostDevice {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            slot,
            file,
            space_at,
            bars,
            shape: Shape { space, signal },
            resets,
            msix,
            vectors,
            container,
        } = parts;
        Self {
            slot,
            file,
            space_at,
            bars,
            power_on: space.clone(),
            space,
            signal,
            resets,
            msix,
            vectors,
            container,
            owned: false,
        }
    }

    /// Its vectors, as the guest has them.
    pub(crate) fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Has KVM interrupt the guest by those vectors that fire now, and by no others.
    pub(crate) fn settle(&mut self) {
        let wanted = match self.owned {
            true => self.msix.deliverable(),
            false => Vec::new(),
        };
        if let Err(error) = self.vectors.bind(&wanted) {
            log!("PCI device {}: {error}", self.slot);
        }
    }

    /// Takes over what the guest wrote to the capability by which it interrupts.
    fn signal_written(&mut self) {
        if let Some(message) = self.signal.message(&self.space) {
            self.msix.program(0, message);
        }
        self.msix.control(self.signal.control(&self.space));
        self.msix.note_stale();
    }

    /// Tells the device what the guest lets it do. Interrupts by its pin it may never raise.
    fn command(&self) -> rustix::io::Result<()> {
        let command = self.space.command() & COMMAND_BITS | INTX_DISABLE;
        rustix::io::pwrite(&self.file, &command.to_le_bytes(), self.space_at + COMMAND).map(drop)
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the request has no argument and changes no memory of this process; what the device does to guest memory
        // it does no more.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), VFIO_DEVICE_RESET) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn container(&self) -> std::sync::MutexGuard<'_, Container> {
        self.container
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Where MSI-X's table and pending bits are, in the device's descriptor.
    fn tables(&self) -> Option<(&Range<u64>, &Range<u64>)> {
        match &self.signal {
            Signal::Msi { .. } => None,
            Signal::MsiX { table, pending, .. } => Some((table, pending)),
        }
    }
}

impl Function for HostDevice {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        let signal = |device: &Self| {
            let space = &device.space;
            (device.signal.control(space), device.signal.message(space))
        };
        let before = (self.space.command(), signal(self));
        self.space.write(offset, data);
        if self.space.command() != before.0 {
            // A device that is gone takes nothing, and answers with all ones.
            let _ = self.command();
        }
        if signal(self) != before.1 {
            self.signal_written();
        }
    }

    /// Counted as in the device's descriptor.
    fn decode(&self, bytes: &Range<u64>) -> Option<u64> {
        self.bars.iter().enumerate().find_map(|(index, behind)| {
            let bar = self.space.memory_bar(index)?;
            let within = bar.start <= bytes.start && bytes.end <= bar.end;
            within.then(|| behind.at.saturating_add(bytes.start - bar.start))
        })
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((table, pending)) = self.tables() {
            if table.contains(&offset) {
                return self.msix.table_read(offset - table.start, data);
            }
            if pending.contains(&offset) {
                return self.msix.pending_read(offset - pending.start, data);
            }
        }
        let length = data.len();
        if rustix::io::pread(&self.file, &mut *data, offset) != Ok(length) {
            data.fill(0xFF);
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        if let Some((table, pending)) = self.tables() {
            if table.contains(&offset) {
                self.msix.table_write(offset - table.start, data);
                // One that is masked by now is to be unbound.
                return self.msix.note_stale();
            }
            if pending.contains(&offset) {
                return;
            }
        }
        // A device that is gone takes nothing.
        let _ = rustix::io::pwrite(&self.file, data, offset);
    }
}

impl From<VfioError> for DeviceError {
    fn from(error: VfioError) -> Self {
        Self::Io {
            what: "VFIO",
            source: io::Error::other(error),
        }
    }
}

impl Device for HostDevice {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::VFIO, self.slot.into())
    }

    /// A reset of the guest's resets the device where that can be; its DMA and its interrupts end in any case.
    fn setup(&mut self, mode: StartMode) -> Result<(), DeviceError> {
        self.space = self.power_on.clone();
        self.msix.reset();
        if mode.preserves_guest() {
            return Ok(());
        }
        self.command().map_err(|error| DeviceError::Io {
            what: "command register",
            source: error.into(),
        })?;
        if self.owned && self.resets {
            self.reset().map_err(|source| DeviceError::Io {
                what: "VFIO_DEVICE_RESET",
                source,
            })?;
        }
        self.vectors.forget();
        Ok(())
    }

    /// Interrupts are counted from now on. DMA goes on: only the guest stops it.
    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.vectors.bind(&[]).map_err(|error| DeviceError::Io {
            what: "KVM_IRQFD",
            source: io::Error::other(error),
        })
    }

    fn save(&mut self, mode: StartMode) -> Result<SavedSection, DeviceError> {
        if self.owned && mode == StartMode::CprTransfer {
            self.container().give_up()?;
        }
        let saved = SavedHostDevice {
            config: self.space.save(),
            msix: self.msix.save(),
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedHostDevice { config, msix } = state::decode(section, VERSION)?;
        self.space.load(config)?;
        self.msix.load(msix, self.signal.control(&self.space))?;
        Ok(())
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.owned = true;
        let taken = self.container().take();
        self.settle();
        Ok(taken?)
    }

    fn failed(&mut self, _mode: StartMode) {}
}

#[cfg(test)]
mod tests;
