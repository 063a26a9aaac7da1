//! The demo's VM: made in a directory of its own, and ended and removed by every way out of the demo.

use std::fs;
use std::io;
use std::time::Duration;

use baton_guest::CommandLine;
use baton_ipc::control::Refusal;
use baton_ipc::control::Started;
use serde::Serialize;
use tempfile::TempDir;

use crate::arguments::Run;
use crate::client::Client;
use crate::commands::run::Broker;
use crate::demo::Plan;
use crate::demo::guest::PERIOD_MS;
use crate::failure::unfit;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;

/// The VM's name.
const NAME: &str = "demo";

/// How long a forced end may take.
const END: Duration = Duration::from_secs(20);

/// The VM while it runs.
#[derive(Debug)]
pub(super) struct Machine {
    broker: Broker,
    started: Started,
    directory: VmDirectory,
    over: bool,
    // Last: removed when nothing uses it any more.
    _temporary: TempDir,
}

/// The VM file.
#[derive(Serialize)]
struct Description<'a> {
    schema: u32,
    name: &'a str,
    cpus: Cpus,
    memory: Memory<'a>,
    boot: Boot<'a>,
}

#[derive(Serialize)]
struct Cpus {
    count: u8,
}

#[derive(Serialize)]
struct Memory<'a> {
    size: &'a str,
}

#[derive(Serialize)]
struct Boot<'a> {
    kernel: &'a str,
    cmdline: String,
}

impl Machine {
    /// Starts it.
    pub(super) fn start(plan: &Plan, signals: &Signals) -> Result<Self, Refusal> {
        let failed = |error: io::Error| {
            unfit(
                format!("cannot make the demo's directory: {error}"),
                "name another with TMPDIR",
            )
        };
        let temporary = tempfile::Builder::new()
            .prefix("baton-demo-")
            .tempdir()
            .map_err(failed)?;
        let file = temporary.path().join("demo.toml");
        fs::write(temporary.path().join("guest.elf"), baton_guest::ELF).map_err(failed)?;
        fs::write(&file, description(plan)?).map_err(failed)?;
        let run_dir = RunDir::resolve(Some(&temporary.path().join("run")))?;
        let run = Run {
            incoming: Vec::new(),
            paused: false,
            file,
            detach: false,
            starting: plan.starting.clone(),
        };
        let mut broker = Broker::spawn(&run, &run_dir)?;
        let directory = run_dir.vm(NAME)?;
        match broker.started(signals) {
            Ok(started) => Ok(Self {
                broker,
                started,
                directory,
                over: false,
                _temporary: temporary,
            }),
            Err(refusal) => {
                // It said why it ends; what it does not end by itself is ended here.
                finish(&mut broker, &directory)?;
                Err(refusal)
            }
        }
    }

    pub(super) fn started(&self) -> &Started {
        &self.started
    }

    /// A connection to its broker.
    pub(super) fn client(&self) -> Result<Client, Refusal> {
        self.directory.broker()
    }

    /// Ends it, and says if that did not go well.
    pub(super) fn end(mut self) -> Result<(), Refusal> {
        self.over = true;
        finish(&mut self.broker, &self.directory)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.over {
            // The reason for ending early is what the person is told.
            let _ = finish(&mut self.broker, &self.directory);
        }
    }
}

/// Ends broker and worker: by request, else by force.
fn finish(broker: &mut Broker, directory: &VmDirectory) -> Result<(), Refusal> {
    if let Ok(Found::Broker(mut client)) = directory.look() {
        // If it refuses, it is killed below; the connection stays until it has heard.
        let _ = client
            .begin_stop(true)
            .and_then(|()| client.ended(END, None));
    }
    broker.end(END)?;
    // A killed broker leaves its worker.
    if let Found::Orphan(orphan) = directory.look()? {
        directory.end(&orphan)?;
    }
    Ok(())
}

fn description(plan: &Plan) -> Result<String, Refusal> {
    let mut cmdline = CommandLine::new().walk().console().period_ms(PERIOD_MS);
    if plan.cpus > 1 {
        cmdline = cmdline.cpus(usize::from(plan.cpus));
    }
    let description = Description {
        schema: 1,
        name: NAME,
        cpus: Cpus { count: plan.cpus },
        memory: Memory { size: &plan.memory },
        boot: Boot {
            kernel: "guest.elf",
            cmdline: cmdline.to_string(),
        },
    };
    toml::to_string(&description)
        .map_err(|error| unfit(format!("cannot write the demo's VM file: {error}"), ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Starting;

    #[test]
    fn the_vm_file_says_what_was_asked_for() {
        let plan = Plan {
            upgrades: 1,
            memory: "64M".to_owned(),
            cpus: 2,
            starting: Starting::default(),
        };
        let file: toml::Table = description(&plan).unwrap().parse().unwrap();
        assert_eq!(file["schema"].as_integer(), Some(1));
        assert_eq!(file["memory"]["size"].as_str(), Some("64M"));
        assert_eq!(file["cpus"]["count"].as_integer(), Some(2));
        let cmdline = file["boot"]["cmdline"].as_str().unwrap();
        for word in ["walk", "console", "cpus=2", "period_ms=50"] {
            assert!(cmdline.split(' ').any(|have| have == word), "{cmdline}");
        }
    }
}
