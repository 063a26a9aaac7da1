//! The audit log of one VM: what was opened, granted, refused, confirmed and replaced, and at whose wish.
//!
//! JSON Lines in the shape of the Open Cybersecurity Schema Framework ([`shape`]), each record with the SHA-256 of the line
//! before it ([`log`], the writer, which the broker has). [`verify`] finds what was edited, removed or reordered since;
//! a [`Checkpoint`] that lies elsewhere shows a log that was rewritten whole or has lost its end. `docs/audit-log.md` is the
//! reader's account of the format.
//!
//! Nothing here decides anything about a VM, and nothing that a reader is given is trusted.
#![forbid(unsafe_code)]

pub mod actor;
pub mod checkpoint;
pub mod echo;
pub mod journal;
pub mod log;
pub mod read;
pub mod segments;
pub mod shape;
mod spans;
pub mod verify;

pub use actor::Actor;
pub use checkpoint::Checkpoint;
pub use log::AuditLog;
pub use log::Limits;
pub use log::LogError;
pub use shape::quoted;
