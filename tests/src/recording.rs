//! The tests' own run as a recording of what workers call: `tests/exercise` runs some of them so.
//!
//! Under `BATON_RECORD` every VM that a [`Builder`](crate::Builder) starts has a policy that learns: its workers' filters deny
//! nothing, and each broker writes the calls of its workers to a file of its own in that directory. Nothing is tested by such a
//! run, and what a test expects of confinement fails in it.

use std::path::PathBuf;

/// The directory that recordings go to.
pub const VARIABLE: &str = "BATON_RECORD";

fn directory() -> Option<PathBuf> {
    std::env::var_os(VARIABLE)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

/// Whether this run is a recording.
#[must_use]
pub fn is_on() -> bool {
    directory().is_some()
}

/// A policy's text, so that it learns.
#[must_use]
pub fn learning(text: &str) -> String {
    format!("{text}\n[learn]\nwhy = \"a recording of the tests\"\n")
}

/// What a broker's command line has more in a recording, for a shell. The broker makes no file.
pub(crate) fn argument() -> String {
    directory().map_or_else(String::new, |directory| {
        let file = format!("{}/$$.jsonl", directory.display());
        format!(" --learn \"{file}\"\n    : >> \"{file}\"")
    })
}
