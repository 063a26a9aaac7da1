//! S3 to S12: what the broker does at each step of an upgrade.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use baton_ipc::StartMode;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use baton_ipc::control::Step;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;
use baton_ipc::worker::PanicAction;
use serde_json::json;

use super::Upgrade;
use crate::broker::Broker;
use crate::clients::Awaiting;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::upgrade::pause;
use crate::upgrade::pause::PauseEnd;
use crate::upgrade::pause::Standing;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::process::is_stopped;

impl Broker {
    /// S3: the new worker is confirmed; both are told of each other.
    pub(super) fn agree(&mut self) -> Result<()> {
        let Some(mut upgrade) = self.upgrade.take() else {
            return Ok(());
        };
        let agreed = self.agree_in(&mut upgrade);
        self.upgrade = Some(upgrade);
        agreed
    }

    pub(super) fn agree_in(&mut self, upgrade: &mut Upgrade) -> Result<()> {
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
        old.order_with(&Order::Transfer { elsewhere: false }, &[old_end.as_fd()])
            .doing("cannot tell the old worker")?;
        nascent.deadline = Instant::now() + self.deadlines.of(Step::Agree);
        // Both ends close here: each worker sees the other's end, and the broker can read neither.
        Ok(())
    }

    /// S4: versions and machine agree; the descriptors go over.
    pub(crate) fn upgrade_agreed(&mut self) -> Result<()> {
        if self
            .upgrade
            .as_ref()
            .is_some_and(|upgrade| upgrade.outgoing.is_some() && upgrade.aborting.is_none())
        {
            return self.or_abort(Self::transfer_agreed);
        }
        self.or_abort(|broker| {
            let Some(mut upgrade) = broker.upgrade.take() else {
                return Ok(());
            };
            let handed = broker.hand_over_in(&mut upgrade);
            broker.upgrade = Some(upgrade);
            handed
        })
    }

    pub(super) fn hand_over_in(&mut self, upgrade: &mut Upgrade) -> Result<()> {
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
    pub(super) fn take_over(&mut self) -> Result<()> {
        if self.is_saving() {
            return self.order_save();
        }
        let Some(mut upgrade) = self.upgrade.take() else {
            return Ok(());
        };
        let (new, confirmed) = match (upgrade.nascent.take(), &mut upgrade.outgoing) {
            (Some(nascent), _) => {
                let new = nascent.into_worker()?;
                let confirmed = self.confirm_settled(&new, &upgrade.rules);
                (new, confirmed)
            }
            // The other broker has confirmed it against its own policy.
            (None, Some(outgoing)) => match outgoing.take_ready() {
                Some(new) => (new, Ok(())),
                None => return Ok(()),
            },
            (None, None) => return Ok(()),
        };
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

    pub(super) fn pause_and_switch(&mut self, mut new: Worker) -> Result<()> {
        let (Some(mut upgrade), Some(mut old)) = (self.upgrade.take(), self.worker.take()) else {
            return Ok(());
        };
        let standing = Standing {
            stands: self.paused,
            on_panic: self.vm.on_panic == PanicAction::Pause,
        };
        let (log, clients, policy) = (&mut self.log, &mut self.clients, &self.rules.policy);
        let mut canceller = None;
        let generation = new.generation;
        let mut outgoing = upgrade.outgoing.take();
        let (end, facts) = pause::run(
            &mut old,
            &mut new,
            self.deadlines,
            &mut upgrade.clock,
            standing,
            &mut || {
                canceller = canceller.or_else(|| clients.cancels(policy));
                canceller.is_some()
            },
            |digest| {
                // One that is dead cannot take the guest; later it is found by its worker.
                outgoing
                    .as_mut()
                    .map_or(Ok(()), crate::transfer::outgoing::Outgoing::still_there)?;
                log.write(
                    "commit-intent",
                    &json!({"generation": generation, "state_digest": digest.to_string()}),
                )
                .recorded()
            },
        );
        let step = upgrade.clock.step();
        if facts.halted {
            // Whoever has it holds it; what is said of that comes with its event.
            (self.paused, self.panicked) = (true, true);
        }
        // Which connections there are goes over with the name.
        facts.vsock.iter().for_each(|said| self.vsock_said(*said));
        if let (PauseEnd::Committed, Some(outgoing)) = (&end, &mut outgoing) {
            self.hand_name_over(outgoing);
            crate::fail_point::at(Step::Kick, &old, &new);
            // Which the other broker does that has waited for this one in vain.
            self.log.end_if_continued();
        }
        let handed_away = outgoing.is_some() && matches!(end, PauseEnd::Committed);
        self.paused_and_switched(&upgrade.clock, &end, &facts, handed_away);
        // After the steps that it came in: whoever follows them takes the last one for how it stands.
        if let Some(client) = canceller {
            self.cancelled_in_pause(client);
        }
        let (outcome, reason) = match end {
            PauseEnd::Committed => {
                upgrade.clock.enter(Step::Retire);
                self.worker = Some(new);
                self.retire(old);
                self.rules = upgrade.rules;
                if !handed_away {
                    self.limit_anew();
                }
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
        let mut handed_to = None;
        match outgoing {
            Some(outgoing) if outcome == Outcome::Committed => handed_to = Some(outgoing),
            Some(outgoing) => self.retired.extend(outgoing.cancel(&reason)),
            None => {}
        }
        // Each of these whatever becomes of the others: the guest's fate is decided.
        self.news.said = facts.balloon.or(self.news.said);
        let published = match handed_to {
            None => self.publish(),
            Some(_) => Ok(()),
        };
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
        if let (Some(outgoing), Some(outcome)) = (handed_to, self.last_upgrade.clone()) {
            if let Some(new) = self.worker.take() {
                crate::fail_point::at(Step::Retire, &new, &new);
                self.retire_broker(outgoing, new, &outcome);
            }
        }
        // A worker that was parked had no time for questions.
        let status = Reply::Status(Box::new(self.vm_status()));
        self.clients.answer(Awaiting::Status, &status);
        Ok(())
    }

    /// The guest is back where it was because this client wanted it.
    fn cancelled_in_pause(&mut self, client: u64) {
        let who = self
            .clients
            .get_mut(client)
            .map(|client| client.actor.clone());
        self.log
            .note_by("request", who.as_ref(), &json!({"request": "cancel"}));
        self.happened(Happening::UpgradeCancelled);
        self.clients.reply(client, &Reply::Done);
    }

    /// The state between upgrades.
    pub(crate) fn at_rest(&self) -> VmState {
        if self.paused {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    pub(crate) fn progress(&mut self, step: Step) {
        self.clients
            .answer(Awaiting::Upgrade, &Reply::Progress(step));
    }
}
