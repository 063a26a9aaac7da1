//! A policy told the other way round: for each role what it may call and why, for one call who may make it and what
//! stops the others.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::bounds;
use crate::descriptors::{Grant, PathPattern};
use crate::policy::{Policy, Role, Violation};
use crate::syscalls::Syscall;

/// The whole policy, for people and for tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Its name.
    pub policy: String,
    /// Its digest.
    pub digest: String,
    /// What surrounds the filters: ids, namespaces, limits, capabilities, Landlock, one sentence each.
    pub process: Vec<String>,
    /// What may be handed out, one sentence each.
    pub descriptors: Vec<String>,
    /// What each role is.
    pub roles: Vec<RoleExplanation>,
    /// Every call that some role may make or is refused, by name.
    pub calls: Vec<CallExplanation>,
}

/// One role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RoleExplanation {
    /// Which.
    pub role: Role,
    /// What happens at a violation.
    pub violation: Violation,
    /// What it is.
    pub why: String,
    /// How many calls it may make, with whatever arguments.
    pub calls: usize,
}

/// One system call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CallExplanation {
    /// Its name.
    pub call: String,
    /// Its number.
    pub number: u32,
    /// What each role gets.
    pub answers: Vec<RoleAnswer>,
    /// Why no policy may permit it to some role, when that is so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub never: Vec<Never>,
}

/// What one role gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RoleAnswer {
    /// Which.
    pub role: Role,
    /// What it gets.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What becomes of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// Let through by these rules; with other arguments than theirs it is a violation.
    Allowed {
        /// Those rules.
        rules: Vec<RuleExplanation>,
    },
    /// Answered with an error.
    Refused {
        /// Which.
        errno: String,
        /// The policy's reason.
        why: String,
        /// The line of the file.
        line: usize,
    },
    /// Not executed, and a violation.
    Violation {
        /// What happens then.
        violation: Violation,
    },
}

/// One rule that lets a call through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleExplanation {
    /// Its condition; none: any arguments.
    pub when: Option<String>,
    /// The policy's reason.
    pub why: String,
    /// What its table is about.
    pub topic: String,
    /// The line of the file.
    pub line: usize,
}

/// A bound that no policy may cross.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Never {
    /// For which roles.
    pub roles: Vec<Role>,
    /// With which arguments.
    pub what: String,
    /// Why.
    pub why: &'static str,
}

