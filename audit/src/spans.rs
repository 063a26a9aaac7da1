//! What a broker and its workers do, as it happens, for the person who started it with `--log`: a line an event, a line a
//! span, with the mode, the descriptor's name and id.
//!
//! ```text
//!      2.310 ms  broker    open                 kernel#0 kind=image path=/boot/vmlinux
//!     40.127 ms  broker    grant                kernel#0 mode=none to worker 1
//!     44.906 ms  worker 1  build                mode=none 15.814 ms: memory 0.900, machine 14.273, rehearsal 0.641
//!    310.551 ms  broker    S5 build             75.020 ms
//! ```
//!
//! The times on the left are since the log was opened. The audit log itself is elsewhere and has all of this, and more.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::Map;
use serde_json::Value;

use crate::echo::Echo;

/// What is said in a place of its own, or is of use to a machine only.
const ELSEWHERE: &[&str] = &[
    "prev",
    "vm",
    "descriptor",
    "id",
    "generation",
    "mode",
    "times",
    "phases",
    "what",
    "uid",
];
/// A digest is known by its beginning, in hex digits.
const DIGEST_SHOWN: usize = 12;
/// The hex digits of a whole SHA-256.
const DIGEST: usize = 64;

/// Where the lines go.
#[derive(Debug)]
pub(crate) struct Spans {
    began: Instant,
    echo: Echo,
}

impl Spans {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            echo: Echo::new(),
        }
    }

    /// Says what happened just now.
    pub(crate) fn say(&mut self, event: &str, fields: &Map<String, Value>) {
        let at = self.began.elapsed().as_secs_f64() * 1e3;
        let mut text = String::new();
        for (who, what, how) in lines(event, fields) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{at:>11.3} ms  {who:<9} {what:<20} {how}");
        }
        self.echo.say(text.as_bytes());
    }
}

/// Who, what, and the rest of each line.
fn lines(event: &str, fields: &Map<String, Value>) -> Vec<(String, String, String)> {
    let number = |field: &str| fields.get(field).and_then(Value::as_u64);
    let worker = |generation: Option<u64>| match generation {
        Some(generation) => format!("worker {generation}"),
        None => "worker".to_owned(),
    };
    let mut words = Vec::new();
    match fields.get("descriptor") {
        // ("name", id) where it is opened, name and id apart where it is granted.
        Some(Value::Array(key)) => words.push(key.iter().map(shown).collect::<Vec<_>>().join("#")),
        Some(name) => words.push(match number("id") {
            Some(id) => format!("{}#{id}", shown(name)),
            None => shown(name),
        }),
        None => {}
    }
    if let Some(mode) = fields.get("mode") {
        words.push(format!("mode={}", shown(mode)));
    }
    let mut who = "broker".to_owned();
    match event {
        "grant" => words.push(format!("to {}", worker(number("generation")))),
        "ready" => {
            let time = |field| {
                let times = fields.get("times")?;
                times.get(field)?.as_u64()
            };
            let (memory, machine) = (time("memory_us").unwrap_or(0), time("vm_us").unwrap_or(0));
            let whole = time("rehearsed_us").unwrap_or(0);
            words.push(format!(
                "{}: memory {}, machine {}, rehearsal {}",
                took(whole),
                ms(memory),
                ms(machine.saturating_sub(memory)),
                ms(whole.saturating_sub(machine)),
            ));
            return vec![(
                worker(number("generation")),
                "build".to_owned(),
                words.join(" "),
            )];
        }
        "first-run" | "running" | "guest" | "worker-says" => who = worker(number("generation")),
        _ => {
            words.extend(number("generation").map(|generation| format!("generation={generation}")))
        }
    }
    for (field, value) in fields {
        let nothing = value.is_null()
            || value.as_str().is_some_and(str::is_empty)
            || value.as_array().is_some_and(Vec::is_empty);
        if !nothing && !ELSEWHERE.contains(&field.as_str()) {
            words.push(format!("{field}={}", shown(value)));
        }
    }
    let mut lines: Vec<_> = fields
        .get("phases")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|phase| {
            let step = phase.get("step")?.as_str()?;
            let us = phase.get("us")?.as_u64()?;
            Some(("broker".to_owned(), format!("upgrade {step}"), took(us)))
        })
        .collect();
    lines.push((who, event.to_owned(), words.join(" ")));
    lines
}

fn ms(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

fn took(us: u64) -> String {
    format!("{} ms", ms(us))
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let digest = text.len() == DIGEST && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            match text.get(..DIGEST_SHOWN).filter(|_| digest) {
                Some(beginning) => format!("{beginning}…"),
                None if text.contains(' ') => format!("{text:?}"),
                None => text.clone(),
            }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(event: &str, fields: Value) -> Vec<(String, String, String)> {
        let Value::Object(fields) = fields else {
            panic!("{fields}");
        };
        lines(event, &fields)
    }

    fn line(who: &str, what: &str, how: &str) -> (String, String, String) {
        (who.to_owned(), what.to_owned(), how.to_owned())
    }

    #[test]
    fn a_descriptor_has_its_name_and_id_wherever_it_goes() {
        assert_eq!(
            said(
                "open",
                json!({"prev": "0", "descriptor": ["ram", 1], "kind": "guest-ram", "path": "memfd:guest-ram"})
            ),
            [line(
                "broker",
                "open",
                "ram#1 kind=guest-ram path=memfd:guest-ram"
            )]
        );
        assert_eq!(
            said(
                "grant",
                json!({"descriptor": "disk", "id": 2, "generation": 3, "mode": "cpr-transfer", "uid": 1, "what": {"size": 0}})
            ),
            [line(
                "broker",
                "grant",
                "disk#2 mode=cpr-transfer to worker 3"
            )]
        );
    }

    #[test]
    fn spans_of_the_worker_and_of_the_broker_have_their_lengths() {
        let times = json!({"memory_us": 900, "vm_us": 15_173, "rehearsed_us": 15_814});
        assert_eq!(
            said(
                "ready",
                json!({"generation": 2, "mode": "none", "times": times})
            ),
            [line(
                "worker 2",
                "build",
                "mode=none 15.814 ms: memory 0.900, machine 14.273, rehearsal 0.641"
            )]
        );
        let phases = json!([{"step": "build", "us": 75_020}, {"step": "park", "us": 7}]);
        let digest = "0123456789ab".repeat(6);
        assert_eq!(
            said(
                "upgrade",
                json!({"generation": 2, "outcome": "committed", "phases": phases, "reason": "", "state_digest": digest.get(..64)})
            ),
            [
                line("broker", "upgrade build", "75.020 ms"),
                line("broker", "upgrade park", "0.007 ms"),
                line(
                    "broker",
                    "upgrade",
                    "generation=2 outcome=committed state_digest=0123456789ab…"
                ),
            ]
        );
    }
}
