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
mod qemu;

use std::fmt::Write as _;
use std::path::Path;

use baton_tests::Builder;
use baton_tests::Qmp;
use serde_json::Value;
use serde_json::json;

use crate::cases::CASES;
use crate::cases::Case;
use crate::qemu::Qemu;

/// A message of a case as it goes over the wire, and what of the answer counts.
///
/// `NAME {ARGUMENTS}` is a command, anything else goes as it is. What follows ` => ` are JSON pointers into what is returned.
/// `$main` and `$cpr` are channels whose sockets nobody listens on, `$dir` is where they would be.
fn parse(step: &str, dir: &Path) -> (String, Vec<String>) {
    let (message, shown) = step.split_once(" => ").unwrap_or((step, ""));
    let channel = |kind: &str| {
        let path = dir.join(format!("{kind}.sock"));
        let addr = json!({"transport": "socket", "type": "unix", "path": path});
        json!({"channel-type": kind, "addr": addr}).to_string()
    };
    let message = message
        .replace("$main", &channel("main"))
        .replace("$cpr", &channel("cpr"))
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
    for step in case.before {
        qmp.send(parse(step, dir).0);
        let answer = qmp.answer();
        assert!(
            answer.get("return").is_some(),
            "{}: {step}: {answer}",
            case.name
        );
    }
    let mut said = Vec::new();
    for step in case.asks {
        let (line, shown) = parse(step, dir);
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

#[test]
fn every_answer_is_qemus_or_its_difference_is_declared() {
    let mut table = String::new();
    let mut wrong = Vec::new();
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let qemu = Qemu::start(dir.path());
        let theirs = ask(qemu.connect(), case, dir.path());
        drop(qemu);
        let vm = Builder::release().start();
        let ours = ask(Qmp::greeted(&vm), case, dir.path());
        let (mark, agreed) = match &case.here {
            None => (" ", theirs == ours),
            Some(here) => ("*", here.says == ours && theirs != ours),
        };
        writeln!(
            table,
            "{mark} {}\n    QEMU   {theirs}\n    Baton  {ours}",
            case.name
        )
        .unwrap();
        if let Some(here) = &case.here {
            writeln!(table, "    why    {}", here.why).unwrap();
        }
        if !agreed {
            wrong.push(case.name);
        }
    }
    println!("{table}");
    assert!(
        wrong.is_empty(),
        "not as the table declares: {wrong:#?}\n{table}"
    );
}
