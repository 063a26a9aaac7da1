//! Which rules of a policy the tests' own run has used: what `tests/exercise` has recorded, and why other rules stay.
//!
//! A rule counts as used if a thread of a role that has it made a call that it lets through, in a run of the end-to-end tests.
//! [`Role::Build`]'s filter stays below those of the other roles, so what one of them uses, it has to let through, too.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::learn::{Observation, Unused};
use crate::policy::{Policy, Role};

/// What the tests' workers call, one observation a line.
const RECORDED: &str = include_str!("../exercised.jsonl");

/// Why rules that no test uses stay.
const KEPT: &str = include_str!("../unexercised.toml");

/// Calls that were seen, and reasons for rules that need none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exercise {
    seen: BTreeSet<Observation>,
    kept: Vec<Kept>,
}

/// Rules that stay though no test uses them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// The reason.
    why: String,
    /// The roles that may have them without a use.
    roles: BTreeSet<Role>,
    /// Each as a call's name, or that and its condition as [`Unused`] has them: `CALL when CONDITION`.
    rules: BTreeSet<String>,
}

/// A rule, or a part of one, that no test uses in one role.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Unexercised {
    /// Its line in the policy.
    pub line: usize,
    /// The call.
    pub call: String,
    /// The alternative of its condition; none: the whole rule.
    pub when: Option<String>,
    /// The role.
    pub role: Role,
    /// Why it stays, if that is known.
    pub kept: Option<String>,
}

/// A recording or a list of reasons cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExerciseError {
    /// A line of a recording is no observation.
    #[error("line {line} of the recording is no observation: {source}")]
    Recording {
        /// The line, from 1.
        line: usize,
        /// What it is instead.
        source: serde_json::Error,
    },
    /// The built-in reasons do not parse.
    #[error("the built-in reasons for rules that no test uses: {0}")]
    Reasons(#[from] toml::de::Error),
}

impl Exercise {
    /// What this build's tests have used.
    ///
    /// # Errors
    ///
    /// None that this crate's tests would have let through; it is a `Result` so that no code path panics.
    pub fn builtin() -> Result<Self, ExerciseError> {
        Self::recorded(RECORDED)
    }

    /// What a recording has: that of `tests/exercise`, or of `baton policy learn --record`.
    ///
    /// # Errors
    ///
    /// The first line that is no observation.
    pub fn recorded(text: &str) -> Result<Self, ExerciseError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            kept: Vec<Kept>,
        }
        let lines = text.lines().enumerate();
        let seen = lines.map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| ExerciseError::Recording {
                line: index + 1,
                source,
            })
        });
        let File { kept } = toml::from_str(KEPT)?;
        Ok(Self {
            seen: seen.collect::<Result<_, _>>()?,
            kept,
        })
    }

    /// The rules of a policy that nothing of this has used, by alternative and role.
    #[must_use]
    pub fn unexercised(&self, policy: &Policy) -> Vec<Unexercised> {
        let unused = policy.unused(&self.seen);
        let each = unused.into_iter().flat_map(|unused| {
            let roles = unused.roles.clone().into_iter();
            roles.map(move |role| (role, unused.clone()))
        });
        each.map(|(role, unused)| Unexercised {
            kept: self.kept(role, &unused).map(str::to_owned),
            line: unused.line,
            call: unused.call,
            when: unused.when,
            role,
        })
        .collect()
    }

    fn kept(&self, role: Role, unused: &Unused) -> Option<&str> {
        let whole = unused
            .when
            .as_ref()
            .map(|when| format!("{} when {when}", unused.call));
        let names = |one: &&Kept| {
            let by_condition = whole.as_ref().is_some_and(|rule| one.rules.contains(rule));
            one.roles.contains(&role) && (by_condition || one.rules.contains(&unused.call))
        };
        self.kept.iter().find(names).map(|one| one.why.as_str())
    }
}

impl fmt::Display for Unexercised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            line,
            call,
            when,
            role,
            kept,
        } = self;
        write!(f, "line {line}: {call}")?;
        if let Some(when) = when {
            write!(f, " when {when}")?;
        }
        write!(f, ", in {role}: no test exercises it")?;
        match kept {
            Some(why) => write!(f, "; it stays because {why}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BUILTIN;

    #[test]
    fn every_rule_of_the_built_in_policy_is_exercised_or_has_a_reason_to_stay() {
        let unexercised = Exercise::builtin()
            .unwrap()
            .unexercised(&Policy::builtin().unwrap());
        let unexplained: Vec<String> = unexercised
            .iter()
            .filter(|one| one.kept.is_none())
            .map(ToString::to_string)
            .collect();
        assert!(
            unexplained.is_empty(),
            "test these, or take them out of policy/default.toml, or say in policy/unexercised.toml why they stay; \
             tests/exercise records anew:\n{}",
            unexplained.join("\n")
        );
    }

    #[test]
    fn every_reason_is_of_a_rule_that_there_is() {
        let policy = Policy::builtin().unwrap();
        // With nothing seen, every rule in every role is unexercised.
        let all = policy.unused(&BTreeSet::new());
        for kept in Exercise::builtin().unwrap().kept {
            assert!(!kept.why.trim().is_empty());
            for rule in &kept.rules {
                let is_it = |one: &Unused| {
                    let whole = one
                        .when
                        .as_ref()
                        .map(|when| format!("{} when {when}", one.call));
                    one.call == *rule || whole.as_ref() == Some(rule)
                };
                let roles: BTreeSet<Role> = all
                    .iter()
                    .filter(|one| is_it(one))
                    .flat_map(|one| one.roles.iter().copied())
                    .collect();
                assert!(
                    !roles.is_disjoint(&kept.roles),
                    "{rule}: {:?} of {roles:?}",
                    kept.roles
                );
            }
        }
    }

    #[test]
    fn a_rule_counts_as_exercised_only_by_a_call_that_it_lets_through_in_a_role_that_has_it() {
        let seen = r#"{"role":"control","call":285,"arguments":[0,3,0,0,0,0]}"#;
        let unexercised = |policy: &str| {
            let all = Exercise::recorded(seen).unwrap();
            let all = all.unexercised(&Policy::parse(policy, "test").unwrap());
            all.into_iter()
                .filter(|one| one.call == "fallocate")
                .collect::<Vec<_>>()
        };
        let of = |mode: &str, found: &[Unexercised]| -> Vec<Role> {
            let of_mode = found
                .iter()
                .filter(|one| one.when.as_deref().unwrap_or_default().contains(mode));
            of_mode.map(|one| one.role).collect()
        };
        // FALLOC_FL_PUNCH_HOLE|FALLOC_FL_KEEP_SIZE in `control`: `build` has to let that through as well.
        let found = unexercised(BUILTIN);
        assert_eq!(of("PUNCH_HOLE", &found), [Role::Io]);
        assert_eq!(
            of("ZERO_RANGE", &found),
            [Role::Build, Role::Control, Role::Io]
        );
        assert!(Exercise::recorded("{}").is_err());
    }
}
