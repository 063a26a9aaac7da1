//! Learning: filters that let every call through and have each reported, and what the reports say of a policy.
//!
//! A policy with `[learn]` compiles to such filters, so that nothing else of a worker's life is different: the same steps, the same
//! namespaces and Landlock domain, the same comparison byte for byte. The reports come by `SECCOMP_RET_USER_NOTIF` (seccomp(2)),
//! which has the thread, the number and all arguments of a call, takes no privilege to read, loses none, and leaves a worker's
//! signals and stops as they are. (`SECCOMP_RET_LOG` has no arguments, and its log is root's; a tracer would see a worker's stops
//! before its broker does.) A worker that nobody listens to gets ENOSYS for everything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bpf::{Answer, Call};
use crate::compile::CompileError;
use crate::condition::{Comparison, describe};
use crate::policy::{Policy, Role, Rule};
use crate::program::{Instruction, Program};
use crate::syscalls::{Syscall, Width};

// `linux/bpf_common.h`, `linux/seccomp.h`, and offsets in `struct seccomp_data`.
const LD_W_ABS: u16 = 0x20;
const JEQ_K: u16 = 0x15;
const JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// The first number of x32's (`arch/x86/include/uapi/asm/unistd.h`, `__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// What stands for an argument that is larger than any constant: it is a pointer, and another one each time.
pub const POINTER: u64 = 1 << 63;

/// How many sets of arguments are proposed for one call, at the most.
const MAX_PROPOSED: usize = 32;

/// A call that a thread of a learning worker has made, with the arguments that rules can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// The thread's role.
    pub role: Role,
    /// The call's number.
    pub call: u32,
    /// Its arguments: 0 for those that no rule can name, [`POINTER`] for pointers.
    pub arguments: [u64; 6],
}

/// What observations say of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lesson {
    /// How many different calls there were.
    pub observed: usize,
    /// Rules that nothing has used, in all roles or in some.
    pub unused: Vec<Unused>,
    /// Calls that no rule permits.
    pub missing: Vec<Missing>,
}

/// A rule, or a part of one, that nothing has used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Unused {
    /// Its line in the policy.
    pub line: usize,
    /// The call.
    pub call: String,
    /// The alternative of its condition; none: the whole rule.
    pub when: Option<String>,
    /// The roles that have it and did not use it.
    pub roles: BTreeSet<Role>,
    /// What the policy says that it is for.
    pub why: String,
}

/// A call that no rule permits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// The call.
    pub call: String,
    /// Who has to have it: who made it, and [`Role::Build`], on top of whose filter the others' are.
    pub roles: BTreeSet<Role>,
    /// With which arguments, as conditions; empty for a call of which rules can tell none apart.
    pub arguments: Vec<String>,
}

impl Observation {
    /// The observation that a report is.
    #[must_use]
    pub fn of(role: Role, number: u32, arguments: &[u64; 6]) -> Self {
        let mut told = [0; 6];
        let known = Syscall::from_number(number).map_or(&[][..], Syscall::arguments);
        for argument in known {
            let index = usize::from(argument.index);
            if let (Some(to), Some(from)) = (told.get_mut(index), arguments.get(index)) {
                *to = match argument.width {
                    Width::Dword => from & u64::from(u32::MAX),
                    Width::Qword if *from > u64::from(u32::MAX) => POINTER,
                    Width::Qword => *from,
                };
            }
        }
        Self {
            role,
            call: number,
            arguments: told,
        }
    }

    fn as_call(&self) -> Call {
        Call::new(self.call, self.arguments)
    }
}

impl Policy {
    /// Whether an alternative of a rule (or the rule, which has none) lets an observed call through.
    #[must_use]
    pub fn lets(rule: &Rule, alternative: usize, seen: &Observation) -> bool {
        rule.call.number() == seen.call
            && rule.roles.contains(&seen.role)
            && rule
                .alternatives
                .get(alternative)
                .is_none_or(|all| all.iter().all(|one| one.holds(&seen.arguments)))
    }

    /// What these observations say of this policy.
    #[must_use]
    pub fn learn(&self, observations: &BTreeSet<Observation>) -> Lesson {
        Lesson {
            observed: observations.len(),
            unused: self.unused(observations),
            missing: self.missing(observations),
        }
    }

    /// The rules, by alternative and role, that none of the observed calls has used. What another role has used, [`Role::Build`]
    /// needs: its filter stays below theirs.
    #[must_use]
    pub fn unused(&self, observations: &BTreeSet<Observation>) -> Vec<Unused> {
        let mut unused = Vec::new();
        for rule in &self.rules {
            for index in 0..rule.alternatives.len().max(1) {
                let uses = observations
                    .iter()
                    .filter(|seen| Self::lets(rule, index, seen))
                    .map(|seen| seen.role);
                let mut uses: BTreeSet<Role> = uses.collect();
                let above = observations
                    .iter()
                    .any(|seen| self.is_above(rule, index, seen));
                uses.extend(above.then_some(Role::Build));
                let roles: BTreeSet<Role> = rule.roles.difference(&uses).copied().collect();
                if !roles.is_empty() {
                    let alternative = rule.alternatives.get(index);
                    unused.push(Unused {
                        line: rule.line,
                        call: rule.call.to_string(),
                        when: alternative.map(|all| describe(rule.call, all)),
                        roles,
                        why: rule.why.clone(),
                    });
                }
            }
        }
        unused.sort();
        unused
    }

