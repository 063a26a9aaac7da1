//! `baton upgrade`: replaces one worker.

use std::path::Path;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;

use crate::arguments::Globals;
use crate::arguments::Upgrade;
use crate::client::Plan;
use crate::client::WorkerFile;
use crate::commands::fleet;
use crate::commands::successor;
use crate::failure::unfit;
use crate::outcome;
use crate::output::Output;
use crate::run_dir::RunDir;
use crate::signals::Signals;

pub(crate) fn execute(
    globals: &Globals,
    upgrade: &Upgrade,
    output: &Output,
) -> Result<Exit, Refusal> {
    let signals = Signals::take()?;
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    if let (Some(vm), Some(broker)) = (&upgrade.vm, &upgrade.broker) {
        let worker = upgrade.worker.as_deref();
        return successor::upgrade(&run_dir, vm, broker.as_deref(), worker, &signals, output);
    }
    let worker = upgrade.worker.as_deref().map(open_worker).transpose()?;
    match &upgrade.vm {
        Some(vm) => {
            let plan = Plan {
                dry_run: upgrade.dry_run,
                approve: upgrade.approve.as_deref(),
                worker: worker.as_ref(),
            };
            one(&run_dir, vm, &plan, &signals, output)
        }
        None => fleet::upgrade(&run_dir, upgrade, worker.as_ref(), &signals, output),
    }
}

/// Opens the new worker here, with this user's rights: the broker opens no path that a client names.
fn open_worker(path: &Path) -> Result<WorkerFile, Refusal> {
    // Opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let binary = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| crate::failure::file("open the worker", path, &error.into()))?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(baton_policy::signature::SUFFIX);
    // The policy may have the binary's digest: the broker says what it lacks.
    let signature = rustix::fs::open(Path::new(&beside), flags, Mode::empty()).ok();
    let kind = rustix::fs::fstat(&binary).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::RegularFile) => Ok(WorkerFile { binary, signature }),
        _ => Err(unfit(
            format!("{} is not a regular file", path.display()),
            "name the worker's binary",
        )),
    }
}

fn one(
    run_dir: &RunDir,
    vm: &str,
    plan: &Plan<'_>,
    signals: &Signals,
    output: &Output,
) -> Result<Exit, Refusal> {
    let directory = run_dir.vm(vm)?;
    let mut client = directory.broker()?;
    let outcome = outcome::followed(&directory, vm, output, |progress, interrupted| {
        client.upgrade(plan, Some(signals), progress, interrupted)
    })?;
    outcome::say(vm, &outcome, &outcome::document(&outcome), output)
}
