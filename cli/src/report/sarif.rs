//! Audits as one SARIF log (Static Analysis Results Interchange Format, version 2.1.0, OASIS), for tools that collect findings.

use baton_ipc::control::Evidence;
use serde_json::Value;
use serde_json::json;

use super::Audited;
use crate::units;

/// The schema that the log follows.
const SCHEMA: &str =
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json";

/// Every rule that an audit may find violated: its stable name, and what it says.
#[rustfmt::skip]
const RULES: &[(&str, &str)] = &[
    ("alive",          "The worker runs."),
    ("capabilities",   "No thread has a capability that the policy does not keep, in any of its five sets."),
    ("descriptor",     "Every open descriptor is one that was granted, of the granted kind, access, object and seals, or one that a worker makes for itself."),
    ("groups",         "The worker is in no supplementary group."),
    ("ids",            "All user and group ids are the VM's own."),
    ("memory",         "Nothing is executable but the worker's binary, and nothing is both writable and executable."),
    ("namespaces",     "The worker has the namespaces that the policy names for itself, and is pid 1 of its pid namespace."),
    ("no-new-privs",   "no_new_privs is set on every thread."),
    ("process",        "The process is as its broker made it: the checked binary, an empty root, the VM's cgroup."),
    ("rlimits",        "No resource limit is higher than the policy's."),
    ("roles",          "There are as many threads of each role as the VM needs."),
    ("seccomp-filter", "Every filter of every thread is the compiled policy's, byte for byte."),
    ("seccomp-mode",   "Every thread is under seccomp filters."),
    ("threads",        "There is no thread but the worker's, and one of the kernel's own."),
    ("tracer",         "Nobody traces the worker."),
    ("weaker",         "What is weaker on this host, or for this user, than the policy's best."),
];

/// All audits as one log of one run.
pub(crate) fn log(all: &[Audited]) -> Value {
    let mut results = Vec::new();
    for audited in all {
        let report = &audited.report;
        for finding in &report.findings {
            let rule = RULES
                .iter()
                .find(|rule| rule.0 == finding.rule)
                .map_or("process", |rule| rule.0);
            let text = format!(
                "{}: declared {}, found {}",
                finding.subject, finding.declared, finding.found
            );
            results.push(result(audited, rule, "fail", &finding.subject, &text));
        }
        for weaker in &report.weaker {
            results.push(result(audited, "weaker", "informational", "host", weaker));
        }
        for check in &report.checks {
            let kind = match check.evidence {
                Evidence::Kernel => "pass",
                // Nobody has looked at it from outside.
                Evidence::ByConstruction => "informational",
                Evidence::Against => continue,
            };
            let text = format!("{}: {}", check.what, check.found);
            results.push(result(
                audited,
                rule_of(&check.what),
                kind,
                &check.what,
                &text,
            ));
        }
    }
    let rules: Vec<Value> = RULES
        .iter()
        .map(|(id, text)| json!({"id": id, "shortDescription": {"text": text}}))
        .collect();
    let times: Vec<Value> = all
        .iter()
        .map(|audited| {
            json!({
                "executionSuccessful": true,
                "endTimeUtc": units::timestamp(audited.time),
                "properties": {
                    "vm": audited.vm,
                    "verdict": audited.report.verdict,
                    "generation": audited.report.generation,
                    "workerDigest": audited.report.worker_digest,
                    "policyDigest": audited.report.policy_digest,
                },
            })
        })
        .collect();
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "baton audit",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            }},
            "invocations": times,
            "results": results,
        }],
    })
}

/// The rule that a comparison of this name is about.
fn rule_of(check: &str) -> &'static str {
    match check {
        "memory" => "memory",
        "limits" => "rlimits",
        "filters" => "seccomp-filter",
        "privileges" => "capabilities",
        "namespaces" => "namespaces",
        _ => "process",
    }
}

