//! The time that an upgrade spends in each step.

use std::time::Duration;
use std::time::Instant;

use baton_ipc::control::PhaseTime;
use baton_ipc::control::Step;

/// A stopwatch that is always in exactly one step.
#[derive(Debug)]
pub(crate) struct PhaseClock {
    began: Instant,
    entered: Instant,
    step: Step,
    done: Vec<PhaseTime>,
    starts: Vec<(Step, Instant)>,
}

impl PhaseClock {
    pub(crate) fn start(now: Instant) -> Self {
        Self {
            began: now,
            entered: now,
            step: Step::Request,
            done: Vec::new(),
            starts: vec![(Step::Request, now)],
        }
    }

    pub(crate) fn step(&self) -> Step {
        self.step
    }

    pub(crate) fn entered(&self) -> Instant {
        self.entered
    }

    /// Goes over to another step.
    pub(crate) fn enter(&mut self, step: Step) {
        let now = Instant::now();
        self.done.push(PhaseTime {
            step: self.step,
            us: micros(now - self.entered),
        });
        (self.step, self.entered) = (step, now);
        self.starts.push((step, now));
    }

    /// When a step was entered, if it was.
    pub(crate) fn start_of(&self, step: Step) -> Option<Instant> {
        let start = self.starts.iter().find(|start| start.0 == step)?;
        Some(start.1)
    }

    pub(crate) fn total(&self) -> Duration {
        self.began.elapsed()
    }

    /// Ends the last step.
    pub(crate) fn finish(mut self) -> Vec<PhaseTime> {
        self.enter(self.step);
        self.done
    }
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
