//! The demo: boots the embedded guest, replaces its worker several times while it counts and goes through its memory,
//! asks it and the kernel how that was, and leaves nothing behind.

mod guest;
mod machine;
pub(crate) mod story;

use std::time::Duration;

use baton_ipc::control::AuditReport;
use baton_ipc::control::Exit;
use baton_ipc::control::Outcome;
use baton_ipc::control::Refusal;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;

use crate::arguments::Starting;
use crate::demo::guest::Guest;
use crate::demo::guest::Health;
use crate::demo::machine::Machine;
use crate::failure::failure;
use crate::outcome;
use crate::signals::Signals;

/// What to do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) upgrades: usize,
    /// As in a VM file: `256M`.
    pub(crate) memory: String,
    pub(crate) cpus: u8,
    pub(crate) starting: Starting,
}

/// How long the guest may take to boot and to go through its memory once: blank memory is the host's to provide, some
/// µs a page, a hundredfold where guests are emulated.
const BOOT: Duration = Duration::from_secs(120);

/// Lines of the guest to wait for after an upgrade: the first may have been under way already.
const AFTERWARDS: usize = 2;

/// And without one, to compare: about as long as an upgrade takes, most of it before the pause.
const QUIET: usize = 8;

/// How many aborted upgrades are tried again: a host that is busy with other things misses a deadline now and then.
const ABORTS: usize = 5;

/// What happened.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) start_us: u64,
    /// The longest time between two turns of the guest in a while without an upgrade, in microseconds: the host's noise.
    pub(crate) quiet_gap_us: u64,
    pub(crate) upgrades: Vec<Replacement>,
    /// Those that were aborted, and tried again.
    pub(crate) aborts: Vec<UpgradeOutcome>,
    /// How the guest was at the end.
    pub(crate) health: Health,
    pub(crate) ram_bytes: u64,
    pub(crate) audit: AuditReport,
}

/// One upgrade, as the broker and as the guest saw it.
#[derive(Debug)]
pub(crate) struct Replacement {
    pub(crate) outcome: UpgradeOutcome,
    /// The longest time between two turns of the guest around this upgrade, in microseconds of its own clock.
    pub(crate) guest_gap_us: u64,
}

/// Something that the demo has come to.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// The broker says that the guest runs.
    Started { worker_pid: u32, start_us: u64 },
    /// The guest boots and goes through its memory.
    Booting,
    /// It has done so once.
    Booted(&'a Health),
    /// An upgrade is at a step.
    Step(usize, Option<Step>),
    /// An upgrade is over.
    Replaced(&'a Replacement),
    /// One was aborted, and is tried again.
    Aborted(&'a UpgradeOutcome),
    /// Everything else is over too.
    Auditing,
}

/// Does it. Whatever happens, nothing is left running or lying about afterwards.
pub(crate) fn run(
    plan: &Plan,
    signals: &Signals,
    tell: &mut dyn FnMut(&Event<'_>),
) -> Result<Run, Refusal> {
    let machine = Machine::start(plan, signals)?;
    tell(&Event::Started {
        worker_pid: machine.started().worker_pid,
        start_us: machine.started().start_us,
    });
    let mut client = machine.client()?;
    let status = client.status()?;
    let mut guest = Guest::attach(client.console()?, status.tsc_khz);
    tell(&Event::Booting);
    guest.wait_for_sweep(signals, BOOT)?;
    tell(&Event::Booted(&guest.health()?));
    guest.clear_gap(signals)?;
    let quiet_gap_us = guest.largest_gap_us(signals, QUIET)?;

    let mut upgrades = Vec::new();
    let mut aborts = Vec::new();
    while upgrades.len() < plan.upgrades {
        let number = upgrades.len() + 1;
        guest.clear_gap(signals)?;
        let mut interrupted = false;
        let outcome = client.upgrade(
            &crate::client::Plan::default(),
            Some(signals),
            &mut |step| tell(&Event::Step(number, step)),
            &mut || interrupted = true,
        )?;
        if interrupted {
            return Err(guest::interrupted());
        }
        // Also after an abort: the old worker's guest has to be as well as before.
        let guest_gap_us = guest.largest_gap_us(signals, AFTERWARDS)?;
        match outcome.outcome {
            Outcome::Committed => {
                let replacement = Replacement {
                    outcome,
                    guest_gap_us,
                };
                tell(&Event::Replaced(&replacement));
                upgrades.push(replacement);
            }
            Outcome::Aborted if aborts.len() < ABORTS => {
                tell(&Event::Aborted(&outcome));
                aborts.push(outcome);
            }
            _ => {
                return Err(failure(
                    outcome::exit_of(outcome.outcome),
                    format!(
                        "upgrade {number} did not go through{}",
                        outcome::why(&outcome)
                    ),
                    "more with --log",
                ));
            }
        }
    }
    tell(&Event::Auditing);
    let audit = client.audit()?;
    let health = guest.health()?;
    let start_us = machine.started().start_us;
    drop((guest, client));
    machine.end()?;
    Ok(Run {
        start_us,
        quiet_gap_us,
        upgrades,
        aborts,
        health,
        ram_bytes: status.ram_bytes,
        audit,
    })
}

impl Run {
    /// The blackouts, in microseconds, in order.
    pub(crate) fn blackouts(&self) -> Vec<u64> {
        self.upgrades
            .iter()
            .map(|replacement| replacement.outcome.blackout_us)
            .collect()
    }

    /// The longest gap that the guest saw around any upgrade, in microseconds.
    pub(crate) fn guest_gap_us(&self) -> u64 {
        self.upgrades
            .iter()
            .map(|replacement| replacement.guest_gap_us)
            .max()
            .unwrap_or(0)
    }

    /// The exit status: findings of the audit are the demo's.
    pub(crate) fn exit(&self) -> Exit {
        crate::report::exit(&self.audit)
    }
}
