//! What the broker itself may hold: `broker.toml`, which is a file as a worker's policy is, and the comparison with the
//! kernel's record of it.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use crate::capabilities::{self, Capabilities, CapabilityError};
use crate::procfs::TaskStatus;
use crate::rlimits::{Limit, Resource, RlimitError, Rlimits};

/// The file that [`OwnPolicy::builtin`] parses.
pub const BROKER: &str = include_str!("../broker.toml");

/// CAP_SETPCAP (`linux/capability.h`), which shrinking the bounding set and locking securebits takes.
const SETPCAP: u64 = 1 << 8;

/// What the broker keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPolicy {
    /// Limits, soft and hard.
    pub rlimits: Rlimits,
    /// Capabilities, by name, each with its reason.
    pub capabilities: Vec<(String, String)>,
    keep: Capabilities,
}

/// A file that is none, or a name in it that is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnPolicyError {
    /// Not the tables that it has to have.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// No capability is called that, or it has no reason.
    #[error("{0:?} is no capability, or has no reason")]
    Capability(String),
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnError {
    /// Resource limits.
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    /// Capabilities.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// `no_new_privs`.
    #[error("cannot set no_new_privs")]
    NoNewPrivs(#[source] std::io::Error),
}

/// Something that the broker holds and should not, or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnDiscrepancy {
    /// Capabilities beyond those of the file in this set.
    Capabilities(&'static str, Capabilities),
    /// An exec could gain privileges.
    NewPrivileges,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "schema")]
    _schema: u32,
    rlimits: BTreeMap<Resource, u64>,
    capability: Vec<FileCapability>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCapability {
    name: String,
    why: String,
}

impl OwnPolicy {
    /// The built-in file.
    ///
    /// # Errors
    ///
    /// None that this crate's tests would have let through.
    pub fn builtin() -> Result<Self, OwnPolicyError> {
        Self::parse(BROKER)
    }

    fn parse(text: &str) -> Result<Self, OwnPolicyError> {
        let file: File = toml::from_str(text)?;
        let mut rlimits = Rlimits::default();
        for (resource, amount) in file.rlimits {
            rlimits.set(resource, Limit::At(amount));
        }
        let (mut keep, mut capabilities) = (Capabilities::NONE, Vec::new());
        for FileCapability { name, why } in file.capability {
            keep = match keep.with_name(&name) {
                Some(keep) if !why.trim().is_empty() => keep,
                _ => return Err(OwnPolicyError::Capability(name)),
            };
            capabilities.push((name, why));
        }
        Ok(Self {
            rlimits,
            capabilities,
            keep,
        })
    }

    /// Gives up everything else, for good: what it starts has no capability until it makes a user namespace of its own.
    /// `status` is the calling process's own. Whoever may not shrink its bounding set keeps that, and can gain nothing by it.
    ///
    /// # Errors
    ///
    /// The first step that fails.
    pub fn enter(&self, status: &TaskStatus) -> Result<(), OwnError> {
        self.rlimits.apply()?;
        crate::no_new_privs().map_err(OwnError::NoNewPrivs)?;
        if status.effective.mask() & SETPCAP != 0 {
            let more = status.permitted.without(self.keep);
            capabilities::limit_to(status.permitted.without(more))?;
        }
        Ok(())
    }

    /// What the kernel's record of the broker has beyond this.
    #[must_use]
    pub fn compare(&self, status: &TaskStatus) -> Vec<OwnDiscrepancy> {
        let none = Capabilities::NONE;
        let mut sets = vec![
            ("permitted", status.permitted, self.keep),
            ("effective", status.effective, self.keep),
            ("inheritable", status.inheritable, none),
            ("ambient", status.ambient, none),
        ];
        // Without any capability, and with no_new_privs, an exec gains none whatever this set has.
        if !status.permitted.is_empty() {
            sets.push(("bounding", status.bounding, self.keep));
        }
        let beyond = sets
            .into_iter()
            .map(|(set, found, keep)| (set, found.without(keep)));
        let mut found: Vec<OwnDiscrepancy> = beyond
            .filter(|(_, more)| !more.is_empty())
            .map(|(set, more)| OwnDiscrepancy::Capabilities(set, more))
            .collect();
        if !status.no_new_privs {
            found.push(OwnDiscrepancy::NewPrivileges);
        }
        found
    }
}

impl fmt::Display for OwnDiscrepancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capabilities(set, more) => {
                write!(f, "the broker's {set} set has {more} beyond its policy")
            }
            Self::NewPrivileges => f.write_str("the broker is without no_new_privs"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> TaskStatus {
        TaskStatus::parse(&std::fs::read_to_string("/proc/self/status").unwrap()).unwrap()
    }

    #[test]
    fn every_capability_of_the_file_is_one_and_has_its_reason() {
        let own = OwnPolicy::builtin().unwrap();
        let kept = usize::try_from(own.keep.mask().count_ones()).unwrap();
        assert_eq!(own.capabilities.len(), kept);
        assert!(OwnPolicy::parse(&BROKER.replace("CAP_SETUID", "CAP_SETOUT")).is_err());
        let reason = own.capabilities.first().map(|one| one.1.clone()).unwrap();
        assert!(OwnPolicy::parse(&BROKER.replace(&reason, " ")).is_err());
        assert!(OwnPolicy::parse(&format!("{BROKER}\nsurprise = 1")).is_err());
    }

    #[test]
    fn what_is_beyond_the_file_is_found_in_each_set() {
        let policy = OwnPolicy::builtin().unwrap();
        let clean = TaskStatus {
            permitted: policy.keep,
            effective: policy.keep,
            bounding: policy.keep,
            inheritable: Capabilities::NONE,
            ambient: Capabilities::NONE,
            no_new_privs: true,
            ..own()
        };
        assert_eq!(policy.compare(&clean), []);
        // CAP_SYS_MODULE.
        let more = Capabilities::from_mask(policy.keep.mask() | 1 << 16);
        type Change = fn(&mut TaskStatus, Capabilities);
        let cases: [(&str, Change); 5] = [
            ("permitted", |status, more| status.permitted = more),
            ("effective", |status, more| status.effective = more),
            ("bounding", |status, more| status.bounding = more),
            ("inheritable", |status, more| status.inheritable = more),
            ("ambient", |status, more| status.ambient = more),
        ];
        for (set, change) in cases {
            let mut status = clean.clone();
            change(&mut status, more);
            let found: Vec<String> = policy
                .compare(&status)
                .iter()
                .map(ToString::to_string)
                .collect();
            assert!(
                found
                    .iter()
                    .all(|text| text.contains(set) && text.contains("CAP_SYS_MODULE"))
                    && found.len() == 1,
                "{set}: {found:?}"
            );
        }
        let status = TaskStatus {
            no_new_privs: false,
            ..clean
        };
        assert_eq!(policy.compare(&status), [OwnDiscrepancy::NewPrivileges]);
    }
}
