//! An upgrade, from the request to its terminal record.
//!
//! ```text
//!  S1 request ─► S2 spawn ─► S3 agree ─► S4 hand-over ─► S5 build ─► S6..S10 pause ─► S12 retire
//!                  │            │             │              │            │
//!                  └────────────┴── abort ────┴──────────────┘       rolled back, committed or lost
//! ```
//!
//! S2 to S5 are driven by the loop while the guest runs; the pause is one call. Exactly one terminal record is written, and
//! synced, after the guest runs again and before anybody is told.

mod confirm;
pub(crate) mod deadlines;
mod ending;
pub(crate) mod pause;
pub(crate) mod phase_clock;
mod steps;

use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_ipc::StartMode;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Step;
use baton_ipc::control::VmState;
use baton_ipc::worker::RamBacking;
use serde_json::json;

use crate::broker::Broker;
use crate::broker::Rules;
use crate::reboot::saving::Saving;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::rules::Approved;
use crate::transfer::outgoing::Outgoing;
use crate::upgrade::pause::PauseFacts;
use crate::upgrade::phase_clock::PhaseClock;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::binary::Unchecked;
use crate::worker::nascent::Advance;
use crate::worker::nascent::Nascent;
use crate::worker::process::is_stopped;

/// An upgrade under way.
#[derive(Debug)]
pub(crate) struct Upgrade {
    nascent: Option<Nascent>,
    /// Another broker makes the new worker.
    outgoing: Option<Outgoing>,
    /// There is none: the guest goes into a file.
    saving: Option<Saving>,
    rules: Rc<Rules>,
    clock: PhaseClock,
    dry_run: bool,
    /// It is to wait before its pause, or waits there.
    hold: Hold,
    /// It has failed, and the old worker has not yet confirmed that it is as before.
    aborting: Option<Abort>,
}

/// Whether an upgrade waits before its pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    No,
    Asked,
    Holds,
}

/// How long an upgrade is held for its operator.
const HOLD: Duration = Duration::from_secs(600);

#[derive(Debug)]
struct Abort {
    outcome: Outcome,
    step: Step,
    reason: String,
    by: Instant,
}

impl Upgrade {
    /// One whose new worker is another broker's.
    pub(crate) fn there(outgoing: Outgoing, rules: Rc<Rules>, clock: PhaseClock) -> Self {
        Self {
            nascent: None,
            outgoing: Some(outgoing),
            saving: None,
            rules,
            clock,
            dry_run: false,
            hold: Hold::No,
            aborting: None,
        }
    }

    /// One without a new worker: the guest goes into a file.
    pub(crate) fn into_file(saving: Saving, rules: Rc<Rules>, clock: PhaseClock) -> Self {
        Self {
            nascent: None,
            outgoing: None,
            saving: Some(saving),
            rules,
            clock,
            dry_run: false,
            hold: Hold::No,
            aborting: None,
        }
    }

    /// Whether it puts the guest into a file.
    pub(crate) fn saves(&self) -> bool {
        self.saving.is_some()
    }

    pub(crate) fn saving_mut(&mut self) -> Option<&mut Saving> {
        self.saving.as_mut()
    }

    pub(crate) fn into_saving(self) -> Option<(Saving, PhaseClock)> {
        self.saving.map(|saving| (saving, self.clock))
    }

    pub(crate) fn outgoing(&self) -> Option<&Outgoing> {
        self.outgoing.as_ref()
    }

    pub(crate) fn outgoing_mut(&mut self) -> Option<&mut Outgoing> {
        self.outgoing.as_mut()
    }

    pub(crate) fn is_aborting(&self) -> bool {
        self.aborting.is_some()
    }

    /// A step has begun.
    pub(crate) fn enter(&mut self, step: Step) {
        self.clock.enter(step);
    }

    pub(crate) fn nascent(&self) -> Option<&Nascent> {
        self.nascent.as_ref()
    }

    /// The new worker, once it has every descriptor that there was.
    pub(crate) fn heir(&self) -> Option<&Worker> {
        self.nascent.as_ref().and_then(Nascent::heir)
    }

    /// What it waits for.
    pub(crate) fn awaits(&self) -> &'static str {
        match (&self.aborting, self.hold, &self.outgoing) {
            (Some(_), ..) => "the old worker to go on",
            (None, Hold::Holds, _) => "`migrate-continue`",
            (None, _, Some(outgoing)) => outgoing.awaits(),
            (None, _, None) if self.saving.is_some() => "the guest's state in the file",
            (None, _, None) => "the new worker to be built",
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        match (&self.aborting, &self.nascent) {
            (Some(abort), _) => abort.by,
            (None, Some(nascent)) => nascent.deadline,
            (None, None) => {
                let outgoing = self.outgoing.as_ref().map(|outgoing| outgoing.deadline);
                let saving = self.saving.as_ref().map(|saving| saving.deadline);
                outgoing.or(saving).unwrap_or_else(Instant::now)
            }
        }
    }
}

