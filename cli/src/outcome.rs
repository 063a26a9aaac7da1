//! How an upgrade is followed, and its outcome said: to a person, and as JSON.

use std::time::Instant;

use baton_ipc::control::Exit;
use baton_ipc::control::Outcome;
use baton_ipc::control::Refusal;
use baton_ipc::control::Request;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::failure::failure;
use crate::output::Output;
use crate::output::Style;
use crate::output::bar;
use crate::output::printable;
use crate::run_dir::VmDirectory;
use crate::units;

/// How many steps an upgrade has.
const STEPS: u64 = 12;

/// What is called for every step, and between them.
type Progress<'a> = &'a mut dyn FnMut(Option<Step>);

/// Shows an upgrade's progress, and has it cancelled at the first signal.
pub(crate) fn followed(
    directory: &VmDirectory,
    vm: &str,
    output: &Output,
    run: impl FnOnce(Progress<'_>, &mut dyn FnMut()) -> Result<UpgradeOutcome, Refusal>,
) -> Result<UpgradeOutcome, Refusal> {
    let mut live = output.live();
    let begun = Instant::now();
    let mut last = None;
    let mut cancelled = false;
    let mut cancel = || {
        if cancelled {
            output.note("already cancelled: waiting for the outcome");
            return;
        }
        cancelled = true;
        output.note("cancelling: waiting for the outcome");
        // On a connection of its own: this one waits for the outcome.
        let asked = directory
            .broker()
            .and_then(|mut client| client.order(&Request::Cancel));
        if let Err(refusal) = asked {
            output.note(&format!("not cancelled: {refusal}"));
        }
    };
    let outcome = run(
        &mut |step| {
            last = step.or(last);
            live.draw(&progress_line(vm, last, begun));
        },
        &mut cancel,
    );
    live.clear();
    outcome
}

/// Says an upgrade's outcome; as JSON, this document.
pub(crate) fn say(
    vm: &str,
    outcome: &UpgradeOutcome,
    document: &Value,
    output: &Output,
) -> Result<Exit, Refusal> {
    let exit = exit_of(outcome.outcome);
    if output.json() {
        output.document(document)?;
    }
    if exit != Exit::Done {
        output.complain(&complaint(vm, outcome));
    } else if !output.json() {
        output.text(&format!("{vm}: {}", sentence(outcome, output)))?;
        if output.terminal() {
            output.text(&chart(outcome))?;
        }
    }
    Ok(exit)
}

/// How far an upgrade is, in one line.
pub(crate) fn progress_line(vm: &str, step: Option<Step>, begun: Instant) -> String {
    let number = step.map_or(0, |step| u64::from(step.number()));
    let step = step.map_or_else(|| "asking".to_owned(), |step| step.to_string());
    format!(
        "{vm}  {:<12}  {step:<13} {:.1} s",
        bar(number, STEPS, 12),
        begun.elapsed().as_secs_f32()
    )
}

/// The exit status of an outcome.
pub(crate) fn exit_of(outcome: Outcome) -> Exit {
    match outcome {
        Outcome::Committed | Outcome::Rehearsed | Outcome::Saved => Exit::Done,
        Outcome::Aborted => Exit::Aborted,
        Outcome::Lost => Exit::Lost,
    }
}

/// An outcome's name, as in JSON, and how good it is.
pub(crate) fn outcome_name(outcome: Outcome) -> (Style, &'static str) {
    match outcome {
        Outcome::Committed => (Style::Good, "committed"),
        Outcome::Rehearsed => (Style::Good, "rehearsed"),
        Outcome::Saved => (Style::Good, "saved"),
        Outcome::Aborted => (Style::Warning, "aborted"),
        Outcome::Lost => (Style::Bad, "lost"),
    }
}

/// A step's name in JSON: snake case, as `hand_over`.
fn key(step: Step) -> &'static str {
    match step {
        Step::Request => "request",
        Step::Spawn => "spawn",
        Step::Agree => "agree",
        Step::HandOver => "hand_over",
        Step::Build => "build",
        Step::Park => "park",
        Step::Save => "save",
        Step::Load => "load",
        Step::Commit => "commit",
        Step::Run => "run",
        Step::Kick => "kick",
        Step::Retire => "retire",
    }
}

