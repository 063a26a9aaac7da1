//! The one lifecycle of every device, and the set that drives it.
//!
//! ```text
//! cold start        setup(None) ── resume(None)
//! guest reset       park(None) ── setup(None) ── resume(None)
//! old worker        park ── save ─┬─ (retired)
//!                                 └─ failed ── resume          the upgrade did not happen
//! new worker        setup ── rehearse ── load ─┬─ resume       committed
//!                                              └─ failed       it never touches the guest
//! ```
//!
//! Devices are set up, parked, saved and loaded in the order in which they were added; resumed, and told of a failure,
//! in the opposite one. All vCPUs are stopped before `park` and run only after `resume`. A call out of order is an
//! error and reaches no device.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use baton_ipc::StartMode;
use thiserror::Error;

use super::id::DeviceId;
use super::state::SavedSection;
use super::state::StateError;

/// What every device does.
pub trait Device: Send {
    /// Its name in the saved state; the same for its whole life.
    fn id(&self) -> DeviceId;

    /// Puts the device in its reset state. At a start, and again when the guest resets. When `mode` preserves a guest,
    /// nothing that a descriptor stands for is touched, not even read: another worker uses it.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; the worker then gives up its start.
    fn setup(&mut self, mode: StartMode) -> Result<(), DeviceError>;

    /// Stops everything that the device does by itself, and finishes what is in flight: after this it changes neither
    /// guest memory, nor interrupts, nor anything behind a descriptor. Events that come in later are kept.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; `failed` and `resume` follow.
    fn park(&mut self, mode: StartMode) -> Result<(), DeviceError>;

    /// Says all that a later worker has to know. The device is parked and stays as it is. (A rehearsal saves a device
    /// that has only been set up.)
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; `failed` and `resume` follow.
    fn save(&mut self, mode: StartMode) -> Result<SavedSection, DeviceError>;

    /// Takes over what `save` said. `section` is hostile. Still touches nothing outside this process.
    ///
    /// # Errors
    ///
    /// [`DeviceError::State`] for a state that no device has; `failed` follows.
    fn load(&mut self, mode: StartMode, section: &SavedSection) -> Result<(), DeviceError>;

    /// Begins, or goes on. After a load this is where the device first touches the guest and its descriptors, and
    /// repeats interrupts that may have been lost.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]; the device does not work then, and the VM may be lost.
    fn resume(&mut self, mode: StartMode) -> Result<(), DeviceError>;

    /// The transfer ended without this worker handing over or taking over. In the old worker, which had parked: undoes
    /// what `save` did; `resume` follows. In the new one: lets go without touching anything.
    fn failed(&mut self, mode: StartMode);
}

/// Why a device could not do as it was told.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The saved state is refused.
    #[error(transparent)]
    State(#[from] StateError),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Requests did not finish within the time for parking.
    #[error("{0} requests still in flight")]
    Busy(usize),
    /// A device without a size was to have another.
    #[error("this device has no size")]
    Fixed,
    /// What another process does for the device did not end within the time for parking.
    #[error("{0}")]
    Elsewhere(&'static str),
}

/// One call of the lifecycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the calls of `Device`, by their names")]
pub enum Call {
    Setup,
    Park,
    Save,
    Load,
    Resume,
    Failed,
}

/// How far the set is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Devices are being added.
    #[default]
    New,
    /// Set up; nothing has run yet.
    Ready,
    /// The guest may run.
    Running,
    /// Parked, and saved perhaps not.
    Parked,
    /// Parked and saved: handed over unless `failed` is called.
    Saved,
    /// Loaded; nothing has run yet.
    Loaded,
    /// A call failed on the way; only `failed` is possible.
    Broken,
    /// This worker will never run the guest.
    Dead,
}

/// Why the set could not do as it was told.
#[derive(Debug, Error)]
pub enum LifecycleError {
    /// A device could not.
    #[error("{id}: {call:?}: {source}")]
    Device {
        /// Which one.
        id: DeviceId,
        /// What it was told.
        call: Call,
        /// Why not.
        source: DeviceError,
    },
    /// The call is not possible now.
    #[error("{call:?} ({mode:?}) is not possible while {phase:?}")]
    OutOfOrder {
        /// The call.
        call: Call,
        /// Its start mode.
        mode: StartMode,
        /// How far the set is.
        phase: Phase,
    },
    /// Two devices have one name.
    #[error("{0} is there already")]
    Added(DeviceId),
    /// A section for a device that this VM does not have.
    #[error("a saved state for {0}, which this VM does not have")]
    Unknown(DeviceId),
    /// Two sections for one device.
    #[error("a second saved state for {0}")]
    Duplicate(DeviceId),
    /// No section for a device.
    #[error("no saved state for {0}")]
    Missing(DeviceId),
    /// Sections in another order than the devices'.
    #[error("the saved state of {found} where {expected}'s belongs")]
    Reordered {
        /// Whose turn it was.
        expected: DeviceId,
        /// Whose section it is.
        found: DeviceId,
    },
}

