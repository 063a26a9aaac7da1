//! Finds what was done to a log after it was written.
//!
//! The chain vouches for every record but the last: each has the digest of the line before it. So an edited record is
//! named by the one after it, a removed one leaves a gap in the numbers, and a reordered one stands where its number does
//! not fit. Whoever can rewrite the file can rewrite all of it from some record on, or take its end away; that is what a
//! [`Checkpoint`] kept elsewhere shows.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::path::PathBuf;

use baton_policy::Digest;
use serde::Deserialize;
use serde::Serialize;
use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::log::MAX_RECORD;

/// The most findings that are listed; a log that was never one has one a line.
const MAX_FINDINGS: usize = 100;

/// The part of a record that makes the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The record's number.
    pub sequence: u64,
    /// The digest of the line before it.
    pub previous: Digest,
    /// Our name of the event.
    pub event: String,
}

#[derive(Deserialize)]
struct Wire {
    metadata: WireMetadata,
    unmapped: WireUnmapped,
}

#[derive(Deserialize)]
struct WireMetadata {
    sequence: u64,
    #[serde(default)]
    event_code: String,
}

#[derive(Deserialize)]
struct WireUnmapped {
    prev: String,
}

/// A line that is no record.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No JSON, or not of this shape.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// `prev` is no digest.
    #[error("{0}")]
    Digest(#[from] baton_policy::DigestError),
}

impl Link {
    /// Reads the link of a record from its line.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn parse(line: &[u8]) -> Result<Self, LinkError> {
        let wire: Wire = serde_json::from_slice(line)?;
        Ok(Self {
            sequence: wire.metadata.sequence,
            previous: wire.unmapped.prev.parse()?,
            event: crate::quoted(&wire.metadata.event_code),
        })
    }
}

/// Where a line is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Which file.
    pub file: PathBuf,
    /// Which line, from 1.
    pub line: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What was done to a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The record's line is not the one that was written.
    Edited {
        /// Which.
        sequence: u64,
    },
    /// Records are missing.
    Removed {
        /// The first of them.
        from: u64,
        /// The last of them.
        to: u64,
    },
    /// The record stands after one that came later.
    Reordered {
        /// Which.
        sequence: u64,
        /// The one before it in the file.
        after: u64,
    },
    /// The number is there twice.
    Repeated {
        /// Which.
        sequence: u64,
    },
    /// No record at all.
    Malformed {
        /// Why not.
        why: String,
    },
    /// The last line has no end.
    CutShort {
        /// How many bytes there are of it.
        bytes: u64,
    },
    /// The log is not the one that the checkpoint was made of.
    Rewritten {
        /// The record whose line has another digest than the checkpoint says.
        sequence: u64,
    },
    /// The log has fewer records than the checkpoint says.
    EndRemoved {
        /// How many it has, counting those that were rotated away.
        found: u64,
        /// How many it had.
        expected: u64,
    },
    /// The checkpoint is of another VM's log.
    OtherVm {
        /// The checkpoint's.
        vm: String,
    },
}

/// What was found, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogFinding {
    /// Where; `None` when it is about the log as a whole.
    pub place: Option<Place>,
    /// What.
    pub what: What,
}

impl fmt::Display for LogFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        match &self.what {
            What::Edited { sequence } => {
                write!(
                    f,
                    "record {sequence} was edited: the record after it has another digest of it"
                )
            }
            What::Removed { from, to } if from == to => {
                write!(f, "record {from} was removed before this line")
            }
            What::Removed { from, to } => {
                write!(f, "records {from} to {to} were removed before this line")
            }
            What::Reordered { sequence, after } => {
                write!(
                    f,
                    "record {sequence} was moved: it stands after record {after}"
                )
            }
            What::Repeated { sequence } => write!(f, "record {sequence} is there twice"),
            What::Malformed { why } => write!(f, "not a record: {why}"),
            What::CutShort { bytes } => write!(
                f,
                "the last line is cut short after {bytes} bytes: its writer died, or the file was cut"
            ),
            What::Rewritten { sequence } => write!(
                f,
                "the log was rewritten: record {sequence} is not the one that the checkpoint was made of"
            ),
            What::EndRemoved { found, expected } => write!(
                f,
                "the end was removed: {found} records are there, the checkpoint was made of {expected}"
            ),
            What::OtherVm { vm } => write!(f, "the checkpoint is of the log of {vm}"),
        }
    }
}

