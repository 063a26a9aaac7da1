//! What all clients share: the state of migration, and the events that wait to be told.

use baton_ipc::control::Event;
use baton_ipc::control::Happening;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::worker::PanicAction;
use serde_json::Value;
use serde_json::json;

use crate::failure::Failure;
use crate::migration::Migration;
use crate::table::EVENTS;

/// What a command comes to: an answer, or a question to the broker and what its answer leads to.
pub(crate) enum Answer {
    /// This is it.
    Now(Result<Value, Failure>),
    /// Ask, and go on.
    Ask(Request, Then),
    /// Ask, and do not wait: it is done.
    Tell(Request),
    /// The client is told of our own events from now on, or no longer: it is done.
    OwnEvents(bool),
}

/// What follows from the broker's reply; a refusal is the error.
pub(crate) type Then = Box<dyn FnOnce(&mut Shared, Result<Reply, Refusal>) -> Answer>;

impl Answer {
    /// Nothing to say: it is done.
    pub(crate) fn done() -> Self {
        Self::Now(Ok(json!({})))
    }

    pub(crate) fn value(value: Value) -> Self {
        Self::Now(Ok(value))
    }

    pub(crate) fn failed(failure: Failure) -> Self {
        Self::Now(Err(failure))
    }

    pub(crate) fn ask(
        request: Request,
        then: impl FnOnce(&mut Shared, Result<Reply, Refusal>) -> Self + 'static,
    ) -> Self {
        Self::Ask(request, Box::new(then))
    }

    /// Asks for something that is done or refused.
    pub(crate) fn order(request: Request) -> Self {
        Self::ask(request, |_, reply| match reply {
            Ok(_) => Self::done(),
            Err(refusal) => Self::failed(refusal.into()),
        })
    }
}

/// What all clients share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) migration: Migration,
    /// A client has asked for the VM's end.
    pub(crate) quit: bool,
    /// The guest has panicked, and its end follows from that.
    panicked: bool,
    events: Vec<Value>,
}

impl Shared {
    /// The events that have come up since the last call, for everybody.
    pub(crate) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Brings an event up. One that is not as the table says is a defect, and is said to be one instead of being told.
    pub(crate) fn emit(&mut self, at_us: u64, name: &str, data: &Value) {
        let as_declared = EVENTS
            .iter()
            .find(|event| event.name == name)
            .zip(data.as_object())
            .is_some_and(|(event, data)| event.data.check(data, "").is_ok());
        if !as_declared {
            eprintln!("event {name} is not as declared: {data}");
            return;
        }
        let mut event = json!({
            "timestamp": {"seconds": at_us / 1_000_000, "microseconds": at_us % 1_000_000},
            "event": name,
        });
        if let (Some(event), Some(false)) = (
            event.as_object_mut(),
            data.as_object().map(serde_json::Map::is_empty),
        ) {
            event.insert("data".to_owned(), data.clone());
        }
        self.events.push(event);
    }

    /// The broker says that something happened.
    pub(crate) fn happened(&mut self, event: &Event) {
        let Event { at_us, what } = event;
        let at_us = *at_us;
        match what {
            Happening::Stopped => self.emit(at_us, "STOP", &json!({})),
            Happening::Resumed => self.emit(at_us, "RESUME", &json!({})),
            Happening::PowerButton => self.emit(at_us, "POWERDOWN", &json!({})),
            Happening::Reset { guest } => {
                let reason = if *guest {
                    "guest-reset"
                } else {
                    "host-qmp-system-reset"
                };
                self.emit(at_us, "RESET", &json!({"guest": guest, "reason": reason}));
            }
            Happening::Ended { guest } => {
                let reason = match (guest, self.quit) {
                    (true, _) if self.panicked => "guest-panic",
                    (true, _) => "guest-shutdown",
                    (false, true) => "host-qmp-quit",
                    (false, false) => "host-signal",
                };
                self.emit(
                    at_us,
                    "SHUTDOWN",
                    &json!({"guest": guest, "reason": reason}),
                );
            }
            Happening::GuestPanicked(action) => {
                self.panicked = *action == PanicAction::PowerOff;
                let action = match action {
                    PanicAction::Run => "run",
                    PanicAction::Pause => "pause",
                    PanicAction::PowerOff => "poweroff",
                };
                self.emit(at_us, "GUEST_PANICKED", &json!({"action": action}));
            }
            Happening::GuestCrashLoaded => {
                self.emit(at_us, "GUEST_CRASHLOADED", &json!({"action": "run"}));
            }
            Happening::BalloonChanged(bytes) => {
                self.emit(at_us, "BALLOON_CHANGE", &json!({"actual": bytes}));
            }
            Happening::DeviceDeleted { id } => {
                self.emit(at_us, "DEVICE_DELETED", &device(id));
            }
            Happening::DeviceKept { id } => {
                self.emit(at_us, "DEVICE_UNPLUG_GUEST_ERROR", &device(id));
            }
            Happening::GuestPvShutdown => self.emit(at_us, "GUEST_PVSHUTDOWN", &json!({})),
            Happening::Lost { reason } => {
                self.emit(at_us, "__org.baton_VM_LOST", &json!({"reason": reason}));
            }
            Happening::UpgradeBegan { .. }
            | Happening::UpgradeHeld
            | Happening::UpgradeStep(_)
            | Happening::UpgradeCancelled
            | Happening::UpgradeEnded(_) => crate::migration::happened(self, at_us, what),
        }
    }
}

/// A device, as events name it.
fn device(id: &str) -> Value {
    json!({"device": id, "path": format!("/machine/peripheral/{id}")})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_carry_their_time_and_only_declared_data() {
        let mut shared = Shared::default();
        shared.emit(1_000_002, "STOP", &json!({}));
        shared.emit(0, "STOP", &json!({"extra": 1}));
        shared.emit(0, "NO_SUCH_EVENT", &json!({}));
        let stop = json!({"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"});
        assert_eq!(shared.take_events(), [stop]);
    }
}
