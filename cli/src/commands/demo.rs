//! `baton demo`: shows on this host what Baton does.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

use crate::arguments::Demo;
use crate::demo;
use crate::demo::Event;
use crate::demo::Plan;
use crate::demo::story;
use crate::doctor;
use crate::doctor::Host;
use crate::doctor::Level;
use crate::failure::unfit;
use crate::outcome;
use crate::output::Output;
use crate::output::Style;
use crate::signals::Signals;
use crate::units;

pub(crate) fn execute(demo: &Demo, output: &Output) -> Result<Exit, Refusal> {
    let signals = Signals::take()?;
    fit(demo)?;
    let plan = Plan {
        upgrades: demo.upgrades,
        memory: demo.memory.clone(),
        cpus: demo.cpus,
        starting: demo.starting.clone(),
    };
    let mut teller = Teller {
        output,
        upgrades: demo.upgrades,
        live: output.live(),
        scale: 0,
        step: None,
        begun: std::time::Instant::now(),
        failed: None,
    };
    let run = demo::run(&plan, &signals, &mut |event| teller.tell(event));
    teller.live.clear();
    if let Some(refusal) = teller.failed {
        return Err(refusal);
    }
    let run = run?;
    if output.json() {
        output.document(&story::document(&run)?)?;
    } else {
        output.text(&story::person(&run, output))?;
    }
    Ok(run.exit())
}

/// What every VM needs has to be there, before anything is begun.
fn fit(demo: &Demo) -> Result<(), Refusal> {
    let checks = doctor::examine(&Host::this(), demo.starting.worker.as_deref());
    let missing: Vec<_> = checks
        .iter()
        .filter(|check| check.level == Level::Missing)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let found: Vec<&str> = missing.iter().map(|check| check.found.as_str()).collect();
    let remedies: Vec<&str> = missing.iter().map(|check| check.remedy.as_str()).collect();
    Err(unfit(
        format!("no VM can run here: {}", found.join("; ")),
        format!(
            "{}\n  everything at a glance: baton doctor",
            remedies.join("\n  ")
        ),
    ))
}

/// Tells what happens while it happens.
struct Teller<'a> {
    output: &'a Output,
    upgrades: usize,
    live: crate::output::Live,
    /// Microseconds that fill a bar: a few times the first blackout.
    scale: u64,
    step: Option<baton_ipc::control::Step>,
    begun: std::time::Instant,
    /// Standard output could not be written.
    failed: Option<Refusal>,
}

impl Teller<'_> {
    fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Started {
                worker_pid,
                start_us,
            } => self.say(&format!(
                "A guest boots in a confined worker (pid {worker_pid}), {} after its broker was started.",
                units::microseconds(*start_us)
            )),
            Event::Booting => self
                .live
                .draw("the guest goes through its memory for the first time"),
            Event::Booted(health) => self.say(&format!(
                "It counts, and writes and checks every page of its memory, over and over (boot nonce {:016x}).\n{}",
                health.nonce,
                self.output.paint(
                    Style::Dim,
                    "Now its worker is replaced. It stands still while one worker hands it to the next:"
                )
            )),
            Event::Step(number, step) => {
                if step.is_some() {
                    self.step = *step;
                }
                if *step == Some(baton_ipc::control::Step::Request) {
                    self.begun = std::time::Instant::now();
                }
                let line = outcome::progress_line(
                    &format!("{number} of {}", self.upgrades),
                    self.step,
                    self.begun,
                );
                self.live.draw(&line);
            }
            Event::Replaced(replacement) => {
                self.step = None;
                if self.scale == 0 {
                    self.scale = replacement.outcome.blackout_us.saturating_mul(3).max(1);
                }
                self.say(&story::replacement(replacement, self.scale));
            }
            Event::Aborted(outcome) => {
                self.step = None;
                self.say(&story::abort(outcome));
            }
            Event::Auditing => self.live.draw("auditing the worker"),
        }
    }

    fn say(&mut self, text: &str) {
        self.live.clear();
        if self.output.json() || self.failed.is_some() {
            return;
        }
        if let Err(refusal) = self.output.text(text) {
            self.failed = Some(refusal);
        }
    }
}
