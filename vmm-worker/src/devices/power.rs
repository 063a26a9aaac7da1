//! Power events that the guest raises, kept until the run loop can act on them.
//!
//! The first event stands until it is taken: a guest that shuts down and is then slow to stop does not turn into one
//! that resets. Between `park` and `resume` nothing can be taken, so an event of a guest that is being handed over is
//! in the saved state, and whoever runs the guest next acts on it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use baton_ipc::StartMode;
use serde::Deserialize;
use serde::Serialize;

use super::id::DeviceId;
use super::id::DeviceKind;
use super::lifecycle::Device;
use super::lifecycle::DeviceError;
use super::signal::Trigger;
use super::state;
use super::state::SavedSection;
use super::state::StateError;

/// What a guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// It asked for a reset (i8042, ACPI reset register).
    Reset,
    /// It shut down (ACPI S5).
    Shutdown,
    /// It crashed: a triple fault (KVM_EXIT_SHUTDOWN).
    TripleFault,
}

const NONE: u8 = 0;

impl PowerEvent {
    /// Its number in the latch and in the saved state; 0 is no event.
    fn code(self) -> u8 {
        match self {
            PowerEvent::Reset => 1,
            PowerEvent::Shutdown => 2,
            PowerEvent::TripleFault => 3,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [
            PowerEvent::Reset,
            PowerEvent::Shutdown,
            PowerEvent::TripleFault,
        ]
        .into_iter()
        .find(|event| event.code() == code)
    }
}

/// Where devices and vCPU threads raise events, and the run loop takes them. No locks.
pub struct PowerLatch {
    pending: AtomicU8,
    held: AtomicBool,
    wake: Arc<dyn Trigger>,
}

impl PowerLatch {
    /// A latch without an event, held until `resume`. `wake` tells the run loop that there is one to take.
    #[must_use]
    pub fn new(wake: Arc<dyn Trigger>) -> Arc<Self> {
        Arc::new(PowerLatch {
            pending: AtomicU8::new(NONE),
            held: AtomicBool::new(true),
            wake,
        })
    }

    /// Raises an event. One that is pending already stands.
    pub fn raise(&self, event: PowerEvent) {
        let first = self
            .pending
            .compare_exchange(NONE, event.code(), Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        if first && !self.held.load(Ordering::SeqCst) {
            self.wake.trigger();
        }
    }

    /// Takes the event, if there is one and the VM is not parked.
    pub fn take(&self) -> Option<PowerEvent> {
        if self.held.load(Ordering::SeqCst) {
            return None;
        }
        PowerEvent::from_code(self.pending.swap(NONE, Ordering::SeqCst))
    }

    /// The event that is pending, parked or not.
    pub fn pending(&self) -> Option<PowerEvent> {
        PowerEvent::from_code(self.pending.load(Ordering::SeqCst))
    }

    fn hold(&self, held: bool) {
        self.held.store(held, Ordering::SeqCst);
        if !held && self.pending().is_some() {
            self.wake.trigger();
        }
    }
}

impl std::fmt::Debug for PowerLatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PowerLatch({:?})", self.pending())
    }
}

const VERSION: u16 = 1;

/// Version 1.
#[derive(Debug, Serialize, Deserialize)]
struct SavedPower {
    /// 0 none, 1 reset, 2 shutdown, 3 triple fault.
    pending: u8,
}

/// The latch's place among the devices.
#[derive(Debug)]
pub struct Power {
    latch: Arc<PowerLatch>,
}

impl Power {
    /// The device of `latch`.
    #[must_use]
    pub fn new(latch: Arc<PowerLatch>) -> Self {
        Power { latch }
    }
}

impl Device for Power {
    fn id(&self) -> DeviceId {
        DeviceId::new(DeviceKind::POWER, 0)
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.latch.held.store(true, Ordering::SeqCst);
        self.latch.pending.store(NONE, Ordering::SeqCst);
        Ok(())
    }

    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.latch.hold(true);
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        let PowerLatch {
            pending,
            held: _,
            wake: _,
        } = &*self.latch;
        let saved = SavedPower {
            pending: pending.load(Ordering::SeqCst),
        };
        Ok(state::encode(self.id(), VERSION, &saved)?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        let SavedPower { pending } = state::decode(section, VERSION)?;
        if pending != NONE && PowerEvent::from_code(pending).is_none() {
            return Err(StateError::field("pending", pending, "not 0 to 3").into());
        }
        self.latch.pending.store(pending, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.latch.hold(false);
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn latch() -> (Arc<PowerLatch>, Arc<AtomicUsize>) {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        (
            PowerLatch::new(Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            })),
            woken,
        )
    }

    #[test]
    fn the_first_event_stands_until_taken() {
        let (latch, woken) = latch();
        Power::new(Arc::clone(&latch))
            .resume(StartMode::None)
            .unwrap();
        assert_eq!(latch.take(), None);
        latch.raise(PowerEvent::Shutdown);
        latch.raise(PowerEvent::Reset);
        assert_eq!(
            (latch.take(), latch.take()),
            (Some(PowerEvent::Shutdown), None)
        );
        assert_eq!(woken.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_event_while_parked_goes_to_whoever_runs_next() {
        for event in [
            PowerEvent::Reset,
            PowerEvent::Shutdown,
            PowerEvent::TripleFault,
        ] {
            let mode = StartMode::CprTransfer;
            let (old, old_woken) = latch();
            let mut device = Power::new(Arc::clone(&old));
            device.resume(StartMode::None).unwrap();
            device.park(mode).unwrap();
            old.raise(event);
            assert_eq!((old.take(), old_woken.load(Ordering::SeqCst)), (None, 0));
            let section = device.save(mode).unwrap();

            let (new, new_woken) = latch();
            let mut next = Power::new(Arc::clone(&new));
            next.setup(mode).unwrap();
            next.load(mode, &section).unwrap();
            assert_eq!(
                (new.take(), new_woken.load(Ordering::SeqCst)),
                (None, 0),
                "nothing before the commit"
            );
            next.resume(mode).unwrap();
            assert_eq!(
                (new.take(), new_woken.load(Ordering::SeqCst)),
                (Some(event), 1)
            );

            device.failed(mode);
            device.resume(mode).unwrap();
            assert_eq!(
                old.take(),
                Some(event),
                "after a rollback the old worker acts on it"
            );
        }
    }

    #[test]
    fn a_reset_forgets_what_the_old_guest_raised() {
        let (latch, _) = latch();
        let mut device = Power::new(Arc::clone(&latch));
        latch.raise(PowerEvent::Shutdown);
        device.setup(StartMode::None).unwrap();
        device.resume(StartMode::None).unwrap();
        assert_eq!(latch.take(), None);
    }

    #[test]
    fn no_other_event_is_accepted() {
        let (latch, _) = latch();
        let mut device = Power::new(latch);
        let section = state::encode(device.id(), VERSION, &SavedPower { pending: 4 }).unwrap();
        let error = device.load(StartMode::CprTransfer, &section).unwrap_err();
        assert!(matches!(
            error,
            DeviceError::State(StateError::Field {
                name: "pending",
                value: 4,
                ..
            })
        ));
    }
}
