//! Every event that the log knows is an event of OCSF 1.5.0: a known class, every attribute known, of its type and among its
//! values, every required one there.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test's helpers fail as the test does"
)]

use baton_audit::Actor;
use baton_audit::AuditLog;
use baton_audit::Limits;
use baton_audit::shape::Subject;
use baton_audit::shape::event_names;
use serde_json::Value;
use serde_json::json;

const SCHEMA: &str = include_str!("ocsf/schema-1.5.0.json");

/// Everything that is wrong with an object.
fn wrong(
    schema: &Value,
    rules: &Value,
    object: &Value,
    place: &str,
    profiles: &[&str],
) -> Vec<String> {
    let mut wrong = Vec::new();
    let attributes = rules["attributes"].as_object().unwrap();
    for (name, rule) in attributes {
        let of_profile = rule["profile"].as_str();
        let applies = of_profile.is_none_or(|profile| profiles.contains(&profile));
        if rule["required"] == true && applies && object.get(name).is_none() {
            wrong.push(format!("{place}: no {name}"));
        }
    }
    if let Some(any) = rules["at_least_one"].as_array() {
        if !any.is_empty()
            && !any
                .iter()
                .any(|name| object.get(name.as_str().unwrap()).is_some())
        {
            wrong.push(format!("{place}: none of {any:?}"));
        }
    }
    for (name, value) in object.as_object().unwrap() {
        let place = format!("{place}.{name}");
        let Some(rule) = attributes.get(name) else {
            wrong.push(format!("{place}: no such attribute"));
            continue;
        };
        if rule["profile"]
            .as_str()
            .is_some_and(|profile| !profiles.contains(&profile))
        {
            wrong.push(format!("{place}: only with profile {}", rule["profile"]));
        }
        let values = match (rule["array"] == true, value) {
            (true, Value::Array(values)) => values.clone(),
            (false, value) => vec![value.clone()],
            (true, _) => {
                wrong.push(format!("{place}: not an array"));
                continue;
            }
        };
        for value in &values {
            let fits = match rule["type"].as_str().unwrap() {
                "integer_t" | "long_t" | "timestamp_t" | "port_t" => value.is_i64(),
                "float_t" => value.is_number(),
                "boolean_t" => value.is_boolean(),
                "json_t" => true,
                "object_t" => value.is_object(),
                _ => value.is_string(),
            };
            if !fits {
                wrong.push(format!("{place}: {value} is no {}", rule["type"]));
            }
            if rule["enum"]
                .as_array()
                .is_some_and(|all| !all.contains(value))
            {
                wrong.push(format!("{place}: {value} is none of {}", rule["enum"]));
            }
            // `object` is the schema's own word for: anything.
            if let (Some(object), true) = (
                rule["object"].as_str().filter(|name| *name != "object"),
                value.is_object(),
            ) {
                match schema["objects"].get(object) {
                    Some(rules) => {
                        wrong.extend(self::wrong(schema, rules, value, &place, profiles))
                    }
                    None => {
                        wrong.push(format!("{place}: an object {object} is not in the extract"))
                    }
                }
            }
        }
    }
    wrong
}

/// Everything that is wrong with a record.
fn wrong_with(record: &Value) -> Vec<String> {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let class = record["class_uid"].to_string();
    let Some(rules) = schema["classes"].get(&class) else {
        return vec![format!("no class {class}")];
    };
    let profiles: Vec<&str> = record["metadata"]["profiles"]
        .as_array()
        .map(|profiles| profiles.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    wrong(&schema, rules, record, "", &profiles)
}

#[test]
fn every_event_is_one_of_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let subject = Subject {
        vm: "web1".to_owned(),
        version: "0.1.0".to_owned(),
        host: "host".to_owned(),
        pid: 1,
    };
    let mut log = AuditLog::open(&path, subject, Limits::default()).unwrap();
    let actor = Actor {
        uid: 1000,
        pid: 77,
        unit: Some("nightly.service".to_owned()),
    };
    let fields = json!({
        "request": "upgrade", "descriptor": ["kvm", 0], "id": 0, "uid": 1_900_000_000, "path": "/dev/kvm", "outcome": "aborted",
        "reason": "it took too long", "findings": [{"rule": "x"}], "generation": 2,
    });
    for event in event_names().chain(["one-of-tomorrow"]) {
        log.write_by(event, Some(&actor), &fields).unwrap();
        log.write(event, &fields).unwrap();
        log.write(event, &json!({})).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.lines().count() > 60);
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let wrong = wrong_with(&record);
        assert!(wrong.is_empty(), "{wrong:#?}\n{record:#}");
        let (class, category) = (
            record["class_uid"].as_u64().unwrap(),
            record["category_uid"].as_u64().unwrap(),
        );
        assert_eq!(category, class / 1000);
        assert_eq!(
            record["type_uid"].as_u64(),
            Some(class * 100 + record["activity_id"].as_u64().unwrap())
        );
    }
}

#[test]
fn the_check_finds_what_is_wrong() {
    let good = json!({
        "class_uid": 6003, "category_uid": 6, "activity_id": 99, "type_uid": 600_399, "severity_id": 1, "time": 1,
        "actor": {"user": {"uid": "0"}}, "api": {"operation": "stop"}, "src_endpoint": {"hostname": "a"},
        "metadata": {"version": "1.5.0", "product": {"name": "Baton"}},
    });
    assert_eq!(wrong_with(&good), [""; 0]);
    let bad = [
        ("actor", Value::Null),
        ("severity_id", json!(17)),
        ("time", json!("now")),
        ("metadata", json!({"version": "1.5.0"})),
        ("vm", json!("web1")),
        ("actor", json!({"process": {"unit": "x"}})),
        ("class_uid", json!(1234)),
    ];
    for (name, value) in bad {
        let mut record = good.clone();
        record[name] = value;
        assert!(!wrong_with(&record).is_empty(), "{record}");
    }
}
