//! The segment: configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2), ECAM (PCI Express 3.0, 7.2.2), and the window
//! in which BARs answer. It has bus 0 alone, each device one function.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::Function;
use super::config_space::ConfigSpace;
use super::config_space::Identity;
use crate::devices::BusDevice;
use crate::devices::Device;
use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::lifecycle::DeviceError;
use crate::devices::state;
use crate::devices::state::SavedSection;
use crate::devices::state::StateError;

/// Device numbers have 5 bits.
const SLOTS: usize = 32;
/// Configuration address: a configuration access, not one to ports.
const ENABLE: u32 = 1 << 31;
/// Bits of the configuration address that keep what is written: bus, device, function, register.
const ADDRESS_BITS: u32 = ENABLE | 0x00FF_FFFC;
/// Offset of the data port from the address port.
const DATA: u64 = 4;

/// The host bridge: the generic one of Red Hat's range, as QEMU uses for machines without a chipset
/// (QEMU, `docs/specs/pci-ids.rst`).
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// A function, shared with whoever else looks after it.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// The bus and what is on it.
pub struct Segment {
    host_bridge: ConfigSpace,
    /// By device number; 0 is the host bridge.
    functions: [Option<SharedFunction>; SLOTS],
    /// What was last written to the address port.
    address: u32,
    /// Where the memory window begins, which [`Window::Memory`]'s offsets count from.
    window: u64,
}

impl Segment {
    /// A bus with a host bridge alone, whose memory window begins at `window`.
    #[must_use]
    pub fn new(window: u64) -> Self {
        Self {
            host_bridge: ConfigSpace::new(HOST_BRIDGE),
            functions: Default::default(),
            address: 0,
            window,
        }
    }

    /// Plugs a function in; `false` when there is one, or no such slot.
    pub fn plug(&mut self, slot: u8, function: SharedFunction) -> bool {
        match self.functions.get_mut(usize::from(slot)) {
            Some(empty @ None) if slot != 0 => {
                *empty = Some(function);
                true
            }
            _ => false,
        }
    }

    /// Takes a function away; whether there was one.
    pub fn unplug(&mut self, slot: u8) -> bool {
        let function = self.functions.get_mut(usize::from(slot));
        function.and_then(Option::take).is_some()
    }

    /// A configuration read; what is not there reads as all ones.
    fn config_read(&mut self, slot: usize, offset: u64, data: &mut [u8]) {
        let Some(offset) = within(offset, data.len()) else {
            // PCI Express's extension: no capability there.
            data.fill(0);
            return;
        };
        if slot == 0 {
            self.host_bridge.read(offset, data);
        } else if let Some(mut function) = self.function(slot) {
            function.config_read(offset, data);
        }
    }

    fn config_write(&mut self, slot: usize, offset: u64, data: &[u8]) {
        let Some(offset) = within(offset, data.len()) else {
            return;
        };
        if slot == 0 {
            self.host_bridge.write(offset, data);
        } else if let Some(mut function) = self.function(slot) {
            function.config_write(offset, data);
        }
    }

    fn function(&self, slot: usize) -> Option<MutexGuard<'_, dyn Function + 'static>> {
        let function = self.functions.get(slot)?.as_ref()?;
        Some(function.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ports_read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (DATA.., _) => {
                if let Some((slot, register)) = self.addressed(offset - DATA) {
                    self.config_read(slot, register, data);
                }
            }
            _ => {}
        }
    }

