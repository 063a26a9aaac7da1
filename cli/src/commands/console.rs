//! `baton console`: a guest's console in this terminal.

use std::io::IsTerminal;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

use crate::arguments::Globals;
use crate::console::Console;
use crate::console::End;
use crate::output::Output;
use crate::run_dir::RunDir;
use crate::signals::Signals;

pub(crate) fn execute(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    let signals = Signals::take()?;
    let stream = RunDir::resolve(globals.run_dir.as_deref())?
        .vm(vm)?
        .broker()?
        .console()?;
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
