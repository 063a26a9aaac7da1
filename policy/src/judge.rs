//! What a policy means for one call, worked out from its rules and not from its filters.
//!
//! This is the definition that the compiled filters are tested against, so it shares nothing with the compiler but
//! the meaning of a single comparison.

use crate::bpf::{AUDIT_ARCH_X86_64, Answer, Call};
use crate::condition::Conjunction;
use crate::policy::{Policy, Role, Rule, Violation};
use crate::syscalls::Syscall;

impl Policy {
    /// What happens to `call` in a thread of `role`: what the build phase, and the role's own filter on top of it,
    /// make of it together.
    #[must_use]
    pub fn judge(&self, role: Role, call: &Call) -> Answer {
        if call.arch != AUDIT_ARCH_X86_64 {
            return Answer::KillProcess;
        }
        let build = match self
            .refusals
            .iter()
            .find(|refusal| refusal.call.number() == call.number)
        {
            Some(refusal) => Answer::Errno(refusal.errno),
            None => self.alone(Role::Build, call),
        };
        if role == Role::Build {
            build
        } else {
            stricter(build, self.alone(role, call))
        }
    }

    /// The rule that lets `call` through in `role`.
    #[must_use]
    pub fn rule_for(&self, role: Role, call: &Call) -> Option<&Rule> {
        self.rules_of(role).find(|rule| {
            rule.call.number() == call.number
                && (rule.alternatives.is_empty()
                    || rule
                        .alternatives
                        .iter()
                        .any(|all| all.iter().all(|one| one.holds(&call.arguments))))
        })
    }

    /// The sets of arguments with which `role` may make `call`: none, if it may not; one without any comparison, if
    /// it may with all.
    #[must_use]
    pub fn permitted(&self, role: Role, call: Syscall) -> Vec<Conjunction> {
        let mut permitted = Vec::new();
        for rule in self.rules_of(role).filter(|rule| rule.call == call) {
            if rule.alternatives.is_empty() {
                return vec![Vec::new()];
            }
            permitted.extend(rule.alternatives.iter().cloned());
        }
        permitted.sort();
        permitted
    }

    fn alone(&self, role: Role, call: &Call) -> Answer {
        if self.rule_for(role, call).is_some() {
            return Answer::Allow;
        }
        match self.roles.get(&role).map(|role| role.violation) {
            Some(Violation::Trap) => Answer::Trap,
            Some(Violation::Kill) | None => Answer::KillProcess,
        }
    }
}

fn stricter(one: Answer, other: Answer) -> Answer {
    let leniency = |answer: Answer| match answer {
        Answer::KillProcess => 0,
        Answer::Trap => 1,
        Answer::Errno(_) => 2,
        Answer::Other(_) => 3,
        Answer::Allow => 4,
    };
    if leniency(one) <= leniency(other) {
        one
    } else {
        other
    }
}
