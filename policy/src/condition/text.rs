//! The text of conditions: `prot lacks PROT_EXEC`, `request in KVM_RUN, KVM_GET_REGS`.
//!
//! ```text
//! condition  = test *( "and" test )
//! test       = ARGUMENT ( "is" value / "in" value *( "," value )
//!                       / "lacks" value     none of these bits
//!                       / "has" value       all of these bits
//!                       / "within" value )  no bits but these
//! value      = term *( "|" term )
//! term       = NAME / decimal / 0xHEX
//! ```
//!
//! ARGUMENT is the kernel's name of an argument of the call, NAME a constant of its family.

use std::fmt;

use super::spelling::nearest;
use super::{Comparison, Conjunction};
use crate::constants;
use crate::syscalls::{Argument, Syscall};

/// The most alternatives of one condition.
pub(crate) const MAX_ALTERNATIVES: usize = 512;

/// Why a condition is not one, and where in its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConditionError {
    pub(crate) problem: ConditionProblem,
    /// Byte offset in the text.
    pub(crate) at: usize,
    /// How many bytes of the text it concerns.
    pub(crate) length: usize,
}

/// What is wrong with a condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConditionProblem {
    /// The argument is not one of the call's, or not one that this crate knows.
    #[error("{call} has no argument {name:?}; rules may constrain {known}")]
    UnknownArgument {
        /// The call.
        call: Syscall,
        /// What was written.
        name: String,
        /// The arguments that could have been.
        known: String,
    },
    /// Not an operator.
    #[error("expected one of is, in, lacks, has, within; found {found:?}")]
    UnknownOperator {
        /// What was written.
        found: String,
    },
    /// Neither a number nor a constant of the argument's family.
    #[error("{name:?} is no value of {argument}{}", did_you_mean(.suggestion.as_deref()))]
    UnknownValue {
        /// What was written.
        name: String,
        /// The argument.
        argument: &'static str,
        /// The nearest constant, if one is near.
        suggestion: Option<&'static str>,
    },
    /// A value that does not fit the argument.
    #[error("{value:#x} does not fit {argument}, of which the kernel looks at 32 bits")]
    TooWide {
        /// The value.
        value: u64,
        /// The argument.
        argument: &'static str,
    },
    /// `has 0`, `lacks 0`, or `within` everything: true of every call.
    #[error("this is true of every call; leave `when` out if that is meant")]
    AlwaysTrue,
    /// More alternatives than a filter can hold.
    #[error("more than {MAX_ALTERNATIVES} alternatives")]
    TooMany,
    /// `x is A and x is B`: true of no call.
    #[error("this is true of no call")]
    NeverTrue,
    /// The text ends where something should follow.
    #[error("the condition ends where {expected} should follow")]
    Incomplete {
        /// What should follow.
        expected: &'static str,
    },
}

fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |name| format!("; did you mean {name}?"))
}
/// Reads a condition on `call` into alternatives, each a conjunction; sorted, without duplicates.
pub(crate) fn parse(call: Syscall, text: &str) -> Result<Vec<Conjunction>, ConditionError> {
    let mut tokens = Tokens { text, at: 0 };
    let mut alternatives: Vec<Conjunction> = vec![Vec::new()];
    loop {
        let start = tokens.at;
        let choices = test(call, &mut tokens)?;
        if alternatives.len() * choices.len() > MAX_ALTERNATIVES {
            let length = tokens.at - start;
            return Err(ConditionError {
                problem: ConditionProblem::TooMany,
                at: start,
                length,
            });
        }
        let mut product = Vec::new();
        for before in &alternatives {
            for choice in &choices {
                let mut conjunction = before.clone();
                conjunction.push(*choice);
                product.extend(simplified(conjunction));
            }
        }
        if product.is_empty() {
            let at = start
                + text
                    .get(start..)
                    .map_or(0, |rest| rest.len() - rest.trim_start().len());
            return Err(ConditionError {
                problem: ConditionProblem::NeverTrue,
                at,
                length: tokens.at - at,
            });
        }
        alternatives = product;
        match tokens.next() {
            None => break,
            Some(Token { text: "and", .. }) => {}
            Some(token) => {
                return Err(token.problem(ConditionProblem::UnknownOperator {
                    found: token.text.to_owned(),
                }));
            }
        }
    }
    alternatives.sort();
    alternatives.dedup();
    Ok(alternatives)
}

/// Sorted and with one comparison an argument; nothing when two contradict each other.
fn simplified(mut conjunction: Conjunction) -> Option<Conjunction> {
    conjunction.sort_by_key(|comparison| comparison.index);
    let mut merged: Conjunction = Vec::new();
    for comparison in conjunction {
        match merged.last_mut() {
            Some(last) if last.index == comparison.index => {
                let both = last.mask & comparison.mask;
                if last.value & both != comparison.value & both {
                    return None;
                }
                last.mask |= comparison.mask;
                last.value |= comparison.value;
            }
            _ => merged.push(comparison),
        }
    }
    Some(merged)
}

