//! What happens to the VM, told to those who have asked for events. Nobody is waited for: see [`Clients::publish`].
//!
//! [`Clients::publish`]: crate::clients::Clients::publish

use std::time::Duration;
use std::time::SystemTime;

use baton_ipc::control::Event;
use baton_ipc::control::Happening;
use baton_ipc::control::Step;

use crate::broker::Broker;
use crate::pause::PauseEnd;
use crate::pause::PauseFacts;
use crate::phase_clock::PhaseClock;
use crate::phase_clock::micros;

impl Broker {
    /// Something happened just now.
    pub(crate) fn happened(&mut self, what: Happening) {
        self.happened_before(Duration::ZERO, what);
    }

    /// Something happened that long ago.
    pub(crate) fn happened_before(&mut self, ago: Duration, what: Happening) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let at = now.unwrap_or_default().saturating_sub(ago);
        let event = Event {
            at_us: micros(at),
            what,
        };
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
        for step in [Step::Park, Step::Save] {
            let Some(ago) = clock.since(step) else {
                continue;
            };
            if step == Step::Park && !stood_already {
                self.happened_before(ago, Happening::Stopped);
            }
            self.happened_before(ago, Happening::UpgradeStep(step));
        }
        let runs = !matches!(end, PauseEnd::Lost(_));
        // A guest that has gone to another broker resumes there.
        if runs && !stood_already && !handed_away {
            // When its worker said so; what came after that is not the guest's pause.
            let pause = Duration::from_micros(facts.pause_us);
            let ago = clock.since(Step::Park).unwrap_or_default();
            self.happened_before(ago.saturating_sub(pause), Happening::Resumed);
        }
    }
}
