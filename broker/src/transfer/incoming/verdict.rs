//! How it went: the old broker's word, or, when that is dead, the worker's own; and what follows the guest.

use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Received;
use baton_ipc::StartMode;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::transfer::Committed;
use baton_ipc::transfer::ToNew;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use serde_json::json;

use super::Link;
use super::Stage;
use super::cancelled;
use crate::broker::Broker;
use crate::devices::console::Console;
use crate::devices::console::Port;
use crate::devices::console::handover::Part;
use crate::devices::vsock::Vsock;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::worker::Phase;
use crate::worker::Worker;

impl Broker {
    /// The old broker says how it went.
    pub(super) fn await_verdict(
        &mut self,
        mut link: Link,
        mut worker: Box<Worker>,
    ) -> Result<Stage> {
        let text = worker.read_diagnostics();
        self.log_diagnostics(&text);
        match link.receive() {
            Ok(Received::Empty) => Ok(Stage::Lent(link, worker)),
            Ok(Received::Message(ToNew::Committed(committed), _)) => {
                let consoles = self.take_over_from(*worker, &committed);
                let by = Instant::now() + self.deadlines.order();
                Ok(Stage::Settling(link, consoles, by))
            }
            Ok(Received::Message(ToNew::Cancelled(reason), _)) => {
                self.retired.push(*worker);
                Err(cancelled(&reason))
            }
            // Dead, or as good as that: nobody else tells the worker anything any more.
            Ok(Received::Message(..) | Received::HungUp) | Err(_) => {
                self.log.note(
                    "incoming-undecided",
                    &json!({"reason": "the old broker hung up without a word"}),
                );
                let _ = worker.order(&Order::Abandon);
                Ok(Stage::Asked(worker))
            }
        }
    }

    /// The old broker hung up without a word. Only when it is dead is its worker's word this broker's to read.
    pub(super) fn await_word(&mut self, mut worker: Box<Worker>) -> Result<Stage> {
        let gone = worker.reap();
        if let Some(how) = gone {
            self.retired.push(*worker);
            return Err(unfit(
                format_args!(
                    "the old broker is gone, and the new worker never ran the guest ({how})"
                ),
                "",
            ));
        }
        let peer_lives = self
            .incoming
            .as_ref()
            .and_then(|incoming| incoming.peer.as_ref())
            .is_some_and(|peer| !is_over(peer));
        if peer_lives {
            return Ok(Stage::Asked(worker));
        }
        worker.phase = Phase::Running;
        // It answers only when it has the guest.
        let paused = match worker.hear() {
            Ok(Some(Report::Status(_))) => false,
            Ok(Some(Report::Paused)) => true,
            _ => return Ok(Stage::Asked(worker)),
        };
        let committed = Committed {
            // Which it has closed by now is not known; their ids are not used again.
            connections: crate::devices::vsock::handover::connections(&self.registry),
            paused,
            uptime_us: 0,
            resets_asked: 0,
            panicked: false,
        };
        self.consoles = self.take_over_from(*worker, &committed);
        self.settled_down(None);
        Ok(Stage::Gone)
    }

    /// The guest is this broker's. Its consoles, not yet read.
    pub(super) fn take_over_from(
        &mut self,
        mut worker: Worker,
        committed: &Committed,
    ) -> Vec<Console> {
        worker.phase = Phase::Running;
        let generation = worker.generation;
        let pause = self.incoming.as_ref().is_some_and(|one| one.paused) && !committed.paused;
        self.worker = Some(worker);
        self.paused = committed.paused;
        self.resets_asked = committed.resets_asked;
        self.panicked = committed.panicked;
        self.state = self.at_rest();
        let uptime = Duration::from_micros(committed.uptime_us);
        self.began = Instant::now().checked_sub(uptime).unwrap_or(self.began);
        // Each of these whatever becomes of the others: the guest runs.
        let named = self.directory.take_name();
        // Its broker may have died before it could, or may yet.
        let old_cgroup = self
            .incoming
            .as_mut()
            .map(|one| std::mem::take(&mut one.old_cgroup));
        self.remains.extend(old_cgroup.into_iter().flatten());
        for done in [named, self.publish()] {
            if let Err(refusal) = done {
                complain(&refusal);
            }
        }
        self.log.note(
            "running",
            &json!({"generation": generation, "mode": StartMode::CprTransfer}),
        );
        self.happened(Happening::UpgradeStep(Step::Park));
        if !self.paused {
            self.happened(Happening::Resumed);
        }
        if pause {
            // `-S`: it stands still as soon as it can be told to.
            if let Some(worker) = &self.worker {
                self.pausing = worker.order(&Order::Pause).is_ok();
            }
        }
        crate::devices::vsock::handover::forget_others(&mut self.registry, &committed.connections);
        let Some(incoming) = &mut self.incoming else {
            return Vec::new();
        };
        if let (Some(listener), Some(vsock)) = (incoming.vsock.take(), &self.vm.vsock) {
            let resumed = crate::devices::resources::vsock_place(vsock, &self.rules.policy)
                .and_then(|path| Vsock::resume(&path, listener));
            self.vsock = resumed.map_err(|refusal| complain(&refusal)).ok();
        }
        let files = std::mem::take(&mut incoming.files);
        let streams = std::mem::take(&mut incoming.consoles);
        let ports = Port::of(&self.vm).map(|(port, _)| port);
        let consoles = ports.zip(streams).zip(files);
        let resumed = consoles.map(|((port, stream), file)| Console::resume(port, stream, file));
        resumed
            .filter_map(|console| console.map_err(|refusal| complain(&refusal)).ok())
            .collect()
    }

