//! From rules to filters, through seccompiler.
//!
//! seccompiler gives a filter one action for what matches and one for what does not. So the build phase is several
//! filters, stacked: for each error number one that answers the refused calls with it and lets everything else
//! through, and on top the list of what is allowed, which lets the refused calls through too. The kernel runs all
//! of them and takes the strictest answer (an error is stricter than "allow", SIGSYS is stricter than an error), so
//! together they say what the policy says. The steady roles are one filter each, on top of those.
//!
//! The same policy always gives the same bytes, and so does the same policy with its rules in another order.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use serde::{Deserialize, Serialize};

use crate::condition::{Comparison, Conjunction};
use crate::digest::Digest;
use crate::policy::{Policy, Role, Rule, Violation};
use crate::program::{Instruction, Program, ProgramError};
use crate::syscalls::{Syscall, Width};

/// Every filter of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// For the whole process, to be installed in this order before the exec. Never empty.
    pub build: Vec<Program>,
    /// For one thread each, on top: every role of [`Role::STEADY`].
    pub roles: BTreeMap<Role, Program>,
}

/// A policy that cannot be compiled. None that parsed is known to be one, except for its size.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// seccompiler refused.
    #[error("cannot compile the filter of {role}: {source}")]
    Backend {
        /// The role.
        role: Role,
        /// What seccompiler said.
        source: seccompiler::BackendError,
    },
    /// The filter is too long.
    #[error("the filter of {role} is too long: {source}")]
    Program {
        /// The role.
        role: Role,
        /// How long.
        source: ProgramError,
    },
    /// No rule at all.
    #[error("{role} may call nothing, not even exit_group")]
    Nothing {
        /// The role.
        role: Role,
    },
}

impl Policy {
    /// Compiles every filter.
    ///
    /// # Errors
    ///
    /// When a role has no rule, or its filter is longer than the kernel accepts (4096 instructions).
    pub fn compile(&self) -> Result<Compiled, CompileError> {
        let mut build = Vec::new();
        let mut by_errno: BTreeMap<u16, Rules> = BTreeMap::new();
        for refusal in &self.refusals {
            by_errno
                .entry(refusal.errno)
                .or_default()
                .insert(refusal.call, Vec::new());
        }
        for (errno, rules) in by_errno {
            let answer = SeccompAction::Errno(u32::from(errno));
            build.push(filter(Role::Build, &rules, SeccompAction::Allow, answer)?);
        }
        let mut roles = BTreeMap::new();
        if self.learn.is_some() {
            build.push(Self::learning_build(Role::Build)?);
            for role in Role::STEADY {
                roles.insert(role, Self::learning_role(role)?);
            }
            return Ok(Compiled { build, roles });
        }
        build.push(self.compile_role(Role::Build)?);
        for role in Role::STEADY {
            roles.insert(role, self.compile_role(role)?);
        }
        Ok(Compiled { build, roles })
    }

    fn compile_role(&self, role: Role) -> Result<Program, CompileError> {
        let mut rules = self.allowed(role);
        if rules.is_empty() {
            return Err(CompileError::Nothing { role });
        }
        if role == Role::Build {
            // Let through here, answered with an error by the filters below.
            rules.extend(
                self.refusals
                    .iter()
                    .map(|refusal| (refusal.call, Vec::new())),
            );
        }
        let violation = match self.roles.get(&role).map(|role| role.violation) {
            Some(Violation::Trap) => SeccompAction::Trap,
            Some(Violation::Kill) | None => SeccompAction::KillProcess,
        };
        filter(role, &rules, violation, SeccompAction::Allow)
    }

    /// What `role` may call: for each call the alternatives, sorted; none means any arguments.
    #[must_use]
    pub fn allowed(&self, role: Role) -> Rules {
        by_call(self.rules_of(role))
    }
}

/// The broker's own filter. What matches no rule is answered with EPERM.
pub(crate) fn own(rules: &[Rule]) -> Result<Program, CompileError> {
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    filter(
        Role::Control,
        &by_call(rules),
        refused,
        SeccompAction::Allow,
    )
}