    /// Whether an observed call of another role passes [`Role::Build`]'s filter by this alternative of a rule.
    fn is_above(&self, rule: &Rule, alternative: usize, seen: &Observation) -> bool {
        let below = Observation {
            role: Role::Build,
            ..*seen
        };
        Self::lets(rule, alternative, &below) && self.rule_for(seen.role, &seen.as_call()).is_some()
    }

    fn missing(&self, observations: &BTreeSet<Observation>) -> Vec<Missing> {
        let mut calls: BTreeMap<u32, (BTreeSet<Role>, BTreeSet<String>)> = BTreeMap::new();
        for seen in observations {
            // What is answered with an error is not executed while it learns, either.
            let answer = self.judge(seen.role, &seen.as_call());
            if !matches!(answer, Answer::Allow | Answer::Errno(_)) {
                let (roles, arguments) = calls.entry(seen.call).or_default();
                roles.insert(seen.role);
                if self.rule_for(Role::Build, &seen.as_call()).is_none() {
                    roles.insert(Role::Build);
                }
                arguments.extend(condition_of(seen));
            }
        }
        let missing = calls
            .into_iter()
            .map(|(number, (roles, arguments))| Missing {
                call: Syscall::from_number(number)
                    .map_or_else(|| format!("call {number}"), |call| call.to_string()),
                roles,
                arguments: arguments.into_iter().take(MAX_PROPOSED).collect(),
            });
        missing.collect()
    }

