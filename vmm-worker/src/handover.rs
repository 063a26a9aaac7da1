//! The old side of the pause: park, save, stream; and back, when the upgrade does not happen.

use baton_ipc::StartMode;
use baton_ipc::StateDigest;
use baton_ipc::worker::Report;

use crate::clock;
use crate::control::Phase;
use crate::control::Worker;
use crate::devices::lifecycle;
use crate::fail_point::fail_point;
use crate::guest::STOP_TIMEOUT;
use crate::sections;
use crate::transfer::main_channel::MainChannel;
use crate::transfer::outgoing::SEND_TIMEOUT;
use crate::vm_state::VmState;

const MODE: StartMode = StartMode::CprTransfer;

/// A step that failed, and why.
pub(crate) type Failure = (&'static str, String);

pub(crate) fn failure<E: std::fmt::Display>(step: &'static str) -> impl Fn(E) -> Failure {
    move |error| (step, error.to_string())
}

impl Worker {
    /// Stops the guest, saves it, and sends its state to the other worker. Whatever fails is reported; the guest then
    /// stands still until the broker rolls back or dies.
    pub(crate) fn park(&mut self, mut main: MainChannel) {
        self.stood = matches!(self.phase, Phase::Paused);
        let outcome = self.park_and_save(&mut main);
        self.phase = Phase::Parked(Some(main));
        if let Err((step, reason)) = outcome {
            self.fail(step, reason);
        }
    }

    fn park_and_save(&mut self, main: &mut MainChannel) -> Result<(), Failure> {
        let lie = fail_point!(Park).map_err(failure("park"))?;
        let (bytes, digest) = self.stop_and_encode()?;

        let half = if cfg!(feature = "fail-points") {
            bytes.len() / 2
        } else {
            bytes.len()
        };
        let (first, rest) = bytes.split_at(half);
        main.send(first, SEND_TIMEOUT).map_err(failure("save"))?;
        if !fail_point!(Save).map_err(failure("save"))? {
            main.send(rest, SEND_TIMEOUT).map_err(failure("save"))?;
        }
        if lie {
            self.run_on();
        }
        self.report(Report::Saved {
            digest,
            bytes: bytes.len() as u64,
        });
        Ok(())
    }

    /// Stops the guest: its state, and that one's digest.
    pub(crate) fn stop_and_encode(&mut self) -> Result<(Vec<u8>, StateDigest), Failure> {
        let stopped = self
            .machinery
            .vcpus
            .stop(STOP_TIMEOUT)
            .map_err(failure("park"))?;
        if let Some(reason) = stopped.stuck {
            return Err(("park", reason));
        }
        // The devices before the vCPUs are saved: what a device finishes may interrupt one.
        let devices = &mut self.machinery.platform.devices;
        // Those of a guest that stands still are parked already.
        if devices.phase() != lifecycle::Phase::Parked {
            devices.park(MODE).map_err(failure("park"))?;
        }
        self.look_after_vsock(true);
        let parked_ns = clock::monotonic_ns();
        self.machinery.vcpus.begin_save();
        self.report(Report::Parked {
            first_exit_ns: stopped.first_exit_ns.min(parked_ns),
            parked_ns,
        });

        let state = VmState::save(&self.machinery.vm).map_err(failure("save"));
        let devices = self
            .machinery
            .platform
            .devices
            .save(MODE)
            .map_err(failure("save"));
        let vcpus = self
            .machinery
            .vcpus
            .finish_save()
            .map_err(failure("save"))?;
        sections::encode(self.vm, self.generation + 1, &vcpus, &state?, devices?)
            .map_err(failure("save"))
    }

    /// Lets the guest run again where it stopped, unless it stood still before: the upgrade did not happen.
    pub(crate) fn unpark(&mut self) {
        // After a park that failed, some vCPUs may still be on their way out.
        match self.machinery.vcpus.stop(STOP_TIMEOUT) {
            Ok(_) if self.stood => {
                self.machinery.platform.devices.failed(MODE);
                self.phase = Phase::Paused;
                self.report(Report::Resumed);
            }
            Ok(stopped) => {
                self.run_on();
                self.phase = Phase::Running;
                self.report(Report::Resumed);
                if let Some(reason) = stopped.stuck {
                    self.stuck(reason);
                }
            }
            // Whoever ordered it sees that the guest does not run; a further order tries again.
            Err(error) => self.fail("rollback", error.to_string()),
        }
    }

    fn run_on(&mut self) {
        let devices = &mut self.machinery.platform.devices;
        devices.failed(MODE);
        if devices.phase() == lifecycle::Phase::Parked {
            if let Err(error) = devices.resume(MODE) {
                self.fail("rollback", error.to_string());
            }
        }
        self.machinery.vcpus.release(true);
    }
}
