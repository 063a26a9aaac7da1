//! What can be wrong with a policy, and how it is said: file, line, column, the line with a caret, a remedy.

use std::fmt;
use std::ops::Range;

use super::rules::ERRNOS;
use crate::condition::text::{ConditionProblem, MAX_ALTERNATIVES};
use crate::digest::DigestError;
use crate::policy::{Role, SCHEMA};
use crate::signature::KeyError;
use crate::syscalls::Syscall;
use crate::trusted::TrustError;

/// A policy that is not one: where, what, and what to do.
#[derive(Debug)]
pub struct PolicyError {
    /// The file.
    pub origin: String,
    /// Where in it, when it is about a place in the text.
    pub place: Option<Place>,
    /// What is wrong.
    pub problem: Box<Problem>,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// How many characters it concerns, at least 1, on that line.
    pub width: usize,
    /// The line itself.
    pub text: String,
}

/// What is wrong with a policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The file cannot be read or is not to be trusted.
    #[error(transparent)]
    File(#[from] TrustError),
    /// Not TOML, a missing or unknown field, a wrong type.
    #[error("{0}")]
    Toml(String),
    /// A version of the format that this crate does not read.
    #[error("schema {0} is not known; this version reads schema {SCHEMA}")]
    Schema(i64),
    /// No such system call.
    #[error("no system call is called {name:?}")]
    UnknownCall {
        /// What was written.
        name: String,
        /// The nearest, if one is near.
        suggestion: Option<&'static str>,
    },
    /// A condition that is not one.
    #[error(transparent)]
    Condition(ConditionProblem),
    /// A reason that is none.
    #[error("a rule needs its reason: `why` is {0:?}")]
    NoReason(String),
    /// A control character in a text.
    #[error("a text has the control character {}", .0.escape_unicode())]
    Control(char),
    /// A list that may not be empty.
    #[error("`{0}` is empty")]
    Empty(&'static str),
    /// Said twice.
    #[error("{what} is there twice, first on line {first}")]
    Twice {
        /// What.
        what: String,
        /// The line of the first.
        first: usize,
    },
    /// A rule with a condition and one without, for one call and role.
    #[error(
        "{role} may already call {call} with any arguments (line {first}); this rule adds nothing, or that one is too wide"
    )]
    Overlap {
        /// The role.
        role: Role,
        /// The call.
        call: Syscall,
        /// The line of the other rule.
        first: usize,
    },
    /// Too many alternatives for one call.
    #[error("{role}: the conditions on {call} have more than {MAX_ALTERNATIVES} alternatives")]
    TooManyAlternatives {
        /// The role.
        role: Role,
        /// The call.
        call: Syscall,
    },
    /// A call that is both refused and allowed.
    #[error("{call} is refused on line {refused}, and so cannot be allowed")]
    RefusedAndAllowed {
        /// The call.
        call: Syscall,
        /// The line of the refusal.
        refused: usize,
    },
    /// A steady role has what the filter below it denies.
    #[error(
        "{role} is given {what}, which `build` does not have: filters only narrow, so it would never be let through"
    )]
    NotInBuild {
        /// The role.
        role: Role,
        /// The call, with its condition.
        what: String,
    },
    /// What no policy may permit.
    #[error("no policy may give {role} {what}: {why}")]
    Never {
        /// The role.
        role: Role,
        /// The call, with the arguments that are out of bounds.
        what: String,
        /// Why not.
        why: &'static str,
    },
    /// A role without its table.
    #[error("there is no [roles.{0}]")]
    MissingRole(Role),
    /// An error number that is not one.
    #[error("{0:?} is no error that a refusal may answer with")]
    UnknownErrno(String),
    /// A path pattern that is not one.
    #[error(
        "{0:?} is no absolute path pattern (no empty, \".\" or \"..\" component, \"**\" only as a whole component)"
    )]
    BadPath(String),
    /// No numeric IP address.
    #[error("{0:?} is no IP address; name one of this host in digits, as in \"127.0.0.1\"")]
    BadAddress(String),
    /// A digest that is not one.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// A public key that is none.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A capability that is not one.
    #[error("no capability is called {0:?}")]
    UnknownCapability(String),
    /// A limit that is not one.
    #[error("{0:?} is no limit")]
    BadLimit(String),
    /// `nproc` in `[rlimits]`.
    #[error("`nproc` follows from the number of vCPUs")]
    NprocGiven,
    /// A Landlock floor that cannot be required.
    #[error("ABI {0} cannot be a floor")]
    LandlockFloor(u32),
    /// Ids that wrap or contain root.
    #[error("ids {first} and {count} more are no range of host ids")]
    IdRange {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
    /// A field that makes no sense here.
    #[error("{0}")]
    Inconsistent(&'static str),
}

impl Problem {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::UnknownCall { suggestion: Some(name), .. } => format!("did you mean {name:?}?"),
            Self::UnknownCall { .. } => "use the names of the kernel's table for x86-64".to_owned(),
            Self::Control(_) => "leave it out: a text is for people to read".to_owned(),
            Self::NoReason(_) => "say what it is needed for, in a few words".to_owned(),
            Self::Overlap { .. } => "keep one of the two rules; the compiler would drop one silently".to_owned(),
            Self::NotInBuild { .. } => "give it to \"build\" too, or take it away here".to_owned(),
            Self::Never { .. } => "constrain the arguments with `when`, or take the rule out".to_owned(),
            Self::MissingRole(_) => format!("add it, with `violation` and `why`; every policy states all of {}", names(&Role::ALL)),
            Self::UnknownErrno(_) => format!("one of {}", ERRNOS.map(|(name, _)| name).join(", ")),
            Self::BadLimit(_) => "a number that is not negative, or \"unlimited\"".to_owned(),
            Self::NprocGiven => "say how many more in `[threads] headroom`".to_owned(),
            Self::LandlockFloor(_) => "6 (Linux 6.12) is the first that scopes signals and sockets, 10 the newest known here".to_owned(),
            Self::IdRange { .. } => "start above 0 and end below 4294967295".to_owned(),
            Self::UnknownCapability(_) => "names as in capabilities(7), CAP_NET_ADMIN; an empty list is the usual".to_owned(),
            _ => return None,
        })
    }
}

