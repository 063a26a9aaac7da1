//! What a worker may hold and do.
//!
//! A [`Policy`] is a file that a person reads in five minutes (`default.toml` is the built-in one). From it come
//! the filters of every thread ([`Policy::compile`]), what the launcher does to itself before it executes a worker
//! ([`Confinement`]), the list of binaries that may run ([`WorkerAllowList`]), and the descriptors that may be
//! handed out ([`descriptors`]). [`procfs`] and [`proof`] compare what the kernel says of a running worker with it;
//! [`check`], [`explain`], [`diff`] and [`dump`] are for the people who write and audit policies.
//!
//! The crate decides and applies; it opens no descriptor for a worker, starts no process, and depends on no other
//! crate of this workspace. Its only unsafe code is in [`kernel`].
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod access;
mod bounds;
pub mod bpf;
pub mod capabilities;
pub mod cgroup;
pub mod check;
pub mod compile;
pub mod condition;
mod confinement;
pub mod constants;
pub mod declaration;
pub mod descriptors;
pub mod diff;
mod digest;
pub mod disasm;
pub mod dump;
pub mod exercise;
pub mod explain;
pub mod io;
pub mod judge;
pub mod kernel;
pub mod landlock;
pub mod learn;
pub mod lint;
pub mod own;
mod parse;
mod policy;
pub mod procfs;
mod program;
pub mod proof;
pub mod rlimits;
pub mod signature;
pub mod syscalls;
mod trusted;
pub mod vm_plan;
pub mod workers;

pub use capabilities::Capabilities;
pub use cgroup::{CgroupLimits, CgroupPolicy, CgroupSetting, CgroupVersion};
pub use compile::{CompileError, Compiled};
pub use confinement::{Confinement, ConfinementError, no_new_privs};
pub use declaration::{Declaration, DeclarationError};
pub use descriptors::{Access, Candidate, Grant, GrantError, Kind, PathPattern, Seal};
pub use digest::{Digest, DigestError};
pub use parse::{MAX_TEXT, Place, PolicyError, Problem};
pub use policy::{
    Approval, BUILTIN, FRONT, Ids, JSON_SCHEMA, LandlockPolicy, Namespace, Policy, Refusal, Role,
    RolePolicy, Rule, SCHEMA, Threads, Violation, Workers,
};
pub use program::{Instruction, MAX_INSTRUCTIONS, Program, ProgramError};
pub use rlimits::{Limit, Resource, Rlimits};
pub use syscalls::Syscall;
pub use trusted::TrustError;
pub use workers::WorkerAllowList;
