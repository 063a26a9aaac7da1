//! What the launcher does to itself before it executes the worker, as one value that travels.
//!
//! The broker makes a [`Confinement`] from the policy and sends it; the launcher, in its new namespaces, with the
//! worker's ids and an emptied root, enters it and executes the worker. From then on there is only less.

use std::io;

use serde::{Deserialize, Serialize};

use crate::capabilities::{self, Capabilities, CapabilityError};
use crate::compile::CompileError;
use crate::landlock::{self, LandlockError, LandlockStatus};
use crate::policy::Policy;
use crate::program::Program;
use crate::rlimits::{RlimitError, Rlimits};

/// Everything that is put on the process itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Resource limits.
    pub rlimits: Rlimits,
    /// Capabilities to keep.
    pub keep: Capabilities,
    /// The least Landlock ABI.
    pub landlock_floor: u32,
    /// The filters of the build phase, in order.
    pub filters: Vec<Program>,
    /// The last of them reports calls ([`crate::learn`]): whoever is to hear them takes the listener from this process, which
    /// stands still in its next call until then.
    pub learn: bool,
}

/// A step that failed. The process must not execute the worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfinementError {
    /// Resource limits.
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    /// Capabilities.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// `no_new_privs`.
    #[error("cannot set no_new_privs")]
    NoNewPrivs(#[source] io::Error),
    /// Landlock.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// A filter.
    #[error("cannot install filter {index} of the build phase")]
    Filter {
        /// Which, from 0.
        index: usize,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Policy {
    /// What the launcher of a worker with this many vCPUs does to itself.
    ///
    /// # Errors
    ///
    /// As [`Policy::compile`].
    pub fn confinement(&self, vcpus: u32) -> Result<Confinement, CompileError> {
        Ok(Confinement {
            rlimits: self.rlimits(vcpus, 0),
            keep: self.capabilities,
            landlock_floor: self.landlock.floor_abi,
            filters: self.compile()?.build,
            learn: self.learn.is_some(),
        })
    }
}

impl Confinement {
    /// Confines the calling thread, which must be the only one of its process: limits, capabilities,
    /// `no_new_privs`, Landlock (and attempts against it), filters, in this order, each of which the next leaves possible. Afterwards the
    /// only way on is `execveat` of an open descriptor with AT_EMPTY_PATH, or the end.
    ///
    /// # Errors
    ///
    /// The first step that fails. Those before it stay in force.
    pub fn enter(&self) -> Result<LandlockStatus, ConfinementError> {
        self.rlimits.apply()?;
        capabilities::drop_all(self.keep)?;
        no_new_privs().map_err(ConfinementError::NoNewPrivs)?;
        let status = landlock::restrict_nothing_allowed(self.landlock_floor)?;
        landlock::attempt(self.landlock_floor)?;
        for (index, filter) in self.filters.iter().enumerate() {
            let installed = if self.learn && index + 1 == self.filters.len() {
                // Closed here once somebody else has a copy: closing it is the first call that is reported.
                crate::kernel::seccomp_install_listened(filter).map(drop)
            } else {
                filter.install()
            };
            installed.map_err(|source| ConfinementError::Filter { index, source })?;
        }
        Ok(status)
    }
}

/// Sets `no_new_privs` on the calling thread, for good (`PR_SET_NO_NEW_PRIVS`), which filters and Landlock need.
///
/// # Errors
///
/// Whatever `prctl` says; it has no reason to fail.
pub fn no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}
