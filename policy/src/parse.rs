//! From the text of a policy to a [`Policy`], or to an error that says where and what to do.
//!
//! TOML with unknown fields refused gives the tables; everything that TOML cannot say (names of calls, conditions,
//! reasons, rules that would cancel each other) is checked here. What parses can be compiled.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::capabilities::Capabilities;
use crate::condition::{self, ConditionProblem, Conjunction, MAX_ALTERNATIVES, nearest};
use crate::descriptors::{Access, Grant, Kind, PathPattern, Seal};
use crate::digest::{Digest, DigestError};
use crate::landlock;
use crate::policy::{
    Ids, LandlockPolicy, Namespace, Policy, Refusal, Role, RolePolicy, Rule, SCHEMA, Threads,
    Violation, Workers,
};
use crate::rlimits::{Limit, Resource, Rlimits};
use crate::syscalls::Syscall;
use crate::trusted::{self, TrustError};

/// The longest policy that is read, in bytes. The built-in one has a twentieth of that.
pub const MAX_TEXT: u64 = 512 * 1024;
/// The least length of a reason: a word or two.
const MIN_WHY: usize = 4;

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
    /// A digest that is not one.
    #[error(transparent)]
    Digest(#[from] DigestError),
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
            Self::NoReason(_) => "say what it is needed for, in a few words".to_owned(),
            Self::Overlap { .. } => "keep one of the two rules; the compiler would drop one silently".to_owned(),
            Self::NotInBuild { .. } => "give it to \"build\" too, or take it away here".to_owned(),
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
    fn new(text: &str, span: &Range<usize>) -> Self {
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

impl Policy {
    /// Reads the policy in `path`, which must belong to root or to the caller and be writable by nobody else.
    ///
    /// # Errors
    ///
    /// When the file is not to be trusted or cannot be read, and as [`Policy::parse`].
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let origin = path.display().to_string();
        match trusted::read(path, MAX_TEXT) {
            Ok(text) => policy(&text, &origin),
            Err(error) => Err(PolicyError {
                origin,
                place: None,
                problem: Box::new(error.into()),
            }),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "schema")]
    _schema: u32,
    name: Spanned<String>,
    workers: FileWorkers,
    ids: Spanned<FileIds>,
    namespaces: FileNamespaces,
    threads: FileThreads,
    rlimits: BTreeMap<Resource, Spanned<FileLimit>>,
    capabilities: FileCapabilities,
    landlock: FileLandlock,
    descriptor: Vec<FileGrant>,
    roles: BTreeMap<Role, FileRole>,
    #[serde(default)]
    refuse: Vec<FileRefusal>,
    allow: Vec<FileTopic>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileWorkers {
    digests: Vec<Spanned<String>>,
    directory: Option<PathBuf>,
    beside_broker: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileIds {
    first: u32,
    count: u32,
    unprivileged_broker: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNamespaces {
    required: Vec<Namespace>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileThreads {
    headroom: NonZeroU32,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FileLimit {
    At(i64),
    Word(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCapabilities {
    keep: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLandlock {
    floor_abi: Spanned<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileGrant {
    name: Spanned<String>,
    kinds: Spanned<Vec<Kind>>,
    access: Access,
    #[serde(default)]
    seals: BTreeSet<Seal>,
    #[serde(default = "one")]
    count: NonZeroU32,
    #[serde(default)]
    paths: Vec<Spanned<String>>,
    why: Spanned<String>,
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRole {
    violation: Violation,
    why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRefusal {
    call: Spanned<String>,
    errno: Spanned<String>,
    why: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTopic {
    topic: Spanned<String>,
    to: Spanned<Vec<Role>>,
    calls: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    call: Spanned<String>,
    when: Option<Spanned<String>>,
    why: Spanned<String>,
}

/// Errors that a refusal may answer with: those that say "not here" to a program that asks.
const ERRNOS: [(&str, i32); 6] = [
    ("ENOSYS", libc::ENOSYS),
    ("EPERM", libc::EPERM),
    ("EACCES", libc::EACCES),
    ("ENOENT", libc::ENOENT),
    ("EINVAL", libc::EINVAL),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
];

/// What is being parsed, for the places of errors.
struct Source<'a> {
    text: &'a str,
    origin: &'a str,
}

impl Source<'_> {
    fn error(&self, span: Range<usize>, problem: Problem) -> PolicyError {
        let place = Some(Place::new(self.text, &span));
        PolicyError {
            origin: self.origin.to_owned(),
            place,
            problem: Box::new(problem),
        }
    }

    fn toml(&self, error: &toml::de::Error) -> PolicyError {
        let place = error.span().map(|span| Place::new(self.text, &span));
        let problem = Box::new(Problem::Toml(error.message().to_owned()));
        PolicyError {
            origin: self.origin.to_owned(),
            place,
            problem,
        }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        Place::new(self.text, span).line
    }

    fn reason(&self, why: Spanned<String>) -> Result<String, PolicyError> {
        let span = why.span();
        let text = one_line(&why.into_inner());
        if text.chars().count() < MIN_WHY {
            return Err(self.error(span, Problem::NoReason(text)));
        }
        Ok(text)
    }

    fn call(&self, name: &Spanned<String>) -> Result<Syscall, PolicyError> {
        Syscall::from_name(name.get_ref()).ok_or_else(|| {
            let problem = Problem::UnknownCall {
                name: name.get_ref().clone(),
                suggestion: nearest(name.get_ref(), Syscall::all().map(|(name, _)| name)),
            };
            self.error(name.span(), problem)
        })
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// See [`Policy::parse`].
pub(crate) fn policy(text: &str, origin: &str) -> Result<Policy, PolicyError> {
    let source = Source { text, origin };
    schema(&source)?;
    let file: File = toml::from_str(text).map_err(|error| source.toml(&error))?;

    let mut refusals: Vec<Refusal> = Vec::new();
    for entry in file.refuse {
        refusals.push(refusal(&source, entry, &refusals)?);
    }
    let roles = roles(&source, file.roles)?;
    let rules = rules(&source, file.allow, &refusals)?;
    let mut descriptors: Vec<Grant> = Vec::new();
    for entry in file.descriptor {
        descriptors.push(grant(&source, entry, &descriptors)?);
    }
    let name = one_line(file.name.get_ref());
    if name.is_empty() {
        return Err(source.error(file.name.span(), Problem::Empty("name")));
    }
    Ok(Policy {
        name,
        origin: origin.to_owned(),
        digest: Digest::of(text.as_bytes()),
        workers: workers(&source, file.workers)?,
        ids: ids(&source, &file.ids)?,
        namespaces: file.namespaces.required.into_iter().collect(),
        threads: Threads {
            headroom: file.threads.headroom,
        },
        rlimits: rlimits(&source, file.rlimits)?,
        capabilities: capabilities(&source, &file.capabilities.keep)?,
        landlock: floor(&source, &file.landlock.floor_abi)?,
        descriptors,
        roles,
        refusals,
        rules,
    })
}

/// The version comes first, so that a newer file is refused for its version and not for its fields.
fn schema(source: &Source<'_>) -> Result<(), PolicyError> {
    #[derive(Deserialize)]
    struct Version {
        schema: Spanned<i64>,
    }
    let version: Version = toml::from_str(source.text).map_err(|error| source.toml(&error))?;
    if *version.schema.get_ref() == i64::from(SCHEMA) {
        return Ok(());
    }
    Err(source.error(
        version.schema.span(),
        Problem::Schema(version.schema.into_inner()),
    ))
}

fn workers(source: &Source<'_>, file: FileWorkers) -> Result<Workers, PolicyError> {
    let digests = file.digests.iter().map(|digest| {
        digest
            .get_ref()
            .parse::<Digest>()
            .map_err(|error| source.error(digest.span(), error.into()))
    });
    Ok(Workers {
        digests: digests.collect::<Result<_, _>>()?,
        directory: file.directory,
        beside_broker: file.beside_broker,
    })
}

fn ids(source: &Source<'_>, file: &Spanned<FileIds>) -> Result<Ids, PolicyError> {
    let FileIds {
        first,
        count,
        unprivileged_broker,
    } = *file.get_ref();
    let range = || -> Option<Ids> {
        // 2^32 - 1 is "no id" to the kernel.
        let after = first.checked_add(count)?;
        (after < u32::MAX).then_some(())?;
        Some(Ids {
            first: NonZeroU32::new(first)?,
            count: NonZeroU32::new(count)?,
            unprivileged_broker,
        })
    };
    range().ok_or_else(|| source.error(file.span(), Problem::IdRange { first, count }))
}

fn rlimits(
    source: &Source<'_>,
    file: BTreeMap<Resource, Spanned<FileLimit>>,
) -> Result<Rlimits, PolicyError> {
    let mut limits = Rlimits::default();
    for (resource, value) in file {
        if resource == Resource::Nproc {
            return Err(source.error(value.span(), Problem::NprocGiven));
        }
        let bad = |text: String| source.error(value.span(), Problem::BadLimit(text));
        let limit = match value.get_ref() {
            FileLimit::At(number) => {
                Limit::At(u64::try_from(*number).map_err(|_| bad(number.to_string()))?)
            }
            FileLimit::Word(word) if word == "unlimited" => Limit::Unlimited,
            FileLimit::Word(word) => return Err(bad(word.clone())),
        };
        limits.set(resource, limit);
    }
    Ok(limits)
}

fn capabilities(
    source: &Source<'_>,
    keep: &[Spanned<String>],
) -> Result<Capabilities, PolicyError> {
    keep.iter().try_fold(Capabilities::NONE, |all, name| {
        all.with_name(name.get_ref()).ok_or_else(|| {
            source.error(
                name.span(),
                Problem::UnknownCapability(name.get_ref().clone()),
            )
        })
    })
}

fn floor(source: &Source<'_>, floor: &Spanned<u32>) -> Result<LandlockPolicy, PolicyError> {
    let floor_abi = *floor.get_ref();
    match landlock::floor_abi(floor_abi) {
        Some(_) => Ok(LandlockPolicy { floor_abi }),
        None => Err(source.error(floor.span(), Problem::LandlockFloor(floor_abi))),
    }
}

fn grant(source: &Source<'_>, file: FileGrant, before: &[Grant]) -> Result<Grant, PolicyError> {
    let span = file.name.span();
    let name = file.name.into_inner();
    if name.is_empty() {
        return Err(source.error(span, Problem::Empty("name")));
    }
    if let Some(first) = before.iter().find(|grant| grant.name == name) {
        let what = format!("the descriptor {name:?}");
        return Err(source.error(
            span,
            Problem::Twice {
                what,
                first: first.line,
            },
        ));
    }
    let kinds: BTreeSet<Kind> = file.kinds.get_ref().iter().copied().collect();
    if kinds.is_empty() {
        return Err(source.error(file.kinds.span(), Problem::Empty("kinds")));
    }
    if !file.seals.is_empty() && !kinds.contains(&Kind::Memfd) {
        return Err(source.error(
            span,
            Problem::Inconsistent("`seals` are of memfds, and this is none"),
        ));
    }
    let paths = file.paths.iter().map(|pattern| {
        PathPattern::new(pattern.get_ref()).ok_or_else(|| {
            source.error(pattern.span(), Problem::BadPath(pattern.get_ref().clone()))
        })
    });
    Ok(Grant {
        name,
        kinds,
        access: file.access,
        seals: file.seals,
        count: file.count.get(),
        paths: paths.collect::<Result<_, _>>()?,
        why: source.reason(file.why)?,
        line: source.line(&span),
    })
}

fn roles(
    source: &Source<'_>,
    file: BTreeMap<Role, FileRole>,
) -> Result<BTreeMap<Role, RolePolicy>, PolicyError> {
    let mut roles = BTreeMap::new();
    for (role, FileRole { violation, why }) in file {
        roles.insert(
            role,
            RolePolicy {
                violation,
                why: source.reason(why)?,
            },
        );
    }
    match Role::ALL.into_iter().find(|role| !roles.contains_key(role)) {
        None => Ok(roles),
        Some(role) => Err(PolicyError {
            origin: source.origin.to_owned(),
            place: None,
            problem: Box::new(Problem::MissingRole(role)),
        }),
    }
}

fn refusal(
    source: &Source<'_>,
    file: FileRefusal,
    before: &[Refusal],
) -> Result<Refusal, PolicyError> {
    let call = source.call(&file.call)?;
    if let Some(first) = before.iter().find(|refusal| refusal.call == call) {
        let problem = Problem::Twice {
            what: format!("the refusal of {call}"),
            first: first.line,
        };
        return Err(source.error(file.call.span(), problem));
    }
    let errno_name = file.errno.get_ref().clone();
    let errno = ERRNOS
        .iter()
        .find(|(name, _)| *name == errno_name)
        .and_then(|(_, number)| u16::try_from(*number).ok())
        .ok_or_else(|| {
            source.error(file.errno.span(), Problem::UnknownErrno(errno_name.clone()))
        })?;
    let line = source.line(&file.call.span());
    Ok(Refusal {
        call,
        errno,
        errno_name,
        why: source.reason(file.why)?,
        line,
    })
}

/// What one role has for one call so far.
#[derive(Default)]
struct Known {
    unconditional: Option<usize>,
    alternatives: BTreeMap<Conjunction, usize>,
}

fn rules(
    source: &Source<'_>,
    topics: Vec<FileTopic>,
    refusals: &[Refusal],
) -> Result<Vec<Rule>, PolicyError> {
    let mut rules = Vec::new();
    let mut spans = Vec::new();
    let mut known: BTreeMap<(Role, Syscall), Known> = BTreeMap::new();
    for FileTopic { topic, to, calls } in topics {
        let roles: BTreeSet<Role> = to.get_ref().iter().copied().collect();
        if roles.is_empty() {
            return Err(source.error(to.span(), Problem::Empty("to")));
        }
        let topic = source.reason(topic)?;
        for file in calls {
            let span = file.call.span();
            let rule = rule(source, &topic, &roles, file)?;
            if let Some(refusal) = refusals.iter().find(|refusal| refusal.call == rule.call) {
                let problem = Problem::RefusedAndAllowed {
                    call: rule.call,
                    refused: refusal.line,
                };
                return Err(source.error(span, problem));
            }
            for role in &roles {
                let known = known.entry((*role, rule.call)).or_default();
                add(known, &rule, *role).map_err(|problem| source.error(span.clone(), problem))?;
            }
            rules.push(rule);
            spans.push(span);
        }
    }
    for (rule, span) in rules.iter().zip(spans) {
        let build = known.get(&(Role::Build, rule.call));
        if let Some(role) = rule.roles.iter().find(|role| **role != Role::Build) {
            if !build.is_some_and(|build| covered(build, rule)) {
                let what = rule.when.as_ref().map_or_else(
                    || rule.call.to_string(),
                    |when| format!("{} when {when}", rule.call),
                );
                return Err(source.error(span, Problem::NotInBuild { role: *role, what }));
            }
        }
    }
    Ok(rules)
}

fn rule(
    source: &Source<'_>,
    topic: &str,
    roles: &BTreeSet<Role>,
    file: FileRule,
) -> Result<Rule, PolicyError> {
    let call = source.call(&file.call)?;
    let (mut when, mut alternatives) = (None, Vec::new());
    if let Some(text) = file.when {
        alternatives = condition::parse(call, text.get_ref()).map_err(|error| {
            let span = within(source.text, &text, error.at, error.length);
            source.error(span, Problem::Condition(error.problem))
        })?;
        when = Some(one_line(text.get_ref()));
    }
    let line = source.line(&file.call.span());
    Ok(Rule {
        topic: topic.to_owned(),
        roles: roles.clone(),
        call,
        when,
        alternatives,
        why: source.reason(file.why)?,
        line,
    })
}

/// Where a piece of a string's value lies in the file. Exact unless the string has escapes, then all of it.
fn within(text: &str, value: &Spanned<String>, at: usize, length: usize) -> Range<usize> {
    let span = value.span();
    let exact = || -> Option<Range<usize>> {
        let written = text.get(span.clone())?;
        let start = span.start + written.find(value.get_ref().as_str())? + at;
        Some(start..start + length)
    };
    exact().unwrap_or(span)
}

/// Adds a rule to what a role has for its call. The compiler takes an empty list of alternatives for "always" and
/// would let one conditional rule replace it silently, so the two never meet.
fn add(known: &mut Known, rule: &Rule, role: Role) -> Result<(), Problem> {
    let call = rule.call;
    if let Some(first) = known.unconditional {
        return Err(Problem::Overlap { role, call, first });
    }
    if rule.alternatives.is_empty() {
        if let Some(first) = known.alternatives.values().next() {
            return Err(Problem::Overlap {
                role,
                call,
                first: *first,
            });
        }
        known.unconditional = Some(rule.line);
        return Ok(());
    }
    for alternative in &rule.alternatives {
        if let Some(first) = known.alternatives.insert(alternative.clone(), rule.line) {
            let what = format!(
                "{call} when {}, for {role},",
                condition::describe(call, alternative)
            );
            return Err(Problem::Twice { what, first });
        }
    }
    if known.alternatives.len() > MAX_ALTERNATIVES {
        return Err(Problem::TooManyAlternatives { role, call });
    }
    Ok(())
}

/// Whether `build` lets through all that `rule` does.
fn covered(build: &Known, rule: &Rule) -> bool {
    if build.unconditional.is_some() {
        return true;
    }
    !rule.alternatives.is_empty()
        && rule.alternatives.iter().all(|narrow| {
            build
                .alternatives
                .keys()
                .any(|wide| condition::implies(narrow, wide))
        })
}
