//! `baton-worker`: the confined VMM process. A broker executes it; a person can only ask it what it is.

mod needs;

use std::process::ExitCode;

use clap::Parser;

/// Runs one guest for baton-broker, confined.
///
/// It takes nothing from its command line, its environment or the file system: descriptor 0 is the socket to the broker
/// that started it, and everything else comes over that.
#[derive(Parser)]
#[command(name = "baton-worker", version)]
struct Arguments {}

fn main() -> ExitCode {
    let Arguments {} = Arguments::parse();
    ExitCode::from(u8::try_from(baton_worker::live()).unwrap_or(1))
}
