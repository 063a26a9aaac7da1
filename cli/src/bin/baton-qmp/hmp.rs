//! `human-monitor-command`: the few verbs of QEMU's human monitor that its documentation of CPR uses, as text.

use baton_ipc::control::VmStatus;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::commands;
use crate::machine;
use crate::schema::Object;
use crate::shared::Answer;
use crate::shared::Shared;
use crate::table::COMMANDS;

pub(crate) fn execute(shared: &mut Shared, arguments: &Object) -> Answer {
    let line = arguments.get("command-line").and_then(Value::as_str);
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
    match words.as_slice() {
        [] => text(""),
        ["info", "status"] => commands::with_status(|_, status| text(info_status(&status))),
        ["info", "migrate"] => text(info_migrate(shared)),
        ["info"] => text(
            "info migrate  -- show migration status\r\ninfo status  -- show the current VM status (running|paused)\r\n",
        ),
        ["info", what, ..] => text(format!("unknown command: 'info {what}'\r\n")),
        ["migrate_set_parameter", name, value] => {
            in_words(shared, "migrate-set-parameters", json!({ *name: value }))
        }
        ["migrate_set_capability", name, state @ ("on" | "off")] => in_words(
            shared,
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": name, "state": *state == "on"}]}),
        ),
        [
            "migrate" | "migrate_cancel" | "stop" | "cont" | "c" | "system_reset"
            | "system_powerdown" | "quit" | "q",
        ] => {
            let name = match words.first() {
                Some(&"c") => "cont",
                Some(&"q") => "quit",
                Some(name) => name,
                None => "",
            };
            in_words(shared, name, json!({}))
        }
        ["migrate_continue", state] => {
            in_words(shared, "migrate-continue", json!({"state": state}))
        }
        ["migrate", "-d"] => in_words(shared, "migrate", json!({})),
        ["migrate", "-d", uri] | ["migrate", uri] => {
            in_words(shared, "migrate", json!({"uri": uri}))
        }
        [verb, ..] => text(format!("unknown command: '{verb}'\r\n")),
    }
}

fn text(text: impl Into<String>) -> Answer {
    Answer::value(Value::String(text.into()))
}

/// Does what a command of the table does, and says it in words: nothing when it is done.
fn in_words(shared: &mut Shared, name: &str, arguments: Value) -> Answer {
    let arguments = match arguments {
        Value::Object(arguments) => arguments,
        _ => Map::new(),
    };
    let Some(command) = COMMANDS
        .iter()
        .find(|one| one.name.replace('-', "_") == name.replace('-', "_"))
    else {
        return text(format!("unknown command: '{name}'\r\n"));
    };
    let answer = match command.arguments.check(&arguments, "") {
        Ok(()) => (command.run)(shared, &arguments),
        Err(failure) => Answer::failed(failure),
    };
    said(answer)
}

fn said(answer: Answer) -> Answer {
    match answer {
        Answer::Now(Ok(_)) | Answer::OwnEvents(_) => text(""),
        Answer::Tell(request) => Answer::ask(request, |_, _| text("")),
        Answer::Now(Err(failure)) => text(format!("Error: {}\r\n", failure.text)),
        Answer::Ask(request, then) => {
            Answer::ask(request, move |shared, reply| said(then(shared, reply)))
        }
    }
}

fn info_status(status: &VmStatus) -> String {
    match machine::run_state(status) {
        "running" => "VM status: running\r\n".to_owned(),
        "paused" => "VM status: paused\r\n".to_owned(),
        state => format!("VM status: paused ({state})\r\n"),
    }
}

/// As QEMU 10.0 has it (`hmp_info_migrate`, migration/migration-hmp-cmds.c), without what is not known here.
fn info_migrate(shared: &Shared) -> String {
    let info = shared.migration.info();
    let text = |member: &str| info.get(member).and_then(Value::as_str);
    let Some(status) = text("status") else {
        return String::new();
    };
    let why = text("error-desc").map(|why| format!(" ({why})"));
    let mut lines = format!("Migration status: {status}{}\r\n", why.unwrap_or_default());
    for (label, member) in [
        ("total time", "total-time"),
        ("downtime", "downtime"),
        ("setup", "setup-time"),
    ] {
        if let Some(ms) = info.get(member) {
            lines.push_str(&format!("{label}: {ms} ms\r\n"));
        }
    }
    let bytes = info.pointer("/ram/transferred").and_then(Value::as_u64);
    if let Some(bytes) = bytes {
        lines.push_str(&format!("transferred ram: {} kbytes\r\n", bytes >> 10));
    }
    lines
}
