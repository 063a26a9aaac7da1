//! A guest for tests, benchmarks and the demo: a small freestanding program that counts, stamps, walks its memory and
//! says how it is, as an ELF image in [`ELF`]; and the host side of what it says.
//!
//! The program (`program/`) is compiled by `build.rs` with the host's own toolchain. This library only reads: it parses
//! the report that the guest keeps in its RAM ([`Report`]) and the lines that it prints ([`ConsoleLine`]), and builds its
//! command line ([`CommandLine`]). All of that comes from a guest, so all of it is checked.
//!
//! # Booting it
//!
//! An ELF kernel, loaded at its physical addresses (2 MiB up), entered at `e_entry` by the 64-bit Linux boot protocol
//! (Documentation/arch/x86/boot.rst): long mode, CPL0, the low 4 GiB mapped one to one, interrupts off, RSI at the zero
//! page, whose e820 table and command line pointer are read. It brings its own descriptor and page tables.
//!
//! It needs in-kernel local APICs, memory-mapped, with ids 0, 1, 2, … and the boot vCPU's 0, and with `console` a serial
//! port. It shuts LINT0 and runs with interrupts enabled, but none comes without `timer_us` or `ipi_us`. RFLAGS.IOPL may
//! be 0: ports are open to it by its TSS.
//!
//! RAM must be what lies from 1 MiB to [`layout::WALK_ADDRESS`], and with `cpus=` the page at
//! [`layout::TRAMPOLINE_ADDRESS`], whether e820 says so or not. A reset may leave RAM as it is, but has to load the image
//! again.
//!
//! Without firmware it is entered in 32-bit protected mode at [`layout::IMAGE_ADDRESS`], flat, with the zero page at
//! [`layout::BARE_ZERO_PAGE`] and the word `bare` in its command line.
//!
//! # What it does
//!
//! It leaves CPL0 after some fifty instructions, because kvm-pvm emulates that ring, and each vCPU then takes turns at
//! CPL3, for ever: one heartbeat, one page of the memory walk (or a pause), and on the first vCPU one byte of the
//! console. It polls and never halts, so every vCPU keeps its processor busy.
//!
//! # How fast it is
//!
//! By the example `measure`, one vCPU, on a 2-core AMD EPYC virtual machine whose KVM is kvm-pvm, RAM in 4 KiB pages:
//!
//! | what | time |
//! |---|---|
//! | a turn without a walk | 32 ns |
//! | the first sweep, over blank RAM | 1.1 to 2.2 ms a MiB (4 to 8 µs a page) |
//! | a warm sweep of 16 MiB | 2.6 to 3.6 µs a MiB (10 to 14 ns a page) |
//! | a warm sweep of 256 MiB | 7 to 9 µs a MiB (28 to 37 ns a page) |
//! | an interrupt to itself, sent to counted | 14 to 19 µs |

mod balloon;
mod command_line;
mod console;
mod disk;
mod driver_state;
mod fs;
mod hvc;
#[path = "../program/layout.rs"]
pub mod layout;
mod load;
mod net;
mod report;
mod rng;
mod vsock;
mod wreck;

pub use balloon::BalloonReport;
pub use command_line::CommandLine;
pub use console::{ConsoleError, ConsoleLine, StartLine, StatusLine, StatusLog};
pub use disk::DiskReport;
pub use driver_state::DriverState;
pub use fs::FsReport;
pub use hvc::HvcReport;
pub use load::LoadReport;
pub use net::{NetPeer, NetReport};
pub use report::{
    GapRound, Ipis, Report, ReportError, Slot, Timer, TscSource, TurnState, Walk, WalkError,
};

pub use rng::RngReport;
pub use vsock::VsockReport;
pub use wreck::WreckReport;

/// The guest: a static ELF64 image for x86-64, entered in 64-bit mode.
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
