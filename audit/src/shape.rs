//! Each event of ours as an event of the Open Cybersecurity Schema Framework, version 1.5.0 (<https://schema.ocsf.io/1.5.0/>).
//!
//! What the schema has a place for goes there; every field of ours is in `unmapped`, under its own name, together with
//! `prev`, the link of the chain. `metadata.event_code` is our name of the event, `metadata.sequence` its number.

use serde::Serialize;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::actor::Actor;
use crate::journal::Priority;

/// The schema's version.
pub const SCHEMA: &str = "1.5.0";

/// The longest text of a field that came from a worker or a client, in bytes.
pub const MAX_FIELD: usize = 512;

/// Event classes, by `class_uid` (the category is the class divided by 1000).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Base Event: what the schema has no class for.
    Base = 0,
    /// File System Activity.
    File = 1001,
    /// Compliance Finding.
    Compliance = 2003,
    /// Detection Finding.
    Detection = 2004,
    /// User Access Management.
    Access = 3005,
    /// Application Lifecycle.
    Lifecycle = 6002,
    /// API Activity.
    Api = 6003,
}

use Class::Access;
use Class::Api;
use Class::Base;
use Class::Compliance;
use Class::Detection;
use Class::File;
use Class::Lifecycle;

/// `activity_id` 99, Other: named by `activity_name`.
const OTHER: u64 = 99;

/// `severity_id` (dictionary attribute of the schema).
const INFORMATIONAL: u64 = 1;
const MEDIUM: u64 = 3;
const HIGH: u64 = 4;
const CRITICAL: u64 = 5;

/// `status_id`.
const SUCCESS: u64 = 1;
const FAILURE: u64 = 2;

