//! `baton upgrade --all`: a few VMs one by one, then many at a time.
//!
//! The worker is opened once, so that every VM gets the same file whatever happens to its path meanwhile.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_ipc::control::Exit;
use baton_ipc::control::Outcome;
use baton_ipc::control::Refusal;
use baton_ipc::control::UpgradeOutcome;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Upgrade;
use crate::client::Plan;
use crate::client::WorkerFile;
use crate::failure::severity;
use crate::failure::unfit;
use crate::outcome;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::bar;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::run_dir::VmDirectory;
use crate::signals::Signals;
use crate::units;

/// What became of one VM.
enum End {
    Ended(Box<UpgradeOutcome>),
    Refused(Refusal),
    Skipped,
}

struct Entry {
    name: String,
    result: End,
}

/// What all workers of the pool share.
struct Fleet<'a> {
    dry_run: bool,
    approve: Option<&'a str>,
    worker: Option<&'a WorkerFile>,
    waiting: Mutex<VecDeque<(usize, VmDirectory)>>,
    entries: Mutex<Vec<Entry>>,
    /// No VM is begun any more.
    halted: AtomicBool,
    done: AtomicUsize,
}

/// Upgrades every VM of `run_dir`.
pub(crate) fn upgrade(
    run_dir: &RunDir,
    upgrade: &Upgrade,
    worker: Option<&WorkerFile>,
    signals: &Signals,
    output: &Output,
) -> Result<Exit, Refusal> {
    let mut directories = Vec::new();
    for directory in run_dir.all()? {
        // What is left of a VM that has ended is nothing to upgrade; anything else is shown in the table.
        match directory.look() {
            Ok(Found::Stale | Found::Absent) => output.note(&directory.stale().to_string()),
            _ => directories.push(directory),
        }
    }
    let all = directories.len();
    let fleet = Fleet {
        dry_run: upgrade.dry_run,
        approve: upgrade.approve.as_deref(),
        worker,
        entries: Mutex::new(
            directories
                .iter()
                .map(|directory| Entry {
                    name: directory.name().to_owned(),
                    result: End::Skipped,
                })
                .collect(),
        ),
        waiting: Mutex::new(directories.into_iter().enumerate().collect()),
        halted: AtomicBool::new(false),
        done: AtomicUsize::new(0),
    };
    let canaries = upgrade.canary.min(all);
    fleet.stage(1, canaries, true, signals, output);
    fleet.stage(
        usize::from(upgrade.parallel),
        all - canaries,
        false,
        signals,
        output,
    );
    let entries = fleet
        .entries
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    report(&entries, output)
}

