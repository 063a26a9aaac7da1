//! S2 to S5 of the new worker, as in any upgrade, and its loan to the old broker.

use std::os::fd::OwnedFd;
use std::time::Instant;

use baton_ipc::StartMode;
use baton_ipc::control::Step;
use baton_ipc::transfer::Ready;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::BuildTimes;
use serde_json::json;

use super::Link;
use super::Stage;
use super::cancelled;
use super::hear;
use super::hung_up;
use crate::broker::Broker;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::transfer::channel_socket;
use crate::worker::Worker;
use crate::worker::nascent::Advance;
use crate::worker::nascent::Nascent;

impl Broker {
    pub(super) fn launch_successor(&mut self) -> Result<Nascent> {
        let generation = self.offered_generation();
        let (binary, declared) =
            crate::rules::worker_binary(&self.vm, &self.options, &self.rules.policy, None)?;
        self.declare(declared);
        let config = self.config(generation, StartMode::CprTransfer, &self.rules.compiled)?;
        self.launch(binary, config, &self.rules)
    }

    pub(super) fn offered_generation(&self) -> u32 {
        let offer = self.incoming.as_ref().and_then(|one| one.offer.as_ref());
        offer.map_or(0, |offer| offer.generation)
    }

    /// S2 to S5, as in any upgrade.
    pub(super) fn build(
        &mut self,
        mut link: Link,
        main: Option<OwnedFd>,
        nascent: Box<Nascent>,
    ) -> Result<Stage> {
        let heard = hear(&mut link);
        let built = heard.and_then(|heard| self.build_in(&link, heard, main, nascent));
        match built {
            Ok((main, nascent, None)) => Ok(Stage::Building {
                link,
                main,
                nascent,
            }),
            Ok((_, nascent, Some(times))) => match self.lend(&link, *nascent, times) {
                Ok(worker) => Ok(Stage::Lent(link, worker)),
                Err(refusal) => {
                    let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                    Err(refusal)
                }
            },
            Err(refusal) => {
                let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                Err(refusal)
            }
        }
    }

    pub(super) fn build_in(
        &mut self,
        link: &Link,
        heard: Option<(ToNew, Vec<OwnedFd>)>,
        mut main: Option<OwnedFd>,
        mut nascent: Box<Nascent>,
    ) -> Result<(Option<OwnedFd>, Box<Nascent>, Option<BuildTimes>)> {
        let fault = |fault: crate::worker::nascent::NascentFault| unfit(fault, "");
        match heard {
            None => {}
            Some((ToNew::Agreed, _)) => {
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::HandOver, None, nascent.worker());
                self.record_grants(self.offered_generation(), StartMode::CprTransfer)?;
                let bound = self.deadlines.of(Step::Build);
                nascent.hand_over(&self.registry, bound).map_err(fault)?;
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::Build, None, nascent.worker());
            }
            Some((ToNew::Cancelled(reason), _)) => return Err(cancelled(&reason)),
            Some(_) => return Err(hung_up()),
        }
        let late = Instant::now() > nascent.deadline;
        let advance = nascent.advance();
        // After the advance: a worker that has failed has said its last by then.
        let text = nascent.read_diagnostics();
        self.log_diagnostics(&text);
        match advance.map_err(fault)? {
            Advance::Waiting if late => Err(unfit("the new worker took too long", "")),
            Advance::Waiting => Ok((main, nascent, None)),
            Advance::Greeted => {
                self.confirm_fresh(&nascent, &std::rc::Rc::clone(&self.rules))?;
                #[cfg(feature = "fail-points")]
                {
                    crate::fail_point::act_at(Step::Spawn, None, nascent.worker());
                    nascent.arm(crate::fail_point::for_new());
                }
                let ends = main.as_ref().and_then(channel_socket::ends);
                nascent.configure(main.take()).map_err(fault)?;
                nascent.deadline = Instant::now() + self.deadlines.of(Step::Build);
                link.send(&ToOld::Greeting { ends })
                    .doing("the old broker")?;
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::Agree, None, nascent.worker());
                Ok((main, nascent, None))
            }
            Advance::Listening(times) => Ok((main, nascent, Some(times))),
        }
    }

    /// The hang-up: the worker is at the old broker's orders from now on.
    pub(super) fn lend(
        &mut self,
        link: &Link,
        nascent: Nascent,
        times: BuildTimes,
    ) -> Result<Box<Worker>> {
        let generation = self.offered_generation();
        self.log
            .write(
                "ready",
                &json!({"generation": generation, "mode": StartMode::CprTransfer, "times": times}),
            )
            .recorded()?;
        let worker = nascent.into_worker()?;
        self.confirm_settled(&worker, &std::rc::Rc::clone(&self.rules))?;
        // Should this process die after the commit, this is how the guest's worker is found.
        self.publish_worker(&worker, None)?;
        let ready = Ready {
            digest: worker.digest.to_string(),
            build: worker.build.clone(),
            times,
        };
        link.send_with(&ToOld::Ready(ready), &[worker.pidfd(), worker.control()])
            .doing("the old broker")?;
        if let Some(incoming) = &mut self.incoming {
            incoming.deadline = None;
        }
        Ok(Box::new(worker))
    }
}
