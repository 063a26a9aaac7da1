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

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_audit::quoted;
use baton_ipc::StartMode;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Confinement;
use baton_policy::proof::Finding;
use baton_policy::proof::Moment;
use serde_json::json;

use crate::binary::WorkerBinary;
use crate::broker::Broker;
use crate::broker::Rules;
use crate::clients::Awaiting;
use crate::launch::Begun;
use crate::launch::Program;
use crate::nascent::Advance;
use crate::nascent::Nascent;
use crate::pause;
use crate::pause::PauseEnd;
use crate::pause::PauseFacts;
use crate::phase_clock::PhaseClock;
use crate::process::is_stopped;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::worker::Phase;
use crate::worker::Worker;

/// An upgrade under way.
#[derive(Debug)]
pub(crate) struct Upgrade {
    nascent: Option<Nascent>,
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
    pub(crate) fn nascent(&self) -> Option<&Nascent> {
        self.nascent.as_ref()
    }

    pub(crate) fn deadline(&self) -> Instant {
        match (&self.aborting, &self.nascent) {
            (Some(abort), _) => abort.by,
            (None, Some(nascent)) => nascent.deadline,
            (None, None) => Instant::now(),
        }
    }
}

impl Broker {
    /// Starts a worker on its way.
    pub(crate) fn launch(
        &self,
        begun: Begun,
        binary: WorkerBinary,
        config: WorkerConfig,
        rules: &Rules,
    ) -> Result<Nascent> {
        let policy = &rules.policy;
        let confinement = Confinement {
            rlimits: policy.rlimits(u32::from(self.vm.cpus.count.0)),
            keep: policy.capabilities,
            landlock_floor: policy.landlock.floor_abi,
            filters: rules.compiled.build.clone(),
        };
        let launch = begun.become_of(binary.as_fd(), confinement)?;
        Ok(Nascent::new(
            launch,
            config,
            binary,
            self.deadlines.of(Step::Spawn),
        ))
    }

    /// S1: policy, and the launch. A refusal here means that nothing has happened.
    pub(crate) fn begin_upgrade(
        &mut self,
        file: Option<File>,
        dry_run: bool,
        asked_by: &Actor,
    ) -> Result<()> {
        let clock = PhaseClock::start(Instant::now());
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
        if old.phase != Phase::Running || self.pausing {
            return Err(crate::refusal::busy(
                "the worker is still busy with what it was told last",
            ));
        }
        self.log.reserve().recorded()?;
        let begun = self.admit_upgrade(file, dry_run, asked_by, clock);
        if self.upgrade.is_none() {
            self.log.release();
        }
        begun
    }

