//! Reading records back, for people and their tools. Whether they are the ones that were written is [`crate::verify`]'s to
//! say.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::path::PathBuf;

use serde_json::Value;

use crate::log::MAX_RECORD;

/// The last records that somebody wants, at most so many, oldest first. What is no record is left out.
///
/// # Errors
///
/// When a file cannot be read.
pub fn last(
    files: &[PathBuf],
    most: usize,
    wanted: impl Fn(&Value) -> bool,
) -> io::Result<Vec<Value>> {
    let mut records = VecDeque::new();
    for path in files {
        let mut reader = BufReader::new(File::open(path)?);
        let mut line = Vec::new();
        loop {
            line.clear();
            // What is longer is read in pieces, none of which is a record.
            let bound = MAX_RECORD as u64 + 1;
            if reader.by_ref().take(bound).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            match serde_json::from_slice::<Value>(&line) {
                Ok(record) if record.is_object() && wanted(&record) => records.push_back(record),
                _ => continue,
            }
            if records.len() > most {
                records.pop_front();
            }
        }
    }
    Ok(records.into())
}

/// Our name of a record's event.
#[must_use]
pub fn event(record: &Value) -> &str {
    record
        .pointer("/metadata/event_code")
        .and_then(Value::as_str)
        .unwrap_or_default()
}