impl Broker {
    /// S1: policy, and the launch. A refusal here means that nothing has happened.
    pub(crate) fn begin_upgrade(
        &mut self,
        file: Option<Unchecked>,
        dry_run: bool,
        approve: Option<String>,
        asked_by: &Actor,
    ) -> Result<()> {
        let clock = PhaseClock::start(Instant::now());
        self.check_old()?;
        self.log.reserve().recorded()?;
        let begun = self.admit_upgrade(file, dry_run, approve, asked_by, clock);
        if self.upgrade.is_none() {
            self.log.release();
        }
        begun
    }

    /// The worker that runs the guest has to be able to hand it over.
    pub(crate) fn check_old(&self) -> Result<()> {
        self.check_worker()?;
        self.check_shared()
    }

    /// Whether guest RAM can be another worker's too.
    pub(crate) fn check_shared(&self) -> Result<()> {
        match self.vm.memory.backing() {
            RamBacking::Private => Err(unfit(
                "Memory region ram is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required.",
                "leave memory.share out of the VM file",
            )),
            RamBacking::Shared | RamBacking::File => Ok(()),
        }
    }

    /// Whether the worker that runs the guest has time to part with it.
    pub(crate) fn check_worker(&self) -> Result<()> {
        let old = self
            .worker
            .as_ref()
            .ok_or_else(|| unfit("there is no worker", ""))?;
        if is_stopped(old.process.pid) {
            return Err(unfit(
                format_args!("the worker (process {}) is stopped", old.process.pid),
                format_args!("continue it: kill -CONT {}", old.process.pid),
            ));
        }
        if old.phase != Phase::Running || self.pausing || self.devices_change() {
            return Err(crate::refusal::busy(
                "the worker is still busy with what it was told last",
            ));
        }
        Ok(())
    }

    fn admit_upgrade(
        &mut self,
        file: Option<Unchecked>,
        dry_run: bool,
        approve: Option<String>,
        asked_by: &Actor,
        mut clock: PhaseClock,
    ) -> Result<()> {
        let mut rules = crate::rules::load(&self.vm, self.lessons.is_some())?;
        let (binary, declared) =
            crate::rules::worker_binary(&self.vm, &self.options, &rules.policy, file)?;
        rules.declared = Some(declared);
        let given = approve.map(|why| Approved::by_client(&why, asked_by));
        let widening = crate::rules::refuse_widening(&self.rules, &rules, &binary.digest, given)?;
        if let Some(cgroup) = &self.cgroup {
            cgroup.check(self.vm.cgroup_limits(&rules.policy))?;
        }
        for (key, description, _) in self.registry.iter() {
            crate::devices::resources::check_grant(&rules.policy, key, description, None)?;
        }
        let config = self.config(
            self.generation() + 1,
            StartMode::CprTransfer,
            &rules.compiled,
        )?;
        for device in &config.virtio {
            crate::devices::io_limits::check(&rules.policy, device)?;
        }
        self.log.write_synced_by("upgrade-begin", asked_by, &json!({
            "generation": config.generation, "worker": binary.digest.to_string(), "signed_by": binary.signed_by, "policy_digest": rules.policy.digest.to_string(),
            "dry_run": dry_run, "widens": widening.words(), "approved": widening.approved.as_ref().map(|one| &one.why),
            "approved_by": widening.approved.as_ref().map(|one| &one.by),
        }))
        .recorded()?;
        self.asked_by = Some(asked_by.clone());
        #[cfg(feature = "fail-points")]
        crate::fail_point::act_at(Step::Request, self.worker.as_ref(), None);
        clock.enter(Step::Spawn);
        self.happened(Happening::UpgradeBegan { dry_run });
        let nascent = match self.launch(binary, config, &rules) {
            Ok(nascent) => nascent,
            Err(refusal) => {
                return self.finish(
                    Outcome::Aborted,
                    Step::Spawn,
                    &refusal.reason,
                    clock,
                    &PauseFacts::default(),
                );
            }
        };
        #[cfg(feature = "fail-points")]
        crate::fail_point::act_at(Step::Spawn, self.worker.as_ref(), nascent.worker());
        self.state = VmState::Upgrading;
        self.upgrade = Some(Upgrade {
            nascent: Some(nascent),
            outgoing: None,
            saving: None,
            rules: Rc::new(rules),
            clock,
            dry_run,
            hold: Hold::No,
            aborting: None,
        });
        self.progress(Step::Spawn);
        Ok(())
    }

