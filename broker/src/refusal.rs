//! Refusals: every error of the broker ends as one, with the exit status and the remedy that an operator needs.

use std::fmt::Display;

use baton_audit::LogError;
use baton_audit::echo::Echo;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

/// The result of what an operator has asked for.
pub(crate) type Result<T> = std::result::Result<T, Refusal>;

/// The host, a file or the VM is not as needed.
pub(crate) fn unfit(reason: impl Display, remedy: impl Display) -> Refusal {
    refusal(Exit::Unfit, reason, remedy)
}

/// Policy refuses.
pub(crate) fn refused(reason: impl Display, remedy: impl Display) -> Refusal {
    refusal(Exit::Refused, reason, remedy)
}

/// Something else is under way.
pub(crate) fn busy(reason: impl Display) -> Refusal {
    refusal(Exit::Busy, reason, "try again when it has ended")
}

/// Any refusal.
pub(crate) fn refusal(exit: Exit, reason: impl Display, remedy: impl Display) -> Refusal {
    Refusal {
        exit,
        reason: reason.to_string(),
        remedy: remedy.to_string(),
    }
}

/// Says on standard error what nobody else can be told, as far as that is taken.
pub(crate) fn complain(what: &dyn Display) {
    Echo::new().say(format!("baton-broker: {what}\n").as_bytes());
}

/// What cannot be recorded is not done.
pub(crate) trait Recorded<T> {
    /// The log's error as a refusal.
    fn recorded(self) -> Result<T>;
}

impl<T> Recorded<T> for std::result::Result<T, LogError> {
    fn recorded(self) -> Result<T> {
        self.map_err(|error| unfit(error, ""))
    }
}

/// Adds what was being done to an error that has no better remedy than its own text.
pub(crate) trait Doing<T> {
    /// The refusal "`what`: error".
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|error| unfit(format_args!("{what}: {error}"), ""))
    }
}