/// An event's class, activity, severity and status, where they do not depend on its fields.
type Row = (&'static str, Class, u64, u64, u64);

#[rustfmt::skip]
const EVENTS: &[Row] = &[
    ("vm-start",          Lifecycle,  3,     INFORMATIONAL, SUCCESS), // Start
    ("ready",             Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("running",           Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("first-run",         Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("guest",             Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("failed",            Lifecycle,  3,     HIGH,          FAILURE), // Start
    ("lost",              Lifecycle,  4,     CRITICAL,      FAILURE), // Stop
    ("power-off-timeout", Lifecycle,  4,     MEDIUM,        FAILURE), // Stop
    ("vm-end",            Lifecycle,  4,     INFORMATIONAL, SUCCESS), // Stop
    ("upgrade-begin",     Lifecycle,  8,     INFORMATIONAL, SUCCESS), // Update
    ("commit-intent",     Lifecycle,  8,     INFORMATIONAL, SUCCESS), // Update
    ("upgrade",           Lifecycle,  8,     INFORMATIONAL, SUCCESS), // Update; see `judged`
    ("incoming-refused",  Lifecycle,  OTHER, MEDIUM,        FAILURE),
    ("incoming-undecided", Lifecycle, OTHER, HIGH,          FAILURE),
    ("taken-over",        Lifecycle,  8,     INFORMATIONAL, SUCCESS), // Update
    ("continued",         Lifecycle,  8,     INFORMATIONAL, SUCCESS), // Update
    ("received",          File,       14,    INFORMATIONAL, SUCCESS), // Open
    ("worker-failed",     Lifecycle,  OTHER, MEDIUM,        FAILURE),
    ("worker-says",       Base,       OTHER, INFORMATIONAL, SUCCESS),
    ("request",           Api,        OTHER, INFORMATIONAL, SUCCESS),
    ("request-refused",   Api,        OTHER, MEDIUM,        FAILURE),
    ("upgrade-refused",   Api,        OTHER, MEDIUM,        FAILURE),
    ("open",              File,       14,    INFORMATIONAL, SUCCESS), // Open
    ("node-add",          File,       14,    INFORMATIONAL, SUCCESS), // Open
    ("node-delete",       File,       OTHER, INFORMATIONAL, SUCCESS),
    ("netdev-add",        File,       14,    INFORMATIONAL, SUCCESS), // Open
    ("netdev-delete",     File,       OTHER, INFORMATIONAL, SUCCESS),
    ("device-add",        File,       OTHER, INFORMATIONAL, SUCCESS),
    ("device-delete",     Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("device-deleted",    Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("device-kept",       Lifecycle,  OTHER, MEDIUM,        FAILURE),
    ("resize",            File,       3,     INFORMATIONAL, SUCCESS), // Update
    ("grant",             Access,     1,     INFORMATIONAL, SUCCESS), // Assign Privileges
    ("confirmed-fresh",   Compliance, 1,     INFORMATIONAL, SUCCESS), // Create; see `judged`
    ("confirmed-settled", Compliance, 1,     INFORMATIONAL, SUCCESS), // Create; see `judged`
    ("audit",             Compliance, 1,     INFORMATIONAL, SUCCESS), // Create; see `judged`
    ("violation",         Detection,  1,     HIGH,          FAILURE), // Create
    ("launcher-died",     Lifecycle,  OTHER, HIGH,          FAILURE),
    ("limit-failed",      Lifecycle,  OTHER, HIGH,          FAILURE),
    ("front-launch",      Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("front-confirmed",   Lifecycle,  OTHER, INFORMATIONAL, SUCCESS),
    ("front-failed",      Lifecycle,  OTHER, MEDIUM,        FAILURE),
    ("front-says",        Base,       OTHER, INFORMATIONAL, SUCCESS),
    ("qmp-client",        Api,        OTHER, INFORMATIONAL, SUCCESS),
    ("vsock-refused",     Base,       OTHER, MEDIUM,        FAILURE),
    ("unwritten",         Base,       OTHER, MEDIUM,        FAILURE),
    ("log-rotated",       Base,       OTHER, INFORMATIONAL, SUCCESS),
];

/// Our names of all events that have a row of their own.
pub fn event_names() -> impl Iterator<Item = &'static str> {
    EVENTS.iter().map(|row| row.0)
}

/// What all records of one log have in common.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The VM.
    pub vm: String,
    /// The broker's version.
    pub version: String,
    /// This host's name.
    pub host: String,
    /// The broker's process.
    pub pid: u32,
}

/// A record before it is written.
#[derive(Clone, Debug)]
pub(crate) struct Shaped {
    /// The whole of it.
    pub(crate) document: Value,
    /// How urgent syslog would call it.
    pub(crate) priority: Priority,
}

/// Where a record stands.
#[derive(Clone, Debug)]
pub(crate) struct Position {
    /// Milliseconds since the epoch.
    pub(crate) time: u64,
    /// Its number.
    pub(crate) sequence: u64,
    /// The digest of the line before it.
    pub(crate) previous: String,
}

/// Puts an event into the schema's shape.
///
/// # Errors
///
/// When the fields are no JSON object.
pub(crate) fn shape(
    subject: &Subject,
    position: Position,
    event: &str,
    actor: Option<&Actor>,
    fields: &impl Serialize,
) -> Result<Shaped, serde_json::Error> {
    let mut own = match serde_json::to_value(fields)? {
        Value::Object(own) => own,
        other => Map::from_iter([("value".to_owned(), other)]),
    };
    let row = EVENTS.iter().find(|row| row.0 == event);
    let (_, class, activity, severity, status) =
        *row.unwrap_or(&("", Base, OTHER, INFORMATIONAL, SUCCESS));
    // Nobody asked: there is no API activity without an actor.
    let class = if class == Api && actor.is_none() {
        Base
    } else {
        class
    };
    let (severity, status) = judged(event, &own).unwrap_or((severity, status));
    let mut document = json!({
        "class_uid": class as u64,
        "category_uid": class as u64 / 1000,
        "activity_id": activity,
        "type_uid": class as u64 * 100 + activity,
        "severity_id": severity,
        "status_id": status,
        "time": position.time,
        "message": message(event, &own),
        "metadata": {
            "version": SCHEMA,
            "product": {"name": "Baton", "vendor_name": "Baton", "version": subject.version},
            "log_name": subject.vm,
            "sequence": position.sequence,
            "event_code": event,
        },
    });
    if let Some(document) = document.as_object_mut() {
        if activity == OTHER {
            document.insert("activity_name".to_owned(), json!(event));
        }
        if let Some(actor) = actor {
            document.insert("actor".to_owned(), actor.document());
            // Classes that are about a machine have their actor from this profile.
            let metadata = document.get_mut("metadata").and_then(Value::as_object_mut);
            if let (Base | Lifecycle | Compliance | Detection, Some(metadata)) = (class, metadata) {
                metadata.insert("profiles".to_owned(), json!(["host"]));
            }
        }
        particulars(class, subject, event, &own, status, document);
        own.insert("vm".to_owned(), json!(subject.vm));
        own.insert("prev".to_owned(), json!(position.previous));
        document.insert("unmapped".to_owned(), Value::Object(own));
    }
    let priority = match severity {
        CRITICAL => Priority::Critical,
        HIGH => Priority::Error,
        MEDIUM => Priority::Warning,
        _ => Priority::Info,
    };
    Ok(Shaped { document, priority })
}

/// What a class requires besides what all have, and what it has a better place for than `unmapped`.
fn particulars(
    class: Class,
    subject: &Subject,
    event: &str,
    own: &Map<String, Value>,
    status: u64,
    document: &mut Map<String, Value>,
) {
    let text = |name: &str| own.get(name).map(plain).unwrap_or_default();
    let mut put = |name: &str, value: Value| drop(document.insert(name.to_owned(), value));
    match class {
        Base => {}
        Lifecycle => put("app", json!({"name": subject.vm, "vendor_name": "Baton"})),
        Api => {
            let operation = match text("request") {
                named if named.is_empty() => event.to_owned(),
                named => named,
            };
            put("api", json!({"operation": operation}));
            put("src_endpoint", json!({"hostname": subject.host}));
        }
        File => {
            let path = text("path");
            let name = path.rsplit('/').next().unwrap_or_default().to_owned();
            // type_id 0: what it is, is in `unmapped.kind`.
            put("file", json!({"name": name, "path": path, "type_id": 0}));
            put("device", json!({"hostname": subject.host, "type_id": 0}));
            put("actor", json!({"process": {"pid": subject.pid}}));
        }
        Access => {
            let privilege = format!("{}#{}", text("descriptor"), text("id"));
            put("privileges", json!([privilege]));
            put("user", json!({"uid": text("uid")}));
        }
        Compliance => {
            let passed = status == SUCCESS;
            put(
                "compliance",
                json!({"standards": ["the VM's policy"], "control": "confinement", "status_id": if passed { 1 } else { 3 }}),
            );
            put("finding_info", info(subject, event));
        }
        Detection => put("finding_info", info(subject, event)),
    }
}

/// `finding_info`, which has to have an identity: one for each kind of finding of a VM.
fn info(subject: &Subject, event: &str) -> Value {
    json!({"uid": format!("{}/{event}", subject.vm), "title": event})
}

/// Severity and status of events that end in more than one way.
fn judged(event: &str, own: &Map<String, Value>) -> Option<(u64, u64)> {
    match event {
        "upgrade" => match own.get("outcome").and_then(Value::as_str) {
            Some("aborted") => Some((MEDIUM, FAILURE)),
            Some("lost") => Some((CRITICAL, FAILURE)),
            _ => None,
        },
        "confirmed-fresh" | "confirmed-settled" | "audit" => own
            .get("findings")
            .and_then(Value::as_array)
            .filter(|findings| !findings.is_empty())
            .map(|_| (HIGH, FAILURE)),
        _ => None,
    }
}

fn message(event: &str, own: &Map<String, Value>) -> String {
    let mut message = event.replace('-', " ");
    for name in ["request", "outcome", "descriptor", "what", "reason"] {
        match own.get(name).map(plain) {
            Some(text) if !text.is_empty() => {
                message.push_str(": ");
                message.push_str(&quoted(&text));
            }
            _ => {}
        }
    }
    message
}

/// A value in words: a text without its quotation marks.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Array(parts) => {
            let parts: Vec<String> = parts.iter().map(plain).collect();
            parts.join("#")
        }
        Value::Object(_) => String::new(),
        other => other.to_string(),
    }
}

/// A text of a worker or a client as the log takes it: bounded, control characters replaced.
#[must_use]
pub fn quoted(text: &str) -> String {
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

    #[test]
    fn hostile_text_is_bounded_and_has_no_control_characters() {
        assert_eq!(quoted("a\n\x1b[2Jb"), "a\u{fffd}\u{fffd}[2Jb");
        assert!(quoted(&"é".repeat(1000)).len() <= MAX_FIELD);
    }

    #[test]
    fn every_event_has_one_row() {
        for (index, row) in EVENTS.iter().enumerate() {
            assert!(
                EVENTS[..index].iter().all(|other| other.0 != row.0),
                "{}",
                row.0
            );
        }
    }
}