    /// Limits the VM's cgroup as the policy that it is now under says.
    fn limit_anew(&mut self) {
        let limits = self.vm.cgroup_limits(&self.rules.policy);
        let limited = self.cgroup.as_mut().map(|cgroup| cgroup.limit(limits));
        if let Some(Err(refusal)) = limited {
            self.log
                .note("limit-failed", &json!({"reason": refusal.reason}));
        }
    }

    /// Goes on with the upgrade, if there is one.
    pub(crate) fn advance_upgrade(&mut self) -> Result<()> {
        let Some(upgrade) = &mut self.upgrade else {
            return Ok(());
        };
        if let Some(abort) = &upgrade.aborting {
            // The old worker's silence does not keep the caller waiting for ever.
            return if Instant::now() > abort.by {
                self.upgrade_rolled_back()
            } else {
                Ok(())
            };
        }
        if let Some(saving) = &upgrade.saving {
            return match Instant::now() > saving.deadline {
                false => Ok(()),
                true if upgrade.hold == Hold::Holds && !saving.parked => self.abort(&format!(
                    "nobody has told it to go on within {} s",
                    HOLD.as_secs()
                )),
                true => self.abort(&format!(
                    "writing the guest into a file took longer than {:?}",
                    self.deadlines.file()
                )),
            };
        }
        if upgrade.outgoing.is_some() {
            return self.advance_outgoing();
        }
        let Some(nascent) = &mut upgrade.nascent else {
            return Ok(());
        };
        let late = Instant::now() > nascent.deadline;
        let advance = nascent.advance();
        // After the advance: a worker that has failed has said its last by then.
        let text = nascent.read_diagnostics();
        self.log_diagnostics(&text);
        match advance {
            Ok(Advance::Waiting) if late && self.is_held() => self.abort(&format!(
                "nobody has told it to go on within {} s",
                HOLD.as_secs()
            )),
            Ok(Advance::Waiting) if late => {
                let step = self
                    .upgrade
                    .as_ref()
                    .map_or(Step::Spawn, |upgrade| upgrade.clock.step());
                self.abort(&format!(
                    "{step} took longer than {:?}",
                    self.deadlines.of(step)
                ))
            }
            Ok(Advance::Waiting) => Ok(()),
            Ok(Advance::Greeted) => self.or_abort(Self::agree),
            Ok(Advance::Listening(times)) => {
                let generation = self.generation() + 1;
                self.log
                    .note("ready", &json!({"generation": generation, "mode": StartMode::CprTransfer, "times": times}));
                self.built()
            }
            Err(fault) => self.abort(&fault.to_string()),
        }
    }

    /// The new worker waits for its guest; now, or when the operator says so.
    pub(crate) fn built(&mut self) -> Result<()> {
        match &mut self.upgrade {
            Some(upgrade) if upgrade.hold == Hold::Asked => {
                upgrade.hold = Hold::Holds;
                let by = Instant::now() + HOLD;
                if let Some(nascent) = &mut upgrade.nascent {
                    nascent.deadline = by;
                }
                if let Some(outgoing) = &mut upgrade.outgoing {
                    outgoing.deadline = by;
                }
                if let Some(saving) = &mut upgrade.saving {
                    saving.deadline = by;
                }
                self.happened(Happening::UpgradeHeld);
                Ok(())
            }
            _ => self.or_abort(Self::take_over),
        }
    }

    /// The upgrade that has just begun is to wait before its pause.
    pub(crate) fn hold_upgrade(&mut self, hold: bool) {
        if let (Some(upgrade), true) = (&mut self.upgrade, hold) {
            upgrade.hold = Hold::Asked;
        }
    }

    /// Whether the guest is being written into a file.
    pub(crate) fn is_saving(&self) -> bool {
        let saving = self.upgrade.as_ref().and_then(|one| one.saving.as_ref());
        saving.is_some()
    }

    fn is_held(&self) -> bool {
        self.upgrade
            .as_ref()
            .is_some_and(|upgrade| upgrade.hold == Hold::Holds && upgrade.aborting.is_none())
    }

    /// Goes on with an upgrade that waits before its pause.
    pub(crate) fn continue_upgrade(&mut self) -> Result<()> {
        if !self.is_held() {
            return Err(unfit("the upgrade does not wait to be continued", ""));
        }
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.hold = Hold::No;
        }
        self.or_abort(Self::take_over)
    }

    /// Runs a step whose failure aborts the upgrade.
    pub(crate) fn or_abort(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match step(self) {
            Ok(()) => Ok(()),
            Err(refusal) => self.abort(&refusal.reason),
        }
    }
}