/// What a verification has found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// How many records there are.
    pub records: u64,
    /// The number of the first one that is there; more than 0 when older files were rotated away.
    pub first: u64,
    /// What was done to it. Empty: nothing that the chain or the checkpoints show.
    pub findings: Vec<LogFinding>,
    /// Findings beyond those listed.
    pub more: u64,
    /// The event of the last record.
    pub last_event: String,
    /// Where the chain stands, if there is any record.
    pub head: Option<Checkpoint>,
    /// Checkpoints that are older than the oldest record that is there, by their counts.
    pub too_old: Vec<u64>,
}

impl Verification {
    /// As a JSON document.
    #[must_use]
    pub fn document(&self) -> serde_json::Value {
        let findings: Vec<_> = self
            .findings
            .iter()
            .map(|finding| {
                json!({
                    "file": finding.place.as_ref().map(|place| &place.file),
                    "line": finding.place.as_ref().map(|place| place.line),
                    "what": finding.what,
                    "message": finding.to_string(),
                })
            })
            .collect();
        json!({
            "intact": self.findings.is_empty(),
            "records": self.records,
            "first": self.first,
            "head": self.head,
            "last_event": self.last_event,
            "findings": findings,
            "findings_not_listed": self.more,
            "checkpoints_too_old": self.too_old,
        })
    }
}

/// One line of a log.
#[derive(Clone, Debug)]
struct Line {
    place: Place,
    link: Link,
    digest: Digest,
}

/// Verifies a log, given its files in order.
///
/// # Errors
///
/// When a file cannot be read.
pub fn files(vm: &str, files: &[PathBuf], checkpoints: &[Checkpoint]) -> io::Result<Verification> {
    let mut verifier = Verifier::default();
    for path in files {
        verifier.read(path, BufReader::new(File::open(path)?))?;
    }
    Ok(verifier.finish(vm, checkpoints))
}

/// Verifies a log that is in memory.
#[must_use]
pub fn bytes(vm: &str, log: &[u8], checkpoints: &[Checkpoint]) -> Verification {
    let mut verifier = Verifier::default();
    // Reading memory does not fail.
    let _ = verifier.read(&PathBuf::from("-"), log);
    verifier.finish(vm, checkpoints)
}

#[derive(Default)]
struct Verifier {
    lines: Vec<Line>,
    /// Lines that are no records, by how many records stand before them.
    holes: BTreeMap<usize, u64>,
    found: Verification,
}

impl Verifier {
    fn find(&mut self, place: Option<Place>, what: What) {
        if self.found.findings.len() < MAX_FINDINGS {
            self.found.findings.push(LogFinding { place, what });
        } else {
            self.found.more += 1;
        }
    }