    /// What follows the guest.
    pub(super) fn settle(
        &mut self,
        mut link: Link,
        mut consoles: Vec<Console>,
        by: Instant,
    ) -> Result<Stage> {
        loop {
            match link.receive() {
                Ok(Received::Message(ToNew::Ended(outcome), _)) => {
                    self.settled_down(Some(outcome));
                }
                Ok(Received::Message(ToNew::Console(part), descriptors)) => {
                    self.take_part(&mut consoles, Port::Serial, (part, descriptors));
                }
                Ok(Received::Message(ToNew::VirtioConsole(part), descriptors)) => {
                    self.take_part(&mut consoles, Port::Virtio, (part, descriptors));
                }
                Ok(Received::Message(ToNew::Vsock(part), socket)) => {
                    if let Some(vsock) = &mut self.vsock {
                        vsock.take_part(part, socket.into_iter().next());
                    }
                }
                Ok(Received::Empty) if Instant::now() <= by => {
                    return Ok(Stage::Settling(link, consoles, by));
                }
                _ => {
                    self.settled_down(None);
                    // Nobody else reads them by now, and everybody who listens is there.
                    self.consoles = consoles;
                    return Ok(Stage::Gone);
                }
            }
        }
    }

    fn take_part(&self, consoles: &mut [Console], port: Port, (part, ends): Part) {
        let mut all = consoles.iter_mut();
        if let Some(console) = all.find(|console| console.port() == port) {
            let taken = console.take_part(part, ends, self.directory.path());
            taken.unwrap_or_else(|refusal| complain(&refusal));
        }
    }

    /// What the old broker did not live to say, or is not there to say in time. The record is still to be written if it has not
    /// written it.
    fn end_for_the_dead(&mut self) -> UpgradeOutcome {
        let outcome = UpgradeOutcome {
            reason: UNSAID.to_owned(),
            ..self.outcome(Outcome::Committed)
        };
        let [begin, end] = ["upgrade-begin", "upgrade"];
        let written = match self.log.last_of(&[begin, end]) {
            Ok(Some(last)) if last == begin => self.log.write_synced(end, &outcome),
            found => found.map(drop),
        };
        if let Err(refusal) = written.recorded() {
            complain(&refusal);
        }
        outcome
    }

    /// The audit log is this broker's, and with it everything.
    pub(super) fn settled_down(&mut self, outcome: Option<Box<UpgradeOutcome>>) {
        if self.has_log {
            return;
        }
        self.has_log = true;
        // Each chain says where the other stood: who changes one of them has to change both.
        let mut waited = None;
        match self.open_own_log() {
            Ok(log) => {
                let linked = self
                    .log
                    .write("continued", &json!({"in": log.checkpoint()}))
                    .recorded();
                linked.unwrap_or_else(|refusal| complain(&refusal));
                self.log.end();
                waited = Some(self.log.checkpoint());
                self.log = log;
            }
            Err(refusal) => complain(&refusal),
        }
        let generation = self.generation();
        let linked = self
            .log
            .write(
                "taken-over",
                &json!({
                    "generation": generation, "vm_file": self.options.vm_file,
                    "policy_digest": self.rules.policy.digest.to_string(), "waited": waited,
                }),
            )
            .recorded();
        linked.unwrap_or_else(|refusal| complain(&refusal));
        let outcome = outcome.map_or_else(|| self.end_for_the_dead(), |outcome| *outcome);
        self.last_cancelled = false;
        self.last_upgrade = Some(outcome.clone());
        self.happened(Happening::UpgradeEnded(Box::new(outcome)));
        self.say_started();
    }
}

/// What a record of an upgrade says that the old broker did not live to end.
const UNSAID: &str = "the guest runs; the old broker did not say how long that took";

/// Whether a process has ended (pidfd_open(2): readable).
fn is_over(pidfd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))
        .is_ok_and(|ready| ready > 0)
}