    fn ports_write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[b0, b1, b2, b3]) => {
                self.address = u32::from_le_bytes([b0, b1, b2, b3]) & ADDRESS_BITS;
            }
            (DATA.., _) => {
                if let Some((slot, register)) = self.addressed(offset - DATA) {
                    self.config_write(slot, register, data);
                }
            }
            _ => {}
        }
    }

    /// What the address port selects: slot and register, if it is on this bus.
    fn addressed(&self, byte: u64) -> Option<(usize, u64)> {
        let [register, devfn, bus, flags] = self.address.to_le_bytes();
        let here = flags & 0x80 != 0 && bus == 0 && devfn & 7 == 0;
        here.then(|| (usize::from(devfn >> 3), u64::from(register) + byte))
    }

    /// The function that has these bytes, and where in it they begin.
    fn at(&self, offset: u64, length: usize) -> Option<(&SharedFunction, u64)> {
        let start = self.window.checked_add(offset)?;
        let bytes = start..start.checked_add(length as u64)?;
        self.functions.iter().flatten().find_map(|function| {
            let decoded = function
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .decode(&bytes)?;
            Some((function, decoded))
        })
    }
}

fn within(offset: u64, length: usize) -> Option<u8> {
    let start = u8::try_from(offset).ok()?;
    (usize::from(start) + length <= super::config_space::SIZE).then_some(start)
}

/// One of the three ranges by which a guest reaches the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Ports 0xCF8 to 0xCFF.
    Ports,
    /// Enhanced configuration access: 4 KiB a function.
    Ecam,
    /// Memory BARs.
    Memory,
}

/// One window of a shared segment, as a device on a bus.
pub struct WindowDevice {
    /// Which.
    pub window: Window,
    /// Of what.
    pub segment: Arc<Mutex<Segment>>,
}

impl WindowDevice {
    fn segment(&self) -> MutexGuard<'_, Segment> {
        self.segment.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slot and register of an offset into ECAM, on bus 0, function 0.
fn ecam(offset: u64) -> Option<(usize, u64)> {
    let (bus, devfn) = (offset >> 20, offset >> 12 & 0xFF);
    (bus == 0 && devfn & 7 == 0).then(|| (usize::try_from(devfn >> 3).unwrap_or(0), offset & 0xFFF))
}

impl BusDevice for WindowDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut segment = self.segment();
        match self.window {
            Window::Ports => segment.ports_read(offset, data),
            Window::Ecam => {
                if let Some((slot, register)) = ecam(offset) {
                    let there = slot == 0 || segment.function(slot).is_some();
                    if there && data.len() <= 4 {
                        segment.config_read(slot, register, data);
                    }
                }
            }
            Window::Memory => {
                if let Some((function, offset)) = segment.at(offset, data.len()) {
                    function
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .bar_read(offset, data);
                }
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut segment = self.segment();
        match self.window {
            Window::Ports => segment.ports_write(offset, data),
            Window::Ecam => {
                if let Some((slot, register)) = ecam(offset).filter(|_| data.len() <= 4) {
                    segment.config_write(slot, register, data);
                }
            }
            Window::Memory => {
                if let Some((function, offset)) = segment.at(offset, data.len()) {
                    function
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .bar_write(offset, data);
                }
            }
        }
    }
}

/// The segment's own part of a VM's lifecycle: its address port and its host bridge.
pub struct SegmentDevice(pub Arc<Mutex<Segment>>);

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedSegment {
    address: u32,
    host_bridge: super::config_space::SavedConfigSpace,
}

impl SegmentDevice {
    fn segment(&self) -> MutexGuard<'_, Segment> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for SegmentDevice {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::PCI, 0)
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        let mut segment = self.segment();
        segment.address = 0;
        segment.host_bridge = ConfigSpace::new(HOST_BRIDGE);
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let segment = self.segment();
        let Segment {
            host_bridge,
            functions: _,
            address,
            window: _,
        } = &*segment;
        let saved = SavedSegment {
            address: *address,
            host_bridge: host_bridge.save(),
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedSegment {
            address,
            host_bridge,
        } = state::decode(section, VERSION)?;
        if address & !ADDRESS_BITS != 0 {
            return Err(StateError::field(
                "address",
                address,
                "has bits that the address port does not",
            )
            .into());
        }
        let mut segment = self.segment();
        segment.host_bridge.load(host_bridge)?;
        segment.address = address;
        Ok(())
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

#[cfg(test)]
mod tests;
