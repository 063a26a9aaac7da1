//! What the broker itself and its launcher may hold and do: `broker.toml`, which is a file as a worker's policy is, and the
//! comparison with the kernel's record of it.

mod place;

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use crate::capabilities::{self, Capabilities, CapabilityError};
use crate::compile::{self, CompileError};
use crate::landlock;
use crate::parse::{self, OwnTopic, PolicyError};
use crate::policy::Rule;
use crate::procfs::TaskStatus;
use crate::program::Program;
use crate::rlimits::{Limit, Resource, RlimitError, Rlimits};

pub use place::{Domain, Place, PlaceAccess, PlaceRule, Places};

/// The file that [`OwnPolicy::builtin`] parses.
pub const BROKER: &str = include_str!("../broker.toml");

/// CAP_SETPCAP (`linux/capability.h`), which shrinking the bounding set and locking securebits takes.
const SETPCAP: u64 = 1 << 8;

/// A process of the broker's, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// The broker from its first moment until it has opened what its VM file names.
    Start,
    /// The broker ever after, under its filter.
    Broker,
    /// The launcher.
    Launcher,
}

/// What they keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPolicy {
    /// Limits, soft and hard.
    pub rlimits: Rlimits,
    /// Capabilities, by name, each with who has it and its reason.
    pub capabilities: Vec<(String, Vec<Holder>, String)>,
    /// What the broker may call once it has started, in the order of the file. It has one thread.
    pub rules: Vec<Rule>,
    /// Where it may do what to files, from then on, in the order of the file.
    pub places: Vec<PlaceRule>,
    /// The least Landlock ABI that will do.
    pub floor_abi: u32,
    keep: BTreeMap<Holder, Capabilities>,
}

/// A file that is none, or a name in it that is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnPolicyError {
    /// Not the tables that it has to have.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// No capability is called that, or it has no reason.
    #[error("{0:?} is no capability, or has no holder or no reason")]
    Capability(String),
    /// A place twice, without a right or without a reason.
    #[error("the place {0:?} is there twice, or has no access or no reason")]
    Place(Place),
    /// A Landlock ABI that is none to begin with.
    #[error("ABI {0} is no floor")]
    Floor(u32),
    /// A rule for a system call is none.
    #[error(transparent)]
    Rule(#[from] PolicyError),
    /// The rules are too many.
    #[error(transparent)]
    Compile(#[from] CompileError),
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

/// Something that a process holds and should not, or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnDiscrepancy {
    /// Capabilities beyond those of the file in this set.
    Capabilities(Holder, &'static str, Capabilities),
    /// An exec could gain privileges.
    NewPrivileges(Holder),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "schema")]
    _schema: u32,
    rlimits: BTreeMap<Resource, u64>,
    capability: Vec<FileCapability>,
    landlock: FileLandlock,
    place: Vec<PlaceRule>,
    allow: Vec<OwnTopic>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCapability {
    name: String,
    of: Vec<Holder>,
    why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLandlock {
    floor_abi: u32,
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
        let (mut keep, mut capabilities) = (BTreeMap::new(), Vec::new());
        for FileCapability { name, of, why } in file.capability {
            if of.is_empty() || why.trim().is_empty() {
                return Err(OwnPolicyError::Capability(name));
            }
            for holder in &of {
                let set: &mut Capabilities = keep.entry(*holder).or_default();
                *set = set
                    .with_name(&name)
                    .ok_or_else(|| OwnPolicyError::Capability(name.clone()))?;
            }
            capabilities.push((name, of, why));
        }
        place::check(&file.place)?;
        let floor_abi = file.landlock.floor_abi;
        landlock::floor_abi(floor_abi).ok_or(OwnPolicyError::Floor(floor_abi))?;
        Ok(Self {
            rlimits,
            capabilities,
            places: file.place,
            floor_abi,
            rules: parse::own_rules(text, file.allow)?,
            keep,
        })
    }

    /// What one of them keeps.
    #[must_use]
    pub fn keep(&self, holder: Holder) -> Capabilities {
        self.keep.get(&holder).copied().unwrap_or_default()
    }

    /// The broker's filter: EPERM for whatever no rule lets through.
    ///
    /// An error and not the end: a broker that dies of its own filter leaves a guest that nobody can upgrade, and a call that
    /// is refused is not executed either way.
    ///
    /// # Errors
    ///
    /// None that this crate's tests would have let through.
    pub fn filter(&self) -> Result<Program, OwnPolicyError> {
        Ok(compile::own(&self.rules)?)
    }

    /// How many system calls the broker may make, in whatever way.
    #[must_use]
    pub fn calls(&self) -> usize {
        compile::by_call(&self.rules).len()
    }

    /// Gives up everything else, for good: what the calling thread executes has no capability until it makes a user namespace of
    /// its own. `status` is the calling process's own. Whoever may not shrink its bounding set keeps that, and can gain nothing
    /// by it.
    ///
    /// # Errors
    ///
    /// The first step that fails.
    pub fn enter(&self, holder: Holder, status: &TaskStatus) -> Result<(), OwnError> {
        self.rlimits.apply()?;
        crate::no_new_privs().map_err(OwnError::NoNewPrivs)?;
        if status.effective.mask() & SETPCAP != 0 {
            let more = status.permitted.without(self.keep(holder));
            capabilities::limit_to(status.permitted.without(more))?;
        }
        Ok(())
    }

    /// What the kernel's record of a process has beyond this.
    #[must_use]
    pub fn compare(&self, holder: Holder, status: &TaskStatus) -> Vec<OwnDiscrepancy> {
        let (keep, none) = (self.keep(holder), Capabilities::NONE);
        let mut sets = vec![
            ("permitted", status.permitted, keep),
            ("effective", status.effective, keep),
            ("inheritable", status.inheritable, none),
            ("ambient", status.ambient, none),
        ];
        // Without any capability, and with no_new_privs, an exec gains none whatever this set has.
        if !status.permitted.is_empty() {
            sets.push(("bounding", status.bounding, keep));
        }
        let beyond = sets
            .into_iter()
            .map(|(set, found, keep)| (set, found.without(keep)));
        let mut found: Vec<OwnDiscrepancy> = beyond
            .filter(|(_, more)| !more.is_empty())
            .map(|(set, more)| OwnDiscrepancy::Capabilities(holder, set, more))
            .collect();
        if !status.no_new_privs {
            found.push(OwnDiscrepancy::NewPrivileges(holder));
        }
        found
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "the starting broker",
            Self::Broker => "the broker",
            Self::Launcher => "the launcher",
        })
    }
}