/// All devices of a VM.
#[derive(Default)]
pub struct Devices {
    slots: Vec<Slot>,
    phase: Phase,
}

struct Slot {
    id: DeviceId,
    device: Arc<Mutex<dyn Device>>,
    /// Was told to park, and not yet to resume.
    parked: bool,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, dyn Device + 'static> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Devices {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Devices::default()
    }

    /// Adds a device; all are there before `setup`.
    ///
    /// # Errors
    ///
    /// [`LifecycleError::Added`] when its name is taken, [`LifecycleError::OutOfOrder`] after `setup`.
    pub fn add(&mut self, device: Arc<Mutex<dyn Device>>) -> Result<(), LifecycleError> {
        self.expect(Call::Setup, StartMode::None, self.phase == Phase::New)?;
        let id = device.lock().unwrap_or_else(PoisonError::into_inner).id();
        if self.slots.iter().any(|slot| slot.id == id) {
            return Err(LifecycleError::Added(id));
        }
        self.slots.push(Slot {
            id,
            device,
            parked: false,
        });
        Ok(())
    }

    /// Adds a device to a VM that runs or is parked, which joins it in that. Its place is before the first that has a higher
    /// instance: devices that come and go have their PCI slots for that, as in a VM that was made with them.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; the set is as before then.
    pub fn join(&mut self, device: Arc<Mutex<dyn Device>>) -> Result<(), LifecycleError> {
        let parked = self.phase == Phase::Parked;
        let possible = parked || self.phase == Phase::Running;
        self.expect(Call::Setup, StartMode::None, possible)?;
        let id = device.lock().unwrap_or_else(PoisonError::into_inner).id();
        let mut slot = Slot { id, device, parked };
        if self.slots.iter().any(|slot| slot.id == id) {
            return Err(LifecycleError::Added(id));
        }
        let failed = |call| move |source| LifecycleError::Device { id, call, source };
        slot.lock()
            .setup(StartMode::None)
            .map_err(failed(Call::Setup))?;
        if !parked {
            slot.lock()
                .resume(StartMode::None)
                .map_err(failed(Call::Resume))?;
            slot.parked = false;
        }
        let at = self
            .slots
            .iter()
            .position(|other| other.id.instance > id.instance)
            .unwrap_or(self.slots.len());
        self.slots.insert(at, slot);
        Ok(())
    }

    /// Takes a device out of a VM that runs or is parked.
    ///
    /// # Errors
    ///
    /// [`LifecycleError::OutOfOrder`] in any other phase.
    pub fn leave(&mut self, id: DeviceId) -> Result<(), LifecycleError> {
        let possible = matches!(self.phase, Phase::Running | Phase::Parked);
        self.expect(Call::Setup, StartMode::None, possible)?;
        self.slots.retain(|slot| slot.id != id);
        Ok(())
    }

    /// How far the set is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The devices' names, in the order in which their states are saved.
    pub fn ids(&self) -> impl Iterator<Item = DeviceId> + '_ {
        self.slots.iter().map(|slot| slot.id)
    }

    /// Puts all devices in their reset state: at a start, and of a parked VM whose guest resets.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; the set is broken then.
    pub fn setup(&mut self, mode: StartMode) -> Result<(), LifecycleError> {
        let reset = self.phase == Phase::Parked && !mode.preserves_guest();
        self.expect(Call::Setup, mode, self.phase == Phase::New || reset)?;
        self.each(Call::Setup, |device| device.setup(mode))?;
        self.slots.iter_mut().for_each(|slot| slot.parked = false);
        self.phase = Phase::Ready;
        Ok(())
    }

    /// Saves each device and loads it with that, so that a filter which is too tight for either shows before it costs
    /// anything. The devices have been set up and stay so.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; the set is broken then.
    pub fn rehearse(&mut self, mode: StartMode) -> Result<(), LifecycleError> {
        self.expect(Call::Load, mode, self.phase == Phase::Ready)?;
        self.each(Call::Load, |device| {
            let section = device.save(mode)?;
            device.load(mode, &section)
        })
    }

    /// Parks all devices of a running VM whose vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; `failed` and `resume` put the set right again.
    pub fn park(&mut self, mode: StartMode) -> Result<(), LifecycleError> {
        self.expect(Call::Park, mode, self.phase == Phase::Running)?;
        self.phase = Phase::Broken;
        for slot in &mut self.slots {
            slot.parked = true;
            slot.lock()
                .park(mode)
                .map_err(|source| LifecycleError::Device {
                    id: slot.id,
                    call: Call::Park,
                    source,
                })?;
        }
        self.phase = Phase::Parked;
        Ok(())
    }

    /// Saves all devices of a parked VM.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; `failed` and `resume` put the set right again.
    pub fn save(&mut self, mode: StartMode) -> Result<Vec<SavedSection>, LifecycleError> {
        self.expect(Call::Save, mode, self.phase == Phase::Parked)?;
        let mut sections = Vec::with_capacity(self.slots.len());
        self.each(Call::Save, |device| {
            sections.push(device.save(mode)?);
            Ok(())
        })?;
        self.phase = Phase::Saved;
        Ok(sections)
    }

    /// Loads all devices from `sections`: one for each device, in the devices' order. No device is loaded unless the
    /// names are as they should be.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; only `failed` is possible then.
    pub fn load(
        &mut self,
        mode: StartMode,
        sections: &[SavedSection],
    ) -> Result<(), LifecycleError> {
        self.expect(
            Call::Load,
            mode,
            self.phase == Phase::Ready && mode.preserves_guest(),
        )?;
        self.phase = Phase::Broken;
        for (index, section) in sections.iter().enumerate() {
            self.judge(sections, index, section.id)?;
        }
        if let Some(slot) = self.slots.get(sections.len()) {
            return Err(LifecycleError::Missing(slot.id));
        }
        for (slot, section) in self.slots.iter().zip(sections) {
            slot.lock()
                .load(mode, section)
                .map_err(|source| LifecycleError::Device {
                    id: slot.id,
                    call: Call::Load,
                    source,
                })?;
        }
        self.phase = Phase::Loaded;
        Ok(())
    }

    /// Lets all devices begin or go on, the last one first.
    ///
    /// # Errors
    ///
    /// [`LifecycleError`]; the set is broken then, and the VM may be lost.
    pub fn resume(&mut self, mode: StartMode) -> Result<(), LifecycleError> {
        let possible = match self.phase {
            Phase::Ready => !mode.preserves_guest(),
            Phase::Parked | Phase::Loaded => true,
            _ => false,
        };
        self.expect(Call::Resume, mode, possible)?;
        // After a park that failed half-way, those that were never parked are still running.
        let all = self.phase != Phase::Parked;
        self.phase = Phase::Broken;
        for slot in self
            .slots
            .iter_mut()
            .rev()
            .filter(|slot| all || slot.parked)
        {
            slot.lock()
                .resume(mode)
                .map_err(|source| LifecycleError::Device {
                    id: slot.id,
                    call: Call::Resume,
                    source,
                })?;
            slot.parked = false;
        }
        self.phase = Phase::Running;
        Ok(())
    }

    /// The transfer failed or was cancelled. In a worker that has parked (whole or half-way), the devices that did are
    /// told, and `resume` is possible again. A worker that has not yet run the guest never will. A running worker that
    /// has not parked has nothing to undo.
    pub fn failed(&mut self, mode: StartMode) {
        let parked = self.slots.iter().any(|slot| slot.parked);
        match self.phase {
            Phase::New | Phase::Running | Phase::Dead => {}
            _ if parked => {
                self.tell_failed(mode);
                self.phase = Phase::Parked;
            }
            _ => {
                self.slots.iter_mut().for_each(|slot| slot.parked = true);
                self.tell_failed(mode);
                self.phase = Phase::Dead;
            }
        }
    }

    fn tell_failed(&self, mode: StartMode) {
        self.slots
            .iter()
            .rev()
            .filter(|slot| slot.parked)
            .for_each(|slot| slot.lock().failed(mode));
    }

    fn expect(&self, call: Call, mode: StartMode, possible: bool) -> Result<(), LifecycleError> {
        if possible {
            Ok(())
        } else {
            Err(LifecycleError::OutOfOrder {
                call,
                mode,
                phase: self.phase,
            })
        }
    }

    /// Calls every device in order; a failure leaves the set broken.
    fn each(
        &mut self,
        call: Call,
        mut f: impl FnMut(&mut dyn Device) -> Result<(), DeviceError>,
    ) -> Result<(), LifecycleError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Broken);
        for slot in &self.slots {
            f(&mut *slot.lock()).map_err(|source| LifecycleError::Device {
                id: slot.id,
                call,
                source,
            })?;
        }
        self.phase = phase;
        Ok(())
    }

    /// Whether the section at `index`, which says that it is `found`'s, is where it belongs.
    fn judge(
        &self,
        sections: &[SavedSection],
        index: usize,
        found: DeviceId,
    ) -> Result<(), LifecycleError> {
        match self.slots.get(index) {
            Some(slot) if slot.id == found => Ok(()),
            _ if !self.slots.iter().any(|slot| slot.id == found) => {
                Err(LifecycleError::Unknown(found))
            }
            _ if sections
                .iter()
                .take(index)
                .any(|earlier| earlier.id == found) =>
            {
                Err(LifecycleError::Duplicate(found))
            }
            Some(slot) if !sections.iter().any(|section| section.id == slot.id) => {
                Err(LifecycleError::Missing(slot.id))
            }
            Some(slot) => Err(LifecycleError::Reordered {
                expected: slot.id,
                found,
            }),
            None => Err(LifecycleError::Unknown(found)),
        }
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("phase", &self.phase)
            .field(
                "ids",
                &self.slots.iter().map(|slot| slot.id).collect::<Vec<_>>(),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests;
