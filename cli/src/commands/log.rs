//! `baton log`: reads a VM's audit log, and verifies that nobody has changed it. The files are read directly; a running
//! broker is asked only where its chain stands.

use std::io::Read;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use baton_audit::Checkpoint;
use baton_audit::checkpoint::MAX_CHECKPOINT;
use baton_audit::read;
use baton_audit::segments;
use baton_audit::verify;
use baton_audit::verify::LogFinding;
use baton_audit::verify::Place;
use baton_audit::verify::Verification;
use baton_audit::verify::What;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::Value;

use crate::arguments::Globals;
use crate::arguments::LogCommand;
use crate::arguments::LogFiles;
use crate::failure::file;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::printable;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::units;

/// How often a log is read again whose last line its broker may just be writing.
const TRIES: usize = 3;

/// How many transfers are followed into the log of those that waited, the last ones.
const MAX_FOLLOWED: usize = 1000;

pub(crate) fn execute(
    globals: &Globals,
    command: &LogCommand,
    output: &Output,
) -> Result<Exit, Refusal> {
    match command {
        LogCommand::Show { log, event, last } => {
            show(&Log::find(globals, log)?, event.as_deref(), *last, output)
        }
        LogCommand::Verify { log, checkpoint } => {
            check(&Log::find(globals, log)?, checkpoint, output)
        }
        LogCommand::Checkpoint { log } => checkpoint(&Log::find(globals, log)?, output),
    }
}

/// A log's files, and what its broker says of it.
struct Log {
    vm: String,
    files: Vec<PathBuf>,
    /// What a running broker remembers, asked before the files are read: they can only have become longer.
    live: Option<Checkpoint>,
    /// The log of the brokers that have waited for this VM's guest.
    waited: Option<PathBuf>,
}

impl Log {
    fn find(globals: &Globals, asked: &LogFiles) -> Result<Self, Refusal> {
        let vm = asked.vm.clone();
        if !asked.file.is_empty() {
            let files = asked.file.clone();
            return Ok(Self {
                vm,
                files,
                live: None,
                waited: None,
            });
        }
        let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
        let directory = run_dir.vm(&vm)?;
        let live = match directory.look() {
            Ok(Found::Broker(mut client)) => {
                let head = client.log_head()?;
                Some(Checkpoint {
                    vm: vm.clone(),
                    count: head.count,
                    head: head.head,
                })
            }
            _ => None,
        };
        let current = run_dir.path().join(".audit").join(format!("{vm}.jsonl"));
        let files = segments::all(&current).unwrap_or_default();
        if files.is_empty() && live.is_none() {
            return Err(unfit(
                format!("there is no audit log {}", current.display()),
                "pass the --run-dir that the VM was started with, or --file for a copy",
            ));
        }
        let waited = current.with_file_name(format!("{vm}.incoming.jsonl"));
        Ok(Self {
            vm,
            files,
            live,
            waited: Some(waited),
        })
    }