/// Rules by their calls, the alternatives of each sorted.
pub(crate) fn by_call<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> Rules {
    let mut all = Rules::new();
    for rule in rules {
        all.entry(rule.call)
            .or_default()
            .extend(rule.alternatives.iter().cloned());
    }
    for alternatives in all.values_mut() {
        alternatives.sort();
    }
    all
}

/// Calls with the alternatives under which they are let through; an empty list means any arguments. The parser
/// sees to it that no call has both a rule with a condition and one without.
pub type Rules = BTreeMap<Syscall, Vec<Conjunction>>;

impl Compiled {
    /// The filters that a thread of `role` has, in the order in which they were installed, without what the
    /// process that spawned the worker had already.
    #[must_use]
    pub fn stack(&self, role: Role) -> Vec<&Program> {
        self.build.iter().chain(self.roles.get(&role)).collect()
    }

    /// The digest of all filters.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut bytes = Vec::new();
        for program in self.build.iter().chain(self.roles.values()) {
            bytes.extend_from_slice(&(program.len() as u64).to_le_bytes());
            bytes.extend_from_slice(program.as_bytes());
        }
        Digest::of(&bytes)
    }
}

fn filter(
    role: Role,
    rules: &Rules,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<Program, CompileError> {
    let backend = |source| CompileError::Backend { role, source };
    let mut all = BTreeMap::new();
    for (call, alternatives) in rules {
        let alternatives: Result<Vec<SeccompRule>, _> =
            alternatives.iter().map(|all| rule(all)).collect();
        all.insert(i64::from(call.number()), alternatives.map_err(backend)?);
    }
    let filter = SeccompFilter::new(all, mismatch, matched, TargetArch::x86_64).map_err(backend)?;
    let program = BpfProgram::try_from(filter).map_err(backend)?;
    let instructions = program.iter().map(|one| Instruction {
        code: one.code,
        jt: one.jt,
        jf: one.jf,
        k: one.k,
    });
    Program::from_instructions(instructions)
        .map_err(|source| CompileError::Program { role, source })
}

fn rule(conjunction: &[Comparison]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions: Result<Vec<_>, _> = conjunction.iter().map(condition).collect();
    SeccompRule::new(conditions?)
}

fn condition(comparison: &Comparison) -> Result<SeccompCondition, seccompiler::BackendError> {
    let width = match comparison.width {
        // Bits that are not compared need not be loaded.
        Width::Qword if comparison.mask > u64::from(u32::MAX) => SeccompCmpArgLen::Qword,
        Width::Qword | Width::Dword => SeccompCmpArgLen::Dword,
    };
    let operator = if comparison.is_equality() {
        SeccompCmpOp::Eq
    } else {
        SeccompCmpOp::MaskedEq(comparison.mask)
    };
    SeccompCondition::new(comparison.index, width, operator, comparison.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_policy_compiles_within_the_kernels_limit() {
        let compiled = Policy::builtin().unwrap().compile().unwrap();
        assert_eq!(
            compiled.build.len(),
            2,
            "one filter of errors, one of what is allowed"
        );
        assert_eq!(
            compiled.roles.keys().copied().collect::<Vec<_>>(),
            Role::STEADY
        );
        // The kernel also bounds all filters of a thread together, each with 4 instructions' overhead
        // (MAX_INSNS_PER_PATH, 32768 instructions, in kernel/seccomp.c).
        for role in Role::STEADY {
            let total: usize = compiled
                .stack(role)
                .iter()
                .map(|program| program.len() + 4)
                .sum();
            assert!(total < 4096, "{role}: {total} instructions");
        }
    }

    #[test]
    fn the_same_policy_gives_the_same_bytes_in_any_order() {
        let policy = Policy::builtin().unwrap();
        let mut reversed = policy.clone();
        reversed.rules.reverse();
        reversed.refusals.reverse();
        let compiled = policy.compile().unwrap();
        assert_eq!(compiled, policy.compile().unwrap());
        assert_eq!(compiled, reversed.compile().unwrap());
        assert_eq!(compiled.digest(), reversed.compile().unwrap().digest());
    }
}
