//! The same questions, put over QMP by the same driver to a real QEMU 10.0 and to Baton. Where the answers differ, the table
//! of cases has to say so, and why; a difference that it does not declare fails, and so does a declared one that is gone.
//!
//! QEMU is the program that `BATON_QEMU` names, or `qemu-system-x86_64`; `tests/run` provides it. The two answers to every
//! question are printed side by side.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

mod cases;
mod failures;
mod impostor;
mod listener;
mod pair;
mod pairs;
mod party;
mod qemu;
mod resources;
mod run_states;
mod starts;
mod strangers;

use std::path::Path;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::transfer::channel;
use serde_json::Value;
use serde_json::json;

use crate::cases::CASES;
use crate::cases::Case;
use crate::cases::Here;
use crate::failures::FAILURES;
use crate::pair::Pair;
use crate::pairs::PAIRS;
use crate::party::Party;
use crate::qemu::Machine;
use crate::qemu::Memory;
use crate::qemu::Qemu;
use crate::qemu::SMALL;
use crate::resources::RESOURCES;
use crate::run_states::RUN_STATES;
use crate::starts::STARTS;

/// A message of a case as it goes over the wire, and what of the answer counts.
///
/// `NAME {ARGUMENTS}` is a command, anything else goes as it is. What follows ` => ` are JSON pointers into what is returned.
/// `$main` and `$cpr` are the channels that lead to these sockets, `$dir` is a directory.
fn parse(step: &str, dir: &Path, main: &Path, cpr: &Path) -> (String, Vec<String>) {
    let (message, shown) = step.split_once(" => ").unwrap_or((step, ""));
    let message = message
        .replace("$main", &channel("main", main).to_string())
        .replace("$cpr", &channel("cpr", cpr).to_string())
        .replace("$dir", &dir.display().to_string());
    let line = match message.split_once(' ') {
        Some((name, arguments))
            if name
                .chars()
                .all(|c| c.is_ascii_lowercase() || "-_".contains(c)) =>
        {
            format!("{{\"execute\": \"{name}\", \"arguments\": {arguments}}}")
        }
        _ => message,
    };
    let shown = shown.split_whitespace().map(str::to_owned).collect();
    (line + "\n", shown)
}

/// An answer in one line.
fn render(answer: Option<Value>, shown: &[String], dir: &Path) -> String {
    let Some(answer) = answer else {
        return "hangs up".to_owned();
    };
    let said = if let Some(error) = answer.get("error") {
        let part = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        format!("{}: {}", part("class"), part("desc"))
    } else {
        let value = answer.get("return").unwrap_or(&answer);
        if shown.is_empty() && value.is_string() {
            value.to_string()
        } else if shown.is_empty() && *value == json!({}) {
            "done".to_owned()
        } else {
            let parts = shown.iter().map(|pointer| {
                let value = if pointer == "/id" { &answer } else { value };
                value
                    .pointer(pointer)
                    .map_or("-".to_owned(), Value::to_string)
            });
            parts.collect::<Vec<_>>().join(" ")
        }
    };
    said.replace(&dir.display().to_string(), "DIR")
}

/// What somebody says to a case.
fn ask(mut qmp: Qmp, case: &Case, dir: &Path) -> String {
    if case.negotiated {
        qmp.done("qmp_capabilities", json!({}));
    }
    // Nobody listens there.
    let parse = |step| parse(step, dir, &dir.join("main.sock"), &dir.join("cpr.sock"));
    for step in case.before {
        qmp.send(parse(step).0);
        let answer = qmp.answer();
        assert!(
            answer.get("return").is_some(),
            "{}: {step}: {answer}",
            case.name
        );
    }
    let mut said = Vec::new();
    for step in case.asks {
        let (line, shown) = parse(step);
        qmp.send(line);
        let answer = loop {
            match qmp.receive() {
                Some(message) if message.get("event").is_some() => {}
                message => break message,
            }
        };
        let ended = answer.is_none();
        said.push(render(answer, &shown, dir));
        if ended {
            break;
        }
    }
    said.join("; ")
}

/// Prints the two answers, and keeps the names of those that are not as the table declares.
#[derive(Default)]
struct Report(Vec<&'static str>);

impl Report {
    fn add(&mut self, name: &'static str, here: Option<&Here>, theirs: &str, ours: &str) {
        let (mark, agreed) = match here {
            None => (" ", theirs == ours),
            Some(here) => ("*", here.says == ours && theirs != ours),
        };
        println!("{mark} {name}\n    QEMU   {theirs}\n    Baton  {ours}");
        if let Some(here) = here {
            println!("    why    {}", here.why);
        }
        if !agreed {
            self.0.push(name);
        }
    }

    fn judge(self) {
        assert!(
            self.0.is_empty(),
            "not as the table declares: {:#?}",
            self.0
        );
    }
}

#[test]
fn every_answer_is_qemus_or_its_difference_is_declared() {
    let mut report = Report::default();
    for case in CASES {
        let dir = tempfile::Builder::new().prefix("baton-e2e-").tempdir();
        let dir = dir.unwrap();
        let machine = Machine {
            memory: case.memory,
            ..SMALL
        };
        let qemu = Qemu::start(dir.path(), "old", machine, &[]);
        let theirs = ask(qemu.connect(), case, dir.path());
        drop(qemu);
        let vm = match case.memory {
            Memory::Private => Builder::release()
                .memory_lines("share = false")
                .start_unseen(),
            _ => Builder::release().state_files().start(),
        };
        let ours = ask(Qmp::greeted(&vm), case, dir.path());
        report.add(case.name, case.here.as_ref(), &theirs, &ours);
    }
    report.judge();
}

/// Puts each flow to two of QEMU and to two of ours.
fn both(pairs: &[Pair]) {
    let mut report = Report::default();
    for pair in pairs {
        let theirs = pair::ask(Party::qemu(pair.new), pair);
        let ours = pair::ask(Party::baton(pair.new), pair);
        report.add(pair.name, pair.here.as_ref(), &theirs, &ours);
    }
    report.judge();
}

#[test]
fn both_sides_of_a_transfer_answer_as_qemus_do_or_the_difference_is_declared() {
    both(PAIRS);
}

#[test]
fn a_transfer_that_fails_leaves_what_it_does_in_qemu_or_the_difference_is_declared() {
    both(FAILURES);
}

#[test]
fn each_run_state_takes_the_commands_that_it_does_in_qemu_or_the_difference_is_declared() {
    both(RUN_STATES);
}

#[test]
fn what_both_sides_have_of_the_host_fares_as_in_qemu_or_the_difference_is_declared() {
    both(RESOURCES);
}

#[test]
fn a_side_that_is_to_wait_starts_as_qemus_does_or_the_difference_is_declared() {
    let mut report = Report::default();
    for start in STARTS {
        let (theirs, ours) = (starts::qemu(start), starts::baton(start));
        report.add(start.name, start.here.as_ref(), &theirs, &ours);
    }
    report.judge();
}
