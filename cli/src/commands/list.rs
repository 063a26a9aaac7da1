//! `baton list`: the VMs that run here.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::VmStatus;
use serde_json::Value;

use crate::arguments::Globals;
use crate::commands::status;
use crate::failure::severity;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::run_dir::Found;
use crate::run_dir::Orphan;
use crate::run_dir::RunDir;
use crate::units;

pub(crate) fn execute(globals: &Globals, output: &Output) -> Result<Exit, Refusal> {
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    let mut table = Table::new(&[
        "NAME", "STATE", "GEN", "WORKER", "DIGEST", "MEMORY", "UPTIME", "BLACKOUT",
    ]);
    let mut documents = Vec::new();
    let mut exit = Exit::Done;
    for directory in run_dir.all()? {
        // One VM that does not answer must not hide the others.
        let found = directory.look().and_then(|found| match found {
            Found::Broker(mut client) => client
                .status()
                .map(|status| Some(Row::Broker(Box::new(status)))),
            Found::Orphan(orphan) => Ok(Some(Row::Orphan(Box::new(orphan)))),
            Found::Stale => {
                output.note(&directory.stale().to_string());
                Ok(None)
            }
            Found::Absent => Ok(None),
        });
        match found {
            Ok(Some(row)) => {
                documents.push(row.document());
                table.row(row.cells(directory.name()));
            }
            Ok(None) => {}
            Err(refusal) => {
                output.note(&refusal.to_string());
                if severity(refusal.exit) > severity(exit) {
                    exit = refusal.exit;
                }
            }
        }
    }
    if output.json() {
        output.document(&Value::Array(documents))?;
    } else if !documents.is_empty() {
        output.text(&table.draw(output))?;
    } else if exit == Exit::Done {
        output.hint(&format!("no VM runs in {}", run_dir.path().display()));
    }
    Ok(exit)
}

enum Row {
    Broker(Box<VmStatus>),
    Orphan(Box<Orphan>),
}

impl Row {
    fn document(&self) -> Value {
        match self {
            Self::Broker(status) => status::document(status),
            Self::Orphan(orphan) => orphan.document(),
        }
    }

    fn cells(&self, name: &str) -> Vec<(Option<Style>, String)> {
        let plain = |text: String| (None, text);
        match self {
            Self::Broker(vm) => {
                let (style, state) = status::state(vm);
                let blackout = vm
                    .last_upgrade
                    .as_ref()
                    .filter(|upgrade| upgrade.blackout_us > 0)
                    .map_or("-".to_owned(), |upgrade| {
                        units::microseconds(upgrade.blackout_us)
                    });
                vec![
                    plain(name.to_owned()),
                    (Some(style), state),
                    plain(vm.generation.to_string()),
                    plain(vm.worker_pid.to_string()),
                    plain(units::short_digest(&vm.worker_digest).to_owned()),
                    plain(units::bytes(vm.ram_bytes)),
                    plain(units::seconds(vm.uptime_s)),
                    plain(blackout),
                ]
            }
            Self::Orphan(orphan) => vec![
                plain(name.to_owned()),
                (Some(Style::Bad), "orphaned".to_owned()),
                plain(orphan.generation().to_string()),
                plain(orphan.worker_pid().to_string()),
                plain("-".to_owned()),
                plain(units::bytes(orphan.ram_bytes())),
                plain("-".to_owned()),
                plain("-".to_owned()),
            ],
        }
    }
}
