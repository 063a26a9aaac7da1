//! `baton qmp`: one QMP command, as any other QMP client would send it.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Globals;
use crate::failure::failure;
use crate::failure::unfit;
use crate::output::Output;
use crate::run_dir::RunDir;

/// How long an answer may take. The front starts within milliseconds; a guest's pause takes at most 300.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest message from the front, in bytes. The schema has some 30 KiB.
const MAX_MESSAGE: u64 = 4 << 20;

pub(crate) fn execute(
    globals: &Globals,
    vm: &str,
    command: &str,
    output: &Output,
) -> Result<Exit, Refusal> {
    let command = parse(command)?;
    let directory = RunDir::resolve(globals.run_dir.as_deref())?.vm(vm)?;
    // Says what is wrong with a VM that has no broker.
    drop(directory.broker()?);
    let broken = |error: std::io::Error| {
        unfit(
            format!("cannot talk QMP to {vm}: {error}"),
            "the audit log says why the QMP front does not answer: `front-failed`",
        )
    };
    let stream = directory.qmp().map_err(broken)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(broken)?;
    let mut qmp = Qmp {
        reader: BufReader::new(stream),
    };
    qmp.receive().map_err(broken)?;
    if command.get("execute") != Some(&json!("qmp_capabilities")) {
        qmp.ask(&json!({"execute": "qmp_capabilities"}))
            .map_err(broken)?;
    }
    let answer = qmp.ask(&command).map_err(broken)?;
    match (answer.get("return"), answer.get("error")) {
        (Some(value), _) => {
            output.text(&value.to_string())?;
            Ok(Exit::Done)
        }
        (None, Some(error)) => {
            let member = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
            Err(unfit(
                format!(
                    "{} ({})",
                    crate::output::printable(member("desc")),
                    crate::output::printable(member("class"))
                ),
                "",
            ))
        }
        (None, None) => Err(unfit(format!("{vm} gave an answer that is no QMP"), "")),
    }
}

fn parse(command: &str) -> Result<Value, Refusal> {
    if !command.trim_start().starts_with(['{', '[', '"']) {
        return Ok(json!({"execute": command.trim()}));
    }
    serde_json::from_str(command).map_err(|error| {
        failure(
            Exit::Usage,
            format!("the command is no JSON: {error}"),
            "for example: baton qmp web1 '{\"execute\": \"query-status\"}'",
        )
    })
}

struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    fn ask(&mut self, command: &Value) -> std::io::Result<Value> {
        let line = format!("{command}\n");
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let message = self.receive()?;
            if message.get("event").is_none() {
                return Ok(message);
            }
        }
    }

    fn receive(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        (&mut self.reader).take(MAX_MESSAGE).read_line(&mut line)?;
        if line.is_empty() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(Into::into)
    }
}
