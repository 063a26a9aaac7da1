//! The writer: one JSON object a line, each with the SHA-256 of the line before it, over any number of files.
//!
//! A record that decides something is on disk before its effect is acknowledged. Inside an upgrade's pause nothing waits for
//! a disk: space is allocated when the upgrade is admitted, no file is rotated until it has ended, and the one record that
//! is written in the pause is not synced.
//!
//! Rotation keeps the chain: the first record of a new file is `log-rotated`, with the digest of the old file's last record
//! and the next number. What is kept is bounded; what is dropped is named in that record.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use baton_policy::Digest;
use rustix::fs::FallocateFlags;
use serde::Serialize;
use serde_json::Value;
use serde_json::json;
use thiserror::Error;

use crate::actor::Actor;
use crate::checkpoint::Checkpoint;
use crate::echo::Echo;
use crate::journal::Journal;
use crate::segments;
use crate::shape;
use crate::shape::Position;
use crate::shape::Subject;
use crate::spans::Spans;
use crate::verify::Link;

/// The longest record, in bytes: an audit's 128 findings of four bounded texts each fit.
pub const MAX_RECORD: usize = 512 << 10;
/// What an upgrade's records need at most, in bytes: its own 30, and what may be noted meanwhile, each of at most 2 KiB.
const RESERVE: u64 = 1 << 20;
/// How many bytes of its own records are looked through for the last of a kind: an upgrade's are in one file, and fit into what it
/// has reserved.
const LOOK_BACK: u64 = 2 * RESERVE;
/// How many records may be noted at once; one more every 50 ms.
const BURST: u32 = 256;

/// How much of a log is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A file of this many bytes is rotated.
    pub segment: u64,
    /// How many rotated files are kept.
    pub keep: usize,
}

impl Default for Limits {
    /// 16 files of 4 MiB, about 80,000 records: a run directory is memory.
    fn default() -> Self {
        Self {
            segment: 4 << 20,
            keep: 15,
        }
    }
}

/// Why a log cannot be written.
#[derive(Debug, Error)]
pub enum LogError {
    /// A file operation failed.
    #[error("cannot {what} the audit log {}: {source}{}", path.display(), hint(source))]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// What is there is no log of this program.
    #[error("the end of {} is no audit record ({why}): move the file aside to begin a new log", path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A record is too long.
    #[error("the audit record `{event}` has {length} bytes, more than {MAX_RECORD}")]
    TooLong {
        /// Which.
        event: String,
        /// Its length in bytes.
        length: usize,
    },
    /// The fields cannot be JSON.
    #[error("cannot write an audit record: {0}")]
    Json(#[from] serde_json::Error),
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space there: until then nothing new is granted and no worker is replaced, and the guest runs on"
        }
        _ => "",
    }
}

/// The log of one VM.
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    path: PathBuf,
    subject: Subject,
    limits: Limits,
    sequence: u64,
    previous: Digest,
    /// The sequence number of this file's first record.
    first: u64,
    /// Where the next record begins.
    end: u64,
    /// An upgrade has reserved space in this file.
    reserved: bool,
    spans: Option<Spans>,
    journal: Option<Journal>,
    /// Records that may still be noted now, and when there was last one more.
    allowance: u32,
    replenished: Instant,
    /// Records that were not written since the last that was.
    unwritten: u64,
    /// Somebody else goes on with it.
    ended: bool,
}

