//! The audit log: one JSON object a line, each with the SHA-256 of the line before it.
//!
//! A record that decides something is on disk before its effect is acknowledged. Inside an upgrade's pause nothing waits for
//! a disk: space is allocated when the upgrade is admitted, and the one record that is written in the pause is not synced.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use baton_policy::Digest;
use rustix::fs::FallocateFlags;
use serde::Serialize;
use serde_json::json;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// What an upgrade's records need at most, in bytes: about 25 records of at most 1 KiB.
const RESERVE: u64 = 64 << 10;
/// How many records may be noted at once; one more every 50 ms.
const BURST: u32 = 256;
/// The longest text of a field that came from a worker or a client, in bytes.
const MAX_FIELD: usize = 512;

/// One record, before time and chain are added.
#[derive(Debug, Serialize)]
struct Record<'a, F: Serialize> {
    time_ms: u128,
    seq: u64,
    prev: String,
    vm: &'a str,
    event: &'a str,
    #[serde(flatten)]
    fields: &'a F,
}

/// The log of one VM.
#[derive(Debug)]
pub(crate) struct AuditLog {
    file: File,
    vm: String,
    sequence: u64,
    previous: Digest,
    echo: bool,
    /// Where the next record begins.
    end: u64,
    /// Records that may still be noted now, and when there was last one more.
    allowance: u32,
    replenished: Instant,
    /// Records that were not written since the last that was.
    unwritten: u64,
}

impl AuditLog {
    /// Opens the log, and goes on with its chain.
    pub(crate) fn open(path: &Path, vm: &str, echo: bool) -> Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .doing(format_args!("cannot open the audit log {}", path.display()))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)
            .doing("cannot read the audit log")?;
        let whole = text
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        let lines = text.get(..whole).unwrap_or_default();
        let last = lines
            .split(|&byte| byte == b'\n')
            .rfind(|line| !line.is_empty());
        let sequence = lines.iter().filter(|&&byte| byte == b'\n').count();
        // A line that a crash cut short is no record.
        let end = u64::try_from(whole).unwrap_or(0);
        file.set_len(end)
            .and_then(|()| file.seek(SeekFrom::Start(end)))
            .doing("cannot extend the audit log")?;
        Ok(Self {
            file,
            vm: vm.to_owned(),
            sequence: u64::try_from(sequence).unwrap_or(0),
            previous: Digest::of(last.unwrap_or_default()),
            echo,
            end,
            allowance: BURST,
            replenished: Instant::now(),
            unwritten: 0,
        })
    }

    /// Makes sure that an upgrade's records will fit.
    pub(crate) fn reserve(&mut self) -> Result<()> {
        let at = self
            .file
            .stream_position()
            .doing("cannot extend the audit log")?;
        rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, at, RESERVE).map_err(|e| {
            unfit(
                format_args!("the audit log has no space left for an upgrade: {e}"),
                "free space on its file system; the guest runs on",
            )
        })
    }

    /// Writes a record.
    pub(crate) fn write(&mut self, event: &str, fields: &impl Serialize) -> Result<()> {
        let record = Record {
            time_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_millis()),
            seq: self.sequence,
            prev: self.previous.to_string(),
            vm: &self.vm,
            event,
            fields,
        };
        let mut line = serde_json::to_vec(&record).doing("cannot write an audit record")?;
        let digest = Digest::of(&line);
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // Half a line would break the chain of every later one.
            let _ = self
                .file
                .set_len(self.end)
                .and_then(|()| self.file.seek(SeekFrom::Start(self.end)));
            return Err(error).doing("cannot write to the audit log");
        }
        self.end += u64::try_from(line.len()).unwrap_or(0);
        self.previous = digest;
        self.sequence += 1;
        if self.echo {
            // Standard error is the operator's; a broken pipe there harms nobody.
            let _ = std::io::stderr().write_all(&line);
        }
        Ok(())
    }

    /// Notes what happened in the life of a guest. A full disk costs the record and not the guest, and what a guest or a
    /// worker can bring about as often as it likes is bounded in rate; what was left out is counted in the next record.
    pub(crate) fn note(&mut self, event: &str, fields: &impl Serialize) {
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
        if let Err(refusal) = self.write(event, fields) {
            self.unwritten += 1;
            complain(&refusal);
        }
    }

    /// Writes a record, and waits until it is on disk.
    pub(crate) fn write_synced(&mut self, event: &str, fields: &impl Serialize) -> Result<()> {
        self.write(event, fields)?;
        self.file.sync_data().doing("cannot sync the audit log")
    }
}

/// Says on standard error what nobody else can be told. A standard error that cannot be written is no reason to end.
pub(crate) fn complain(what: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "baton-broker: {what}");
}

/// A text of a worker or a client as the log takes it: bounded, control characters replaced.
pub(crate) fn quoted(text: &str) -> String {
    let mut end = text.len().min(MAX_FIELD);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end)
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Fields {
        fd: u32,
    }

    #[test]
    fn the_chain_goes_on_over_a_restart_and_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = AuditLog::open(&path, "web1", false).unwrap();
        log.write("open", &Fields { fd: 3 }).unwrap();
        log.write_synced("grant", &Fields { fd: 4 }).unwrap();
        drop(log);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"torn")
            .unwrap();
        let mut log = AuditLog::open(&path, "web1", false).unwrap();
        log.reserve().unwrap();
        log.write("open", &Fields { fd: 5 }).unwrap();

        let text = std::fs::read_to_string(&path).unwrap();
        let mut previous = Digest::of(b"");
        for (number, line) in text.lines().enumerate() {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(record["seq"], number);
            assert_eq!(record["prev"], previous.to_string());
            previous = Digest::of(line.as_bytes());
        }
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn a_flood_is_bounded_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = AuditLog::open(&path, "web1", false).unwrap();
        for _ in 0..10_000 {
            log.note("guest", &Fields { fd: 1 });
        }
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines < 10_000, "{lines}");
        log.allowance = BURST;
        log.note("guest", &Fields { fd: 1 });
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .contains("unwritten")
        );
    }

    #[test]
    fn hostile_text_is_bounded_and_has_no_control_characters() {
        assert_eq!(quoted("a\n\x1b[2Jb"), "a\u{fffd}\u{fffd}[2Jb");
        assert!(quoted(&"é".repeat(1000)).len() <= MAX_FIELD);
    }
}
