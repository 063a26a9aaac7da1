//! `query-qmp-schema`: the table in the form of QEMU's `qapi/introspect.json`.

use serde_json::Value;
use serde_json::json;

use crate::schema::Type;
use crate::schema::name;
use crate::schema::types;
use crate::table::COMMANDS;
use crate::table::EVENTS;

/// The whole schema.
pub(crate) fn schema() -> Value {
    let commands = COMMANDS.iter().map(|command| {
        json!({
            "name": command.name, "meta-type": "command", "arg-type": command.arguments.name,
            "ret-type": name(command.returns), "allow-oob": command.oob,
        })
    });
    let events = EVENTS.iter().map(
        |event| json!({"name": event.name, "meta-type": "event", "arg-type": event.data.name}),
    );
    commands
        .chain(events)
        .chain(types().into_iter().map(entity))
        .collect()
}

fn entity(ty: Type) -> Value {
    match ty {
        Type::Any => json!({"name": "any", "meta-type": "builtin", "json-type": "value"}),
        Type::Str => json!({"name": "str", "meta-type": "builtin", "json-type": "string"}),
        Type::Int => json!({"name": "int", "meta-type": "builtin", "json-type": "int"}),
        Type::Number => {
            json!({"name": "number", "meta-type": "builtin", "json-type": "number"})
        }
        Type::Bool => json!({"name": "bool", "meta-type": "builtin", "json-type": "boolean"}),
        Type::Enum(choice) => {
            let values: Vec<_> = choice.values.iter().map(|value| value.0).collect();
            let members: Vec<_> = values.iter().map(|value| json!({"name": value})).collect();
            json!({"name": choice.name, "meta-type": "enum", "values": values, "members": members})
        }
        Type::List(of) => {
            json!({"name": name(ty), "meta-type": "array", "element-type": name(*of)})
        }
        Type::Struct(object) => {
            let member = |member: &crate::schema::Member| {
                let mut value = json!({"name": member.name, "type": name(member.ty)});
                // QEMU's sign for "may be left out".
                if let (true, Some(members)) = (member.optional, value.as_object_mut()) {
                    members.insert("default".to_owned(), Value::Null);
                }
                value
            };
            let members: Vec<_> = object.members.iter().map(member).collect();
            let mut value = json!({"name": object.name, "meta-type": "object", "members": members});
            if let (Some(variants), Some(entity)) = (&object.variants, value.as_object_mut()) {
                let cases = variants
                    .cases
                    .iter()
                    .map(|(case, of)| json!({"case": case, "type": of.name}));
                entity.insert("tag".to_owned(), json!(variants.tag));
                entity.insert("variants".to_owned(), cases.collect());
            }
            value
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::schema::Struct;

    /// The names of an object's members, those of all its variants for each of them.
    fn member_lists(object: &'static Struct) -> Vec<Vec<&'static str>> {
        let own: Vec<_> = object.members.iter().map(|member| member.name).collect();
        let cases = object.variants.iter().flat_map(|variants| variants.cases);
        let with_variants = cases.flat_map(|case| member_lists(case.1)).map(|more| {
            let all = own.iter().copied().chain(more);
            all.collect()
        });
        let mut lists: Vec<_> = with_variants.collect();
        lists.push(own);
        lists
    }

    #[test]
    fn no_object_has_a_member_twice_whichever_variant_it_is() {
        for ty in types() {
            let Type::Struct(object) = ty else { continue };
            for members in member_lists(object) {
                let mut names = BTreeSet::new();
                for member in members {
                    assert!(names.insert(member), "{}.{member}", object.name);
                }
            }
        }
    }

    #[test]
    fn every_type_that_is_named_is_there_and_named_once() {
        let schema = schema();
        let entities = schema.as_array().unwrap();
        let mut names = BTreeSet::new();
        for entity in entities {
            assert!(names.insert(entity["name"].as_str().unwrap()), "{entity}");
        }
        for entity in entities {
            let named = ["arg-type", "ret-type", "element-type"];
            let direct = named.iter().filter_map(|key| entity[*key].as_str());
            let members = entity["members"].as_array().into_iter().flatten();
            let variants = entity["variants"].as_array().into_iter().flatten();
            let nested = members
                .chain(variants)
                .filter_map(|member| member["type"].as_str());
            for name in direct.chain(nested) {
                assert!(names.contains(name), "{name} of {entity}");
            }
        }
    }
}
