//! `baton-qmp`: the QMP front of one VM.
//!
//! Started by the VM's broker, confined, with one connection to it. The broker sends it QMP clients, each with control
//! connections of its own; this program reads their JSON, turns it into typed requests and the answers back into JSON. It
//! outlives every worker, so a QMP connection survives an upgrade. It opens nothing, and it can break nothing but itself and
//! its clients' connections.
//!
//! What it offers is one table (`table.rs`): dispatch, the check of arguments and of return values, `query-qmp-schema` and
//! `docs/qmp.md` are made from it.
#![forbid(unsafe_code)]

mod capability;
mod channels;
mod commands;
mod devices;
mod document;
mod failure;
mod front;
mod hmp;
mod introspect;
mod json;
mod machine;
mod migration;
mod schema;
mod session;
mod shared;
mod table;
mod types;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (None, _) => match front::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("baton-qmp: {error}");
                ExitCode::FAILURE
            }
        },
        (Some(word), None) if word == "--document" => {
            print!("{}", document::markdown());
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!(
                "baton-qmp is started by baton-broker; `baton-qmp --document` prints what it understands"
            );
            ExitCode::from(2)
        }
    }
}