    fn verify(&self, checkpoints: &[Checkpoint]) -> Result<Verification, Refusal> {
        let mut all = checkpoints.to_vec();
        all.extend(self.live.clone());
        for attempt in 1.. {
            let found = verify::files(&self.vm, &self.files, &all)
                .map_err(|error| unfit(format!("cannot read the audit log: {error}"), ""))?;
            let cut = found
                .findings
                .iter()
                .any(|finding| matches!(finding.what, What::CutShort { .. }));
            if !cut || self.live.is_none() || attempt == TRIES {
                return self.follow(found);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Verification::default())
    }

    /// A broker that took the guest over from another wrote down where its own log stood until then: that has to be there, too.
    fn follow(&self, mut found: Verification) -> Result<Verification, Refusal> {
        let Some(waited) = &self.waited else {
            return Ok(found);
        };
        let failed = |error| unfit(format!("cannot read the audit log: {error}"), "");
        let taken = |record: &Value| read::event(record) == "taken-over";
        let taken = read::last(&self.files, MAX_FOLLOWED, taken).map_err(failed)?;
        let marks: Vec<Checkpoint> = taken
            .iter()
            .filter_map(|record| record.pointer("/unmapped/waited"))
            .filter_map(|mark| serde_json::from_value(mark.clone()).ok())
            .collect();
        let Some(first) = marks.first() else {
            return Ok(found);
        };
        let files = segments::all(waited).unwrap_or_default();
        let other = verify::files(&first.vm, &files, &marks).map_err(failed)?;
        found.more += other.more;
        // A broker that waits just now may be writing.
        let cut = |what: &What| matches!(what, What::CutShort { .. });
        let end = Place {
            file: waited.clone(),
            line: other.records,
        };
        let findings = other.findings.into_iter().filter(|one| !cut(&one.what));
        let findings = findings.map(|one| LogFinding {
            place: Some(one.place.unwrap_or_else(|| end.clone())),
            what: one.what,
        });
        found.findings.extend(findings);
        Ok(found)
    }
}

fn show(log: &Log, event: Option<&str>, last: usize, output: &Output) -> Result<Exit, Refusal> {
    let wanted = |record: &Value| event.is_none_or(|event| read::event(record) == event);
    let records = read::last(&log.files, last, wanted)
        .map_err(|error| unfit(format!("cannot read the audit log: {error}"), ""))?;
    if output.json() {
        output.document(&Value::Array(records))?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["TIME", "RECORD", "EVENT", "BY", "WHAT"]);
    for record in &records {
        let number = |pointer| record.pointer(pointer).and_then(Value::as_u64);
        let style = match number("/severity_id") {
            Some(4..) => Some(Style::Bad),
            Some(2..) => Some(Style::Warning),
            _ => None,
        };
        let event = read::event(record);
        let message = record
            .get("message")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let what = message
            .strip_prefix(&event.replace('-', " "))
            .unwrap_or(message)
            .trim_start_matches(": ");
        table.row(vec![
            (None, units::timestamp(number("/time").unwrap_or(0))),
            (
                None,
                number("/metadata/sequence")
                    .map(|number| number.to_string())
                    .unwrap_or_default(),
            ),
            (style, event.to_owned()),
            (None, who(record) + &approved_by(record)),
            (None, what.to_owned()),
        ]);
    }
    if records.is_empty() {
        output.hint("no such record");
    } else {
        output.text(&table.draw(output))?;
    }
    Ok(Exit::Done)
}

/// Who has approved of what it widened: who asked, or the policy.
fn approved_by(record: &Value) -> String {
    let Some(by) = record.pointer("/unmapped/approved_by") else {
        return String::new();
    };
    match (
        by.get("policy").and_then(Value::as_str),
        by.pointer("/user/uid"),
    ) {
        (Some(policy), _) => format!("; approved by {}", printable(policy)),
        (None, Some(uid)) => format!("; approved by uid {}", uid.as_str().unwrap_or_default()),
        (None, None) => String::new(),
    }
}

/// Who asked, in a few words: a unit says more than a process.
fn who(record: &Value) -> String {
    let Some(uid) = record.pointer("/actor/user/uid").and_then(Value::as_str) else {
        return "-".to_owned();
    };
    let unit = record.pointer("/actor/app_name").and_then(Value::as_str);
    let pid = record
        .pointer("/actor/process/pid")
        .map(Value::to_string)
        .unwrap_or_default();
    match unit {
        Some(unit) => format!("uid {uid}, pid {pid}, {unit}"),
        None => format!("uid {uid}, pid {pid}"),
    }
}

fn check(log: &Log, checkpoints: &[PathBuf], output: &Output) -> Result<Exit, Refusal> {
    let kept = checkpoints
        .iter()
        .map(|path| read_checkpoint(path))
        .collect::<Result<Vec<_>, _>>()?;
    let found = log.verify(&kept)?;
    let ended = found.last_event == "vm-end" || log.live.is_some();
    if output.json() {
        output.document(&found.document())?;
    } else {
        let lines = found
            .findings
            .iter()
            .map(|finding| {
                let mark = output.paint(Style::Bad, "finding:");
                format!("{mark} {}", printable(&finding.to_string()))
            })
            .chain((found.more > 0).then(|| format!("and {} more", found.more)))
            .chain(std::iter::once(verdict(log, &found, output)));
        output.text(&lines.collect::<Vec<_>>().join("\n"))?;
    }
    for count in &found.too_old {
        output.note(&format!(
            "the checkpoint of {count} records is older than record {}, the oldest that is kept",
            found.first
        ));
    }
    if !ended {
        output.note(
            "the last record is not vm-end: the broker died, or the end was removed; a checkpoint would show which",
        );
    } else if log.live.is_none() && kept.is_empty() {
        output.note(
            "without a checkpoint nothing shows whether the log was written anew as a whole: `baton log checkpoint`",
        );
    }
    Ok(if found.findings.is_empty() {
        Exit::Done
    } else {
        Exit::Findings
    })
}

fn verdict(log: &Log, found: &Verification, output: &Output) -> String {
    let vm = printable(&log.vm);
    if !found.findings.is_empty() {
        let count = u64::try_from(found.findings.len()).unwrap_or(0) + found.more;
        return format!(
            "{vm}: {count} {}",
            output.paint(Style::Bad, if count == 1 { "finding" } else { "findings" })
        );
    }
    let head = found.head.as_ref();
    format!(
        "{vm}: {}: {} records in {} {}, from {}; the last has digest {}",
        output.paint(Style::Good, "intact"),
        found.records,
        log.files.len(),
        if log.files.len() == 1 {
            "file"
        } else {
            "files"
        },
        found.first,
        head.map_or("-", |head| &head.head),
    )
}

fn checkpoint(log: &Log, output: &Output) -> Result<Exit, Refusal> {
    let found = log.verify(&[])?;
    if let Some(finding) = found.findings.first() {
        output.complain(&unfit(
            format!("{}: {finding}", log.vm),
            format!("see all: baton log verify {}", log.vm),
        ));
        return Ok(Exit::Findings);
    }
    let head = log
        .live
        .clone()
        .or(found.head)
        .ok_or_else(|| unfit(format!("the audit log of {} has no record", log.vm), ""))?;
    if output.json() {
        let document = serde_json::to_value(&head)
            .map_err(|error| unfit(format!("cannot print this as JSON: {error}"), ""))?;
        output.document(&document)?;
    } else {
        output.text(head.to_string().trim_end())?;
    }
    Ok(Exit::Done)
}

fn read_checkpoint(path: &Path) -> Result<Checkpoint, Refusal> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|open| {
            open.take(MAX_CHECKPOINT as u64 + 1)
                .read_to_string(&mut text)
        })
        .map_err(|error| file("read", path, &error))?;
    text.parse().map_err(|error| {
        unfit(
            format!("{}: {error}", path.display()),
            "give what `baton log checkpoint` printed",
        )
    })
}