fn names(roles: &[Role]) -> String {
    roles
        .iter()
        .map(|role| role.name())
        .collect::<Vec<_>>()
        .join(", ")
}

impl std::error::Error for PolicyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.problem)
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            None => write!(f, "{}: {}", self.origin, self.problem)?,
            Some(place) => {
                write!(
                    f,
                    "{}:{}:{}: {}",
                    self.origin, place.line, place.column, self.problem
                )?;
                let number = place.line.to_string();
                let (shown, skipped) = place.window();
                let indent = " ".repeat(number.len());
                let caret = " ".repeat(place.column - 1 - skipped) + &"^".repeat(place.width);
                write!(f, "\n{indent} |\n{number} | {shown}\n{indent} | {caret}")?;
            }
        }
        match self.problem.remedy() {
            Some(remedy) => write!(f, "\n  = {remedy}"),
            None => Ok(()),
        }
    }
}

impl Place {
    pub(super) fn new(text: &str, span: &Range<usize>) -> Self {
        let start = (0..=span.start.min(text.len()))
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        let (before, after) = text.split_at(start);
        let head = before.rsplit('\n').next().unwrap_or("");
        let tail = after.split('\n').next().unwrap_or("");
        let concerned = after
            .get(..span.end.saturating_sub(start))
            .unwrap_or(tail)
            .split('\n')
            .next()
            .unwrap_or("");
        Self {
            line: before.matches('\n').count() + 1,
            column: head.chars().count() + 1,
            width: concerned.chars().count().max(1),
            text: format!("{head}{tail}").trim_end_matches('\r').to_owned(),
        }
    }

    /// At most 100 characters of the line around the place, and how many were left out before them.
    fn window(&self) -> (String, usize) {
        const SHOWN: usize = 100;
        let end = self.column + self.width;
        let skipped = if end > SHOWN {
            (self.column - 1).min(end - SHOWN / 2)
        } else {
            0
        };
        let shown = self
            .text
            .chars()
            .skip(skipped)
            .take(SHOWN.max(self.width + 1));
        (
            shown
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
            skipped,
        )
    }
}
