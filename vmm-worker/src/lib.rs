//! The confined worker: runs the guest's vCPUs over memory and descriptors that it was handed, and hands them on.
//!
//! ```text
//! life        hello, configuration, descriptors ──► assembly ──► rehearsal ──► ready
//! control     one thread: orders, the other worker, the guest's events, the console
//!   orders      what each order does in each phase
//!   guest       start, commit, pause, reset
//!   handover    park, save, stream, roll back          transfer   the main channel's two sides
//! vcpu        one thread each; its state, and how it is stopped without losing a kick
//! vm_state    what belongs to no vCPU                  sections   what the state stream is made of
//! boot        the kernel in RAM                        devices    what the guest finds on its buses
//! pci_host    interrupts and notifications in KVM      io_pool    the threads that serve disks
//! vfio        PCI devices of the host
//! ```
//!
//! It opens nothing, connects to nothing and starts nothing: every descriptor but the control socket comes from the
//! broker, and no path is ever seen here.

mod assembly;
mod blob;
pub mod boot;
mod clock;
mod console;
mod control;
mod cpuid;
pub mod devices;
mod diagnostics;
mod fail_point;
mod gap;
mod guest;
mod handover;
mod io_pool;
mod kvmclock;
mod life;
mod memory;
mod orders;
mod pci_host;
mod platform;
mod reboot;
mod rehearsal;
mod sections;
mod signals;
mod transfer;
mod vcpu;
mod vfio;
mod vm;
mod vm_state;

pub use life::BUILD;
pub use life::live;
