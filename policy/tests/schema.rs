//! The JSON Schema that editors use agrees with the parser: it accepts the built-in policy, and every field that it
//! knows, requires or enumerates is one that the parser knows, requires or accepts, and the other way round.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use baton_policy::{BUILTIN, JSON_SCHEMA, Policy};
use serde_json::{Value, json};

/// The part of draft 2020-12 that the schema uses, without patterns. The first thing that is wrong, with its place.
fn validate(schema: &Value, root: &Value, value: &Value, place: &str) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{place}: {what}"));
    for (keyword, rule) in schema.as_object().unwrap() {
        let holds = match keyword.as_str() {
            "$ref" => {
                let target = root
                    .pointer(rule.as_str().unwrap().trim_start_matches('#'))
                    .unwrap();
                validate(target, root, value, place)?;
                true
            }
            "type" => match rule.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "integer" => value.is_i64(),
                "boolean" => value.is_boolean(),
                other => return wrong(&format!("unknown type {other}")),
            },
            "const" => value == rule,
            "enum" => rule.as_array().unwrap().contains(value),
            "minimum" => value.as_i64() >= rule.as_i64(),
            "maximum" => value.as_i64() <= rule.as_i64(),
            "minLength" => {
                value.as_str().unwrap().chars().count()
                    >= usize::try_from(rule.as_u64().unwrap()).unwrap()
            }
            "minItems" => {
                value.as_array().unwrap().len() >= usize::try_from(rule.as_u64().unwrap()).unwrap()
            }
            "anyOf" => rule
                .as_array()
                .unwrap()
                .iter()
                .any(|one| validate(one, root, value, place).is_ok()),
            "required" => rule
                .as_array()
                .unwrap()
                .iter()
                .all(|name| value.get(name.as_str().unwrap()).is_some()),
            "additionalProperties" => {
                let known = schema["properties"].as_object().unwrap();
                value
                    .as_object()
                    .unwrap()
                    .keys()
                    .all(|name| known.contains_key(name))
            }
            "properties" => {
                for (name, rule) in rule.as_object().unwrap() {
                    if let Some(value) = value.get(name) {
                        validate(rule, root, value, &format!("{place}/{name}"))?;
                    }
                }
                true
            }
            "items" => {
                for (index, item) in value.as_array().unwrap().iter().enumerate() {
                    validate(rule, root, item, &format!("{place}/{index}"))?;
                }
                true
            }
            "pattern" | "description" | "title" | "$schema" | "$defs" => true,
            other => return wrong(&format!("the test does not know {other}")),
        };
        if !holds {
            return wrong(&format!("{keyword} {rule}"));
        }
    }
    Ok(())
}

fn by_schema(value: &Value) -> bool {
    let schema: Value = serde_json::from_str(JSON_SCHEMA).unwrap();
    validate(&schema, &schema, value, "").is_ok()
}

fn by_parser(value: &Value) -> bool {
    let text = toml::to_string(value).unwrap();
    Policy::parse(&text, "test.toml").is_ok()
}

fn builtin() -> Value {
    // What the built-in policy has none of comes with it.
    let access = "[[access]]\nto = [\"view\"]\nusers = [7]\ngroups = [40]\nwhy = \"operators\"\n";
    let table: toml::Table = toml::from_str(&format!("{BUILTIN}\n{access}")).unwrap();
    serde_json::to_value(table).unwrap()
}

/// Every object in the document, by its place.
fn objects(value: &Value, place: String, all: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            all.push(place.clone());
            fields
                .iter()
                .for_each(|(name, value)| objects(value, format!("{place}/{name}"), all));
        }
        // One of a kind is enough.
        Value::Array(items) => {
            if let Some(first) = items.first() {
                objects(first, format!("{place}/0"), all);
            }
        }
        _ => {}
    }
}

#[test]
fn the_builtin_policy_is_valid_by_both() {
    let schema: Value = serde_json::from_str(JSON_SCHEMA).unwrap();
    assert_eq!(validate(&schema, &schema, &builtin(), ""), Ok(()));
    assert!(
        by_parser(&builtin()),
        "also when TOML is written by a program"
    );
}

#[test]
fn no_table_takes_an_unknown_field_and_both_miss_the_same_ones() {
    let mut places = Vec::new();
    objects(&builtin(), String::new(), &mut places);
    assert!(places.len() > 12, "{places:?}");
    for place in places {
        let mut extra = builtin();
        extra.pointer_mut(&place).unwrap()["surprise"] = json!(1);
        assert!(!by_schema(&extra) && !by_parser(&extra), "{place}/surprise");
        let names: Vec<String> = extra
            .pointer(&place)
            .unwrap()
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        for name in names.into_iter().filter(|name| name != "surprise") {
            let mut less = builtin();
            less.pointer_mut(&place)
                .unwrap()
                .as_object_mut()
                .unwrap()
                .remove(&name);
            // What is left may be refused for its meaning (a call without its condition, later phases without the
            // rule), but never for its form, by one of the two alone.
            let formally = |value: &Value| {
                let text = toml::to_string(value).unwrap();
                match Policy::parse(&text, "test.toml") {
                    Ok(_) => true,
                    Err(error) => !matches!(
                        *error.problem,
                        baton_policy::Problem::Toml(_) | baton_policy::Problem::MissingRole(_)
                    ),
                }
            };
            assert_eq!(by_schema(&less), formally(&less), "{place} without {name}");
        }
    }
}

#[test]
fn every_word_that_the_schema_lists_is_one_that_the_parser_takes_and_no_other() {
    let schema: Value = serde_json::from_str(JSON_SCHEMA).unwrap();
    let lists = [
        (
            "/properties/namespaces/properties/required/items/enum",
            "/namespaces/required/0",
        ),
        (
            "/properties/descriptor/items/properties/kinds/items/enum",
            "/descriptor/1/kinds/0",
        ),
        (
            "/properties/descriptor/items/properties/access/enum",
            "/descriptor/0/access",
        ),
        (
            "/properties/descriptor/items/properties/seals/items/enum",
            "/descriptor/1/seals/0",
        ),
        (
            "/properties/refuse/items/properties/errno/enum",
            "/refuse/0/errno",
        ),
        (
            "/$defs/role/properties/violation/enum",
            "/roles/io/violation",
        ),
    ];
    for (list, place) in lists {
        for word in schema.pointer(list).unwrap().as_array().unwrap() {
            let mut changed = builtin();
            *changed.pointer_mut(place).unwrap() = word.clone();
            // A descriptor with seals must be a memfd; that is meaning.
            changed["descriptor"][1]["seals"] = if place.contains("kinds") {
                json!([])
            } else {
                changed["descriptor"][1]["seals"].clone()
            };
            assert!(
                by_schema(&changed) && by_parser(&changed),
                "{place} = {word}"
            );
        }
        let mut changed = builtin();
        *changed.pointer_mut(place).unwrap() = json!("surprise");
        assert!(!by_schema(&changed) && !by_parser(&changed), "{place}");
    }
    let limits = schema["properties"]["rlimits"]["properties"]
        .as_object()
        .unwrap();
    for resource in baton_policy::Resource::ALL {
        let mut changed = builtin();
        changed["rlimits"] = json!({ resource.name(): "unlimited" });
        let known = limits.contains_key(resource.name());
        assert_eq!(
            (by_schema(&changed), by_parser(&changed)),
            (known, known),
            "{resource}"
        );
    }
}
