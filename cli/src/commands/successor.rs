//! `baton upgrade VM --broker`: starts another broker from the running VM's file, beside the old one, and has the old one hand
//! the guest over. It is `baton run --incoming` and `migrate` in one command.
//!
//! The new broker waits on sockets in its own directory, and ends with this process as long as no guest has come.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use baton_ipc::Address;
use baton_ipc::control::CPR_SOCKET;
use baton_ipc::control::Exit;
use baton_ipc::control::MAIN_SOCKET;
use baton_ipc::control::Outcome;
use baton_ipc::control::Refusal;
use serde_json::json;

use crate::broker_binary;
use crate::commands::run::Broker;
use crate::failure::unfit;
use crate::outcome;
use crate::output::Output;
use crate::run_dir::RunDir;
use crate::signals::Signals;

/// How long a broker that nothing came of has to end by itself.
const ENDING: Duration = Duration::from_secs(5);

pub(crate) fn upgrade(
    run_dir: &RunDir,
    vm: &str,
    broker: Option<&Path>,
    worker: Option<&Path>,
    signals: &Signals,
    output: &Output,
) -> Result<Exit, Refusal> {
    let directory = run_dir.vm(vm)?;
    let mut client = directory.broker()?;
    let status = client.status()?;
    let place = run_dir.path().join(format!("{vm}.incoming"));
    let address = |name: &str| {
        let path = place.join(name);
        Address::unix(&path.display().to_string())
            .map_err(|error| unfit(error.to_string(), "choose a shorter --run-dir or name"))
    };
    let (main, cpr) = (address(MAIN_SOCKET)?, address(CPR_SOCKET)?);
    let mut arguments: Vec<OsString> = ["--detach", "--successor-of", vm]
        .map(OsString::from)
        .into();
    for (name, address) in [("--incoming-cpr", &cpr), ("--incoming-main", &main)] {
        arguments.extend([name.into(), address.to_string().into()]);
    }
    if let Some(worker) = worker {
        arguments.extend(["--worker".into(), worker.into()]);
    }
    arguments.push(status.vm_file.into());
    let binary = match broker {
        Some(binary) => binary.to_owned(),
        None => broker_binary::find()?,
    };
    let mut successor = Broker::spawn_with(&binary, run_dir, &arguments, true)?;
    if let Err(refusal) = successor.waits(signals) {
        successor.abandon(ENDING)?;
        return Err(refusal);
    }
    let outcome = outcome::followed(&directory, vm, output, |progress, interrupted| {
        client.transfer(main.clone(), cpr.clone(), signals, progress, interrupted)
    });
    drop(client);
    let outcome = match outcome {
        Ok(outcome) if outcome.outcome == Outcome::Committed => outcome,
        Ok(outcome) => {
            // It was told, and ends by itself.
            successor.end(ENDING)?;
            return outcome::say(vm, &outcome, &outcome::document(&outcome), output);
        }
        Err(refusal) => {
            // The old broker may have died after the commit: then the new one has the guest, and goes on.
            successor.abandon(ENDING)?;
            return Err(refusal);
        }
    };
    let started = successor.started(signals).map_err(|refusal| {
        unfit(
            format!("the guest has gone to the new broker, which says: {refusal}"),
            format!("see what became of it: baton status {vm}"),
        )
    })?;
    let mut document = outcome::document(&outcome);
    if let Some(document) = document.as_object_mut() {
        document.insert("broker_pid".to_owned(), json!(started.broker_pid));
    }
    outcome::say(vm, &outcome, &document, output)
}
