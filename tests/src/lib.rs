//! What the end-to-end tests share: a VM started through the built `baton`, and witnesses that do not ask Baton how the
//! guest is: its report in its RAM, its console, `/proc`, the cgroup, the audit log.
//!
//! ```text
//! test ──► Vm ──► baton run, upgrade, status, …      the programs as people use them
//!           ├──► Ram           the guest's own account of itself, through the broker's memfd
//!           ├──► AuditLog      every record, its chain verified
//!           └──► Residue       descriptors, processes, cgroup and files of a moment
//! ```
//!
//! Tests run as root, one process each (cargo-nextest), against release builds; [`Binaries`] says where they are looked
//! for. A failing assertion is a failing test, so this library panics where another would return an error.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

mod answer;
pub mod attack;
mod audit_log;
mod backend;
pub mod between;
mod binaries;
pub mod hostility;
mod huge_pages;
pub mod impostor;
mod loop_device;
mod patience;
pub mod petitioner;
mod processes;
mod qmp;
mod ram;
pub mod reboot;
pub mod recording;
mod residue;
mod site;
pub mod talk;
pub mod transfer;
mod verdict;
mod vm;
mod wire;
mod witness;
mod work;

pub use answer::Answer;
pub use answer::Upgrade;
pub use audit_log::AuditLog;
pub use audit_log::Record;
pub use backend::Backend;
pub use binaries::Binaries;
pub use huge_pages::HugePages;
pub use loop_device::LoopDevice;
pub use loop_device::Mount;
pub use patience::until;
pub use processes::continue_process;
pub use processes::is_alive;
pub use processes::is_stopped;
pub use processes::kill_process;
pub use processes::signal_stop;
pub use processes::stop_process;
pub use processes::with_children;
pub use qmp::Qmp;
pub use ram::Ram;
pub use residue::Residue;
pub use site::Site;
pub use talk::Talk;
pub use transfer::Waiting;
pub use verdict::Faulted;
pub use vm::Builder;
pub use vm::Vm;
pub use wire::Flood;
pub use wire::Wire;
pub use witness::Witness;
