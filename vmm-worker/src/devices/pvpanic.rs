//! pvpanic: the port by which a guest's kernel says that it has panicked (QEMU's `docs/specs/pvpanic.rst`), found by its
//! ACPI device QEMU0001.
//!
//! ```text
//! +0  read: what can be said here     written: what has happened, one bit of it
//! ```
//!
//! What was said stays until the run loop takes it; between `park` and `resume` nothing is taken, so that it is in the saved
//! state, and whoever runs the guest next acts on it. Each is said on once until the guest is reset or an operator lets it
//! run: a guest that writes without end does not keep others busy.

use std::sync::Arc;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::bus::BusDevice;
use super::id::DeviceId;
use super::id::DeviceKind;
use super::lifecycle::Device;
use super::lifecycle::DeviceError;
use super::signal::Trigger;
use super::state;
use super::state::SavedSection;
use super::state::StateError;

/// Bits of the port (`include/standard-headers/misc/pvpanic.h` of QEMU, `include/uapi/misc/pvpanic.h` of Linux).
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;
const SHUTDOWN: u8 = 1 << 2;
/// All that can be said.
const EVENTS: u8 = PANICKED | CRASH_LOADED | SHUTDOWN;

/// What a guest says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicEvent {
    /// Its kernel has panicked.
    Panicked,
    /// Its kernel has panicked, and its crash kernel takes over.
    CrashLoaded,
    /// It shuts down, and has no other way to.
    Shutdown,
}

/// In the order in which they are looked at: of several bits in one write, the first that is known counts, as in QEMU.
const BY_BIT: [(u8, PanicEvent); 3] = [
    (PANICKED, PanicEvent::Panicked),
    (CRASH_LOADED, PanicEvent::CrashLoaded),
    (SHUTDOWN, PanicEvent::Shutdown),
];

/// The port.
pub struct PvPanic {
    wake: Arc<dyn Trigger>,
    /// Said, and not taken.
    pending: u8,
    /// Said since the guest began or was let run.
    said: u8,
    held: bool,
}

impl PvPanic {
    /// A port, held until `resume`. `wake` tells the run loop that there is something to take.
    #[must_use]
    pub fn new(wake: Arc<dyn Trigger>) -> Self {
        Self {
            wake,
            pending: 0,
            said: 0,
            held: true,
        }
    }

    /// Takes what was said, unless the VM is parked.
    pub fn take(&mut self) -> Option<PanicEvent> {
        if self.held {
            return None;
        }
        let (bit, event) = BY_BIT
            .into_iter()
            .find(|(bit, _)| self.pending & bit != 0)?;
        self.pending &= !bit;
        if self.pending != 0 {
            self.wake.trigger();
        }
        Some(event)
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = EVENTS;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let byte = data.first().copied().unwrap_or_default();
        let Some((bit, _)) = BY_BIT.into_iter().find(|(bit, _)| byte & bit != 0) else {
            return;
        };
        if self.said & bit == 0 {
            self.said |= bit;
            self.pending |= bit;
            if !self.held {
                self.wake.trigger();
            }
        }
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedPvPanic {
    pending: u8,
    said: u8,
}

impl Device for PvPanic {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::PVPANIC, 0)
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        (self.pending, self.said, self.held) = (0, 0, true);
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.held = true;
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let Self {
            wake: _,
            pending,
            said,
            held: _,
        } = self;
        let saved = SavedPvPanic {
            pending: *pending,
            said: *said,
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedPvPanic { pending, said } = state::decode(section, VERSION)?;
        if said & !EVENTS != 0 {
            return Err(StateError::field("said", said, "has bits that the port does not").into());
        }
        if pending & !said != 0 {
            return Err(StateError::field("pending", pending, "not among what was said").into());
        }
        (self.pending, self.said) = (pending, said);
        Ok(())
    }

    fn resume(&mut self, mode: StartMode) -> Result<(), DeviceError> {
        if !mode.preserves_guest() {
            // What waits to be taken was said all the same.
            self.said = self.pending;
        }
        self.held = false;
        if self.pending != 0 {
            self.wake.trigger();
        }
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PvPanic(pending {:#x})", self.pending)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering;

    use super::*;

    const CPR: StartMode = StartMode::CprTransfer;

    fn device() -> (PvPanic, Arc<AtomicUsize>) {
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&woken);
        let mut device = PvPanic::new(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        device.resume(StartMode::None).unwrap();
        (device, woken)
    }

    #[test]
    fn the_port_says_what_it_takes_and_takes_it_once() {
        let (mut device, woken) = device();
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [0b111]);
        for (written, event) in [
            (0b1000_0000, None),
            (0, None),
            (0b001, Some(PanicEvent::Panicked)),
            (0b010, Some(PanicEvent::CrashLoaded)),
            (0b101, None),
            (0b110, None),
            (0b100, Some(PanicEvent::Shutdown)),
        ] {
            device.write(0, &[written]);
            assert_eq!(device.take(), event, "{written:#b}");
        }
        assert_eq!(woken.load(Ordering::SeqCst), 3, "once for each");
        // An operator lets it run: it may say so again.
        device.park(StartMode::None).unwrap();
        device.resume(StartMode::None).unwrap();
        device.write(0, &[PANICKED]);
        assert_eq!(device.take(), Some(PanicEvent::Panicked));
    }

    #[test]
    fn what_nobody_took_before_an_upgrade_is_taken_after_it() {
        let (mut old, _) = device();
        old.write(0, &[CRASH_LOADED]);
        assert_eq!(old.take(), Some(PanicEvent::CrashLoaded));
        old.write(0, &[PANICKED]);
        old.park(CPR).unwrap();
        assert_eq!(old.take(), None);
        let section = old.save(CPR).unwrap();
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&woken);
        let mut new = PvPanic::new(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        new.load(CPR, &section).unwrap();
        assert_eq!(new.save(CPR).unwrap(), section);
        assert_eq!(new.take(), None, "not before the commit");
        new.resume(CPR).unwrap();
        assert_eq!(woken.load(Ordering::SeqCst), 1);
        assert_eq!(new.take(), Some(PanicEvent::Panicked));
        new.write(0, &[PANICKED | CRASH_LOADED]);
        new.write(0, &[CRASH_LOADED]);
        assert_eq!(new.take(), None, "said before the upgrade");
        new.setup(StartMode::None).unwrap();
        new.resume(StartMode::None).unwrap();
        new.write(0, &[CRASH_LOADED]);
        assert_eq!(new.take(), Some(PanicEvent::CrashLoaded));
    }

    #[test]
    fn every_wrong_field_is_named() {
        let (mut device, _) = device();
        let id = device.id();
        let mut refused = |pending, said, field: &str| {
            let saved = SavedPvPanic { pending, said };
            let section = state::encode(id, VERSION, &saved).unwrap();
            let error = device.load(CPR, &section).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        };
        refused(0, 0b1000, "said");
        refused(0b1000, 0b1000, "said");
        refused(0b010, 0b101, "pending");
    }
}
