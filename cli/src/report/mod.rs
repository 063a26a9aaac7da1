//! What an audit found: tables for a terminal, JSON for scripts, SARIF for tools, one HTML page for people.

mod drawing;
mod html;
mod json;
mod sarif;
mod table;
mod timeline;

use std::path::Path;

use baton_audit::segments;
use baton_ipc::control::AuditReport;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::Verdict;
use baton_policy::Policy;
use serde::Serialize;
use serde_json::Value;

use crate::failure::file;
use crate::run_dir::RunDir;

pub(crate) use html::page;
pub(crate) use json::document;
pub(crate) use sarif::log;
pub(crate) use table::table;

/// How many upgrades a page shows, of the last.
const UPGRADES: usize = 20;

/// One audited VM, with what else its page shows.
#[derive(Debug)]
pub(crate) struct Audited {
    /// The VM's name.
    pub(crate) vm: String,
    /// What the broker found.
    pub(crate) report: AuditReport,
    /// The policy that the worker is held to; `None` when it cannot be read here, or has changed since.
    pub(crate) policy: Option<Policy>,
    /// The records of its last upgrades, oldest first.
    pub(crate) upgrades: Vec<Value>,
    /// When it was audited, in milliseconds since the epoch.
    pub(crate) time: u64,
}

impl Audited {
    /// Adds to a report what is read here and not asked of the broker.
    pub(crate) fn new(run_dir: &RunDir, vm: &str, report: AuditReport) -> Self {
        let policy = if report.policy == "default" {
            Policy::builtin()
        } else {
            Policy::load(Path::new(&report.policy))
        };
        let policy = policy
            .ok()
            .filter(|policy| policy.digest.to_string() == report.policy_digest);
        let current = run_dir.path().join(".audit").join(format!("{vm}.jsonl"));
        let upgrades = segments::all(&current)
            .and_then(|files| {
                baton_audit::read::last(&files, UPGRADES, |record| {
                    baton_audit::read::event(record) == "upgrade"
                })
            })
            .unwrap_or_default();
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0));
        Self {
            vm: vm.to_owned(),
            report,
            policy,
            upgrades,
            time,
        }
    }

    /// Whether nothing disagrees.
    pub(crate) fn is_proven(&self) -> bool {
        exit(&self.report) == Exit::Done
    }
}

/// Proven only if the broker says so and names nothing against it.
pub(crate) fn exit(report: &AuditReport) -> Exit {
    match report.verdict {
        Verdict::Proven if report.findings.is_empty() => Exit::Done,
        _ => Exit::Findings,
    }
}

/// What a unit variant is called in JSON; `-` for none.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "-".to_owned(),
    }
}

/// Writes a report into a file.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), Refusal> {
    std::fs::write(path, text).map_err(|error| file("write", path, &error))
}