impl Policy {
    /// Explains all of it.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        let calls: BTreeSet<Syscall> = self
            .rules
            .iter()
            .map(|rule| rule.call)
            .chain(self.refusals.iter().map(|refusal| refusal.call))
            .collect();
        let mut calls: Vec<CallExplanation> = calls
            .into_iter()
            .map(|call| self.explain_call(call))
            .collect();
        calls.sort_by(|one, other| one.call.cmp(&other.call));
        let roles = self.roles.iter().map(|(role, about)| RoleExplanation {
            role: *role,
            violation: about.violation,
            why: about.why.clone(),
            calls: self
                .rules_of(*role)
                .map(|rule| rule.call)
                .collect::<BTreeSet<_>>()
                .len(),
        });
        Explanation {
            policy: self.name.clone(),
            digest: self.digest.to_string(),
            process: self.process_sentences(),
            descriptors: self.descriptor_sentences(),
            roles: roles.collect(),
            calls,
        }
    }

    /// Explains one call: who may make it, and what stops the others.
    #[must_use]
    pub fn explain_call(&self, call: Syscall) -> CallExplanation {
        let answers = Role::ALL.into_iter().map(|role| RoleAnswer {
            role,
            outcome: self.outcome(role, call),
        });
        CallExplanation {
            call: call.name().to_owned(),
            number: call.number(),
            answers: answers.collect(),
            never: bounds::of(call),
        }
    }

    fn outcome(&self, role: Role, call: Syscall) -> Outcome {
        let rules: Vec<RuleExplanation> = self
            .rules_of(role)
            .filter(|rule| rule.call == call)
            .map(|rule| RuleExplanation {
                when: rule.when.clone(),
                why: rule.why.clone(),
                topic: rule.topic.clone(),
                line: rule.line,
            })
            .collect();
        if !rules.is_empty() {
            return Outcome::Allowed { rules };
        }
        match self
            .refusals
            .iter()
            .find(|refusal| refusal.call == call && role == Role::Build)
        {
            Some(refusal) => Outcome::Refused {
                errno: refusal.errno_name.clone(),
                why: refusal.why.clone(),
                line: refusal.line,
            },
            None => {
                let violation = self
                    .roles
                    .get(&role)
                    .map_or(Violation::Kill, |role| role.violation);
                Outcome::Violation { violation }
            }
        }
    }

    fn process_sentences(&self) -> Vec<String> {
        let namespaces: Vec<&str> = self
            .namespaces
            .iter()
            .map(|namespace| namespace.proc_name())
            .collect();
        let limits: Vec<String> = self
            .rlimits
            .iter()
            .map(|(resource, limit)| format!("{resource} {limit}"))
            .collect();
        let last = u64::from(self.ids.first.get()) + u64::from(self.ids.count.get()) - 1;
        let unprivileged = if self.ids.unprivileged_broker {
            "may run workers under its own, in its groups and in no cgroup, without reading their filters back"
        } else {
            "is refused"
        };
        let mut sentences = vec![
            format!(
                "A worker runs under a host user and group of its own, {} to {last}; a broker without privilege {unprivileged}.",
                self.ids.first
            ),
            format!("Its own namespaces: {}.", namespaces.join(", ")),
            format!(
                "It has at most one task per vCPU and {} more.",
                self.threads.headroom
            ),
            format!(
                "Its cgroup: memory, {} bytes beyond guest RAM; processors, {} beyond one per vCPU.",
                self.cgroup.memory_headroom, self.cgroup.cpu_headroom
            ),
            self.io_sentence(),
            format!("Its limits: {}.", limits.join(", ")),
            format!("Capabilities that it keeps: {}.", self.capabilities),
            format!(
                "Landlock denies everything that it can; the kernel must know ABI {} at least.",
                self.landlock.floor_abi
            ),
        ];
        for key in &self.workers.keys {
            let why = &key.why;
            sentences.push(format!("What {key} has signed may run as a worker: {why}."));
        }
        if let Some(why) = &self.learn {
            sentences.push(format!(
                "This policy learns: every call passes and is reported, whatever the rules below say. Only `baton policy learn` \
                 runs a VM under it: {why}."
            ));
        }
        for approval in &self.approvals {
            sentences.push(format!(
                "An upgrade to {} may widen what a worker may do: {}.",
                approval.worker, approval.why
            ));
        }
        sentences.push(format!(
            "Threads share their memory, so a worker that was taken over may call whatever any of its settled threads may: \
             {} of the calls below. The filter of each thread keeps an honest one honest.",
            self.settled_calls()
        ));
        for rule in &self.access.0 {
            let list = |ids: &BTreeSet<u32>| {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                ids.join(", ")
            };
            let rights: Vec<String> = rule.rights.iter().map(ToString::to_string).collect();
            sentences.push(format!(
                "Besides root and the broker's user, users [{}] and groups [{}] may {}: {}.",
                list(&rule.users),
                list(&rule.groups),
                rights.join(", "),
                rule.why
            ));
        }
        sentences
    }

    /// How many calls some thread may make once all have their last filters, with whatever arguments.
    fn settled_calls(&self) -> usize {
        let calls: BTreeSet<Syscall> = Role::STEADY
            .into_iter()
            .flat_map(|role| self.rules_of(role))
            .map(|rule| rule.call)
            .collect();
        calls.len()
    }

    fn descriptor_sentences(&self) -> Vec<String> {
        let sentence = |grant: &Grant| format!("{}: {}", grant.name, grant.sentence());
        self.descriptors.iter().map(sentence).collect()
    }
}

impl Grant {
    /// What may be handed out under its name, and why.
    #[must_use]
    pub fn sentence(&self) -> String {
        let kinds: Vec<String> = self.kinds.iter().map(ToString::to_string).collect();
        let paths: Vec<&str> = self.paths.iter().map(PathPattern::as_str).collect();
        let seals: Vec<String> = self.seals.iter().map(ToString::to_string).collect();
        let mut text = format!("{} for {}", kinds.join(" or "), self.access);
        if self.count > 1 {
            text += &format!(", up to {}", self.count);
        }
        if !seals.is_empty() {
            text += &format!(", with the seals {}", seals.join(", "));
        }
        if !paths.is_empty() {
            text += &format!(", from {}", paths.join(", "));
        }
        if !self.addresses.is_empty() {
            let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
            text += &format!(", over TCP at {}", addresses.join(", "));
        }
        format!("{text}: {}.", self.why)
    }
}

