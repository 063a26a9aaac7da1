//! From bytes to JSON values: where one value ends and the next begins, whatever lines they are on, within bounds.
//!
//! Only the extent of a value is found here; serde_json says whether it is one. After bytes that can be no value, the rest of
//! the line is passed over, so that a client finds its way back by ending the line.

use serde_json::Value;

use crate::failure::Failure;

/// The longest command, in bytes. (QEMU takes 64 MiB; the longest command that this program understands has some hundred.)
pub(crate) const MAX_COMMAND: usize = 64 * 1024;

/// The deepest nesting of objects and arrays. (QEMU takes 1024.)
pub(crate) const MAX_DEPTH: usize = 64;

/// Cuts a stream into values.
#[derive(Debug, Default)]
pub(crate) struct Framer {
    buffer: Vec<u8>,
    depth: usize,
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Between values, or inside an object or array.
    #[default]
    Open,
    /// In a string.
    Text,
    /// In a string, right after a backslash.
    Escape,
    /// In a number or a word at the top level.
    Word,
    /// After an error, until the line ends.
    Lost,
}

impl Framer {
    /// Takes one byte. What it completes: a value's text, or an error that the client has to be told.
    pub(crate) fn feed(&mut self, byte: u8) -> Option<Result<Vec<u8>, Failure>> {
        match self.place {
            Place::Lost => {
                if byte == b'\n' {
                    self.place = Place::Open;
                }
                return None;
            }
            Place::Text => match byte {
                b'\\' => self.place = Place::Escape,
                b'"' => {
                    self.place = Place::Open;
                    self.buffer.push(byte);
                    return self.complete_at_top();
                }
                0..0x20 => return Some(self.lose("control character in a string", byte)),
                _ => {}
            },
            Place::Escape if byte < 0x20 => {
                return Some(self.lose("control character in a string", byte));
            }
            Place::Escape => self.place = Place::Text,
            Place::Word => {
                if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'+' | b'-' | b'_') {
                    return self.push(byte);
                }
                self.place = Place::Open;
                let word = std::mem::take(&mut self.buffer);
                // The byte that ended it begins something else.
                return match self.feed(byte) {
                    Some(Err(failure)) => Some(Err(failure)),
                    _ => Some(Ok(word)),
                };
            }
            Place::Open => match byte {
                b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => return None,
                b'"' => self.place = Place::Text,
                b'{' | b'[' => {
                    self.depth += 1;
                    if self.depth > MAX_DEPTH {
                        return Some(self.lose("JSON nesting depth limit exceeded", byte));
                    }
                }
                b'}' | b']' if self.depth == 0 => return Some(self.lose("unexpected end", byte)),
                b'}' | b']' => {
                    self.depth -= 1;
                    self.buffer.push(byte);
                    return self.complete_at_top();
                }
                _ if self.depth > 0 => {}
                _ if byte.is_ascii_alphanumeric() || byte == b'-' => self.place = Place::Word,
                _ => return Some(self.lose("expecting value", byte)),
            },
        }
        self.push(byte)
    }

    fn push(&mut self, byte: u8) -> Option<Result<Vec<u8>, Failure>> {
        if self.buffer.len() >= MAX_COMMAND {
            return Some(self.lose("JSON size limit exceeded", byte));
        }
        self.buffer.push(byte);
        None
    }

    fn complete_at_top(&mut self) -> Option<Result<Vec<u8>, Failure>> {
        (self.depth == 0).then(|| Ok(std::mem::take(&mut self.buffer)))
    }

    fn lose(&mut self, what: &str, byte: u8) -> Result<Vec<u8>, Failure> {
        self.buffer = Vec::new();
        self.depth = 0;
        self.place = if byte == b'\n' {
            Place::Open
        } else {
            Place::Lost
        };
        Err(Failure::generic(format_args!("JSON parse error, {what}")))
    }
}

/// Parses one value.
pub(crate) fn parse(text: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(text)
        .map_err(|error| Failure::generic(format_args!("JSON parse error, {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Vec<Result<String, String>> {
        let mut framer = Framer::default();
        bytes
            .iter()
            .filter_map(|byte| framer.feed(*byte))
            .map(|frame| match frame {
                Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
                Err(failure) => Err(failure.text),
            })
            .collect()
    }

    #[test]
    fn values_are_cut_wherever_lines_end() {
        let cut = all(b"{\"a\":\n[1,\r\n2]}{\"b\":\"}\\\"{\"} 17 \"x\"\n[[]]");
        let cut: Vec<_> = cut.into_iter().map(Result::unwrap).collect();
        assert_eq!(
            cut,
            [
                "{\"a\":\n[1,\r\n2]}",
                "{\"b\":\"}\\\"{\"}",
                "17",
                "\"x\"",
                "[[]]"
            ]
        );
    }

    #[test]
    fn after_nonsense_the_next_line_counts_again() {
        for nonsense in [
            &b"}"[..],
            b"\xff\xfe{{{",
            b", 1",
            b"{\"a\x01\": 2}",
            b"{\"unterminated",
        ] {
            let bytes = [nonsense, b"\n{\"execute\": 1}"].concat();
            let cut = all(&bytes);
            assert!(matches!(cut.first(), Some(Err(_))), "{cut:?}");
            assert_eq!(cut.last(), Some(&Ok("{\"execute\": 1}".to_owned())));
        }
    }

    #[test]
    fn length_and_depth_are_bounded() {
        let deep = vec![b'['; MAX_DEPTH + 1];
        assert_eq!(
            all(&deep),
            [Err(
                "JSON parse error, JSON nesting depth limit exceeded".into()
            )]
        );
        let mut framer = Framer::default();
        assert!(framer.feed(b'"').is_none());
        let told = (0..10 * MAX_COMMAND)
            .filter_map(|_| framer.feed(b'a'))
            .count();
        assert_eq!(told, 1, "one error, and nothing kept");
        assert!(framer.buffer.capacity() == 0);
    }

    #[test]
    fn random_bytes_never_keep_more_than_a_command() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut framer = Framer::default();
        for _ in 0..2_000_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            // Weighted towards what has a meaning.
            let alphabet = b"{}[]\":,\\ \n\xff0a";
            let byte = alphabet[usize::try_from(seed % alphabet.len() as u64).unwrap()];
            if let Some(Ok(text)) = framer.feed(byte) {
                let _ = parse(&text);
            }
            assert!(framer.buffer.len() <= MAX_COMMAND + 1 && framer.depth <= MAX_DEPTH + 1);
        }
    }
}
