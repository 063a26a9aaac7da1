//! `docs/qmp.md`: the table for people.

use std::fmt::Write as _;

use crate::capability::CAPABILITIES;
use crate::json::MAX_COMMAND;
use crate::json::MAX_DEPTH;
use crate::schema::Member;
use crate::schema::Struct;
use crate::schema::Type;
use crate::schema::name;
use crate::schema::types;
use crate::session::MAX_UNSENT;
use crate::table::COMMANDS;
use crate::table::EVENTS;

const INTRODUCTION: &str = include_str!("introduction.md");

/// The whole document.
pub(crate) fn markdown() -> String {
    let mut text = INTRODUCTION
        .replace("{MAX_COMMAND}", &(MAX_COMMAND / 1024).to_string())
        .replace("{MAX_DEPTH}", &MAX_DEPTH.to_string())
        .replace("{MAX_UNSENT}", &(MAX_UNSENT / 1024).to_string());
    text.push_str("\n## Commands\n");
    for command in COMMANDS {
        let _ = write!(text, "\n### `{}`\n\n{}\n", command.name, command.doc);
        if command.oob {
            text.push_str("May be executed out of band.\n");
        }
        if !command.arguments.members.is_empty() {
            text.push_str("\nArguments:\n\n");
            members(&mut text, command.arguments);
        }
        let nothing = matches!(command.returns, Type::Struct(empty) if empty.members.is_empty());
        if !nothing {
            let _ = write!(text, "\nReturns: {}\n", link(command.returns));
        }
    }
    text.push_str("\n## Events\n");
    for event in EVENTS {
        let _ = write!(text, "\n### `{}`\n\n{}\n", event.name, event.doc);
        if !event.data.members.is_empty() {
            text.push_str("\nData:\n\n");
            members(&mut text, event.data);
        }
    }
    text.push_str("\n## Types\n");
    for ty in types() {
        match ty {
            // What is a command's or an event's own is shown there.
            Type::Struct(object) if !object.name.starts_with("q_") => {
                let _ = write!(text, "\n### `{}`\n\n{}\n\n", object.name, object.doc);
                members(&mut text, object);
            }
            Type::Enum(choice) => {
                let _ = write!(text, "\n### `{}`\n\n{}\n\n", choice.name, choice.doc);
                for (value, meaning) in choice.values {
                    let refused = CAPABILITIES
                        .iter()
                        .find(|known| choice.name == "MigrationCapability" && known.0 == *value)
                        .and_then(|known| known.1)
                        .map(|clash| format!(" (`{}`)", clash.why()));
                    let refused = refused.unwrap_or_default();
                    let _ = writeln!(text, "* `{value}`: {meaning}{refused}");
                }
            }
            _ => {}
        }
    }
    text
}

fn members(text: &mut String, object: &Struct) {
    for Member {
        name,
        doc,
        ty,
        optional,
    } in object.members
    {
        let optional = if *optional { ", may be left out" } else { "" };
        let _ = writeln!(text, "* `{name}` ({}{optional}): {doc}", link(*ty));
    }
    for variants in object.variants.iter() {
        for (case, of) in variants.cases {
            let _ = writeln!(
                text,
                "* if `{}` is `{case}`: the members of {}",
                variants.tag,
                link(Type::Struct(of))
            );
        }
    }
}

fn link(ty: Type) -> String {
    match ty {
        Type::List(of) => format!("array of {}", link(*of)),
        Type::Enum(_) | Type::Struct(_) => {
            let name = name(ty);
            let anchor = name.to_lowercase().replace('.', "");
            format!("[`{name}`](#{anchor})")
        }
        Type::Any => "any value".to_owned(),
        Type::Str => "string".to_owned(),
        Type::Int => "integer".to_owned(),
        Type::Number => "number".to_owned(),
        Type::Bool => "boolean".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_documented() {
        for command in COMMANDS {
            assert!(!command.doc.is_empty(), "{}", command.name);
        }
        for event in EVENTS {
            assert!(!event.doc.is_empty(), "{}", event.name);
        }
        for ty in types() {
            match ty {
                Type::Struct(object) => {
                    assert!(!object.doc.is_empty(), "{}", object.name);
                    for member in object.members {
                        assert!(!member.doc.is_empty(), "{}.{}", object.name, member.name);
                    }
                }
                Type::Enum(choice) => {
                    assert!(!choice.doc.is_empty(), "{}", choice.name);
                    for (value, meaning) in choice.values {
                        assert!(!meaning.is_empty(), "{}.{value}", choice.name);
                    }
                }
                _ => {}
            }
        }
    }

    #[test]
    fn the_document_is_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/qmp.md");
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == markdown(),
            "docs/qmp.md is not what the table says; make it anew: baton-qmp --document > docs/qmp.md"
        );
    }
}