impl Outcome {
    /// One character for a table: `●` any arguments, `◐` some, `e` an error, `·` a violation.
    #[must_use]
    pub fn mark(&self) -> char {
        match self {
            Self::Allowed { rules } if rules.iter().any(|rule| rule.when.is_none()) => '●',
            Self::Allowed { .. } => '◐',
            Self::Refused { .. } => 'e',
            Self::Violation { .. } => '·',
        }
    }
}

impl CallExplanation {
    /// Who may make the call, in one sentence: a worker that was taken over may, if any of its settled threads may.
    #[must_use]
    pub fn summary(&self) -> String {
        let of = |wanted: fn(&Outcome) -> bool| -> Vec<&str> {
            let answers = self.answers.iter().filter(|one| wanted(&one.outcome));
            answers.map(|one| one.role.name()).collect()
        };
        let may = of(|outcome| matches!(outcome, Outcome::Allowed { .. }));
        let refused = of(|outcome| matches!(outcome, Outcome::Refused { .. }));
        let violation = of(|outcome| matches!(outcome, Outcome::Violation { .. }));
        let mut by = Vec::new();
        if !refused.is_empty() {
            by.push(format!("an error in {}", refused.join(", ")));
        }
        if !violation.is_empty() {
            by.push(format!("the filter of {}", violation.join(", ")));
        }
        match (may.is_empty(), by.is_empty()) {
            (true, _) => format!("nobody may; refused by {}.", by.join(" and by ")),
            (false, true) => "every thread may.".to_owned(),
            (false, false) => format!(
                "{} may; refused by {}.",
                may.join(", "),
                by.join(" and by ")
            ),
        }
    }
}

impl fmt::Display for CallExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({}): {}", self.call, self.number, self.summary())?;
        for RoleAnswer { role, outcome } in &self.answers {
            match outcome {
                Outcome::Allowed { rules } => {
                    for RuleExplanation {
                        when, why, line, ..
                    } in rules
                    {
                        let when = when.as_ref().map_or_else(
                            || "with any arguments".to_owned(),
                            |when| format!("when {when}"),
                        );
                        writeln!(f, "  {role:<8} may, {when}: {why} (line {line})")?;
                    }
                }
                Outcome::Refused { errno, why, line } => {
                    writeln!(f, "  {role:<8} gets {errno}: {why} (line {line})")?
                }
                Outcome::Violation {
                    violation: Violation::Trap,
                } => {
                    writeln!(
                        f,
                        "  {role:<8} may not: no rule lets it through; it raises SIGSYS and is not executed"
                    )?;
                }
                Outcome::Violation {
                    violation: Violation::Kill,
                } => {
                    writeln!(
                        f,
                        "  {role:<8} may not: no rule lets it through; the process ends and it is not executed"
                    )?;
                }
            }
        }
        for Never { roles, what, why } in &self.never {
            let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
            writeln!(
                f,
                "  No policy may give {} {what}: {why}.",
                roles.join(", ")
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Policy \"{}\", sha256 {}\n", self.policy, self.digest)?;
        for sentence in &self.process {
            writeln!(f, "{sentence}")?;
        }
        writeln!(f, "\nDescriptors that it may be handed:")?;
        for sentence in &self.descriptors {
            writeln!(f, "  {sentence}")?;
        }
        writeln!(f, "\nRoles:")?;
        for RoleExplanation {
            role,
            violation,
            why,
            calls,
        } in &self.roles
        {
            writeln!(
                f,
                "  {role:<8} {calls:>3} calls, violations {violation}: {why}."
            )?;
        }
        write!(f, "\n{:<20}", "")?;
        for role in Role::ALL {
            write!(f, "{role:>9}")?;
        }
        writeln!(f)?;
        for call in &self.calls {
            write!(f, "{:<20}", call.call)?;
            for answer in &call.answers {
                write!(f, "{:>9}", answer.outcome.mark())?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "\n● any arguments  ◐ some arguments  e answered with an error  · a violation"
        )
    }
}
