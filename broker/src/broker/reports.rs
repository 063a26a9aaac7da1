//! What the running worker reports, and what follows from it.

use baton_audit::quoted;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Reply;
use baton_ipc::control::VmState;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::Order;
use baton_ipc::worker::PanicAction;
use baton_ipc::worker::Report;
use serde_json::json;

use super::Broker;
use super::MESSAGES;
use crate::clients::Awaiting;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::worker::Phase;
use crate::worker::Worker;

impl Broker {
    pub(super) fn running_worker(&mut self) -> Result<()> {
        // Bounded: a worker that talks without end does not keep the loop from its deadlines and its operator.
        for _ in 0..MESSAGES {
            let Some(worker) = &mut self.worker else {
                return Ok(());
            };
            let text = worker.read_diagnostics();
            let heard = worker.hear();
            self.log_diagnostics(&text);
            match heard {
                Ok(None) => break,
                Ok(Some(report)) => self.heard(report)?,
                Err(fault) => {
                    let how = self.worker.as_ref().and_then(Worker::reap);
                    let how =
                        how.map_or_else(|| fault.to_string(), |how| format!("{fault}; {how}"));
                    return self.lose(&how);
                }
            }
        }
        let gone = self.worker.as_ref().and_then(Worker::reap);
        gone.map_or(Ok(()), |how| self.lose(&format!("the worker died ({how})")))
    }

