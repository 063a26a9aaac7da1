//! What the control thread does to its guest: start, commit, pause, reset, and what the guest does to itself.

use std::sync::PoisonError;
use std::time::Duration;

use baton_ipc::StartMode;
use baton_ipc::state_stream::StateStream;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::PanicAction;
use baton_ipc::worker::Report;

use crate::boot::RamContent;
use crate::control::EXIT_FAILED;
use crate::control::Exit;
use crate::control::Phase;
use crate::control::Said;
use crate::control::Worker;
use crate::devices::lifecycle;
use crate::devices::power::PowerEvent;
use crate::devices::pvpanic::PanicEvent;
use crate::diagnostics::log;
use crate::fail_point::fail_point;
use crate::gap::Gap;
use crate::transfer::incoming;
use crate::vcpu::Command;
use crate::vcpu::Purpose;

/// How long vCPUs may take to stop: only a host that runs a thread not at all for so long is given up on. In a pause the
/// broker's deadline, which is far shorter, is the one that counts: its order to roll back is obeyed as soon as the vCPUs
/// stand still, and before that there is nothing to let run.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(2);

impl Worker {
    /// A cold start: writes the kernel into blank RAM and runs it.
    pub(crate) fn start(&mut self) -> Result<(), Exit> {
        if let Err(reason) = self.enter_kernel(RamContent::Blank) {
            self.fail("start", reason);
            return Err(Exit(EXIT_FAILED));
        }
        if let Err(error) = self.machinery.platform.devices.resume(StartMode::None) {
            self.fail("start", error.to_string());
            return Err(Exit(EXIT_FAILED));
        }
        if !matches!(self.say_running(), Said::Heard) {
            return Err(Exit(EXIT_FAILED));
        }
        self.machinery.vcpus.release(false);
        self.phase = Phase::Running;
        self.first_run_due = true;
        Ok(())
    }

