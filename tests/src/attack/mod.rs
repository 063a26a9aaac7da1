//! What a worker that was granted everything attempts from inside, and what has to become of each attempt.
//!
//! The attempts are made for real, on the worker's own threads, under the filters that the broker's launcher and the
//! worker put there. A refused call raises SIGSYS ("trap"), which a hostile worker may survive: it does, and asks for the
//! next, so one process learns the kernel's answer to every call. What has to be answered comes from the policy's rules
//! ([`Policy::judge`]), not from the filters that were compiled of them.
//!
//! What this proves: for these calls the kernel's decision is the policy's, exactly. Which *descriptor* a call is made on
//! a filter cannot see, so all of them are made on one that is not there, with pointers to nowhere: what is let through
//! fails in the kernel and changes nothing. The entry of 32-bit programs ends the process at once and is tried in a
//! process of its own each time.

mod attempts;
mod calls;
mod routes;

use std::fmt;

use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::bpf::Answer;
use baton_policy::bpf::Call;

pub use attempts::Attempts;
pub use attempts::Entry32;
pub use calls::EXEMPT;
pub use calls::calls;
pub use routes::Route;
pub use routes::routes;

/// How many attempts ended in which way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Let through to the kernel.
    pub passed: usize,
    /// Answered with an error instead.
    pub answered: usize,
    /// Refused.
    pub refused: usize,
    /// Attempts whose end was not the policy's, the first few in words.
    pub wrong: Vec<String>,
}

/// Attempts whose wrong end is told in words.
const TOLD: usize = 3;

impl Survey {
    /// Counts one attempt, and whether it ended as it should have.
    pub fn add(&mut self, what: impl fmt::Display, found: Answer, expected: Answer) {
        match found {
            Answer::Allow => self.passed += 1,
            Answer::Errno(_) => self.answered += 1,
            _ => self.refused += 1,
        }
        if found != expected && self.wrong.len() < TOLD {
            self.wrong
                .push(format!("{what}: {found:?}, not {expected:?}"));
        }
    }

    /// What has to come of the calls of [`calls`] and of the routes in a thread of this role.
    #[must_use]
    pub fn expected(policy: &Policy, role: Role) -> Self {
        let mut survey = Self::default();
        for call in calls(policy, role).chain(routes().iter().map(Route::call)) {
            let answer = policy.judge(role, &call);
            survey.add("", answer, answer);
        }
        survey
    }

    /// Makes the calls of [`calls`] and of the routes in this thread, whose role this is.
    ///
    /// # Panics
    ///
    /// When [`Attempts`] were not prepared.
    #[must_use]
    pub fn made(attempts: Attempts, policy: &Policy, role: Role) -> Self {
        let mut survey = Self::default();
        for call in calls(policy, role) {
            let Call {
                number, arguments, ..
            } = call;
            let found = attempts.make(&call);
            survey.add(
                format_args!("{number:#x} {arguments:x?}"),
                found,
                policy.judge(role, &call),
            );
        }
        for route in routes() {
            let call = route.call();
            survey.add(route.what, attempts.make(&call), policy.judge(role, &call));
        }
        survey
    }
}

impl fmt::Display for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            answered,
            refused,
            wrong,
        } = self;
        write!(
            f,
            "{passed} passed, {answered} answered, {refused} refused, wrong: {wrong:?}"
        )
    }
}