impl AuditLog {
    /// Opens the log, and goes on with its chain. Of what is there, the end alone is read.
    ///
    /// # Errors
    ///
    /// [`LogError`]: among others, when the end is no record of ours.
    pub fn open(path: &Path, subject: Subject, limits: Limits) -> Result<Self, LogError> {
        let failed = |what, source| file_error(what, path, source);
        let mut file = open_file(path).map_err(|e| failed("open", e))?;
        // Left by a writer that died while it rotated; what was in it comes again.
        let _ = fs::remove_file(segments::unborn(path));
        let (end, tail) = Tail::of(&mut file, path)?;
        // A line that a crash cut short is no record.
        file.set_len(end).map_err(|e| failed("extend", e))?;
        let archive = segments::archive(path).map_err(|e| failed("look for the files of", e))?;
        let (tail, first) = match (tail, archive.last()) {
            (Some(tail), last) => {
                let first = Tail::first(&file, path)?;
                // Nothing may come after this file that was before it.
                if last.is_some_and(|(archived, _)| *archived >= first) {
                    return Err(foreign(
                        path,
                        "a rotated file of the same or a later time is there",
                    ));
                }
                (Some(tail), first)
            }
            (None, Some((_, last))) => {
                let mut archived = File::open(last).map_err(|e| file_error("open", last, e))?;
                let (_, tail) = Tail::of(&mut archived, last)?;
                let next = tail.as_ref().map_or(0, |tail| tail.sequence + 1);
                (tail, next)
            }
            (None, None) => (None, 0),
        };
        let mut log = Self {
            file,
            path: path.to_owned(),
            subject,
            limits,
            sequence: tail.as_ref().map_or(0, |tail| tail.sequence + 1),
            previous: tail.map_or_else(|| Digest::of(b""), |tail| tail.digest),
            first,
            end,
            reserved: false,
            spans: None,
            journal: None,
            allowance: BURST,
            replenished: Instant::now(),
            unwritten: 0,
            ended: false,
        };
        log.rotate_when_full()?;
        Ok(log)
    }

    /// Says what happens on standard error too, for a person, as far as that takes it.
    pub fn show_spans(&mut self) {
        self.spans = Some(Spans::new());
    }

    /// Copies every record to the journal that listens here, if one does.
    pub fn copy_to_journal(&mut self, socket: &Path) {
        self.journal = Journal::at(socket);
    }

    /// Somebody else goes on with the chain: nothing is written here any more.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The same, if somebody else has gone on with it already: two ends would be no chain.
    pub fn end_if_continued(&mut self) {
        let length = self.file.metadata().map_or(0, |metadata| metadata.len());
        self.ended |= length > self.end;
    }