    fn enter_kernel(&mut self, ram: RamContent) -> Result<(), String> {
        let loaded = self
            .machinery
            .load_kernel(ram)
            .map_err(|error| error.to_string())?;
        self.machinery
            .vcpus
            .command_one(0, Command::Enter(loaded.entry))
            .map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Takes over a guest whose state is here whole.
    pub(crate) fn load(&mut self, stream: StateStream) -> Result<(), Exit> {
        match incoming::load(&mut self.machinery, stream, Gap::Pause) {
            Ok(digest) => {
                self.phase = Phase::Loaded;
                // What differs from the preview works as it is, and is arranged once the guest runs.
                let changed = self.machinery.platform.pci.changed();
                self.report(Report::Loaded { digest, changed });
                Ok(())
            }
            Err(error) => self.give_up("load", &error),
        }
    }

    /// Runs the guest that was loaded, or holds it `paused`.
    ///
    /// Nothing that can fail comes between "running" and the vCPUs: the devices, which keep until then what the guest
    /// does to them, go on after.
    pub(crate) fn commit(&mut self, paused: bool) -> Result<(), Exit> {
        let lie = match fail_point!(Commit) {
            Ok(lie) => lie,
            Err(error) => return self.give_up("commit", &error),
        };
        match self.say_running() {
            // A broker that died after it had sent "commit" had put "ceded" into the old worker's queue before: that one
            // never resumes, so this one is the VM.
            Said::Heard | Said::BrokerGone => {}
            Said::No => return Err(Exit(EXIT_FAILED)),
        }
        if lie || fail_point!(Running).is_err() {
            // Claimed to run, and does not.
            self.phase = Phase::Off;
            return Ok(());
        }
        if paused {
            self.phase = Phase::Paused;
        } else {
            self.machinery.vcpus.release(true);
            self.phase = Phase::Running;
            self.first_run_due = true;
        }
        if let Some(vsock) = &self.machinery.vsock {
            vsock.release();
        }
        let devices = &mut self.machinery.platform.devices;
        let mut begun = devices.resume(StartMode::CprTransfer);
        if paused && begun.is_ok() {
            // As after an operator's pause; what was in flight when the state was saved is finished by that.
            begun = devices.park(StartMode::None);
        }
        if let Err(error) = begun {
            self.fail("run", error.to_string());
        }
        Ok(())
    }

    /// Stops the guest at the operator's wish.
    pub(crate) fn pause(&mut self) {
        match self.stop() {
            Ok(None) => {
                self.phase = Phase::Paused;
                self.report(Report::Paused);
            }
            Ok(Some(reason)) => self.end(GuestEvent::Stuck(reason)),
            Err(reason) => {
                // Some vCPUs stand still and some are on their way: what a resume puts right.
                self.phase = Phase::Paused;
                self.fail("pause", reason);
            }
        }
    }

    /// Lets a guest run again that the operator stopped.
    pub(crate) fn resume(&mut self) {
        match self.stop() {
            Ok(_) => {
                self.go_on();
                self.report(Report::Resumed);
            }
            Err(reason) => self.fail("resume", reason),
        }
    }

    fn go_on(&mut self) {
        if let Err(error) = self.machinery.platform.devices.resume(StartMode::None) {
            self.fail("resume", error.to_string());
        }
        self.machinery.vcpus.release(true);
        self.phase = Phase::Running;
    }

    /// Stops all vCPUs and parks the devices. Why the guest cannot go on, if it cannot.
    fn stop(&mut self) -> Result<Option<String>, String> {
        let stopped = self
            .machinery
            .vcpus
            .stop(STOP_TIMEOUT)
            .map_err(|error| error.to_string())?;
        if self.machinery.platform.devices.phase() == lifecycle::Phase::Running {
            self.machinery
                .platform
                .devices
                .park(StartMode::None)
                .map_err(|error| error.to_string())?;
        }
        Ok(stopped.stuck)
    }

    pub(crate) fn press_power_button(&mut self) {
        self.machinery
            .platform
            .acpi_pm
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .press_power_button();
    }

    /// What the guest did to itself.
    pub(crate) fn power_event(&mut self, event: PowerEvent) {
        match event {
            PowerEvent::Reset => self.reset(GuestEvent::Reset),
            PowerEvent::TripleFault => self.reset(GuestEvent::TripleFault),
            PowerEvent::Shutdown => self.shut_down(GuestEvent::Shutdown),
        }
    }

    /// Does what follows if the guest runs here and says that it has panicked.
    pub(crate) fn look_after_panic(&mut self) {
        while let Phase::Running = self.phase {
            let pvpanic = &self.machinery.platform.pvpanic;
            let event = pvpanic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            match event {
                None => return,
                Some(PanicEvent::CrashLoaded) => {
                    self.report(Report::Guest(GuestEvent::CrashLoaded));
                }
                Some(PanicEvent::Shutdown) => self.shut_down(GuestEvent::PvShutdown),
                Some(PanicEvent::Panicked) => match self.machinery.on_panic {
                    PanicAction::Run => self.report(Report::Guest(GuestEvent::Panicked)),
                    PanicAction::PowerOff => self.shut_down(GuestEvent::Panicked),
                    PanicAction::Pause => self.halt_panicked(),
                },
            }
        }
    }

    /// As if an operator had paused it, who may look into it or let it go on.
    fn halt_panicked(&mut self) {
        match self.stop() {
            Ok(None) => {
                self.phase = Phase::Paused;
                self.report(Report::Guest(GuestEvent::Panicked));
            }
            Ok(Some(reason)) => self.end(GuestEvent::Stuck(reason)),
            Err(reason) => {
                // As after a pause: what a resume puts right.
                self.phase = Phase::Paused;
                self.report(Report::Guest(GuestEvent::Panicked));
                self.fail("pause", reason);
            }
        }
    }

    fn shut_down(&mut self, event: GuestEvent) {
        if let Err(reason) = self.machinery.vcpus.stop(STOP_TIMEOUT) {
            log!("after a shutdown: {reason}");
        }
        self.end(event);
    }

    /// A vCPU cannot go on, so the guest cannot.
    pub(crate) fn stuck(&mut self, reason: String) {
        if let Err(error) = self.machinery.vcpus.stop(STOP_TIMEOUT) {
            log!("after a vCPU got stuck: {error}");
        }
        self.end(GuestEvent::Stuck(reason));
    }

    /// The guest has ended. Its last output still goes out.
    fn end(&mut self, event: GuestEvent) {
        self.phase = Phase::Off;
        self.report(Report::Guest(event));
    }

    /// Resets the machine, and lets it run on if it ran.
    pub(crate) fn reset(&mut self, event: GuestEvent) {
        let paused = matches!(self.phase, Phase::Paused);
        match self.reset_machine() {
            Ok(()) => {
                self.report(Report::Guest(event));
                if paused {
                    self.stand_still();
                } else {
                    self.go_on();
                }
            }
            Err(reason) => self.end(GuestEvent::Stuck(format!("the reset failed: {reason}"))),
        }
    }

    /// Parks devices that were set up anew, as an operator's pause leaves them.
    fn stand_still(&mut self) {
        let devices = &mut self.machinery.platform.devices;
        let begun = devices.resume(StartMode::None);
        if let Err(error) = begun.and_then(|()| devices.park(StartMode::None)) {
            self.fail("reset", error.to_string());
        }
    }

    fn reset_machine(&mut self) -> Result<(), String> {
        self.stop()?;
        self.machinery
            .platform
            .devices
            .setup(StartMode::None)
            .map_err(|error| error.to_string())?;
        let vcpus = self.reset.vcpus.clone();
        self.machinery
            .vcpus
            .load(vcpus, Purpose::Reset)
            .map_err(|error| error.to_string())?;
        self.machinery.vcpus.unstick();
        self.reset
            .vm
            .load(&self.machinery.vm, Purpose::Reset)
            .map_err(|error| error.to_string())?;
        self.enter_kernel(RamContent::Used)
    }
}
