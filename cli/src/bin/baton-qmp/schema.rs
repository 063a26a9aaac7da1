//! The language of the table: what commands, events and types are made of, and whether a JSON value is of a type.
//!
//! The errors are QEMU's, word for word, since people's scripts look at them (`qapi/qobject-input-visitor.c`).

use serde_json::Map;
use serde_json::Value;

use crate::failure::Failure;
use crate::shared::Answer;
use crate::shared::Shared;

/// The members of an object.
pub(crate) type Object = Map<String, Value>;

/// A type of values.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Type {
    /// Any value.
    Any,
    /// A string.
    Str,
    /// A whole number of 64 bits, signed.
    Int,
    /// A number, whole or not.
    Number,
    /// `true` or `false`.
    Bool,
    /// One of some strings.
    Enum(&'static Enum),
    /// An object.
    Struct(&'static Struct),
    /// An array.
    List(&'static Type),
}

/// One of some strings.
#[derive(Debug)]
pub(crate) struct Enum {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    /// Each with what it means.
    pub(crate) values: &'static [(&'static str, &'static str)],
}

/// An object.
#[derive(Debug)]
pub(crate) struct Struct {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) members: &'static [Member],
    /// Further members, by the value of one.
    pub(crate) variants: Option<Variants>,
}

/// A member of an object.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) ty: Type,
    pub(crate) optional: bool,
}

/// Further members of an object.
#[derive(Debug)]
pub(crate) struct Variants {
    /// The member that says which; an [`Enum`].
    pub(crate) tag: &'static str,
    /// Its values that have some.
    pub(crate) cases: &'static [(&'static str, &'static Struct)],
}

/// A command.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) arguments: &'static Struct,
    /// An empty object, if there is nothing to say.
    pub(crate) returns: Type,
    /// It may be executed out of band.
    pub(crate) oob: bool,
    pub(crate) run: fn(&mut Shared, &Object) -> Answer,
}

/// An event.
pub(crate) struct Event {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) data: &'static Struct,
}

/// A required member.
pub(crate) const fn member(name: &'static str, ty: Type, doc: &'static str) -> Member {
    Member {
        name,
        doc,
        ty,
        optional: false,
    }
}

/// An optional member.
pub(crate) const fn optional(name: &'static str, ty: Type, doc: &'static str) -> Member {
    Member {
        name,
        doc,
        ty,
        optional: true,
    }
}

impl Type {
    /// Whether a value is of this type; `path` is what it is called in errors.
    pub(crate) fn check(self, value: &Value, path: &str) -> Result<(), Failure> {
        let expected = match self {
            Self::Any => return Ok(()),
            Self::Str if value.is_string() => return Ok(()),
            Self::Int if value.is_i64() => return Ok(()),
            Self::Number if value.is_number() => return Ok(()),
            Self::Bool if value.is_boolean() => return Ok(()),
            Self::Enum(choice) => match value.as_str() {
                Some(word) if choice.has(word) => return Ok(()),
                Some(word) => {
                    return Err(Failure::generic(format_args!(
                        "Parameter '{path}' does not accept value '{word}'"
                    )));
                }
                None => "string",
            },
            Self::Struct(object) => match value.as_object() {
                Some(members) => return object.check(members, path),
                None => "object",
            },
            Self::List(of) => match value.as_array() {
                Some(items) => {
                    return items
                        .iter()
                        .enumerate()
                        .try_for_each(|(index, item)| of.check(item, &format!("{path}[{index}]")));
                }
                None => "array",
            },
            Self::Str => "string",
            Self::Int => "integer",
            Self::Number => "number",
            Self::Bool => "boolean",
        };
        Err(Failure::generic(format_args!(
            "Invalid parameter type for '{path}', expected: {expected}"
        )))
    }
}

impl Enum {
    pub(crate) fn has(&self, word: &str) -> bool {
        self.values.iter().any(|value| value.0 == word)
    }
}

