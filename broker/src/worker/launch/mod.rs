//! Starting a confined process, in two stages of this same binary, without unsafe code.
//!
//! ```text
//! broker                         stage 1 (`launch`)             stage 2 (`launch --confine`)
//!   │ the launcher spawns ──────►│                                │
//!   │ begin, cgroup.procs ──────►│ join the VM's cgroup           │
//!   │                            │ unshare all namespaces         │
//!   │                   unshared │                                │
//!   │ the launcher writes uid_map and gid_map                     │
//!   │ mapped ───────────────────►│ become id 0 of the namespace   │
//!   │                            │ spawn ────────────────────────►│ pid 1 of the new namespaces
//!   │               spawned(pid) │                                │
//!   │ the launcher ends ────────►│                                │ (reparented to the broker, a subreaper)
//!   │ confine + sealed memfd ────┼───────────────────────────────►│ empty root, rlimits, no capabilities,
//!   │                            │                                │ no_new_privs, Landlock, first filter,
//!   │                            │                                │ execveat of the memfd
//! ```
//!
//! Both stages hold three descriptors: 0 is the socket that becomes the worker's control socket, 1 and 2 the diagnostics
//! pipe. Stage 1 runs before any confinement, stage 2 runs until it is complete; neither has seen a byte of the guest.

mod spawn;
mod stages;

use serde::Deserialize;
use serde::Serialize;

pub(crate) use spawn::Begun;
pub(crate) use spawn::Launch;
pub(crate) use spawn::Launched;
pub(crate) use stages::confine;
pub(crate) use stages::unshare;

/// What the broker tells the stages.
#[derive(Debug, Serialize, Deserialize)]
enum LaunchOrder {
    /// To stage 1, with the `cgroup.procs` of each cgroup to join: begin.
    Begin,
    /// To stage 1: the id maps are written.
    Mapped,
    /// To stage 2, with the sealed memfd to execute.
    Confine(Program, baton_policy::Confinement),
}

/// What is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Program {
    /// A worker. The broker's death continues it, should it be stopped, and it decides by what is in its socket.
    Worker,
    /// The QMP front. It ends with its broker.
    Front,
}

/// What the stages answer.
#[derive(Debug, Serialize, Deserialize)]
enum LaunchReport {
    /// Stage 1 has left all namespaces.
    Unshared,
    /// Stage 2 runs, with this number in the broker's pid namespace.
    Spawned(i32),
    /// A step failed; the process exits.
    Failed {
        /// Which.
        step: String,
        /// Why.
        reason: String,
    },
}