impl fmt::Display for OwnDiscrepancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capabilities(holder, set, more) => {
                write!(f, "{holder}'s {set} set has {more} beyond its policy")
            }
            Self::NewPrivileges(holder) => write!(f, "{holder} is without no_new_privs"),
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
        for holder in [Holder::Start, Holder::Broker, Holder::Launcher] {
            let of = |one: &&(String, Vec<Holder>, String)| one.1.contains(&holder);
            let named = own.capabilities.iter().filter(of).count();
            let kept = usize::try_from(own.keep(holder).mask().count_ones()).unwrap();
            assert_eq!(kept, named, "{holder}");
        }
        // The broker gives up more once it has started, and never takes anything back.
        let (start, later) = (own.keep(Holder::Start), own.keep(Holder::Broker));
        assert!(later.without(start).is_empty() && later != start);
        // Or it could not have the broker's filter read.
        assert!(later.without(own.keep(Holder::Launcher)).is_empty());
        assert!(OwnPolicy::parse(&BROKER.replace("CAP_SETUID", "CAP_SETOUT")).is_err());
        let reason = own.capabilities.first().map(|one| one.2.clone()).unwrap();
        assert!(OwnPolicy::parse(&BROKER.replace(&reason, " ")).is_err());
        assert!(OwnPolicy::parse(&format!("{BROKER}\nsurprise = 1")).is_err());
    }

    #[test]
    fn what_is_beyond_the_file_is_found_in_each_set() {
        let policy = OwnPolicy::builtin().unwrap();
        let keep = policy.keep(Holder::Broker);
        let clean = TaskStatus {
            permitted: keep,
            effective: keep,
            bounding: keep,
            inheritable: Capabilities::NONE,
            ambient: Capabilities::NONE,
            no_new_privs: true,
            ..own()
        };
        assert_eq!(policy.compare(Holder::Broker, &clean), []);
        // CAP_SYS_MODULE.
        let more = Capabilities::from_mask(keep.mask() | 1 << 16);
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
                .compare(Holder::Broker, &status)
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
        assert_eq!(
            policy.compare(Holder::Broker, &status),
            [OwnDiscrepancy::NewPrivileges(Holder::Broker)]
        );
    }
}