    fn read(&mut self, path: &std::path::Path, mut reader: impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let most = MAX_RECORD as u64 + 1;
            let length = reader.by_ref().take(most).read_until(b'\n', &mut line)?;
            if length == 0 {
                break;
            }
            let place = Place {
                file: path.to_owned(),
                line: number,
            };
            let Some(text) = line.strip_suffix(b"\n") else {
                let bytes = u64::try_from(length).unwrap_or(u64::MAX);
                if bytes == most {
                    self.hole(place, format!("longer than {MAX_RECORD} bytes"));
                    skip_line(&mut reader)?;
                    continue;
                }
                self.find(Some(place), What::CutShort { bytes });
                break;
            };
            match Link::parse(text) {
                Ok(link) => self.lines.push(Line {
                    place,
                    link,
                    digest: Digest::of(text),
                }),
                Err(error) => self.hole(place, crate::quoted(&error.to_string())),
            }
        }
        Ok(())
    }

    fn hole(&mut self, place: Place, why: String) {
        *self.holes.entry(self.lines.len()).or_default() += 1;
        self.find(Some(place), What::Malformed { why });
    }

    fn finish(mut self, vm: &str, checkpoints: &[Checkpoint]) -> Verification {
        let lines = std::mem::take(&mut self.lines);
        let mut known: BTreeMap<u64, u32> = BTreeMap::new();
        for line in &lines {
            *known.entry(line.link.sequence).or_default() += 1;
        }
        self.found.records = u64::try_from(lines.len()).unwrap_or(u64::MAX);
        self.found.first = known.keys().next().copied().unwrap_or(0);
        self.first(&lines, &known);
        for (index, pair) in lines.windows(2).enumerate() {
            if let [before, line] = pair {
                let after = lines.get(index + 2);
                self.step(before, line, after, &known, index + 1);
            }
        }
        if let Some(last) = lines.last() {
            self.found.last_event.clone_from(&last.link.event);
            self.found.head = Some(Checkpoint {
                vm: vm.to_owned(),
                count: last.link.sequence.saturating_add(1),
                head: last.digest.to_string(),
            });
        }
        for checkpoint in checkpoints {
            self.check(vm, checkpoint, &lines);
        }
        self.found
    }

    /// The first record of all links to nothing; that of a log whose older files are gone, to what nobody has any more.
    fn first(&mut self, lines: &[Line], known: &BTreeMap<u64, u32>) {
        let Some(line) = lines.first() else { return };
        let starts = line.link.sequence == 0;
        if starts && line.link.previous != Digest::of(b"") {
            self.find(Some(line.place.clone()), What::Edited { sequence: 0 });
        }
        let rotated = line.link.event == "log-rotated";
        let earlier_elsewhere = known.range(..line.link.sequence).next().is_some();
        if !starts && !rotated && !earlier_elsewhere && !self.holes.contains_key(&0) {
            self.find(
                Some(line.place.clone()),
                What::Removed {
                    from: 0,
                    to: line.link.sequence - 1,
                },
            );
        }
    }

    fn step(
        &mut self,
        before: &Line,
        line: &Line,
        after: Option<&Line>,
        known: &BTreeMap<u64, u32>,
        index: usize,
    ) {
        let (last, sequence) = (before.link.sequence, line.link.sequence);
        let expected = last.saturating_add(1);
        let place = || Some(line.place.clone());
        if sequence == expected {
            if line.link.previous == before.digest || self.holes.contains_key(&index) {
                return;
            }
            // When the next record does not vouch for this one either, it is this one whose link was changed.
            let vouched = after.is_none_or(|after| after.link.previous == line.digest);
            if vouched {
                self.find(Some(before.place.clone()), What::Edited { sequence: last });
            }
        } else if sequence > expected {
            let holes = self.holes.get(&index).copied().unwrap_or(0);
            let mut next = expected;
            for (&there, _) in known.range(expected..=sequence) {
                // A malformed line that stands here is one of those that the numbers miss.
                if there > next && there - next > holes {
                    self.find(
                        place(),
                        What::Removed {
                            from: next,
                            to: there - 1,
                        },
                    );
                }
                next = there.saturating_add(1);
            }
        } else if known.get(&sequence).is_some_and(|count| *count > 1) {
            self.find(place(), What::Repeated { sequence });
        } else {
            self.find(
                place(),
                What::Reordered {
                    sequence,
                    after: last,
                },
            );
        }
    }

    fn check(&mut self, vm: &str, checkpoint: &Checkpoint, lines: &[Line]) {
        if checkpoint.vm != vm {
            let vm = checkpoint.vm.clone();
            return self.find(None, What::OtherVm { vm });
        }
        let count = checkpoint.count;
        let next = lines
            .last()
            .map_or(0, |line| line.link.sequence.saturating_add(1));
        if count == 0 {
            return;
        }
        if let Some(line) = lines.iter().find(|line| line.link.sequence == count - 1) {
            if line.digest.to_string() != checkpoint.head {
                let sequence = count - 1;
                self.find(Some(line.place.clone()), What::Rewritten { sequence });
            }
        } else if next < count {
            self.find(
                None,
                What::EndRemoved {
                    found: next,
                    expected: count,
                },
            );
        } else if let Some(line) = lines.iter().find(|line| line.link.sequence == count) {
            if line.link.previous.to_string() != checkpoint.head {
                let sequence = count;
                self.find(Some(line.place.clone()), What::Rewritten { sequence });
            }
        } else {
            self.found.too_old.push(count);
        }
    }
}

/// Reads to the end of a line without keeping it.
fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let used = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
