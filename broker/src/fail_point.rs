//! Deterministic faults for tests, at the steps of an upgrade. A build without the feature `fail-points` has none of it.

use baton_ipc::control::Step;

use crate::worker::Worker;

/// Does what the test has asked for at this step of the pause.
#[cfg(not(feature = "fail-points"))]
pub(crate) fn at(_step: Step, _old: &Worker, _new: &Worker) {}

/// A shorter wait for `migrate-incoming`, if the test has asked for one.
#[cfg(not(feature = "fail-points"))]
pub(crate) fn deferred() -> Option<std::time::Duration> {
    None
}

#[cfg(feature = "fail-points")]
pub(crate) use armed::*;

#[cfg(feature = "fail-points")]
mod armed {
    use std::str::FromStr;

    use std::time::Duration;

    use baton_ipc::FailPoint;
    use baton_ipc::FdSocket;
    use rustix::process::Pid;
    use rustix::process::PidfdFlags;
    use rustix::process::Signal;

    use super::*;

    /// The variable that arms faults: `STEP:ACTION-SIDE`, as in `S7:kill-old`, or `SIDE@SITE:ACTION` for one inside a
    /// worker, as in `new@load:die`; or one of [`Between`]. Several with commas. Each acts once, in the first upgrade that reaches it.
    pub(crate) const VARIABLE: &str = "BATON_FAIL";

    /// What the broker itself does at a step.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Act {
        KillOld,
        KillNew,
        KillBoth,
        KillBroker,
        /// The broker whose child the new worker is, in a transfer.
        KillOtherBroker,
        StopOld,
        StopNew,
        StopBroker,
        StopOtherBroker,
    }

    /// What happens between two brokers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Between {
        /// `defer-hurries`: who waits for `migrate-incoming` waits a second.
        DeferHurries,
        /// `committed-is-lost`: the link breaks before the old broker can say that the new worker runs.
        CommittedIsLost,
    }

    #[derive(Debug)]
    enum Fault {
        Between(Between),
        Broker(u8, Act),
        Old(FailPoint),
        New(FailPoint),
    }

    thread_local! {
        static FAULTS: std::cell::RefCell<Vec<Fault>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    /// Reads the variable.
    pub(crate) fn arm() -> Result<(), String> {
        let Ok(text) = std::env::var(VARIABLE) else {
            return Ok(());
        };
        let faults = text
            .split(',')
            .filter(|word| !word.is_empty())
            .map(parse)
            .collect::<Result<Vec<_>, _>>()?;
        FAULTS.set(faults);
        Ok(())
    }

    fn parse(word: &str) -> Result<Fault, String> {
        match word {
            "defer-hurries" => return Ok(Fault::Between(Between::DeferHurries)),
            "committed-is-lost" => return Ok(Fault::Between(Between::CommittedIsLost)),
            _ => {}
        }
        if let Some((side, point)) = word.split_once('@') {
            let point = FailPoint::from_str(point)?;
            return match side {
                "old" => Ok(Fault::Old(point)),
                "new" => Ok(Fault::New(point)),
                other => Err(format!("no side {other:?}")),
            };
        }
        let (step, act) = word
            .split_once(':')
            .ok_or_else(|| format!("{word:?} is no fault"))?;
        let step = step
            .strip_prefix('S')
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| format!("no step {step:?}"))?;
        let act = match act {
            "kill-old" => Act::KillOld,
            "kill-new" => Act::KillNew,
            "kill-both" => Act::KillBoth,
            "kill-broker" => Act::KillBroker,
            "kill-other-broker" => Act::KillOtherBroker,
            "stop-old" => Act::StopOld,
            "stop-new" => Act::StopNew,
            "stop-broker" => Act::StopBroker,
            "stop-other-broker" => Act::StopOtherBroker,
            other => return Err(format!("no act {other:?}")),
        };
        Ok(Fault::Broker(step, act))
    }

    fn take<T>(mut wanted: impl FnMut(&Fault) -> Option<T>) -> Vec<T> {
        FAULTS.with_borrow_mut(|faults| {
            let mut taken = Vec::new();
            faults.retain(|fault| match wanted(fault) {
                Some(value) => {
                    taken.push(value);
                    false
                }
                None => true,
            });
            taken
        })
    }

    /// The faults to arm inside the old worker.
    pub(crate) fn for_old() -> Vec<FailPoint> {
        take(|fault| {
            if let Fault::Old(point) = fault {
                Some(*point)
            } else {
                None
            }
        })
    }

    /// The faults to arm inside the new worker.
    pub(crate) fn for_new() -> Vec<FailPoint> {
        take(|fault| {
            if let Fault::New(point) = fault {
                Some(*point)
            } else {
                None
            }
        })
    }

    fn happens(between: Between) -> bool {
        !take(|fault| match fault {
            Fault::Between(armed) if *armed == between => Some(()),
            _ => None,
        })
        .is_empty()
    }

    /// A shorter wait for `migrate-incoming`, if the test has asked for one.
    pub(crate) fn deferred() -> Option<Duration> {
        happens(Between::DeferHurries).then_some(Duration::from_secs(1))
    }

    /// What leads to nobody, instead of the brokers' link, if the test has asked for that.
    pub(crate) fn cut_link() -> Option<FdSocket> {
        let pair = happens(Between::CommittedIsLost).then(FdSocket::pair);
        pair?.ok().map(|(end, _)| end)
    }

    /// Does what the test has asked for at this step, when both workers are there.
    pub(crate) fn at(step: Step, old: &Worker, new: &Worker) {
        act_at(step, Some(old), Some(new));
    }

    /// Does what the test has asked for at this step, to whoever is there.
    pub(crate) fn act_at(step: Step, old: Option<&Worker>, new: Option<&Worker>) {
        let number = step.number();
        let acts = take(|fault| match fault {
            Fault::Broker(at, act) if *at == number => Some(*act),
            _ => None,
        });
        for act in acts {
            match act {
                Act::KillOld => old.into_iter().for_each(Worker::kill),
                Act::KillNew => new.into_iter().for_each(Worker::kill),
                Act::KillBoth => old.into_iter().chain(new).for_each(Worker::kill),
                Act::StopOld => old.into_iter().for_each(Worker::stop),
                Act::StopNew => new.into_iter().for_each(Worker::stop),
                Act::KillOtherBroker => other(new, Signal::KILL),
                Act::KillBroker => signal(rustix::process::getpid(), Signal::KILL),
                Act::StopOtherBroker => other(new, Signal::STOP),
                Act::StopBroker => signal(rustix::process::getpid(), Signal::STOP),
            }
        }
    }

    /// To the broker whose child the new worker is.
    fn other(new: Option<&Worker>, what: Signal) {
        let parent = new
            .and_then(|new| crate::worker::process::parent(new.process.pid))
            .and_then(Pid::from_raw);
        parent.into_iter().for_each(|parent| signal(parent, what));
    }

    /// By the only call that the broker's filter has for it.
    fn signal(process: Pid, what: Signal) {
        if let Ok(pidfd) = rustix::process::pidfd_open(process, PidfdFlags::empty()) {
            let _ = rustix::process::pidfd_send_signal(&pidfd, what);
        }
    }
}
