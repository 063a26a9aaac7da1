//! `baton`: starts VMs, replaces their workers, asks and proves how they are.
//!
//! This program holds no privilege of its own: whatever it wants done it asks of a VM's broker, over the broker's
//! control socket. It reads no guest memory and starts no worker.
#![forbid(unsafe_code)]

mod arguments;
mod broker_binary;
mod client;
mod commands;
mod console;
mod demo;
mod doctor;
mod failure;
mod incoming;
mod outcome;
mod output;
mod process;
mod report;
mod run_dir;
mod signals;
mod units;

use std::process::ExitCode;

use baton_ipc::control::Exit;
use clap::Parser;

use crate::arguments::Arguments;
use crate::arguments::Command;
use crate::output::Output;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output::new(arguments.json);
    let globals = &arguments.globals;
    let result = match arguments.command {
        Command::Demo(demo) => commands::demo::execute(&demo, &output),
        Command::Run(run) => commands::run::execute(globals, &run, &output),
        Command::List => commands::list::execute(globals, &output),
        Command::Status { vm } => commands::status::execute(globals, &vm, &output),
        Command::Upgrade(upgrade) => commands::upgrade::execute(globals, &upgrade, &output),
        Command::Console { vm, virtio } => {
            commands::console::execute(globals, &vm, virtio, &output)
        }
        Command::Qmp { vm, command } => commands::qmp::execute(globals, &vm, &command, &output),
        Command::Audit(audit) => commands::audit::execute(globals, &audit, &output),
        Command::Log { command } => commands::log::execute(globals, &command, &output),
        Command::Policy { command } => commands::policy::execute(globals, &command, &output),
        Command::Doctor => commands::doctor::execute(&output),
        Command::Pause { vm } => commands::steer::pause(globals, &vm, &output),
        Command::Resume { vm } => commands::steer::resume(globals, &vm, &output),
        Command::Reset { vm } => commands::steer::reset(globals, &vm, &output),
        Command::Stop { vm, force } => commands::stop::execute(globals, &vm, force, &output),
    };
    let exit = result.unwrap_or_else(|refusal| {
        output.failure(&refusal);
        // A refusal is never a success, whatever a broker says.
        match refusal.exit {
            Exit::Done => Exit::Unfit,
            exit => exit,
        }
    });
    ExitCode::from(exit.code())
}
