//! The members of a channel, as JSON or as QEMU's dotted keys (`util/keyval.c`): read one by one, and none of them overlooked.
//! The errors are QEMU's words where it has them.

use std::collections::BTreeSet;

use serde_json::Map;
use serde_json::Value;
use serde_json::json;

/// An object's members, some of which were asked for.
pub(crate) struct Members {
    object: Map<String, Value>,
    /// What comes before their names in errors.
    path: String,
    /// All values are text, as in dotted keys.
    text: bool,
    asked: BTreeSet<String>,
}

impl Members {
    /// Those of a JSON object.
    pub(crate) fn of_json(text: &str) -> Result<Self, String> {
        let object = serde_json::from_str(text).map_err(|e| e.to_string())?;
        Ok(Self::new(object, String::new(), false))
    }

    /// Those of `main,addr.transport=socket,…`: keys with dots, `channel-type` also without its name if it comes first. In a
    /// value `,,` is a comma. Of a key that comes twice the last value counts.
    pub(crate) fn of_keys(text: &str) -> Result<Self, String> {
        let mut object = Map::new();
        let mut rest = text;
        while !rest.is_empty() {
            let at = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, after) = rest.split_at(at);
            let (key, from) = match after.strip_prefix('=') {
                Some(value) => (key, value),
                None if rest.len() == text.len() => ("channel-type", rest),
                None => return Err(format!("Expected '=' after parameter '{key}'")),
            };
            let (value, left) = value(from);
            insert(&mut object, key, value)?;
            rest = left;
        }
        Ok(Self::new(object, String::new(), true))
    }

    fn new(object: Map<String, Value>, path: String, text: bool) -> Self {
        Self {
            object,
            path,
            text,
            asked: BTreeSet::new(),
        }
    }

    fn ask(&mut self, key: &str) -> Option<&Value> {
        self.asked.insert(key.to_owned());
        self.object.get(key)
    }

    fn missing(&self, key: &str) -> String {
        format!("Parameter '{}{key}' is missing", self.path)
    }

    fn mistaken(&self, key: &str, expected: &str) -> String {
        format!(
            "Invalid parameter type for '{}{key}', expected: {expected}",
            self.path
        )
    }

    /// A member that is an object.
    pub(crate) fn object(&mut self, key: &str) -> Result<Self, String> {
        let path = format!("{}{key}.", self.path);
        let text = self.text;
        match self.ask(key) {
            Some(Value::Object(object)) => Ok(Self::new(object.clone(), path, text)),
            Some(_) => Err(self.mistaken(key, "object")),
            None => Err(self.missing(key)),
        }
    }

    /// A member that is a string.
    pub(crate) fn text(&mut self, key: &str) -> Result<String, String> {
        match self.ask(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(self.mistaken(key, "string")),
            None => Err(self.missing(key)),
        }
    }

    /// A whole number that may be left out; as text also in hexadecimal.
    pub(crate) fn integer(&mut self, key: &str) -> Result<Option<u64>, String> {
        let words = self.text;
        let number = match self.ask(key) {
            None => return Ok(None),
            Some(Value::String(text)) if words => match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok(),
                None => text.parse().ok(),
            },
            Some(value) if !words && value.is_number() => value.as_u64(),
            Some(_) => return Err(self.mistaken(key, "integer")),
        };
        let unfit = || format!("Parameter '{}{key}' expects an integer from 0", self.path);
        number.map(Some).ok_or_else(unfit)
    }

    /// A switch that may be left out.
    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, String> {
        let words = self.text;
        match self.ask(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(Value::String(word)) if words => match word.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(format!(
                    "Parameter '{}{key}' expects 'on' or 'off'",
                    self.path
                )),
            },
            Some(_) => Err(self.mistaken(key, "boolean")),
        }
    }

    /// There is nothing that was not asked for.
    pub(crate) fn end(self) -> Result<(), String> {
        match self.object.keys().find(|key| !self.asked.contains(*key)) {
            None => Ok(()),
            Some(key) => Err(format!("Parameter '{}{key}' is unexpected", self.path)),
        }
    }
}

/// A value at the beginning of this, and what comes after it and its comma.
fn value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some((part, after)) = rest.split_once(',') {
        value.push_str(part);
        let Some(more) = after.strip_prefix(',') else {
            return (value, after);
        };
        value.push(',');
        rest = more;
    }
    value.push_str(rest);
    (value, "")
}

fn insert(object: &mut Map<String, Value>, key: &str, value: String) -> Result<(), String> {
    let (mut object, mut last) = (object, key);
    while let Some((first, rest)) = last.split_once('.') {
        let inner = object.entry(first).or_insert_with(|| json!({}));
        let Value::Object(inner) = inner else {
            return Err(format!(
                "Parameters '{}.*' used inconsistently",
                key.strip_suffix(rest).unwrap_or(key).trim_end_matches('.')
            ));
        };
        if first.is_empty() {
            return Err(format!("Invalid parameter '{key}'"));
        }
        (object, last) = (inner, rest);
    }
    if last.is_empty() {
        return Err(format!("Invalid parameter '{key}'"));
    }
    if object.get(last).is_some_and(Value::is_object) {
        return Err(format!("Parameters '{key}.*' used inconsistently"));
    }
    object.insert(last.to_owned(), json!(value));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Value, String> {
        Members::of_keys(text).map(|members| Value::Object(members.object))
    }

    #[test]
    fn keys_have_dots_and_values_commas() {
        for (text, expected) in [
            ("cpr", json!({"channel-type": "cpr"})),
            (
                "a=1,b.c=2,b.d=3,",
                json!({"a": "1", "b": {"c": "2", "d": "3"}}),
            ),
            ("a=x,,y,b=,,,c==", json!({"a": "x,y", "b": ",", "c": "="})),
            ("a=1,a=2", json!({"a": "2"})),
            ("x,,y,a=1", json!({"channel-type": "x,y", "a": "1"})),
        ] {
            assert_eq!(keys(text), Ok(expected), "{text}");
        }
        for (text, words) in [
            ("a=1,b", "Expected '=' after parameter 'b'"),
            ("a=1,b.c=1,b=2", "Parameters 'b.*' used inconsistently"),
            ("a.b=1,a.b.c=2", "Parameters 'a.b.*' used inconsistently"),
            ("x,a.=1", "Invalid parameter 'a.'"),
            ("x,=1", "Invalid parameter ''"),
        ] {
            assert_eq!(keys(text), Err(words.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_switch_is_a_word_among_keys_and_a_boolean_in_json() {
        let flag = |members: Result<Members, String>| members.unwrap().flag("a");
        for (word, on) in [("on", true), ("yes", true), ("off", false), ("n", false)] {
            assert_eq!(flag(Members::of_keys(&format!("a={word}"))), Ok(Some(on)));
        }
        assert_eq!(flag(Members::of_json(r#"{"a": true}"#)), Ok(Some(true)));
        assert_eq!(flag(Members::of_json("{}")), Ok(None));
        let words = flag(Members::of_keys("a=maybe")).unwrap_err();
        assert_eq!(words, "Parameter 'a' expects 'on' or 'off'");
        let words = flag(Members::of_json(r#"{"a": "on"}"#)).unwrap_err();
        assert_eq!(words, "Invalid parameter type for 'a', expected: boolean");
    }
}
