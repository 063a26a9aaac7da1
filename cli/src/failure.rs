//! What a command that could not be carried out says: the reason, what to do next, and the exit status, in the same type
//! as a broker's refusal.

use std::path::Path;

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;

/// A failure; `remedy` may be empty.
pub(crate) fn failure(exit: Exit, reason: impl Into<String>, remedy: impl Into<String>) -> Refusal {
    Refusal {
        exit,
        reason: reason.into(),
        remedy: remedy.into(),
    }
}

/// The host, a file or the VM is not as needed.
pub(crate) fn unfit(reason: impl Into<String>, remedy: impl Into<String>) -> Refusal {
    failure(Exit::Unfit, reason, remedy)
}

/// A file could not be opened or read.
pub(crate) fn file(verb: &str, path: &Path, error: &std::io::Error) -> Refusal {
    let remedy = match error.kind() {
        std::io::ErrorKind::NotFound => "check the path",
        std::io::ErrorKind::PermissionDenied => {
            "run as a user who may, or change the file's permissions"
        }
        _ => "",
    };
    unfit(format!("cannot {verb} {}: {error}", path.display()), remedy)
}

/// How bad an end is, to find the worst of many.
pub(crate) fn severity(exit: Exit) -> u8 {
    match exit {
        Exit::Done => 0,
        Exit::Findings => 1,
        Exit::Busy => 2,
        Exit::Usage => 3,
        Exit::Unfit => 4,
        Exit::Refused => 5,
        Exit::Aborted => 6,
        Exit::Lost => 7,
    }
}
