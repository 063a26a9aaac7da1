//! Devices that come and go, as ACPI sees them: registers by which a guest learns which slots have got a device and which are
//! to lose theirs, and lets one go (those of QEMU's `docs/specs/acpi_pci_hotplug.rst`), with the general-purpose event that
//! says that there is something to learn (ACPI 6.5, 4.8.4.1).
//!
//! ```text
//! +0x00 slots that have got a device, until read     +0x0C slots whose devices can go
//! +0x04 slots that are to lose theirs                +0x10 GPE0 status (write 1 to clear)
//! +0x08 written: lets these devices go               +0x11 GPE0 enable
//! ```
//!
//! A device that is let go is off the bus at once. Its threads and descriptors are for the control thread to end, when the
//! broker says so.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::segment::Segment;
use crate::devices::BusDevice;
use crate::devices::Device;
use crate::devices::DeviceId;
use crate::devices::DeviceKind;
use crate::devices::IrqLine;
use crate::devices::Trigger;
use crate::devices::lifecycle::DeviceError;
use crate::devices::state;
use crate::devices::state::SavedSection;
use crate::devices::state::StateError;

const ADDED: u64 = 0x00;
const LEAVING: u64 = 0x04;
/// Offset of the register by which a guest lets devices go.
pub const EJECT: u64 = 0x08;
const REMOVABLE: u64 = 0x0C;
/// Offset of the general-purpose event block: a byte of status, a byte of enable.
pub const GPE0: u16 = 0x10;
const GPE0_STATUS: u64 = 0x10;
const GPE0_ENABLE: u64 = 0x11;
/// The event's number, as in QEMU: its method is `\_GPE._E01`.
const EVENT: u8 = 1 << 1;

/// The registers.
pub struct Hotplug {
    segment: Arc<Mutex<Segment>>,
    /// Slots whose devices can go: one bit each.
    removable: u32,
    sci: Arc<dyn IrqLine>,
    wake: Arc<dyn Trigger>,
    added: u32,
    leaving: u32,
    /// Let go, and still to be ended by the control thread.
    gone: u32,
    /// Those of them that it does not know of.
    unsaid: u32,
    status: u8,
    enable: u8,
    /// Parked: the line keeps its level.
    parked: bool,
}

fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

impl Hotplug {
    /// Registers of the slots `removable` on this segment, which drive `sci`; `wake` has the control thread ask for
    /// [`Hotplug::take_gone`].
    #[must_use]
    pub fn new(
        segment: Arc<Mutex<Segment>>,
        removable: u32,
        sci: Arc<dyn IrqLine>,
        wake: Arc<dyn Trigger>,
    ) -> Self {
        Self {
            segment,
            removable,
            sci,
            wake,
            added: 0,
            leaving: 0,
            gone: 0,
            unsaid: 0,
            status: 0,
            enable: 0,
            parked: true,
        }
    }

    /// Whether devices come to this slot, and go.
    #[must_use]
    pub fn is_removable(&self, slot: u8) -> bool {
        self.removable & bit(slot) != 0
    }

    /// Tells the guest that this slot has got a device.
    pub fn announce(&mut self, slot: u8) {
        self.added |= bit(slot) & self.removable;
        self.event();
    }

    /// Asks the guest to let the device of this slot go.
    pub fn ask_back(&mut self, slot: u8) {
        self.leaving |= bit(slot) & self.removable & !self.gone;
        self.event();
    }

    /// Slots whose devices the guest has let go since the last call, and all of them after a [`Device::resume`].
    pub fn take_gone(&mut self) -> Vec<u8> {
        let unsaid = std::mem::take(&mut self.unsaid);
        (0..32).filter(|slot| unsaid & bit(*slot) != 0).collect()
    }

    /// Whether the guest has let the device of this slot go, and it is still to be ended.
    #[must_use]
    pub fn is_gone(&self, slot: u8) -> bool {
        self.gone & bit(slot) != 0
    }

