//! Deterministic faults for tests. Only builds with the feature `fail-points` contain any of it.

use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;

/// Where in a worker a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailSite {
    /// Before the offer (new) or the answer (old).
    Agree,
    /// After memory is mapped, before the VM is made.
    Build,
    /// In the rehearsal.
    Rehearse,
    /// Before the vCPUs are stopped.
    Park,
    /// After half of the state stream is written.
    Save,
    /// After the stream is validated, before anything is loaded.
    Validate,
    /// After half of the state is loaded.
    Load,
    /// After the commit came, before "running".
    Commit,
    /// After "running", before the first KVM_RUN.
    Running,
}

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailAction {
    /// The process ends at once.
    Die,
    /// The step fails with an error.
    Error,
    /// The thread sleeps for ever.
    Hang,
    /// The worker claims the step's success without doing it.
    Lie,
    /// A system call that the filter refuses.
    Violate,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailPoint {
    /// Where.
    pub site: FailSite,
    /// What.
    pub action: FailAction,
}

impl FromStr for FailPoint {
    type Err = String;

    /// Parses `site:action`, as in `load:die`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (site, action) = text.split_once(':').ok_or("expected site:action")?;
        let site = match site {
            "agree" => FailSite::Agree,
            "build" => FailSite::Build,
            "rehearse" => FailSite::Rehearse,
            "park" => FailSite::Park,
            "save" => FailSite::Save,
            "validate" => FailSite::Validate,
            "load" => FailSite::Load,
            "commit" => FailSite::Commit,
            "running" => FailSite::Running,
            other => return Err(format!("no fail site {other:?}")),
        };
        let action = match action {
            "die" => FailAction::Die,
            "error" => FailAction::Error,
            "hang" => FailAction::Hang,
            "lie" => FailAction::Lie,
            "violate" => FailAction::Violate,
            other => return Err(format!("no fail action {other:?}")),
        };
        Ok(Self { site, action })
    }
}
