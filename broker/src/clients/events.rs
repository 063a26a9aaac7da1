//! What happens to the VM, told to those who have asked for events. Nobody is waited for: see [`Clients::publish`].
//!
//! [`Clients::publish`]: crate::clients::Clients::publish

use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;

use baton_ipc::control::Event;
use baton_ipc::control::Happening;
use baton_ipc::control::Step;

use crate::broker::Broker;
use crate::upgrade::pause::PauseEnd;
use crate::upgrade::pause::PauseFacts;
use crate::upgrade::phase_clock::PhaseClock;
use crate::upgrade::phase_clock::micros;

/// What was told of the upgrade that is under way, for a QMP front that starts meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Told(Vec<Event>);

impl Told {
    /// In order; nothing when nothing is under way.
    pub(crate) fn events(&self) -> &[Event] {
        &self.0
    }

    /// Whether somebody has had it cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        let mut told = self.0.iter();
        told.any(|event| event.what == Happening::UpgradeCancelled)
    }

    fn note(&mut self, event: &Event) {
        match &event.what {
            Happening::UpgradeBegan { .. } => self.0 = vec![event.clone()],
            Happening::UpgradeEnded(_) => self.0.clear(),
            // Who cancels again and again makes it no longer.
            Happening::UpgradeCancelled if self.is_cancelled() => {}
            Happening::UpgradeHeld | Happening::UpgradeStep(_) | Happening::UpgradeCancelled => {
                self.0.push(event.clone());
            }
            _ => {}
        }
    }
}

impl Broker {
    /// Something happened just now.
    pub(crate) fn happened(&mut self, what: Happening) {
        self.happened_at(wall_clock(), what);
    }

    /// Something happened at that time since the epoch.
    fn happened_at(&mut self, at: Duration, what: Happening) {
        let event = Event {
            at_us: micros(at),
            what,
        };
        self.told.note(&event);
        self.clients.publish(&event);
        self.tell_front(&event);
    }

    /// A pause is over. Nobody is told anything within it, so that nothing lengthens it; the times are as they were.
    pub(crate) fn paused_and_switched(
        &mut self,
        clock: &PhaseClock,
        end: &PauseEnd,
        facts: &PauseFacts,
        handed_away: bool,
    ) {
        let stood_already = self.paused;
        // One look at both clocks, so that the times keep their order.
        let (wall, now) = (wall_clock(), Instant::now());
        let time_of = |then: Instant| wall.saturating_sub(now.saturating_duration_since(then));
        for step in [Step::Park, Step::Save] {
            let Some(at) = clock.start_of(step).map(time_of) else {
                continue;
            };
            if step == Step::Park && !stood_already {
                self.happened_at(at, Happening::Stopped);
            }
            self.happened_at(at, Happening::UpgradeStep(step));
        }
        let runs = !matches!(end, PauseEnd::Lost(_));
        // A guest that has gone to another broker resumes there.
        if runs && !stood_already && !handed_away {
            // When its worker said so; what came after that is not the guest's pause.
            let pause = Duration::from_micros(facts.pause_us);
            let at = clock.start_of(Step::Park).map_or(wall, time_of) + pause;
            self.happened_at(at.min(wall), Happening::Resumed);
        }
    }
}

/// Since the epoch.
fn wall_clock() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}
