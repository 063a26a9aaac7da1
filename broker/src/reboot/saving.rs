//! Mode `cpr-reboot`, the old side: the guest is stopped for good, and its worker writes it into a file that this broker opens.
//!
//! ```text
//! S1 request, file opened ─► (held) ─► S6 park ─► S7 save ─► S12 the worker is retired; the broker stays, without a guest
//! ```
//!
//! Whatever fails before the end rolls the worker back: the guest runs on, and the file is removed. This broker reads nothing of
//! what is written.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use baton_audit::Actor;
use baton_ipc::FileAddress;
use baton_ipc::StateDigest;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Refusal;
use baton_ipc::control::Step;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;
use serde_json::json;

use crate::broker::Broker;
use crate::reboot::state_file::StateFile;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::upgrade::Upgrade;
use crate::upgrade::pause::PauseFacts;
use crate::upgrade::phase_clock::PhaseClock;
use crate::upgrade::phase_clock::micros;
use crate::vm_file::VmFile;
use crate::worker::Phase;
use crate::worker::Worker;

/// A guest on its way into a file.
#[derive(Debug)]
pub(crate) struct Saving {
    file: StateFile,
    pub(crate) deadline: Instant,
    /// The guest stands still for it.
    pub(crate) parked: bool,
}

impl Broker {
    /// S1: opens the file. A refusal here means that nothing has happened.
    pub(crate) fn begin_save(
        &mut self,
        place: &FileAddress,
        hold: bool,
        asked_by: &Actor,
    ) -> Result<()> {
        let clock = PhaseClock::start(Instant::now());
        self.check_worker()?;
        if let Some(refusal) = self.blocks_save().next() {
            return Err(refusal);
        }
        self.log.reserve().recorded()?;
        let begun = self.admit_save(place, asked_by, clock);
        if self.upgrade.is_none() {
            self.log.release();
        }
        begun?;
        self.hold_upgrade(hold);
        self.built()
    }

    /// What of this VM cannot go into a file.
    pub(crate) fn blocks_save(&self) -> impl Iterator<Item = Refusal> {
        unsavable(&self.vm).chain(self.refuse_hotplugged().err())
    }

    fn admit_save(
        &mut self,
        place: &FileAddress,
        asked_by: &Actor,
        clock: PhaseClock,
    ) -> Result<()> {
        let file = StateFile::create(place, &self.rules.policy)?;
        self.log
            .write_synced_by(
                "upgrade-begin",
                asked_by,
                &json!({"generation": self.generation() + 1, "file": place.to_string()}),
            )
            .recorded()?;
        self.asked_by = Some(asked_by.clone());
        self.happened(Happening::UpgradeBegan { dry_run: false });
        self.state = VmState::Upgrading;
        let saving = Saving {
            file,
            deadline: Instant::now() + self.deadlines.of(Step::Spawn),
            parked: false,
        };
        self.upgrade = Some(Upgrade::into_file(saving, Rc::clone(&self.rules), clock));
        Ok(())
    }

    /// S6: the guest stops, and its worker writes.
    pub(crate) fn order_save(&mut self) -> Result<()> {
        let by = Instant::now() + self.deadlines.file();
        #[cfg(feature = "fail-points")]
        for point in crate::fail_point::for_old() {
            self.worker
                .iter()
                .for_each(|old| drop(old.order(&Order::Fail(point))));
        }
        let (Some(upgrade), Some(worker)) = (&mut self.upgrade, &mut self.worker) else {
            return Ok(());
        };
        upgrade.enter(Step::Park);
        let Some(saving) = upgrade.saving_mut() else {
            return Ok(());
        };
        saving.deadline = by;
        worker.phase = Phase::Parking;
        worker
            .order_with(&Order::Save, &[saving.file.as_fd()])
            .doing("cannot tell the worker")
    }

    /// The guest stands still.
    pub(crate) fn parked_to_be_saved(&mut self) {
        let Some(upgrade) = &mut self.upgrade else {
            return;
        };
        if upgrade.is_aborting() {
            return;
        }
        let Some(saving) = upgrade.saving_mut() else {
            return;
        };
        saving.parked = true;
        upgrade.enter(Step::Save);
        if !self.paused {
            self.happened(Happening::Stopped);
        }
        self.happened(Happening::UpgradeStep(Step::Park));
        self.happened(Happening::UpgradeStep(Step::Save));
    }

    /// Everything is in the file, and durable.
    pub(crate) fn saved(&mut self, digest: StateDigest, bytes: u64) -> Result<()> {
        let kept = match &self.upgrade {
            Some(upgrade) if !upgrade.is_aborting() => self.upgrade.take(),
            _ => None,
        };
        let Some((saving, mut clock)) = kept.and_then(Upgrade::into_saving) else {
            return Ok(());
        };
        let parked = clock.start_of(Step::Park);
        clock.enter(Step::Retire);
        if let Err(refusal) = saving.file.keep() {
            // It is there, and whole; only a crash of the host could still take its name away.
            complain(&refusal);
        }
        // It ends when everything is durable: what comes after it, nobody here can say.
        let pause_us = parked.map_or(0, |at| micros(at.elapsed()));
        let facts = PauseFacts {
            pause_us,
            blackout_us: pause_us,
            state_bytes: bytes,
            digest: Some(digest),
            ..PauseFacts::default()
        };
        // Nobody may ever let it run again: another worker can, from now on.
        self.worker.iter().for_each(Worker::kill);
        self.state = VmState::Postmigrate;
        self.paused = false;
        let finished = self.finish(Outcome::Saved, Step::Retire, "", clock, &facts);
        if let Some(worker) = self.worker.take() {
            self.retire(worker);
        }
        finished
    }
}

/// What of this machine can go into no file, in QEMU's words where it has some.
fn unsavable(vm: &VmFile) -> impl Iterator<Item = Refusal> + use<> {
    let vsock = vm.vsock.is_some().then(|| {
        unfit(
            "State blocked by non-migratable device 'vsock'",
            "its connections would be lost: leave [vsock] out of the VM file",
        )
    });
    let backends = vm.vhost_user.0.iter().map(|device| {
        unfit(
            format_args!(
                "State blocked by non-migratable device 'vhost_user {}'",
                device.id.0
            ),
            "the process behind it has state that is in no file: leave [[vhost_user]] out of the VM file",
        )
    });
    let backends: Vec<_> = backends.collect();
    let vfio = (!vm.vfio.0.is_empty()).then(|| {
        unfit(
            "VFIO device only supports cpr-reboot for runstate suspended",
            "nobody suspends this guest, and what the device has is in no file: leave [[vfio]] out of the VM file",
        )
    });
    vsock.into_iter().chain(backends).chain(vfio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_the_host_blocks_it_in_qemus_words() {
        let plain = "schema = 1\nname = \"vm\"\nmemory.size = \"64M\"\nboot.kernel = \"k\"\n";
        assert_eq!(unsavable(&VmFile::parse(plain).unwrap()).next(), None);
        let device = "[[vfio]]\nid = \"nic\"\ndevice = \"0000:3b:00.0\"\n";
        let vm = VmFile::parse(&format!("{plain}{device}")).unwrap();
        let reasons: Vec<_> = unsavable(&vm).map(|refusal| refusal.reason).collect();
        assert_eq!(
            reasons,
            ["VFIO device only supports cpr-reboot for runstate suspended"]
        );
    }
}