    fn admit_upgrade(
        &mut self,
        file: Option<File>,
        dry_run: bool,
        asked_by: &Actor,
        mut clock: PhaseClock,
    ) -> Result<()> {
        let rules = crate::rules::load(&self.vm)?;
        crate::rules::refuse_widening(&self.rules.policy, &rules.policy)?;
        let binary = crate::rules::worker_binary(&self.vm, &self.options, &rules.policy, file)?;
        for (key, description, _) in self.registry.iter() {
            crate::resources::check_grant(&rules.policy, key, description, None)?;
        }
        let config = self.config(
            self.generation() + 1,
            StartMode::CprTransfer,
            &rules.compiled,
        )?;
        self.log.write_synced_by("upgrade-begin", asked_by, &json!({
            "generation": config.generation, "worker": binary.digest.to_string(), "policy_digest": rules.policy.digest.to_string(),
            "dry_run": dry_run,
        }))
        .recorded()?;
        clock.enter(Step::Spawn);
        self.happened(Happening::UpgradeBegan { dry_run });
        let launched = Begun::start(Program::Worker, self.ids.ids, self.cgroup.as_ref())
            .and_then(|begun| self.launch(begun, binary, config, &rules));
        let nascent = match launched {
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
        self.state = VmState::Upgrading;
        self.upgrade = Some(Upgrade {
            nascent: Some(nascent),
            rules: Rc::new(rules),
            clock,
            dry_run,
            hold: Hold::No,
            aborting: None,
        });
        self.progress(Step::Spawn);
        Ok(())
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
                match &mut self.upgrade {
                    Some(upgrade) if upgrade.hold == Hold::Asked => {
                        upgrade.hold = Hold::Holds;
                        if let Some(nascent) = &mut upgrade.nascent {
                            nascent.deadline = Instant::now() + HOLD;
                        }
                        self.happened(Happening::UpgradeHeld);
                        Ok(())
                    }
                    _ => self.or_abort(Self::take_over),
                }
            }
            Err(fault) => self.abort(&fault.to_string()),
        }
    }

    /// The upgrade that has just begun is to wait before its pause.
    pub(crate) fn hold_upgrade(&mut self, hold: bool) {
        if let (Some(upgrade), true) = (&mut self.upgrade, hold) {
            upgrade.hold = Hold::Asked;
        }
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
        self.or_abort(Self::take_over)
    }

    /// Runs a step whose failure aborts the upgrade.
    fn or_abort(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match step(self) {
            Ok(()) => Ok(()),
            Err(refusal) => self.abort(&refusal.reason),
        }
    }

    /// S3: the new worker is confirmed; both are told of each other.
    fn agree(&mut self) -> Result<()> {
        let Some(mut upgrade) = self.upgrade.take() else {
            return Ok(());
        };
        let agreed = self.agree_in(&mut upgrade);
        self.upgrade = Some(upgrade);
        agreed
    }

    fn agree_in(&mut self, upgrade: &mut Upgrade) -> Result<()> {
        let Some(nascent) = &mut upgrade.nascent else {
            return Ok(());
        };
        self.confirm_fresh(nascent, &upgrade.rules)?;
        upgrade.clock.enter(Step::Agree);
        self.progress(Step::Agree);
        #[cfg(feature = "fail-points")]
        {
            crate::fail_point::act_at(Step::Agree, self.worker.as_ref(), nascent.worker());
            nascent.arm(crate::fail_point::for_new());
            for point in crate::fail_point::for_old() {
                self.worker
                    .iter()
                    .for_each(|old| drop(old.order(&Order::Fail(point))));
            }
        }
        let (old_end, new_end) = UnixStream::pair().doing("cannot make the main channel")?;
        for end in [&old_end, &new_end] {
            end.set_nonblocking(true)
                .doing("cannot make the main channel")?;
        }
        nascent
            .configure(Some(new_end.into()))
            .doing("cannot configure the new worker")?;
        let old = self
            .worker
            .as_mut()
            .ok_or_else(|| unfit("there is no worker", ""))?;
        old.phase = Phase::Transferring;
        old.order_with(&Order::Transfer, &[old_end.as_fd()])
            .doing("cannot tell the old worker")?;
        nascent.deadline = Instant::now() + self.deadlines.of(Step::Agree);
        // Both ends close here: each worker sees the other's end, and the broker can read neither.
        Ok(())
    }

    /// S4: versions and machine agree; the descriptors go over.
    pub(crate) fn upgrade_agreed(&mut self) -> Result<()> {
        self.or_abort(|broker| {
            let Some(mut upgrade) = broker.upgrade.take() else {
                return Ok(());
            };
            let handed = broker.hand_over_in(&mut upgrade);
            broker.upgrade = Some(upgrade);
            handed
        })
    }

    fn hand_over_in(&mut self, upgrade: &mut Upgrade) -> Result<()> {
        let (Some(nascent), None) = (&mut upgrade.nascent, &upgrade.aborting) else {
            return Ok(());
        };
        if upgrade.clock.step() != Step::Agree {
            return Err(unfit("the old worker has agreed twice", ""));
        }
        upgrade.clock.enter(Step::HandOver);
        self.progress(Step::HandOver);
        #[cfg(feature = "fail-points")]
        crate::fail_point::act_at(Step::HandOver, self.worker.as_ref(), nascent.worker());
        self.record_grants(self.generation() + 1, StartMode::CprTransfer)?;
        let bound = self.deadlines.of(Step::Build);
        nascent
            .hand_over(&self.registry, bound)
            .doing("cannot hand the descriptors over")?;
        upgrade.clock.enter(Step::Build);
        self.progress(Step::Build);
        #[cfg(feature = "fail-points")]
        crate::fail_point::act_at(Step::Build, self.worker.as_ref(), nascent.worker());
        Ok(())
    }

    /// S6 to S10.
    fn take_over(&mut self) -> Result<()> {
        let Some(mut upgrade) = self.upgrade.take() else {
            return Ok(());
        };
        let Some(nascent) = upgrade.nascent.take() else {
            return Ok(());
        };
        let new = nascent.into_worker()?;
        let confirmed = self.confirm_settled(&new, &upgrade.rules);
        let stopped = self
            .worker
            .as_ref()
            .is_some_and(|old| is_stopped(old.process.pid));
        self.upgrade = Some(upgrade);
        if confirmed.is_err() || stopped {
            self.retire(new);
            confirmed?;
            return Err(unfit("the old worker is stopped", ""));
        }
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.dry_run) {
            self.retire(new);
            return self.roll_back_transfer(Outcome::Rehearsed, String::new());
        }
        // Should this process die after the commit, this is how the guest's worker is found.
        if let Err(refusal) = self.publish_with(Some(new.process)) {
            self.retire(new);
            return Err(refusal);
        }
        self.pause_and_switch(new)
    }

    fn pause_and_switch(&mut self, mut new: Worker) -> Result<()> {
        let (Some(mut upgrade), Some(mut old)) = (self.upgrade.take(), self.worker.take()) else {
            return Ok(());
        };
        let log = &mut self.log;
        let generation = new.generation;
        let (end, facts) = pause::run(
            &mut old,
            &mut new,
            self.deadlines,
            &mut upgrade.clock,
            self.paused,
            |digest| {
                log.write(
                    "commit-intent",
                    &json!({"generation": generation, "state_digest": digest.to_string()}),
                )
                .recorded()
            },
        );
        let step = upgrade.clock.step();
        self.paused_and_switched(&upgrade.clock, &end, &facts);
        let (outcome, reason) = match end {
            PauseEnd::Committed => {
                upgrade.clock.enter(Step::Retire);
                self.worker = Some(new);
                self.retire(old);
                self.rules = upgrade.rules;
                self.state = self.at_rest();
                (Outcome::Committed, String::new())
            }
            PauseEnd::RolledBack(reason) => {
                self.worker = Some(old);
                self.retire(new);
                self.state = self.at_rest();
                (Outcome::Aborted, reason)
            }
            PauseEnd::Lost(reason) => {
                self.retire(old);
                self.retire(new);
                (Outcome::Lost, reason)
            }
        };
        // Each of these whatever becomes of the others: the guest's fate is decided.
        let published = self.publish();
        let finished = self.finish(outcome, step, &reason, upgrade.clock, &facts);
        let handled = facts
            .events
            .iter()
            .try_for_each(|event| self.guest_event(event));
        let lost = match outcome {
            Outcome::Lost => self.lose(&reason),
            _ => Ok(()),
        };
        for failed in [published, finished, handled, lost] {
            if let Err(refusal) = failed {
                complain(&refusal);
            }
        }
        // A worker that was parked had no time for questions.
        let status = Reply::Status(Box::new(self.vm_status()));
        self.clients.answer(Awaiting::Status, &status);
        Ok(())
    }

    /// The state between upgrades.
    fn at_rest(&self) -> VmState {
        if self.paused {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    /// Kills a worker that does not hold the guest, and forgets it when it is gone.
    fn retire(&mut self, worker: Worker) {
        worker.kill();
        self.retired.push(worker);
    }

    /// The old worker has refused or failed before the pause.
    pub(crate) fn upgrade_refused(&mut self, reason: &str) -> Result<()> {
        match &self.upgrade {
            Some(upgrade) if upgrade.aborting.is_none() => self.abort(reason),
            _ => Ok(()),
        }
    }

    /// Whether it has neither failed nor paused the guest.
    pub(crate) fn upgrade_can_be_cancelled(&self) -> bool {
        self.upgrade
            .as_ref()
            .is_some_and(|upgrade| upgrade.aborting.is_none())
    }

    /// Ends an upgrade whose guest was never paused.
    pub(crate) fn abort(&mut self, reason: &str) -> Result<()> {
        self.roll_back_transfer(Outcome::Aborted, reason.to_owned())
    }

    fn roll_back_transfer(&mut self, outcome: Outcome, reason: String) -> Result<()> {
        let Some(upgrade) = &mut self.upgrade else {
            return Ok(());
        };
        if self.worker.as_ref().is_some_and(Worker::is_dead) {
            // Nobody is left to run on; its death may be what the new one failed of.
            return self.lose(&format!("{reason}; and the old worker is dead"));
        }
        upgrade.aborting = Some(Abort {
            outcome,
            step: upgrade.clock.step(),
            reason,
            by: Instant::now() + self.deadlines.order(),
        });
        let dead = upgrade.nascent.take().and_then(Nascent::into_dead);
        self.retired.extend(dead);
        match &mut self.worker {
            // It knows of the transfer, and says when it has forgotten it.
            Some(old)
                if old.phase == Phase::Transferring && old.order(&Order::Rollback).is_ok() =>
            {
                old.phase = Phase::RollingBack;
                Ok(())
            }
            _ => self.upgrade_rolled_back(),
        }
    }

    /// The old worker is as before: the abort is complete.
    pub(crate) fn upgrade_rolled_back(&mut self) -> Result<()> {
        if self
            .upgrade
            .as_ref()
            .is_none_or(|upgrade| upgrade.aborting.is_none())
        {
            return Ok(());
        }
        let Some(Upgrade {
            clock,
            aborting: Some(abort),
            ..
        }) = self.upgrade.take()
        else {
            return Ok(());
        };
        if self.state == VmState::Upgrading {
            self.state = self.at_rest();
        }
        self.finish(
            abort.outcome,
            abort.step,
            &abort.reason,
            clock,
            &PauseFacts::default(),
        )
    }

    /// The guest is lost while an upgrade is under way.
    pub(crate) fn upgrade_lost(&mut self, reason: &str) -> Result<()> {
        let Some(mut upgrade) = self.upgrade.take() else {
            return Ok(());
        };
        self.retired
            .extend(upgrade.nascent.take().and_then(Nascent::into_dead));
        let step = upgrade.clock.step();
        let reason = match upgrade.aborting {
            Some(abort) => format!("{reason}, while the upgrade was aborted: {}", abort.reason),
            None => reason.to_owned(),
        };
        self.finish(
            Outcome::Lost,
            step,
            &reason,
            upgrade.clock,
            &PauseFacts::default(),
        )
    }

    /// The terminal record, and then the answer.
    fn finish(
        &mut self,
        outcome: Outcome,
        step: Step,
        reason: &str,
        clock: PhaseClock,
        facts: &PauseFacts,
    ) -> Result<()> {
        let failed = matches!(outcome, Outcome::Aborted | Outcome::Lost);
        let outcome = UpgradeOutcome {
            outcome,
            generation: self.generation(),
            worker_pid: self
                .worker
                .as_ref()
                .map_or(0, |worker| worker.process.pid.unsigned_abs()),
            worker_digest: self
                .worker
                .as_ref()
                .map(|worker| worker.digest.to_string())
                .unwrap_or_default(),
            blackout_us: facts.blackout_us,
            pause_us: facts.pause_us,
            total_ms: u64::try_from(clock.total().as_millis()).unwrap_or(u64::MAX),
            state_bytes: facts.state_bytes,
            state_digest: facts
                .digest
                .map(|digest| digest.to_string())
                .unwrap_or_default(),
            phases: clock.finish(),
            failed_step: failed.then_some(step),
            reason: quoted(reason),
        };
        let written = self.log.write_synced("upgrade", &outcome);
        self.log.release();
        self.last_upgrade = Some(outcome.clone());
        self.happened(Happening::UpgradeEnded(Box::new(outcome.clone())));
        self.clients
            .answer(Awaiting::Upgrade, &Reply::Upgrade(Box::new(outcome)));
        // A log that cannot be written is the operator's to mend; the guest does not pay for it.
        if let Err(refusal) = written {
            complain(&refusal);
        }
        Ok(())
    }

    fn progress(&mut self, step: Step) {
        self.clients
            .answer(Awaiting::Upgrade, &Reply::Progress(step));
    }

    /// Confirms a worker from the kernel's records before it is given anything.
    pub(crate) fn confirm_fresh(&mut self, nascent: &Nascent, rules: &Rules) -> Result<()> {
        let Some(worker) = nascent.worker() else {
            return Err(unfit("the worker is not there", ""));
        };
        let mut findings = nascent.confirm_process(self.cgroup.as_ref());
        findings.extend(
            self.prover
                .threads(rules, worker.process.pid, worker.ids, Moment::Fresh)
                .findings,
        );
        self.judge("confirmed-fresh", worker.generation, &findings)
    }

    /// Confirms the last filters of all its threads before the guest runs in it.
    pub(crate) fn confirm_settled(&mut self, worker: &Worker, rules: &Rules) -> Result<()> {
        let verdict = self
            .prover
            .threads(rules, worker.process.pid, worker.ids, self.settled());
        self.judge("confirmed-settled", worker.generation, &verdict.findings)
    }

    /// What a worker looks like when its guest runs.
    pub(crate) fn settled(&self) -> Moment {
        Moment::Settled {
            vcpus: u32::from(self.vm.cpus.count.0),
            io: self.io_threads().into(),
        }
    }

    fn judge(&mut self, event: &str, generation: u32, findings: &[Finding]) -> Result<()> {
        let findings: Vec<_> = findings.iter().map(ToString::to_string).collect();
        self.log.write(event, &json!({
            "generation": generation, "findings": findings, "filters_unreadable": self.prover.unreadable,
        }))
        .recorded()?;
        if findings.is_empty() {
            return Ok(());
        }
        Err(refusal(
            Exit::Unfit,
            format_args!(
                "the worker is not confined as policy says: {}",
                findings.join("; ")
            ),
            "`baton doctor` says what this host lacks",
        ))
    }
}