    pub(super) fn heard(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Running => self.started(),
            Report::FirstRun { .. } => {
                let generation = self.generation();
                self.log
                    .note("first-run", &json!({"generation": generation}));
                Ok(())
            }
            Report::Resumed => {
                self.pausing = false;
                let was = self.worker.as_ref().map(|worker| worker.phase);
                if let Some(worker) = &mut self.worker {
                    worker.phase = Phase::Running;
                }
                // After a rollback it is as before; otherwise an operator has resumed it.
                if was == Some(Phase::Running) && self.state == VmState::Paused {
                    self.state = VmState::Running;
                    (self.paused, self.panicked) = (false, false);
                    self.happened(Happening::Resumed);
                }
                self.clients.answer(Awaiting::Resumed, &Reply::Done);
                self.upgrade_rolled_back()
            }
            Report::Paused => self.stands_still("the guest was paused meanwhile"),
            Report::Status(status) => {
                self.status = status;
                let reply = Reply::Status(Box::new(self.vm_status()));
                self.clients.answer(Awaiting::Status, &reply);
                Ok(())
            }
            Report::Guest(event) => self.guest_event(&event),
            Report::Balloon { pages } => {
                self.news.said = Some(pages);
                Ok(())
            }
            Report::Resized { slot, bytes } => self.resized(slot, bytes),
            Report::Plugged { slot } => self.plugged(slot),
            Report::Ejected { slot } => self.ejected(slot),
            Report::Unplugged { slot } => self.unplugged(slot),
            Report::Vsock(report) => {
                self.vsock_said(report);
                Ok(())
            }
            Report::Violation {
                thread,
                syscall,
                address,
            } => {
                let generation = self.generation();
                self.log.note(
                    "violation",
                    &json!({"generation": generation, "thread": thread, "syscall": syscall, "address": address}),
                );
                Ok(())
            }
            Report::Agreed => self.upgrade_agreed(),
            Report::Failed { step, reason } => {
                let (step, reason) = (quoted(&step), quoted(&reason));
                self.log
                    .note("worker-failed", &json!({"step": step, "reason": reason}));
                self.pausing = false;
                match step.as_str() {
                    "resize" => self.resize_failed(&reason),
                    "plug" => self.plug_failed(&reason),
                    "unplug" => self.unplug_failed(),
                    _ => {}
                }
                if let Some(worker) = self
                    .worker
                    .as_ref()
                    .filter(|worker| worker.phase == Phase::RollingBack)
                {
                    // The guest stands still until it succeeds; its next answer is this one's next try.
                    let _ = worker.order(&Order::Rollback);
                }
                if matches!(self.state, VmState::Starting | VmState::Incoming) {
                    self.not_let_out();
                    return Err(unfit(
                        format_args!("the worker cannot {step}: {reason}"),
                        "",
                    ));
                }
                self.upgrade_refused(&format!("the old worker cannot {step}: {reason}"))
            }
            Report::Parked { .. } => {
                self.parked_to_be_saved();
                Ok(())
            }
            Report::Saved { digest, bytes } => self.saved(digest, bytes),
            Report::Hello { .. } | Report::Ready(_) | Report::Loaded { .. } => Ok(()),
        }
    }

    pub(crate) fn guest_event(&mut self, event: &GuestEvent) -> Result<()> {
        let event_name = quoted(&format!("{event:?}"));
        self.log.note("guest", &json!({"what": event_name}));
        match event {
            GuestEvent::Reset | GuestEvent::TripleFault => {
                let asked = *event == GuestEvent::Reset && self.resets_asked > 0;
                self.resets_asked -= u32::from(asked);
                self.panicked = false;
                self.happened(Happening::Reset { guest: !asked });
                Ok(())
            }
            GuestEvent::Shutdown => {
                self.guest_ended();
                Ok(())
            }
            GuestEvent::PvShutdown => {
                self.happened(Happening::GuestPvShutdown);
                self.guest_ended();
                Ok(())
            }
            GuestEvent::CrashLoaded => {
                self.happened(Happening::GuestCrashLoaded);
                Ok(())
            }
            GuestEvent::Panicked => {
                let action = self.vm.on_panic;
                self.happened(Happening::GuestPanicked(action));
                match action {
                    PanicAction::Run => Ok(()),
                    PanicAction::Pause => {
                        self.panicked = true;
                        self.stands_still("the guest has panicked")
                    }
                    PanicAction::PowerOff => {
                        self.happened(Happening::Stopped);
                        self.guest_ended();
                        Ok(())
                    }
                }
            }
            GuestEvent::Stuck(reason) => {
                self.lose(&format!("KVM cannot go on: {}", quoted(reason)))
            }
        }
    }

    /// The guest has stopped, at an operator's wish or by its panic, and an upgrade that was under way is off.
    fn stands_still(&mut self, why: &str) -> Result<()> {
        self.pausing = false;
        self.paused = true;
        self.happened(Happening::Stopped);
        self.clients.answer(Awaiting::Paused, &Reply::Done);
        let aborted = self.upgrade_refused(why);
        self.state = VmState::Paused;
        aborted
    }

    /// The guest has ended by itself.
    fn guest_ended(&mut self) {
        self.state = VmState::Stopped;
        self.end = Some(Exit::Done);
    }

    /// Nobody runs the guest any more.
    pub(crate) fn lose(&mut self, reason: &str) -> Result<()> {
        if let Some(worker) = self.worker.take() {
            worker.kill();
            self.retired.push(worker);
        }
        let starting = matches!(self.state, VmState::Starting | VmState::Incoming);
        if !starting {
            self.state = VmState::Lost;
        }
        if let Err(refusal) = self.log.write_synced("lost", &json!({"reason": reason})) {
            complain(&refusal);
        }
        self.end_vsock();
        self.upgrade_lost(reason)?;
        self.happened(Happening::Lost {
            reason: quoted(reason),
        });
        // How it is, is known: lost.
        let status = Reply::Status(Box::new(self.vm_status()));
        self.clients.answer(Awaiting::Status, &status);
        self.resizing = None;
        for awaiting in [
            Awaiting::Paused,
            Awaiting::Resumed,
            Awaiting::Devices,
            Awaiting::End,
        ] {
            let reply = Reply::Refused(refusal(
                Exit::Lost,
                format_args!("the VM is lost: {reason}"),
                "",
            ));
            self.clients.answer(awaiting, &reply);
        }
        if starting {
            return Err(refusal(
                Exit::Unfit,
                reason,
                "the worker's diagnostics are in the audit log",
            ));
        }
        if !self.options.detach {
            // A detached VM stays to be asked about; this one's caller sees the exit status.
            self.end = Some(Exit::Lost);
        }
        Ok(())
    }

    pub(crate) fn log_diagnostics(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.is_empty()) {
            self.log.note("worker-says", &json!({"line": quoted(line)}));
        }
    }
}
