//! The part of a broker that tests need: it makes a guest's descriptors, executes the worker under the policy's filters,
//! and speaks the protocol. Every step is a call of its own, so that a test can leave one out or put a fault between two.
#![expect(
    unsafe_code,
    reason = "the worker is executed from its descriptor, in the child, under its filters"
)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    dead_code,
    unused_imports,
    reason = "each test file uses a part of this"
)]

pub(crate) mod tap;
pub(crate) mod upgrade;
pub(crate) mod vm;
#[path = "../../../tests/src/wire.rs"]
#[expect(unreachable_pub, reason = "it is a library's module elsewhere")]
pub(crate) mod wire;
pub(crate) mod worker;

use baton_policy::Compiled;
use baton_policy::Policy;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Duration;

pub(crate) use upgrade::Upgrade;
pub(crate) use upgrade::main_channel;
pub(crate) use vm::Vm;
pub(crate) use worker::Worker;

/// No step of a healthy worker takes nearly as long, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

fn filters() -> &'static Compiled {
    static FILTERS: OnceLock<Compiled> = OnceLock::new();
    FILTERS.get_or_init(|| Policy::builtin().unwrap().compile().unwrap())
}

/// One guest at a time, over all test processes: two busy ones on a small machine miss the deadlines of a pause.
fn alone() -> File {
    // It is not there on another machine than the one that built this.
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/one-guest-at-a-time");
    let lock = File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    lock
}

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap()
}

fn rand_id() -> [u8; 16] {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut id)
        .unwrap();
    id
}

/// An ELF kernel of this code, entered in 64-bit mode at 2 MiB.
pub(crate) fn kernel_of(code: &[u8]) -> Vec<u8> {
    const ENTRY: u64 = 2 << 20;
    let length = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1; entry, program headers at 64, no sections; flags, sizes and counts.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ENTRY, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // One loaded segment: readable, writable, executable.
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, ENTRY, ENTRY, length, length, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Whether a guest that another worker was to take over goes on in the old one, as itself.
#[track_caller]
pub(crate) fn assert_goes_on(vm: &Vm, before: &baton_guest::Report) {
    let after = vm.wait_for_turns();
    assert_eq!(
        (after.nonce, after.boots, after.faults()),
        (before.nonce, before.boots, 0)
    );
}