/// An outcome as JSON: `phases` is an object of microseconds by step.
pub(crate) fn document(outcome: &UpgradeOutcome) -> Value {
    let UpgradeOutcome {
        outcome,
        generation,
        worker_pid,
        worker_digest,
        blackout_us,
        pause_us,
        total_ms,
        state_bytes,
        state_digest,
        phases,
        failed_step,
        reason,
    } = outcome;
    let phases: Map<String, Value> = phases
        .iter()
        .map(|phase| (format!("{}_us", key(phase.step)), phase.us.into()))
        .collect();
    json!({
        "outcome": outcome,
        "generation": generation,
        "worker_pid": worker_pid,
        "worker_digest": worker_digest,
        "blackout_us": blackout_us,
        "pause_us": pause_us,
        "total_ms": total_ms,
        "phases": phases,
        "state_bytes": state_bytes,
        "state_digest": state_digest,
        "failed_step": failed_step.map(key),
        "reason": reason,
    })
}

/// An outcome in one line.
pub(crate) fn sentence(outcome: &UpgradeOutcome, output: &Output) -> String {
    let (style, name) = outcome_name(outcome.outcome);
    let name = output.paint(style, name);
    let generation = outcome.generation;
    match outcome.outcome {
        Outcome::Committed => format!(
            "{name}: generation {generation} runs, the guest stood still for {}; {} ms in all, {} of state",
            units::microseconds(outcome.blackout_us),
            outcome.total_ms,
            units::bytes(outcome.state_bytes)
        ),
        Outcome::Rehearsed => format!(
            "{name}: the new worker was built and let go after {} ms; generation {generation} runs on",
            outcome.total_ms
        ),
        // `baton upgrade` asks for no such thing.
        Outcome::Saved => format!("{name}: its guest is in a file"),
        Outcome::Aborted | Outcome::Lost => format!("{name}{}", why(outcome)),
    }
}

/// Where and why it failed.
pub(crate) fn why(outcome: &UpgradeOutcome) -> String {
    let step = outcome
        .failed_step
        .map_or_else(String::new, |step| format!(" in {step}"));
    if outcome.reason.is_empty() {
        step
    } else {
        format!("{step}: {}", printable(&outcome.reason))
    }
}

fn complaint(vm: &str, outcome: &UpgradeOutcome) -> Refusal {
    let exit = exit_of(outcome.outcome);
    match outcome.outcome {
        Outcome::Lost => failure(
            exit,
            format!("{vm} is lost{}", why(outcome)),
            format!(
                "no worker runs its guest any more. End what is left, and start it again: baton stop --force {vm}"
            ),
        ),
        _ => failure(
            exit,
            format!("the upgrade of {vm} was aborted{}", why(outcome)),
            format!(
                "generation {} runs on{}; it is safe to try again",
                outcome.generation,
                match outcome.pause_us {
                    0 => ", and was not paused".to_owned(),
                    pause => format!(" after a pause of {}", units::microseconds(pause)),
                }
            ),
        ),
    }
}

/// Where the time went, for a person.
fn chart(outcome: &UpgradeOutcome) -> String {
    let longest = outcome
        .phases
        .iter()
        .map(|phase| phase.us)
        .max()
        .unwrap_or(0);
    let lines = outcome.phases.iter().map(|phase| {
        let paused = (Step::Park..=Step::Run).contains(&phase.step);
        format!(
            "{} {:<13} {:>10}  {}",
            if paused { "▐" } else { " " },
            phase.step.to_string(),
            units::microseconds(phase.us),
            bar(phase.us, longest, 30)
        )
    });
    let mut lines: Vec<String> = lines.collect();
    if outcome.pause_us > 0 {
        lines.push("▐ the guest stands still".to_owned());
    }
    lines.join("\n")
}
