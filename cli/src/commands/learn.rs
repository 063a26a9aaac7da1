//! `baton policy learn`: runs a VM under a policy that learns, and says what its workers called that no rule permits, and which
//! rules they had no use for.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_policy::Policy;
use baton_policy::learn::Lesson;
use baton_policy::learn::Missing;
use baton_policy::learn::Observation;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use serde::Deserialize;
use serde_json::json;

use crate::arguments::Globals;
use crate::arguments::Learn;
use crate::arguments::Run;
use crate::commands::run::Broker;
use crate::failure::failure;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;

/// How long the VM's end may take.
const END: Duration = Duration::from_secs(20);

/// How often the command is looked after.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) fn execute(globals: &Globals, learn: &Learn, output: &Output) -> Result<Exit, Refusal> {
    let policy = policy_of(&learn.file)?;
    let signals = Signals::take()?;
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    let lessons = tempfile::NamedTempFile::new().map_err(|error| {
        unfit(
            format!("cannot make a file for what is learnt: {error}"),
            "",
        )
    })?;
    let run = Run {
        file: learn.file.clone(),
        detach: false,
        incoming: Vec::new(),
        paused: false,
        starting: learn.starting.clone(),
    };
    let mut broker = Broker::spawn_learning(&run, &run_dir, lessons.path())?;
    let started = broker.started(&signals)?;
    let directory = run_dir.vm(&started.name)?;
    output.hint(&format!(
        "{}: its workers are not confined by their filters, and each call is written down",
        started.name
    ));
    let worked = work(learn, globals, &started.name, &directory, &signals);
    let ended = finish(&mut broker, &directory);
    worked?;
    ended?;
    let observations = observations(lessons.path())?;
    let lesson = policy.learn(&observations);
    if let Some(file) = &learn.record {
        record(file, &observations)?;
    }
    say(&policy, &lesson, output)?;
    Ok(match lesson.missing.is_empty() {
        true => Exit::Done,
        false => Exit::Findings,
    })
}

/// The policy of a VM file, which has to learn: a VM is run without its filters only where the policy itself says so.
fn policy_of(file: &Path) -> Result<Policy, Refusal> {
    #[derive(Deserialize)]
    struct Description {
        policy: Option<String>,
    }
    let text =
        fs::read_to_string(file).map_err(|error| crate::failure::file("read", file, &error))?;
    let description: Description =
        toml::from_str(&text).map_err(|error| unfit(format!("{}: {error}", file.display()), ""))?;
    let named = description.policy.unwrap_or_else(|| "default".to_owned());
    let path = match named.as_str() {
        "default" => named.into(),
        _ => file.parent().unwrap_or(Path::new("")).join(named),
    };
    let policy = super::policy::load(&path)?;
    if policy.learn.is_none() {
        return Err(failure(
            Exit::Refused,
            format!("the policy {} does not learn", policy.name),
            "give the VM a policy with [learn] and why = \"...\", on a host where nobody else's guests run",
        ));
    }
    Ok(policy)
}

/// Lets the VM run: as long as the command does, or for the time.
fn work(
    learn: &Learn,
    globals: &Globals,
    vm: &str,
    directory: &VmDirectory,
    signals: &Signals,
) -> Result<(), Refusal> {
    let mut child = start(learn, globals, vm)?;
    let until = learn
        .time
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let ended = loop {
        if let Some(child) = &mut child {
            let status = child
                .try_wait()
                .map_err(|error| unfit(format!("cannot wait for the command: {error}"), ""))?;
            if let Some(status) = status {
                break match status.success() {
                    true => Ok(()),
                    false => Err(unfit(format!("the command failed ({status})"), "")),
                };
            }
        }
        if until.is_some_and(|until| Instant::now() > until) {
            break Ok(());
        }
        if !matches!(directory.look()?, Found::Broker(_)) {
            // The guest has switched itself off.
            break Ok(());
        }
        let timeout = Timespec::try_from(LOOK).ok();
        let _ = rustix::event::poll(&mut [PollFd::new(signals, PollFlags::IN)], timeout.as_ref());
        if signals.came() {
            break Ok(());
        }
    };
    if let Some(mut child) = child {
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
    ended
}

fn start(learn: &Learn, globals: &Globals, vm: &str) -> Result<Option<Child>, Refusal> {
    let Some((program, arguments)) = learn.command.split_first() else {
        return Ok(None);
    };
    let mut command = Command::new(program);
    command.args(arguments).env("BATON_VM", vm);
    command.stdout(std::io::stderr());
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    command.env("BATON_RUN_DIR", run_dir.path());
    command.spawn().map(Some).map_err(|error| {
        unfit(
            format!("cannot execute {}: {error}", Path::new(program).display()),
            "",
        )
    })
}

fn finish(broker: &mut Broker, directory: &VmDirectory) -> Result<(), Refusal> {
    if let Ok(Found::Broker(mut client)) = directory.look() {
        // If it refuses, it is killed below.
        let _ = client
            .begin_stop(true)
            .and_then(|()| client.ended(END, None));
    }
    broker.end(END)
}

/// What was written down, one observation a line. A line that is no observation is no file of this program's.
fn observations(file: &Path) -> Result<BTreeSet<Observation>, Refusal> {
    let text =
        fs::read_to_string(file).map_err(|error| crate::failure::file("read", file, &error))?;
    text.lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .map_err(|error| unfit(format!("what was learnt cannot be read: {error}"), ""))
}

fn record(file: &Path, observations: &BTreeSet<Observation>) -> Result<(), Refusal> {
    let lines: Result<Vec<String>, _> = observations.iter().map(serde_json::to_string).collect();
    let lines = lines.map_err(|error| unfit(format!("cannot write this as JSON: {error}"), ""))?;
    fs::write(file, lines.join("\n") + "\n")
        .map_err(|error| crate::failure::file("write", file, &error))
}

fn say(policy: &Policy, lesson: &Lesson, output: &Output) -> Result<(), Refusal> {
    let proposal: String = lesson.missing.iter().map(Missing::proposal).collect();
    if output.json() {
        return output.document(&json!({
            "policy": policy.name,
            "observed": lesson.observed,
            "unused": super::policy::value(&lesson.unused)?,
            "missing": super::policy::value(&lesson.missing)?,
            "proposal": proposal,
        }));
    }
    let mut lines = vec![format!(
        "{} different calls, against the policy {}",
        lesson.observed, policy.name
    )];
    lines.extend(
        lesson
            .unused
            .iter()
            .map(|unused| format!("{} {unused}", output.paint(Style::Good, "- unused"))),
    );
    lines.extend(lesson.missing.iter().map(|missing| {
        let roles: Vec<String> = missing.roles.iter().map(ToString::to_string).collect();
        let what = output.paint(Style::Bad, "+ not permitted");
        let mut line = format!("{what} {}, in {}", missing.call, roles.join(", "));
        if !missing.arguments.is_empty() {
            line += &format!(": {}", missing.arguments.join("; "));
        }
        line
    }));
    if !proposal.is_empty() {
        lines.push("\n# To permit it, once each has its topic and its reason:\n".to_owned());
        lines.push(proposal.trim_end().to_owned());
    }
    output.text(&lines.join("\n"))
}