impl Fleet<'_> {
    /// Upgrades the next `count` VMs, `parallel` at a time. When `strict`, the first that is not committed is the last.
    fn stage(
        &self,
        parallel: usize,
        count: usize,
        strict: bool,
        signals: &Signals,
        output: &Output,
    ) {
        let mut live = output.live();
        let target = self.done.load(Ordering::Acquire) + count;
        let left = AtomicUsize::new(count);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..parallel.min(count))
                .map(|_| scope.spawn(|| self.work(&left, strict)))
                .collect();
            while threads.iter().any(|thread| !thread.is_finished()) {
                let done = self.done.load(Ordering::Acquire);
                live.draw(&format!(
                    "{}  {:<24}  {done} of {target}",
                    if strict { "canaries" } else { "fleet" },
                    bar(done as u64, target as u64, 24),
                ));
                let timeout = Timespec {
                    tv_sec: 0,
                    tv_nsec: i64::from(Duration::from_millis(50).subsec_nanos()),
                };
                let mut source = [PollFd::new(signals, PollFlags::IN)];
                let _ = rustix::event::poll(&mut source, Some(&timeout));
                if signals.came() {
                    live.clear();
                    output.note("no further VM is begun; waiting for those under way");
                    self.halted.store(true, Ordering::Release);
                }
            }
        });
    }

    fn work(&self, left: &AtomicUsize, strict: bool) {
        let take = |count: usize| count.checked_sub(1);
        while !self.halted.load(Ordering::Acquire)
            && left
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
                .is_ok()
        {
            let Some((index, directory)) = lock(&self.waiting).pop_front() else {
                return;
            };
            let result = self.one(&directory);
            let halt = match &result {
                End::Ended(outcome) => match outcome.outcome {
                    Outcome::Committed | Outcome::Rehearsed | Outcome::Saved => false,
                    Outcome::Aborted => strict,
                    Outcome::Lost => true,
                },
                End::Refused(_) | End::Skipped => strict,
            };
            if halt {
                self.halted.store(true, Ordering::Release);
            }
            if let Some(entry) = lock(&self.entries).get_mut(index) {
                entry.result = result;
            }
            self.done.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn one(&self, directory: &VmDirectory) -> End {
        let outcome = self.worker.map(reopen).transpose().and_then(|worker| {
            let plan = Plan {
                dry_run: self.dry_run,
                approve: self.approve,
                worker: worker.as_ref(),
            };
            directory
                .broker()?
                .upgrade(&plan, None, &mut |_| {}, &mut || {})
        });
        match outcome {
            Ok(outcome) => End::Ended(Box::new(outcome)),
            Err(refusal) => End::Refused(refusal),
        }
    }
}

/// The same files with file positions of their own, so that many brokers can read them at once.
fn reopen(worker: &WorkerFile) -> Result<WorkerFile, Refusal> {
    let again = |file: &OwnedFd| {
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map(OwnedFd::from)
            .map_err(|error| unfit(format!("cannot open the worker again: {error}"), ""))
    };
    Ok(WorkerFile {
        binary: again(&worker.binary)?,
        signature: worker.signature.as_ref().map(again).transpose()?,
    })
}

/// A thread that panicked has aborted the process, so the lock is never poisoned; and if it were, what it guards is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report(entries: &[Entry], output: &Output) -> Result<Exit, Refusal> {
    let mut exit = Exit::Done;
    let (mut good, mut failed, mut skipped) = (0, 0, 0);
    for entry in entries {
        let end = match &entry.result {
            End::Ended(outcome) => outcome::exit_of(outcome.outcome),
            End::Refused(refusal) => refusal.exit,
            End::Skipped => {
                skipped += 1;
                // Something asked for was not done.
                Exit::Busy
            }
        };
        match entry.result {
            End::Skipped => {}
            _ if end == Exit::Done => good += 1,
            _ => failed += 1,
        }
        if severity(end) > severity(exit) {
            exit = end;
        }
    }
    if output.json() {
        output.document(&json!({
            "succeeded": good,
            "failed": failed,
            "skipped": skipped,
            "vms": entries.iter().map(document).collect::<Vec<Value>>(),
        }))?;
        return Ok(exit);
    }
    if entries.is_empty() {
        output.hint("no VM runs here");
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["NAME", "OUTCOME", "GEN", "BLACKOUT", "TOTAL", "WHY"]);
    for entry in entries {
        table.row(cells(entry));
    }
    output.text(&table.draw(output))?;
    output.hint(&format!(
        "{good} succeeded, {failed} failed, {skipped} not begun"
    ));
    Ok(exit)
}

fn document(entry: &Entry) -> Value {
    let mut value = match &entry.result {
        End::Ended(outcome) => outcome::document(outcome),
        End::Refused(refusal) => {
            json!({ "outcome": "refused", "error": crate::output::error(refusal) })
        }
        End::Skipped => json!({ "outcome": "skipped" }),
    };
    if let Some(object) = value.as_object_mut() {
        object.insert("name".to_owned(), entry.name.clone().into());
    }
    value
}

fn cells(entry: &Entry) -> Vec<(Option<Style>, String)> {
    let nothing = || (None, "-".to_owned());
    let name = (None, entry.name.clone());
    match &entry.result {
        End::Ended(outcome) => {
            let (style, result) = outcome::outcome_name(outcome.outcome);
            vec![
                name,
                (Some(style), result.to_owned()),
                (None, outcome.generation.to_string()),
                (None, units::microseconds(outcome.blackout_us)),
                (None, format!("{} ms", outcome.total_ms)),
                (None, outcome::why(outcome).trim_start().to_owned()),
            ]
        }
        End::Refused(refusal) => vec![
            name,
            (Some(Style::Bad), "refused".to_owned()),
            nothing(),
            nothing(),
            nothing(),
            (None, refusal.to_string().replace("\n  ", "; ")),
        ],
        End::Skipped => vec![
            name,
            (Some(Style::Dim), "skipped".to_owned()),
            nothing(),
            nothing(),
            nothing(),
            (None, String::new()),
        ],
    }
}