    /// The filter under which a learning worker is built: every call is reported, and executed if whoever listens says so.
    pub(crate) fn learning_build(role: Role) -> Result<Program, CompileError> {
        let one = |code, jt, jf, k| Instruction { code, jt, jf, k };
        let program = [
            one(LD_W_ABS, 0, 0, ARCH),
            one(JEQ_K, 1, 0, crate::bpf::AUDIT_ARCH_X86_64),
            one(RET_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            one(LD_W_ABS, 0, 0, NUMBER),
            one(JGE_K, 0, 1, X32),
            one(RET_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            one(RET_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        ];
        Program::from_instructions(program.into_iter())
            .map_err(|source| CompileError::Program { role, source })
    }

    /// The filter that a thread of a learning worker takes for itself: it permits everything, and is no other role's.
    pub(crate) fn learning_role(role: Role) -> Result<Program, CompileError> {
        let mark = Role::ALL.iter().position(|one| *one == role).unwrap_or(0);
        let k = u32::try_from(mark).unwrap_or(0);
        let one = |code, k| Instruction {
            code,
            jt: 0,
            jf: 0,
            k,
        };
        let mark = Instruction {
            code: JEQ_K,
            jt: 0,
            jf: 0,
            k,
        };
        let program = [
            one(LD_W_ABS, NUMBER),
            mark,
            one(RET_K, libc::SECCOMP_RET_ALLOW),
        ];
        Program::from_instructions(program.into_iter())
            .map_err(|source| CompileError::Program { role, source })
    }
}

/// A call's arguments as a condition that only they fulfil, as far as there are any that a rule can name.
fn condition_of(seen: &Observation) -> Option<String> {
    let call = Syscall::from_number(seen.call)?;
    let comparisons: Vec<Comparison> = call
        .arguments()
        .iter()
        .filter_map(|argument| {
            let value = *seen.arguments.get(usize::from(argument.index))?;
            let mask = match argument.width {
                Width::Dword => u64::from(u32::MAX),
                Width::Qword => u64::MAX,
            };
            (value != POINTER).then_some(Comparison {
                index: argument.index,
                width: argument.width,
                mask,
                value,
            })
        })
        .collect();
    (!comparisons.is_empty()).then(|| describe(call, &comparisons))
}

impl Missing {
    /// The rules that would permit it, as a policy has them. The reasons are left to a person: they do not parse as they are.
    #[must_use]
    pub fn proposal(&self) -> String {
        let roles: Vec<String> = self
            .roles
            .iter()
            .map(|role| format!("\"{role}\""))
            .collect();
        let rule = |when: Option<&String>| {
            let when = when.map_or_else(String::new, |when| format!(", when = \"{when}\""));
            format!("    {{ call = \"{}\"{when}, why = \"\" }},\n", self.call)
        };
        let rules: String = if self.arguments.is_empty() {
            rule(None)
        } else {
            self.arguments.iter().map(|when| rule(Some(when))).collect()
        };
        format!(
            "[[allow]]\ntopic = \"\"\nto = [{}]\ncalls = [\n{rules}]\n",
            roles.join(", ")
        )
    }
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles: Vec<String> = self.roles.iter().map(ToString::to_string).collect();
        write!(f, "line {}: {}", self.line, self.call)?;
        if let Some(when) = &self.when {
            write!(f, " when {when}")?;
        }
        write!(f, ", in {} ({})", roles.join(", "), self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BUILTIN;

    fn seen(role: Role, call: &str, arguments: [u64; 6]) -> Observation {
        Observation::of(role, Syscall::from_name(call).unwrap().number(), &arguments)
    }

    fn learning() -> Policy {
        let text = format!("{BUILTIN}\n[learn]\nwhy = \"a test\"\n");
        Policy::parse(&text, "test").unwrap()
    }

    #[test]
    fn pointers_are_one_and_other_bits_of_an_int_are_none() {
        let one = seen(
            Role::Io,
            "sendto",
            [1, 0x7fff_0000_1000, 2, 3, 0x7fff_0000_2000, 9],
        );
        let other = seen(
            Role::Io,
            "sendto",
            [4, 0x7fff_0000_3000, 5, 3, 0x7fff_0000_4000, 9],
        );
        assert_eq!(one, other);
        let request = 0xffff_ffff_4004_54d0;
        let ioctl = seen(Role::Io, "ioctl", [3, request, 0x7fff_0000_0000, 0, 0, 0]);
        assert_eq!(ioctl.arguments, [0, 0x4004_54d0, POINTER, 0, 0, 0]);
        assert_eq!(seen(Role::Io, "read", [1, 2, 3, 4, 5, 6]).arguments, [0; 6]);
    }

    #[test]
    fn what_was_used_and_what_is_missing_is_told_by_role_and_condition() {
        let policy = learning();
        let observations = BTreeSet::from([
            seen(Role::Control, "read", [0; 6]),
            seen(Role::Io, "fallocate", [3, 3, 0, 0, 0, 0]),
            seen(Role::Io, "socket", [1, 2, 0, 0, 0, 0]),
            seen(Role::Vcpu, "preadv", [0; 6]),
            // Answered with an error, and so no matter.
            seen(Role::Build, "openat", [0; 6]),
        ]);
        let lesson = policy.learn(&observations);
        let missing: Vec<&str> = lesson.missing.iter().map(|one| one.call.as_str()).collect();
        assert_eq!(missing, ["socket", "preadv"]);
        let unused = |call: &str, when: Option<&str>| {
            let mut found = lesson.unused.iter().filter(|one| {
                one.call == call
                    && when
                        .is_none_or(|when| one.when.as_deref().unwrap_or_default().contains(when))
            });
            found.next().map(|one| one.roles.clone())
        };
        let roles = |roles: &[Role]| Some(roles.iter().copied().collect::<BTreeSet<_>>());
        assert_eq!(unused("read", None), roles(&[Role::Vcpu, Role::Io]));
        assert_eq!(
            unused("fallocate", Some("PUNCH_HOLE")),
            roles(&[Role::Control])
        );
        assert_eq!(
            unused("fallocate", Some("ZERO_RANGE")),
            roles(&[Role::Build, Role::Control, Role::Io])
        );
        assert_eq!(unused("socket", None), None);
    }

    #[test]
    fn a_proposal_is_a_policy_once_a_person_has_given_its_reasons() {
        let policy = learning();
        let calls = [
            seen(Role::Io, "madvise", [0, 0, 9, 0, 0, 0]),
            seen(Role::Io, "mremap", [0; 6]),
            seen(Role::Control, "epoll_create1", [0x80000, 0, 0, 0, 0, 0]),
            seen(Role::Vcpu, "fsync", [0; 6]),
        ];
        let lesson = policy.learn(&BTreeSet::from(calls));
        assert_eq!(lesson.missing.len(), 3, "{:?}", lesson.missing);
        let proposed: String = lesson.missing.iter().map(Missing::proposal).collect();
        let unreasoned = format!("{BUILTIN}\n{proposed}");
        assert!(Policy::parse(&unreasoned, "test").is_err());
        let reasoned = proposed.replace("\"\"", "\"a test\"");
        let widened = Policy::parse(&format!("{BUILTIN}\n{reasoned}"), "test").unwrap();
        assert_eq!(widened.learn(&BTreeSet::from(calls)).missing, []);
    }

    #[test]
    fn a_learning_policy_reports_every_call_and_is_wider_than_any() {
        use crate::diff::Difference;
        let (policy, strict) = (learning(), Policy::builtin().unwrap());
        let compiled = policy.compile().unwrap();
        assert_eq!(compiled.build.len(), 2, "errors first, then what reports");
        let different: BTreeSet<_> = compiled.roles.values().collect();
        assert_eq!(different.len(), Role::STEADY.len());
        for number in [0, 59, 1000] {
            let last = compiled.build.last().unwrap();
            let answer = crate::bpf::run(last, &Call::new(number, [0; 6])).unwrap();
            assert_eq!(answer, libc::SECCOMP_RET_USER_NOTIF);
        }
        let between = Difference::between(&strict, &policy);
        assert!(
            between
                .widens_a_worker()
                .any(|change| change.subject == "learn")
        );
        assert!(!Difference::between(&policy, &strict).widens());
        let unreasoned = format!("{BUILTIN}\n[learn]\nwhy = \" \"\n");
        assert!(Policy::parse(&unreasoned, "test").is_err());
    }
}
