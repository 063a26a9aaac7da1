//! The audit log of a VM, read by somebody else than its writer.

use std::path::Path;

use serde_json::Value;
use sha2::Digest;
use sha2::Sha256;

/// Why a worker gives a pause up by itself: no processor was free for one of its vCPUs for so long. `--slow-host` does not
/// reach that bound, and no test is about it; the upgrade is tried again.
pub(crate) const OVERLOADED: &str = "did not answer within";

/// One record.
#[derive(Clone, Debug)]
pub struct Record {
    /// What happened.
    pub event: String,
    /// Our own fields of it.
    pub fields: Value,
    /// The whole record.
    pub record: Value,
}

/// A log whose chain holds.
#[derive(Clone, Debug)]
pub struct AuditLog(pub Vec<Record>);

impl AuditLog {
    /// Reads a log.
    ///
    /// # Panics
    ///
    /// When there is none, or its sequence or its hash chain is broken.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("no audit log {}: {error}", path.display()));
        // What a killed writer left unfinished is no record.
        let whole = text
            .rfind('\n')
            .map_or("", |end| text.get(..=end).unwrap_or_default());
        let mut previous = format!("{:x}", Sha256::digest(b""));
        let mut records = Vec::new();
        for (number, line) in whole.lines().enumerate() {
            let record: Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("record {number} is no JSON ({error}): {line}"));
            let at = |pointer: &str| record.pointer(pointer).cloned().unwrap_or_default();
            assert_eq!(
                at("/metadata/sequence"),
                number,
                "the sequence is broken at {line}"
            );
            assert_eq!(
                at("/unmapped/prev"),
                previous,
                "the hash chain is broken at {line}"
            );
            previous = format!("{:x}", Sha256::digest(line.as_bytes()));
            let event = at("/metadata/event_code");
            records.push(Record {
                event: event.as_str().unwrap_or_default().to_owned(),
                fields: at("/unmapped"),
                record,
            });
        }
        Self(records)
    }

    /// All records of an event, in order.
    pub fn of<'a>(&'a self, event: &'a str) -> impl Iterator<Item = &'a Record> {
        self.0.iter().filter(move |record| record.event == event)
    }

    /// How often an event was recorded.
    #[must_use]
    pub fn count(&self, event: &str) -> usize {
        self.of(event).count()
    }

    /// The outcomes of all upgrades, each of which has to have begun once and ended at most once, in turn (I7). Those that an
    /// overloaded machine made the old worker give up by itself are left out; see [`OVERLOADED`].
    ///
    /// # Panics
    ///
    /// When an upgrade ended twice, or never before the next began.
    #[must_use]
    pub fn upgrades(&self) -> Vec<String> {
        let mut outcomes = Vec::new();
        let mut open = false;
        for record in &self.0 {
            match record.event.as_str() {
                "upgrade-begin" => {
                    assert!(
                        !open,
                        "an upgrade began before the last had ended: {record:?}"
                    );
                    open = true;
                }
                "upgrade" => {
                    assert!(open, "an upgrade ended twice: {record:?}");
                    open = false;
                    let field = |name: &str| {
                        let field = record.fields.get(name).and_then(Value::as_str);
                        field.unwrap_or_default().to_owned()
                    };
                    if !field("reason").contains(OVERLOADED) {
                        outcomes.push(field("outcome"));
                    }
                }
                _ => {}
            }
        }
        outcomes
    }
}