    /// Which of these events was recorded last, among the last [`LOOK_BACK`] bytes of this file.
    ///
    /// # Errors
    ///
    /// [`LogError`], when the file cannot be read.
    pub fn last_of<'a>(&self, events: &[&'a str]) -> Result<Option<&'a str>, LogError> {
        let window = self.end.min(LOOK_BACK);
        let text = read_at(&mut &self.file, self.end - window, window)
            .map_err(|e| file_error("read", &self.path, e))?;
        Ok(text.rsplit(|&byte| byte == b'\n').find_map(|line| {
            let record: Value = serde_json::from_slice(line).ok()?;
            let event = record.pointer("/metadata/event_code")?.as_str()?;
            events.iter().find(|name| **name == event).copied()
        }))
    }

    /// Where the chain stands.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            vm: self.subject.vm.clone(),
            count: self.sequence,
            head: self.previous.to_string(),
        }
    }

    /// Makes sure that an upgrade's records will fit, until [`AuditLog::release`].
    ///
    /// # Errors
    ///
    /// When there is no space for them.
    pub fn reserve(&mut self) -> Result<(), LogError> {
        self.rotate_when_full()?;
        rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, self.end, RESERVE)
            .map_err(|e| file_error("reserve space for an upgrade in", &self.path, e.into()))?;
        self.reserved = true;
        Ok(())
    }

    /// The upgrade is over.
    pub fn release(&mut self) {
        self.reserved = false;
    }

    /// Writes a record.
    ///
    /// # Errors
    ///
    /// When it cannot be written; then nothing of it is there.
    pub fn write(&mut self, event: &str, fields: &impl Serialize) -> Result<(), LogError> {
        self.write_by(event, None, fields)
    }

    /// Writes a record of what somebody asked for.
    ///
    /// # Errors
    ///
    /// As [`AuditLog::write`].
    pub fn write_by(
        &mut self,
        event: &str,
        actor: Option<&Actor>,
        fields: &impl Serialize,
    ) -> Result<(), LogError> {
        if self.ended {
            return Ok(());
        }
        self.rotate_when_full()?;
        self.append(event, actor, fields)
    }

    /// Writes a record, and waits until it is on disk.
    ///
    /// # Errors
    ///
    /// As [`AuditLog::write`].
    pub fn write_synced(&mut self, event: &str, fields: &impl Serialize) -> Result<(), LogError> {
        self.write_by(event, None, fields)?;
        self.sync()
    }

    /// Writes a record of what somebody asked for, and waits until it is on disk.
    ///
    /// # Errors
    ///
    /// As [`AuditLog::write`].
    pub fn write_synced_by(
        &mut self,
        event: &str,
        actor: &Actor,
        fields: &impl Serialize,
    ) -> Result<(), LogError> {
        self.write_by(event, Some(actor), fields)?;
        self.sync()
    }

    /// Notes what happened in the life of a guest. A full disk costs the record and not the guest, and what a guest or a
    /// worker can bring about as often as it likes is bounded in rate; what was left out is counted in the next record.
    pub fn note(&mut self, event: &str, fields: &impl Serialize) {
        self.note_by(event, None, fields);
    }

    /// Notes what somebody asked for that decides nothing by itself.
    pub fn note_by(&mut self, event: &str, actor: Option<&Actor>, fields: &impl Serialize) {
        let earned = u32::try_from(self.replenished.elapsed().as_millis() / 50).unwrap_or(BURST);
        if earned > 0 {
            self.allowance = self.allowance.saturating_add(earned).min(BURST);
            self.replenished = Instant::now();
        }
        if self.allowance == 0 {
            self.unwritten += 1;
            return;
        }
        self.allowance -= 1;
        if self.unwritten > 0
            && self
                .write("unwritten", &json!({"records": self.unwritten}))
                .is_ok()
        {
            self.unwritten = 0;
        }
        if let Err(error) = self.write_by(event, actor, fields) {
            self.unwritten += 1;
            Echo::new().say(format!("baton-broker: {error}\n").as_bytes());
        }
    }

    fn sync(&self) -> Result<(), LogError> {
        self.file
            .sync_data()
            .map_err(|e| file_error("sync", &self.path, e))
    }

    fn append(
        &mut self,
        event: &str,
        actor: Option<&Actor>,
        fields: &impl Serialize,
    ) -> Result<(), LogError> {
        let position = Position {
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0)),
            sequence: self.sequence,
            previous: self.previous.to_string(),
        };
        let shaped = shape::shape(&self.subject, position, event, actor, fields)?;
        let mut line = serde_json::to_vec(&shaped.document)?;
        if line.len() >= MAX_RECORD {
            return Err(LogError::TooLong {
                event: event.to_owned(),
                length: line.len(),
            });
        }
        let digest = Digest::of(&line);
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // Half a line would break the chain of every later one.
            let _ = self.file.set_len(self.end);
            return Err(file_error("write to", &self.path, error));
        }
        let own = shaped.document.get("unmapped").and_then(Value::as_object);
        if let (Some(spans), Some(own)) = (&mut self.spans, own) {
            spans.say(event, own);
        }
        if let (Some(journal), Some(record)) = (&self.journal, line.strip_suffix(b"\n")) {
            let vm = &self.subject.vm;
            journal.send(shaped.priority, vm, event, self.sequence, record);
        }
        self.end += u64::try_from(line.len()).unwrap_or(0);
        self.previous = digest;
        self.sequence += 1;
        Ok(())
    }

    /// Begins a new file when this one is full. A new file that cannot be made leaves the old one in use: a record in a
    /// long file is better than none.
    fn rotate_when_full(&mut self) -> Result<(), LogError> {
        if self.reserved || self.end < self.limits.segment || self.sequence == self.first {
            return Ok(());
        }
        let unborn = segments::unborn(&self.path);
        let made = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&unborn);
        let Ok(file) = made else { return Ok(()) };
        let (old_end, old_first) = (self.end, self.first);
        let (sequence, previous) = (self.sequence, self.previous);
        let old = std::mem::replace(&mut self.file, file);
        (self.end, self.first) = (0, sequence);
        let archived = segments::archived(&self.path, old_first);
        let dropped = self.surplus();
        let begun = self.append(
            "log-rotated",
            None,
            &json!({
                "previous_file": file_name(&archived),
                "dropped_files": dropped.iter().map(|path| file_name(path)).collect::<Vec<_>>(),
            }),
        );
        let renamed = begun.and_then(|()| {
            old.sync_data()
                .and_then(|()| self.file.sync_data())
                .and_then(|()| fs::rename(&self.path, &archived))
                .and_then(|()| fs::rename(&unborn, &self.path))
                .map_err(|e| file_error("rotate", &self.path, e))
        });
        if renamed.is_err() {
            // As if nothing had been: the record of the rotation goes with its file.
            if archived.exists() && !self.path.exists() {
                let _ = fs::rename(&archived, &self.path);
            }
            let _ = fs::remove_file(&unborn);
            self.file = old;
            (self.end, self.first) = (old_end, old_first);
            (self.sequence, self.previous) = (sequence, previous);
            return Ok(());
        }
        for path in dropped {
            let _ = fs::remove_file(path);
        }
        if let Some(directory) = self.path.parent().and_then(|path| File::open(path).ok()) {
            let _ = directory.sync_all();
        }
        Ok(())
    }

    /// Rotated files beyond those to keep, counting the one that is about to be.
    fn surplus(&self) -> Vec<PathBuf> {
        let mut archive = segments::archive(&self.path).unwrap_or_default();
        let most = self.limits.keep.saturating_sub(1);
        archive.truncate(archive.len().saturating_sub(most));
        archive.into_iter().map(|(_, path)| path).collect()
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn file_error(what: &'static str, path: &Path, source: io::Error) -> LogError {
    LogError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

fn foreign(path: &Path, why: &str) -> LogError {
    LogError::Foreign {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

/// The last record of a file.
struct Tail {
    sequence: u64,
    digest: Digest,
}

impl Tail {
    /// Where the whole lines of a file end, and the last of them.
    fn of(file: &mut File, path: &Path) -> Result<(u64, Option<Self>), LogError> {
        let failed = |e| file_error("read", path, e);
        let length = file.metadata().map_err(failed)?.len();
        // The last record, one that was cut short after it, and the line feed before both.
        let window = length.min(2 * MAX_RECORD as u64 + 2);
        let text = read_at(file, length - window, window).map_err(failed)?;
        let Some(end) = text.iter().rposition(|&byte| byte == b'\n') else {
            if length > window {
                return Err(foreign(path, "it has no line end"));
            }
            return Ok((0, None));
        };
        let lines = text.get(..end).unwrap_or_default();
        let line = match lines.iter().rposition(|&byte| byte == b'\n') {
            Some(before) => lines.get(before + 1..).unwrap_or_default(),
            None if length > window => return Err(foreign(path, "its last line is too long")),
            None => lines,
        };
        let link = Link::parse(line).map_err(|e| foreign(path, &e.to_string()))?;
        let torn = text.len() - end - 1;
        let tail = Self {
            sequence: link.sequence,
            digest: Digest::of(line),
        };
        Ok((length - u64::try_from(torn).unwrap_or(0), Some(tail)))
    }

    /// The sequence number of a file's first record.
    fn first(file: &File, path: &Path) -> Result<u64, LogError> {
        let mut file = file;
        let text = read_at(&mut file, 0, MAX_RECORD as u64 + 1)
            .map_err(|e| file_error("read", path, e))?;
        let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let link = Link::parse(line).map_err(|e| foreign(path, &e.to_string()))?;
        Ok(link.sequence)
    }
}

fn read_at(file: &mut (impl Read + Seek), from: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.by_ref().take(bytes).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
