//! `baton pause`, `resume` and `reset`: one request, one answer.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::Request;
use serde_json::json;

use crate::arguments::Globals;
use crate::output::Output;
use crate::run_dir::RunDir;

pub(crate) fn pause(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    order(globals, vm, output, &Request::Pause, "paused")
}

pub(crate) fn resume(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    order(globals, vm, output, &Request::Resume, "running")
}

pub(crate) fn reset(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    order(globals, vm, output, &Request::Reset, "reset")
}

fn order(
    globals: &Globals,
    vm: &str,
    output: &Output,
    request: &Request,
    result: &str,
) -> Result<Exit, Refusal> {
    RunDir::resolve(globals.run_dir.as_deref())?
        .vm(vm)?
        .broker()?
        .order(request)?;
    if output.json() {
        output.document(&json!({ "name": vm, "result": result }))?;
    } else {
        output.text(&format!("{vm}: {result}"))?;
    }
    Ok(Exit::Done)
}