fn result(audited: &Audited, rule: &str, kind: &str, subject: &str, text: &str) -> Value {
    // "none" goes with every kind but "fail" (SARIF 2.1.0, 3.27.10).
    let level = if kind == "fail" { "error" } else { "none" };
    let index = RULES.iter().position(|known| known.0 == rule);
    json!({
        "ruleId": rule,
        "ruleIndex": index,
        "kind": kind,
        "level": level,
        "message": {"text": text},
        "locations": [{"logicalLocations": [{
            "name": subject,
            "fullyQualifiedName": format!("{}/{subject}", audited.vm),
            "kind": "resource",
        }]}],
        "partialFingerprints": {"batonFinding/v1": format!("{}/{rule}/{subject}", audited.vm)},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::tests::audited;

    /// Everything that is wrong with a value, by the part of JSON Schema (draft 4) that the standard's schema uses. What
    /// this does not know is wrong, too, so that nothing passes unjudged.
    fn wrong(schema: &Value, rules: &Value, value: &Value, place: &str) -> Vec<String> {
        let mut all = Vec::new();
        let mut fail = |what: String| all.push(format!("{place}: {what}"));
        let mut below = Vec::new();
        let size = |value: &Value| value.as_array().map(Vec::len);
        for (keyword, rule) in rules.as_object().unwrap() {
            let holds = match keyword.as_str() {
                "title" | "description" | "default" | "id" | "$schema" | "definitions" => true,
                "$ref" => {
                    let target = rule.as_str().unwrap().trim_start_matches('#');
                    below.push((schema.pointer(target).unwrap(), value, place.to_owned()));
                    true
                }
                "type" => {
                    let is = |name: &Value| match name.as_str().unwrap() {
                        "object" => value.is_object(),
                        "array" => value.is_array(),
                        "string" => value.is_string(),
                        "integer" => value.is_i64(),
                        "number" => value.is_number(),
                        "boolean" => value.is_boolean(),
                        "null" => value.is_null(),
                        _ => false,
                    };
                    rule.as_array()
                        .map_or_else(|| is(rule), |names| names.iter().any(is))
                }
                "enum" => rule.as_array().unwrap().contains(value),
                "minimum" => value.as_i64() >= rule.as_i64(),
                "minItems" => {
                    size(value) >= rule.as_u64().and_then(|least| usize::try_from(least).ok())
                }
                "uniqueItems" if rule == false => true,
                "uniqueItems" => {
                    let items = value.as_array().unwrap();
                    (1..items.len()).all(|at| !items[..at].contains(&items[at]))
                }
                "required" => rule
                    .as_array()
                    .unwrap()
                    .iter()
                    .all(|name| value.get(name.as_str().unwrap()).is_some()),
                "anyOf" => rule
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|one| wrong(schema, one, value, place).is_empty()),
                // Absolute URIs are all that there is of formats in what we write, and times, which have a test of theirs.
                "format" => match rule.as_str().unwrap() {
                    "uri" | "uri-reference" => value.as_str().unwrap().starts_with("https://"),
                    "date-time" => value.as_str().unwrap().ends_with('Z'),
                    _ => false,
                },
                "items" => {
                    for (index, item) in value.as_array().unwrap().iter().enumerate() {
                        below.push((rule, item, format!("{place}/{index}")));
                    }
                    true
                }
                "properties" => {
                    for (name, rule) in rule.as_object().unwrap() {
                        if let Some(value) = value.get(name) {
                            below.push((rule, value, format!("{place}/{name}")));
                        }
                    }
                    true
                }
                "additionalProperties" => {
                    let known = rules.get("properties").and_then(Value::as_object);
                    for (name, value) in value.as_object().unwrap() {
                        if known.is_some_and(|known| known.contains_key(name)) {
                            continue;
                        }
                        match rule {
                            Value::Bool(true) => {}
                            Value::Bool(false) => fail(format!("no property {name}")),
                            rule => below.push((rule, value, format!("{place}/{name}"))),
                        }
                    }
                    true
                }
                _ => false,
            };
            if !holds {
                fail(format!("{keyword} {rule} does not hold of {value}"));
            }
        }
        for (rules, value, place) in below {
            all.extend(wrong(schema, rules, value, &place));
        }
        all
    }

    #[test]
    fn a_log_follows_the_standards_schema() {
        let schema = include_str!("../../tests/sarif/sarif-schema-2.1.0.json");
        let schema: Value = serde_json::from_str(schema).unwrap();
        let log = log(&[audited(true), audited(false)]);
        assert_eq!(wrong(&schema, &schema, &log, ""), [""; 0]);
        let results = log["runs"][0]["results"].as_array().unwrap();
        let of_kind = |kind: &str| results.iter().filter(|one| one["kind"] == kind).count();
        assert!(of_kind("fail") == 2 && of_kind("pass") > 2, "{log:#}");
        for result in results {
            let index = usize::try_from(result["ruleIndex"].as_u64().unwrap()).unwrap();
            assert_eq!(RULES[index].0, result["ruleId"].as_str().unwrap());
        }
        // The schema is one that can say no.
        for (pointer, bad) in [
            ("/runs/0/results/0/level", json!("dreadful")),
            ("/runs/0/results/0/message", json!({})),
            ("/runs/0/tool/driver", json!({"nam": "x"})),
            ("/version", json!("2.2.0")),
        ] {
            let mut other = log.clone();
            *other.pointer_mut(pointer).unwrap() = bad;
            assert!(!wrong(&schema, &schema, &other, "").is_empty(), "{pointer}");
        }
    }
}
