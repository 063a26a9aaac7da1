//! `baton stop`: ends a VM, also one whose broker is dead.

use std::time::Duration;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::json;

use crate::arguments::Globals;
use crate::client::Ended;
use crate::failure::failure;
use crate::failure::unfit;
use crate::output::Output;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::signals::Signals;

/// How long an end may take. A guest that does not obey its power button within 180 s is ended by its broker; a worker with
/// much memory takes a while to give it back.
const END: Duration = Duration::from_secs(210);

pub(crate) fn execute(
    globals: &Globals,
    vm: &str,
    force: bool,
    output: &Output,
) -> Result<Exit, Refusal> {
    let signals = Signals::take()?;
    let directory = RunDir::resolve(globals.run_dir.as_deref())?.vm(vm)?;
    match directory.look()? {
        Found::Broker(mut client) => {
            client.begin_stop(force)?;
            let mut live = output.live();
            if !force {
                live.draw(
                    "waiting for the guest to power off; it has 180 s (Ctrl-C leaves it to that)",
                );
            }
            match client.ended(END, Some(&signals))? {
                Ended::Yes => {}
                Ended::Interrupted => {
                    return Err(unfit(
                        format!("{vm} was asked to end, and has not yet"),
                        format!("see whether it does: baton status {vm}"),
                    ));
                }
                Ended::NotYet => {
                    return Err(failure(
                        Exit::Busy,
                        format!("{vm} has not ended within {} s", END.as_secs()),
                        format!("end it at once: baton stop --force {vm}"),
                    ));
                }
            }
        }
        Found::Orphan(orphan) if force => directory.end(&orphan)?,
        Found::Orphan(orphan) => return Err(orphan.refusal()),
        Found::Stale => return Err(directory.stale()),
        Found::Absent => return Err(directory.absent()),
    }
    if output.json() {
        output.document(&json!({ "name": vm, "result": "ended" }))?;
    } else {
        output.text(&format!("{vm}: ended"))?;
    }
    Ok(Exit::Done)
}