/// One `ARGUMENT operator values`, as comparisons of which one must hold.
fn test(call: Syscall, tokens: &mut Tokens<'_>) -> Result<Vec<Comparison>, ConditionError> {
    let name = tokens.expect("the name of an argument")?;
    let argument = call
        .arguments()
        .iter()
        .find(|argument| argument.name == name.text)
        .ok_or_else(|| {
            let known: Vec<_> = call
                .arguments()
                .iter()
                .map(|argument| argument.name)
                .collect();
            let known = if known.is_empty() {
                "none of its arguments".to_owned()
            } else {
                known.join(", ")
            };
            name.problem(ConditionProblem::UnknownArgument {
                call,
                name: name.text.to_owned(),
                known,
            })
        })?;
    let operator = tokens.expect("is, in, lacks, has or within")?;
    let all = Comparison::all_bits(argument.width);
    let compare = |mask: u64, value: u64| Comparison {
        index: argument.index,
        width: argument.width,
        mask,
        value,
    };
    let start = tokens.at;
    let comparison = match operator.text {
        "is" => compare(all, value(argument, tokens)?),
        "in" => {
            let mut choices = vec![compare(all, value(argument, tokens)?)];
            while tokens.skip(",") {
                choices.push(compare(all, value(argument, tokens)?));
            }
            return Ok(choices);
        }
        "lacks" => compare(value(argument, tokens)?, 0),
        "has" => {
            let bits = value(argument, tokens)?;
            compare(bits, bits)
        }
        "within" => compare(all & !value(argument, tokens)?, 0),
        found => {
            return Err(operator.problem(ConditionProblem::UnknownOperator {
                found: found.to_owned(),
            }));
        }
    };
    if comparison.mask == 0 {
        let length = tokens.at - start;
        return Err(ConditionError {
            problem: ConditionProblem::AlwaysTrue,
            at: start,
            length,
        });
    }
    Ok(vec![comparison])
}

/// Constants and numbers joined by `|`.
fn value(argument: &Argument, tokens: &mut Tokens<'_>) -> Result<u64, ConditionError> {
    let mut value = 0;
    loop {
        let token = tokens.expect("a value")?;
        let term = number(token.text)
            .or_else(|| constants::value(argument.family, token.text))
            .ok_or_else(|| {
                let known = constants::of_family(argument.family).map(|(name, _)| name);
                token.problem(ConditionProblem::UnknownValue {
                    name: token.text.to_owned(),
                    argument: argument.name,
                    suggestion: nearest(token.text, known),
                })
            })?;
        if term & !Comparison::all_bits(argument.width) != 0 {
            return Err(token.problem(ConditionProblem::TooWide {
                value: term,
                argument: argument.name,
            }));
        }
        value |= term;
        if !tokens.skip("|") {
            return Ok(value);
        }
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        None if text.bytes().all(|digit| digit.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}
struct Tokens<'a> {
    text: &'a str,
    at: usize,
}

#[derive(Clone, Copy)]
struct Token<'a> {
    text: &'a str,
    at: usize,
}

impl Token<'_> {
    fn problem(self, problem: ConditionProblem) -> ConditionError {
        ConditionError {
            problem,
            at: self.at,
            length: self.text.len(),
        }
    }
}

impl<'a> Tokens<'a> {
    /// The next word or punctuation mark.
    fn next(&mut self) -> Option<Token<'a>> {
        let rest = self.text.get(self.at..)?;
        let trimmed = rest.trim_start();
        let at = self.at + (rest.len() - trimmed.len());
        let first = trimmed.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = if is_word(first) {
            trimmed.find(|c: char| !is_word(c)).unwrap_or(trimmed.len())
        } else {
            first.len_utf8()
        };
        self.at = at + length;
        trimmed.get(..length).map(|text| Token { text, at })
    }

    fn expect(&mut self, expected: &'static str) -> Result<Token<'a>, ConditionError> {
        self.next().ok_or(ConditionError {
            problem: ConditionProblem::Incomplete { expected },
            at: self.text.len(),
            length: 1,
        })
    }

    fn skip(&mut self, wanted: &str) -> bool {
        let before = self.at;
        let found = self.next().is_some_and(|token| token.text == wanted);
        if !found {
            self.at = before;
        }
        found
    }
}

