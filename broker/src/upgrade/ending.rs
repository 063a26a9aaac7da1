//! How an upgrade ends: refused, cancelled, rolled back, committed or lost; with one terminal record.

use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;

use super::Abort;
use super::Upgrade;
use crate::broker::Broker;
use crate::clients::Awaiting;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::upgrade::pause::PauseFacts;
use crate::upgrade::phase_clock::PhaseClock;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::nascent::Nascent;

impl Broker {
    /// Kills a worker that does not hold the guest, and forgets it when it is gone.
    pub(crate) fn retire(&mut self, worker: Worker) {
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

    pub(super) fn roll_back_transfer(&mut self, outcome: Outcome, reason: String) -> Result<()> {
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
        let cancelled = upgrade.aborting.as_ref().map(|abort| abort.reason.clone());
        let outgoing = upgrade.outgoing.take();
        let lent = outgoing.and_then(|outgoing| outgoing.cancel(&cancelled.unwrap_or_default()));
        self.retired.extend(dead.into_iter().chain(lent));
        match &mut self.worker {
            // It knows of the transfer, and says when it has forgotten it.
            Some(old)
                if matches!(old.phase, Phase::Transferring | Phase::Parking)
                    && old.order(&Order::Rollback).is_ok() =>
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
            saving,
            ..
        }) = self.upgrade.take()
        else {
            return Ok(());
        };
        if self.state == VmState::Upgrading {
            self.state = self.at_rest();
        }
        if saving.as_ref().is_some_and(|saving| saving.parked) && !self.paused {
            self.happened(Happening::Resumed);
        }
        // Gone before anybody is told.
        drop(saving);
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
        let outgoing = upgrade.outgoing.take();
        self.retired
            .extend(outgoing.and_then(|outgoing| outgoing.cancel(reason)));
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

    /// How an upgrade ended of which nothing more is known.
    pub(crate) fn outcome(&self, outcome: Outcome) -> UpgradeOutcome {
        let worker = self.worker.as_ref();
        UpgradeOutcome {
            outcome,
            generation: self.generation(),
            worker_pid: worker.map_or(0, |worker| worker.process.pid.unsigned_abs()),
            worker_digest: worker
                .map(|worker| worker.digest.to_string())
                .unwrap_or_default(),
            blackout_us: 0,
            pause_us: 0,
            total_ms: 0,
            state_bytes: 0,
            state_digest: String::new(),
            phases: Vec::new(),
            failed_step: None,
            reason: String::new(),
        }
    }

    /// The terminal record, and then the answer.
    pub(crate) fn finish(
        &mut self,
        outcome: Outcome,
        step: Step,
        reason: &str,
        clock: PhaseClock,
        facts: &PauseFacts,
    ) -> Result<()> {
        let failed = matches!(outcome, Outcome::Aborted | Outcome::Lost);
        let outcome = UpgradeOutcome {
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
            ..self.outcome(outcome)
        };
        let asked_by = self.asked_by.take();
        let written = match &asked_by {
            Some(who) => self.log.write_synced_by("upgrade", who, &outcome),
            None => self.log.write_synced("upgrade", &outcome),
        };
        self.log.release();
        self.last_cancelled = outcome.outcome == Outcome::Aborted && self.told.is_cancelled();
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
}