impl Struct {
    /// The further members that a value of this type has, if it has some.
    pub(crate) fn variant(&self, members: &Object) -> Option<&'static Struct> {
        let variants = self.variants.as_ref()?;
        let tag = members.get(variants.tag)?.as_str()?;
        let case = variants.cases.iter().find(|case| case.0 == tag)?;
        Some(case.1)
    }

    /// Whether an object is of this type.
    pub(crate) fn check(&self, members: &Object, path: &str) -> Result<(), Failure> {
        let mut known = Vec::new();
        self.check_members(members, path, &mut known)?;
        match members.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(Failure::generic(format_args!(
                "Parameter '{}' is unexpected",
                join(path, name)
            ))),
        }
    }

    fn check_members(
        &self,
        members: &Object,
        path: &str,
        known: &mut Vec<&'static str>,
    ) -> Result<(), Failure> {
        for member in self.members {
            known.push(member.name);
            let path = join(path, member.name);
            match members.get(member.name) {
                Some(value) => member.ty.check(value, &path)?,
                None if member.optional => {}
                None => {
                    return Err(Failure::generic(format_args!(
                        "Parameter '{path}' is missing"
                    )));
                }
            }
        }
        match self.variant(members) {
            Some(variant) => variant.check_members(members, path, known),
            None => Ok(()),
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// The commands and events, for whoever walks over all of it.
pub(crate) fn types() -> Vec<Type> {
    let mut all = Vec::new();
    for command in crate::table::COMMANDS {
        collect(Type::Struct(command.arguments), &mut all);
        collect(command.returns, &mut all);
    }
    for event in crate::table::EVENTS {
        collect(Type::Struct(event.data), &mut all);
    }
    all
}

/// The name of a type in the schema; a list's is its element's in brackets.
pub(crate) fn name(ty: Type) -> String {
    match ty {
        Type::Any => "any".to_owned(),
        Type::Str => "str".to_owned(),
        Type::Int => "int".to_owned(),
        Type::Number => "number".to_owned(),
        Type::Bool => "bool".to_owned(),
        Type::Enum(choice) => choice.name.to_owned(),
        Type::Struct(object) => object.name.to_owned(),
        Type::List(of) => format!("[{}]", name(*of)),
    }
}

fn collect(ty: Type, all: &mut Vec<Type>) {
    if all.iter().any(|known| name(*known) == name(ty)) {
        return;
    }
    all.push(ty);
    match ty {
        Type::Struct(object) => {
            object
                .members
                .iter()
                .for_each(|member| collect(member.ty, all));
            let cases = object.variants.iter().flat_map(|variants| variants.cases);
            cases.for_each(|case| collect(Type::Struct(case.1), all));
        }
        Type::List(of) => collect(*of, all),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::table::COMMANDS;

    fn refused(command: &str, arguments: &Value) -> String {
        let command = COMMANDS.iter().find(|one| one.name == command).unwrap();
        let checked = command.arguments.check(arguments.as_object().unwrap(), "");
        checked.unwrap_err().text
    }

    #[test]
    fn arguments_are_refused_in_qemus_words() {
        let main = json!({"channel-type": "main", "addr": {"transport": "socket", "type": "unix"}});
        let cases = [
            (
                "migrate-set-parameters",
                json!({"mode": "bogus"}),
                "Parameter 'mode' does not accept value 'bogus'",
            ),
            (
                "migrate-set-parameters",
                json!({"mode": 3}),
                "Invalid parameter type for 'mode', expected: string",
            ),
            (
                "migrate",
                json!({"channels": [main]}),
                "Parameter 'channels[0].addr.path' is missing",
            ),
            (
                "migrate",
                json!({"channels": [{"channel-type": "x"}]}),
                "Parameter 'channels[0].channel-type' does not accept value 'x'",
            ),
            (
                "migrate",
                json!({"detach": 1}),
                "Invalid parameter type for 'detach', expected: boolean",
            ),
            (
                "migrate",
                json!({"blk": true}),
                "Parameter 'blk' is unexpected",
            ),
            (
                "migrate-set-capabilities",
                json!({}),
                "Parameter 'capabilities' is missing",
            ),
            (
                "human-monitor-command",
                json!({"command-line": "x", "cpu-index": 1e300}),
                "Invalid parameter type for 'cpu-index', expected: integer",
            ),
        ];
        for (command, arguments, text) in cases {
            assert_eq!(refused(command, &arguments), text);
        }
    }
}