impl fmt::Display for ConditionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problem.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(call: &str, text: &str) -> Result<Vec<Conjunction>, ConditionError> {
        parse(Syscall::from_name(call).unwrap(), text)
    }

    fn holds(call: &str, text: &str, arguments: [u64; 6]) -> bool {
        parsed(call, text)
            .unwrap()
            .iter()
            .any(|all| all.iter().all(|one| one.holds(&arguments)))
    }

    #[test]
    fn each_operator_means_what_it_says() {
        let mmap = |prot, flags| [0, 0, prot, flags, 0, 0];
        let text = "prot lacks PROT_EXEC and flags has MAP_PRIVATE|MAP_ANONYMOUS";
        assert!(holds("mmap", text, mmap(3, 0x22)));
        assert!(holds("mmap", text, mmap(0, 0x4022)));
        assert!(!holds("mmap", text, mmap(7, 0x22)));
        assert!(!holds("mmap", text, mmap(3, 0x21)));
        assert!(holds(
            "lseek",
            "whence in SEEK_DATA, SEEK_HOLE",
            [0, 0, 4, 0, 0, 0]
        ));
        assert!(!holds(
            "lseek",
            "whence in SEEK_DATA, SEEK_HOLE",
            [0, 0, 2, 0, 0, 0]
        ));
        assert!(holds(
            "statx",
            "flags within AT_EMPTY_PATH|0x6000",
            [0, 0, 0x5000, 0, 0, 0]
        ));
        assert!(!holds(
            "statx",
            "flags within AT_EMPTY_PATH|0x6000",
            [0, 0, 0x5100, 0, 0, 0]
        ));
    }

    #[test]
    fn only_the_bits_that_the_kernel_sees_are_compared() {
        let upper = 0xdead_beef_0000_0000;
        assert!(holds(
            "ioctl",
            "request is KVM_RUN",
            [0, upper | 0xae80, 0, 0, 0, 0]
        ));
        assert!(!holds("sendto", "addr is 0", [0, 0, 0, 0, upper, 0]));
    }

    #[test]
    fn contradictions_and_tautologies_are_refused() {
        let problem = |call, text| parsed(call, text).unwrap_err().problem;
        assert_eq!(
            problem("ioctl", "request is KVM_RUN and request is 1"),
            ConditionProblem::NeverTrue
        );
        assert_eq!(
            problem("mmap", "prot lacks 0"),
            ConditionProblem::AlwaysTrue
        );
        assert_eq!(
            problem("mmap", "prot has PROT_NONE"),
            ConditionProblem::AlwaysTrue
        );
        assert_eq!(
            problem("mmap", "prot is PROT_EXEC and prot lacks PROT_EXEC"),
            ConditionProblem::NeverTrue
        );
    }

    #[test]
    fn errors_point_at_the_word() {
        let refused = |call, text: &str| {
            let error = parsed(call, text).unwrap_err();
            text.get(error.at..error.at + error.length)
                .unwrap_or("<end>")
                .to_owned()
        };
        assert_eq!(refused("ioctl", "request is KVM_RUM"), "KVM_RUM");
        assert_eq!(refused("ioctl", "reqest is KVM_RUN"), "reqest");
        assert_eq!(refused("ioctl", "request = KVM_RUN"), "=");
        assert_eq!(refused("ioctl", "request is PROT_EXEC"), "PROT_EXEC");
        assert_eq!(refused("ioctl", "request is 0x1ffffffff"), "0x1ffffffff");
        assert_eq!(refused("ioctl", "request in KVM_RUN,"), "<end>");
        assert_eq!(refused("ioctl", ""), "<end>");
        assert_eq!(refused("read", "fd is 1"), "fd");
        assert_eq!(refused("ioctl", "request is KVM_RUN or"), "or");
    }

    #[test]
    fn near_misses_are_named() {
        let error = parsed("ioctl", "request is KVM_RUM").unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"KVM_RUM\" is no value of request; did you mean KVM_RUN?"
        );
    }

    #[test]
    fn order_and_repetition_change_nothing() {
        assert_eq!(
            parsed("mmap", "prot lacks PROT_EXEC and flags is 34").unwrap(),
            parsed("mmap", "flags in 0x22, 34 and prot lacks 4").unwrap()
        );
    }

    #[test]
    fn descriptions_read_as_conditions_do() {
        for (call, text) in [
            ("ioctl", "request is KVM_RUN"),
            ("mmap", "prot lacks PROT_EXEC"),
            ("mmap", "flags has MAP_PRIVATE|MAP_ANONYMOUS"),
            ("statx", "flags within AT_EMPTY_PATH"),
            ("sendto", "addr is 0"),
            ("futex", "op is FUTEX_WAIT_BITSET|FUTEX_CLOCK_REALTIME"),
        ] {
            let alternatives = parsed(call, text).unwrap();
            assert_eq!(
                alternatives[0][0].describe(Syscall::from_name(call).unwrap()),
                text
            );
        }
    }
}