    /// The device of this slot is ended: another one may come.
    pub fn ended(&mut self, slot: u8) {
        let others = !bit(slot);
        self.gone &= others;
        self.unsaid &= others;
        self.added &= others;
        self.leaving &= others;
    }

    fn event(&mut self) {
        self.status |= EVENT;
        self.drive();
    }

    fn drive(&self) {
        if !self.parked {
            self.sci.set(self.status & self.enable != 0);
        }
    }

    /// Takes devices off the bus, which the control thread is to hear of.
    fn eject(&mut self, slots: u32) {
        self.unsaid |= self.unplug(slots);
        if self.unsaid != 0 {
            self.wake.trigger();
        }
    }

    /// Takes devices off the bus; which there were.
    fn unplug(&mut self, slots: u32) -> u32 {
        let mut unplugged = 0;
        let mut segment = self.segment.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in 0..32 {
            let bit = bit(slot);
            if slots & self.removable & bit != 0 && segment.unplug(slot) {
                unplugged |= bit;
            }
        }
        self.gone |= unplugged;
        self.added &= !unplugged;
        self.leaving &= !unplugged;
        unplugged
    }
}

impl BusDevice for Hotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (ADDED, 4) => std::mem::take(&mut self.added),
            (LEAVING, 4) => self.leaving,
            (EJECT, 4) => 0,
            (REMOVABLE, 4) => self.removable,
            (GPE0_STATUS, 1) => self.status.into(),
            (GPE0_ENABLE, 1) => self.enable.into(),
            _ => return,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (EJECT, &[b0, b1, b2, b3]) => self.eject(u32::from_le_bytes([b0, b1, b2, b3])),
            (GPE0_STATUS, &[value]) => {
                self.status &= !value;
                self.drive();
            }
            (GPE0_ENABLE, &[value]) => {
                self.enable = value & EVENT;
                self.drive();
            }
            _ => {}
        }
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedHotplug {
    added: u32,
    leaving: u32,
    gone: u32,
    status: u8,
    enable: u8,
}

impl Device for Hotplug {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::HOTPLUG, 0)
    }

    /// A reset takes away what the guest was asked to let go: whoever boots next does not find it.
    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.eject(self.leaving);
        (self.added, self.leaving) = (0, 0);
        (self.status, self.enable, self.parked) = (0, 0, true);
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.parked = true;
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let Self {
            segment: _,
            removable: _,
            sci: _,
            wake: _,
            added,
            leaving,
            gone,
            // All of them are said again.
            unsaid: _,
            status,
            enable,
            parked: _,
        } = self;
        let saved = SavedHotplug {
            added: *added,
            leaving: *leaving,
            gone: *gone,
            status: *status,
            enable: *enable,
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedHotplug {
            added,
            leaving,
            gone,
            status,
            enable,
        } = state::decode(section, VERSION)?;
        for (name, slots) in [("added", added), ("leaving", leaving), ("gone", gone)] {
            if slots & !self.removable != 0 {
                return Err(StateError::field(name, slots, "has slots that keep theirs").into());
            }
        }
        for (name, bits) in [("status", status), ("enable", enable)] {
            if bits & !EVENT != 0 {
                return Err(
                    StateError::field(name, bits, "has bits that the register does not").into(),
                );
            }
        }
        // Nobody hears of it before the guest is this worker's.
        self.gone = 0;
        self.unplug(gone);
        if self.gone != gone {
            return Err(StateError::field("gone", gone, "has slots without a device").into());
        }
        (self.added, self.leaving) = (added, leaving);
        (self.status, self.enable) = (status, enable);
        Ok(())
    }

    /// The irqchip's saved state has no memory of who held a line up, so the level is driven anew; and whoever was told last
    /// of a device that is gone may not be there any more.
    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.parked = false;
        self.drive();
        self.unsaid = self.gone;
        if self.unsaid != 0 {
            self.wake.trigger();
        }
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for Hotplug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Hotplug(added {:#x}, leaving {:#x}, gone {:#x})",
            self.added, self.leaving, self.gone
        )
    }
}

#[cfg(test)]
mod tests;
