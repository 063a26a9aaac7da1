//! Landlock: a domain in which nothing is allowed, for workers, and one in which a list of places is, for the broker.
//!
//! A worker's has no rules, so it takes no paths. Descriptors that are open already keep working (a right is bound to a
//! descriptor when it is opened), and memfds may still be executed, so the launcher enters the domain before it
//! executes the worker. What Landlock does not cover, `stat`, UDP, pathname sockets, is left to seccomp and to the
//! empty root.

use std::io;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};
use serde::{Deserialize, Serialize};

/// The newest ABI that is asked for; what the kernel knows of it is enforced (Linux 7.2).
const CEILING: ABI = ABI::V10;

/// The domain that the calling thread is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LandlockStatus {
    /// The ABI that is enforced in full: the kernel's, or the newest that the crate knows.
    pub abi: u32,
}

/// The domain could not be entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LandlockError {
    /// The kernel does not know what the floor requires, or refused.
    #[error(
        "Landlock cannot deny everything at ABI {floor}: {source}; it takes Linux 6.12 or newer with \"landlock\" in its lsm= list"
    )]
    Refused {
        /// The least ABI that was asked for.
        floor: u32,
        /// What the crate said.
        source: Box<RulesetError>,
    },
    /// The kernel accepted the ruleset but did not enforce it.
    #[error("Landlock is not enforced at ABI {floor}: the kernel offers {found}")]
    NotEnforced {
        /// The least ABI that was asked for.
        floor: u32,
        /// The status that the crate reports.
        found: String,
    },
    /// A floor that this crate cannot require.
    #[error("no Landlock floor: ABI {floor}; this version knows 6 to {}", CEILING as i32)]
    Floor {
        /// The floor.
        floor: u32,
    },
}

/// Puts the calling thread (and every thread and process that it makes from now on) into a domain where every
/// access to files and to TCP, every signal to the outside and every connection to an outside abstract socket is
/// denied. Sets `no_new_privs`.
///
/// What ABI `floor` has is required; what newer kernels add is taken where there is.
///
/// # Errors
///
/// When the kernel does not enforce all that `floor` stands for.
pub fn restrict_nothing_allowed(floor: u32) -> Result<LandlockStatus, LandlockError> {
    let required = floor_abi(floor).ok_or(LandlockError::Floor { floor })?;
    let status = deny_all(required).map_err(|source| refused(floor, source))?;
    enforced(floor, required, &status)
}

/// Puts the calling thread, and all that it makes from now on, into a domain where files are reached below these paths only, each
/// with its rights, and no TCP port and no abstract socket of the outside at all. A path that cannot be reached is left out. Sets
/// `no_new_privs`.
///
/// Signals to the outside stay possible, and connections to sockets with a path.
///
/// # Errors
///
/// As [`restrict_nothing_allowed`].
pub(crate) fn restrict_to(
    floor: u32,
    allowed: &[(PathBuf, BitFlags<AccessFs>)],
) -> Result<LandlockStatus, LandlockError> {
    let required = floor_abi(floor).ok_or(LandlockError::Floor { floor })?;
    let mut rules = Vec::new();
    for (path, access) in allowed {
        let Ok(parent) = PathFd::new(path) else {
            continue;
        };
        // What only a directory has is no right of a file's.
        let access = if path.is_dir() {
            *access
        } else {
            *access & AccessFs::from_file(required)
        };
        rules.push(PathBeneath::new(parent, access));
    }
    let status = deny_beyond(required, rules).map_err(|source| refused(floor, source))?;
    enforced(floor, required, &status)
}

fn refused(floor: u32, source: RulesetError) -> LandlockError {
    LandlockError::Refused {
        floor,
        source: Box::new(source),
    }
}

fn enforced(
    floor: u32,
    required: ABI,
    status: &RestrictionStatus,
) -> Result<LandlockStatus, LandlockError> {
    let not_enforced = |found: String| LandlockError::NotEnforced { floor, found };
    if status.ruleset == RulesetStatus::NotEnforced || !status.no_new_privs {
        return Err(not_enforced(format!("{:?}", status.ruleset)));
    }
    match status.landlock {
        landlock::LandlockStatus::Available { effective_abi, .. } if effective_abi >= required => {
            // The enumeration's values are the ABI's numbers.
            let abi =
                u32::try_from(effective_abi as i32).map_err(|_| LandlockError::Floor { floor })?;
            Ok(LandlockStatus { abi })
        }
        other => Err(not_enforced(format!("{other:?}"))),
    }
}

/// Attempts what the domain denies, since the kernel shows a domain to nobody: to list the root directory, and to bind a TCP
/// port. Without the domain a process alone in its namespaces could do both. To be called by a process that is in it and
/// under no filter yet.
///
/// # Errors
///
/// When one of them was not denied.
pub fn attempt(floor: u32) -> Result<(), LandlockError> {
    denied(
        floor,
        "a directory could be listed",
        &std::fs::read_dir("/"),
    )?;
    attempt_port(floor)
}

/// Attempts to bind a TCP port, under no filter yet.
///
/// # Errors
///
/// When that was not denied.
pub(crate) fn attempt_port(floor: u32) -> Result<(), LandlockError> {
    let bound = std::net::TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, 0));
    denied(floor, "a TCP port could be bound", &bound)
}

/// An error unless what was attempted was denied (EACCES); `what` says what could be done.
pub(crate) fn denied<T>(
    floor: u32,
    what: &str,
    outcome: &io::Result<T>,
) -> Result<(), LandlockError> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        _ => Err(LandlockError::NotEnforced {
            floor,
            found: format!("{what} in spite of it"),
        }),
    }
}

/// The ABI with this number, when it can be a floor.
pub(crate) fn floor_abi(number: u32) -> Option<ABI> {
    let abi = ABI::from(i32::try_from(number).ok()?);
    (number >= 6 && abi as i32 == i32::try_from(number).ok()?).then_some(abi)
}

fn deny_all(required: ABI) -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(required))?
        .handle_access(AccessNet::from_all(required))?
        .scope(Scope::from_all(required))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(CEILING))?
        .handle_access(AccessNet::from_all(CEILING))?
        .scope(Scope::from_all(CEILING))?
        .create()?
        .restrict_self()
}

/// Everything that both denies and could be allowed for a path, but to reach a socket by its path (ABI 9): which ones the broker
/// connects to is policy's to say.
fn deny_beyond(
    required: ABI,
    rules: Vec<PathBeneath<PathFd>>,
) -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(required))?
        .handle_access(AccessNet::from_all(required))?
        .scope(Scope::AbstractUnixSocket)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(CEILING) & !AccessFs::ResolveUnix)?
        .handle_access(AccessNet::from_all(CEILING))?
        .create()?
        .add_rules(rules.into_iter().map(Ok::<_, RulesetError>))?
        .restrict_self()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_abis_that_scope_can_be_a_floor() {
        for floor in [0, 5, 11, u32::MAX] {
            assert!(
                matches!(
                    restrict_nothing_allowed(floor),
                    Err(LandlockError::Floor { .. })
                ),
                "{floor}"
            );
        }
        assert_eq!(floor_abi(6), Some(ABI::V6));
    }
}
