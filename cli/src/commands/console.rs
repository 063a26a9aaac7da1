//! `baton console`: a guest's console in this terminal.

use std::io::IsTerminal;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

use crate::arguments::Globals;
use crate::client::Client;
use crate::console::Console;
use crate::console::End;
use crate::output::Output;
use crate::run_dir::RunDir;
use crate::signals::Signals;

pub(crate) fn execute(
    globals: &Globals,
    vm: &str,
    virtio: bool,
    output: &Output,
) -> Result<Exit, Refusal> {
    let signals = Signals::take()?;
    // The connection ends here: an old broker of a transfer waits for those who are connected.
    let attach = if virtio {
        Client::virtio_console
    } else {
        Client::console
    };
    let stream = RunDir::resolve(globals.run_dir.as_deref())?
        .vm(vm)?
        .broker()
        .and_then(|mut broker| attach(&mut broker))?;
    if std::io::stdin().is_terminal() {
        output.hint(&format!("attached to {vm}; Ctrl-] detaches"));
    }
    let end = Console::attach(stream)?.copy(&signals, None)?;
    match end {
        End::Escape => output.hint(&format!("\ndetached; {vm} runs on")),
        End::HungUp => output.hint(&format!("\n{vm} closed the console")),
        End::Signal | End::Other => {}
    }
    Ok(Exit::Done)
}
