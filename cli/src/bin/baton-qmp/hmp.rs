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

fn info_migrate(shared: &Shared) -> String {
    let info = shared.migration.info();
    let mut lines = String::new();
    let mut line = |label: &str, member: &str, unit: &str| match info.get(member) {
        Some(Value::String(value)) => lines.push_str(&format!("{label}: {value}{unit}\r\n")),
        Some(value) => lines.push_str(&format!("{label}: {value}{unit}\r\n")),
        None => {}
    };
    line("Status", "status", "");
    line("Error", "error-desc", "");
    line("Total time (ms)", "total-time", "");
    line("Setup time (ms)", "setup-time", "");
    line("Downtime (ms)", "downtime", "");
    lines
}
