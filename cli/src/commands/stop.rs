//! `baton stop`: ends a VM, also one whose broker is dead.

use std::time::Duration;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::json;

use crate::arguments::Globals;
use crate::output::Output;
use crate::run_dir::Found;
use crate::run_dir::RunDir;

/// How long a forced end may take: a worker with much memory takes a while to give it back.
const END: Duration = Duration::from_secs(30);

pub(crate) fn execute(
    globals: &Globals,
    vm: &str,
    force: bool,
    output: &Output,
) -> Result<Exit, Refusal> {
    let directory = RunDir::resolve(globals.run_dir.as_deref())?.vm(vm)?;
    let (result, sentence) = match directory.look()? {
        Found::Broker(mut client) => {
            client.stop(force)?;
            if force && client.wait_for_end(END)? {
                ("ended", "ended")
            } else if force {
                ("ending", "is being ended")
            } else {
                ("asked", "was asked to power off")
            }
        }
        Found::Orphan(orphan) if force => {
            directory.end(&orphan)?;
            ("ended", "ended; its broker was dead already")
        }
        Found::Orphan(orphan) => return Err(orphan.refusal()),
        Found::Stale => return Err(directory.stale()),
        Found::Absent => return Err(directory.absent()),
    };
    if output.json() {
        output.document(&json!({ "name": vm, "result": result }))?;
    } else {
        output.text(&format!("{vm}: {sentence}"))?;
    }
    if result == "asked" {
        output.hint(&format!(
            "if the guest does not obey its power button: baton stop --force {vm}"
        ));
    }
    Ok(Exit::Done)
}
