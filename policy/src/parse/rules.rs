//! The rules for system calls: each known, each with its reason, none that another cancels.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use toml::Spanned;

use super::error::{PolicyError, Problem};
use super::file::{FileRefusal, FileRule, FileTopic, OwnTopic};
use super::source::{Source, one_line};
use crate::bounds;
use crate::condition::text::MAX_ALTERNATIVES;
use crate::condition::{self, Conjunction, cover};
use crate::policy::{Refusal, Role, Rule};
use crate::syscalls::Syscall;

/// Errors that a refusal may answer with: those that say "not here" to a program that asks.
pub(super) const ERRNOS: [(&str, i32); 6] = [
    ("ENOSYS", libc::ENOSYS),
    ("EPERM", libc::EPERM),
    ("EACCES", libc::EACCES),
    ("ENOENT", libc::ENOENT),
    ("EINVAL", libc::EINVAL),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
];

pub(super) fn refusal(
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

pub(super) fn rules(
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
            if let Some((role, bound)) = bounds::crossed(&rule) {
                let problem = Problem::Never {
                    role,
                    what: bound.to_string(),
                    why: bound.why,
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

/// The broker's own rules. What no worker may call, it may: it is what workers are protected by.
pub(super) fn own(source: &Source<'_>, topics: Vec<OwnTopic>) -> Result<Vec<Rule>, PolicyError> {
    // It has one thread.
    let role = Role::Control;
    let mut rules = Vec::new();
    let mut known: BTreeMap<Syscall, Known> = BTreeMap::new();
    for OwnTopic { topic, calls } in topics {
        let topic = source.reason(topic)?;
        for file in calls {
            let span = file.call.span();
            let rule = rule(source, &topic, &BTreeSet::from([role]), file)?;
            let known = known.entry(rule.call).or_default();
            add(known, &rule, role).map_err(|problem| source.error(span, problem))?;
            rules.push(rule);
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
        alternatives = condition::text::parse(call, text.get_ref()).map_err(|error| {
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
    let wide: Vec<Conjunction> = build.alternatives.keys().cloned().collect();
    build.unconditional.is_some()
        || !rule.alternatives.is_empty()
            && rule
                .alternatives
                .iter()
                .all(|narrow| cover::covered(narrow, &wide))
}
