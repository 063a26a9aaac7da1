//! Signals and last words: the kick of a vCPU thread, the report of a refused system call, the end by panic.
//!
//! Handlers here run in whatever state their thread is in, so they allocate nothing, take no lock and use no standard
//! stream: they write to descriptor 0 (the control socket) and descriptor 2 (the diagnostics pipe) and end the process.
#![expect(
    unsafe_code,
    reason = "signal handlers and the inherited descriptor 0 have no safe interface"
)]

use std::io;
use std::os::fd::FromRawFd as _;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use baton_ipc::worker::Report;
use libc::c_int;
use libc::c_void;
use libc::siginfo_t;
use vmm_sys_util::signal::SIGRTMIN;
use vmm_sys_util::signal::register_signal_handler;

/// Exit status after a refused system call: 128 and SIGSYS (31), as a shell would show it.
pub(crate) const EXIT_VIOLATION: c_int = 159;
/// Exit status after a panic; also what Rust programs that unwind end with.
pub(crate) const EXIT_PANIC: c_int = 101;

/// `si_code` of a SIGSYS that a seccomp filter raised (`SYS_SECCOMP`, `asm-generic/siginfo.h`).
const SYS_SECCOMP: c_int = 1;

/// The signal that takes a vCPU thread out of KVM_RUN.
#[must_use]
pub(crate) fn kick() -> c_int {
    SIGRTMIN()
}

/// Takes the control socket, which every worker starts with as descriptor 0. `None` the second time.
#[must_use]
pub(crate) fn take_control() -> Option<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return None;
    }
    // SAFETY: descriptor 0 is open (the standard library sees to that at start) and the flag above hands it out once.
    // Nothing else in this process uses standard input. The SIGSYS handler writes to the number 0, which stays this
    // socket until its owner is dropped; after that the write fails or, since the process is ending, is not missed.
    Some(unsafe { OwnedFd::from_raw_fd(0) })
}

/// Installs the handlers and the panic hook. Before any thread is made.
///
/// # Errors
///
/// The error of sigaction(2).
pub(crate) fn install() -> io::Result<()> {
    install_kick()?;
    register_signal_handler(libc::SIGSYS, on_violation).map_err(io::Error::from)?;
    std::panic::set_hook(Box::new(|info| {
        // Not `eprintln`: a panic inside a panic would abort without a word.
        let line = format!("panic: {info}").replace('\n', " ");
        last_words(line.as_bytes());
        end(EXIT_PANIC)
    }));
    Ok(())
}

/// Installs the handler of the kick alone.
///
/// # Errors
///
/// The error of sigaction(2).
pub(crate) fn install_kick() -> io::Result<()> {
    register_signal_handler(kick(), on_kick).map_err(io::Error::from)
}

/// Does nothing: that KVM_RUN returns EINTR is all that is wanted.
extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// The part of `siginfo_t` that SIGSYS has (`asm-generic/siginfo.h`, on 64-bit machines).
#[repr(C)]
struct SigsysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    padding: c_int,
    call_address: u64,
    syscall: c_int,
    arch: u32,
}

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<siginfo_t>());

extern "C" fn on_violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo_t, which is at least as long as SigsysInfo
    // (checked above) and suitably aligned (both begin with an int and contain a pointer-sized field).
    let info = unsafe { info.cast::<SigsysInfo>().read() };
    // SAFETY: gettid(2) has no preconditions, and is permitted by every filter.
    let thread = unsafe { libc::gettid() };
    // A SIGSYS that somebody sent is no evidence of a call; it ends the process all the same.
    let (syscall, address) = if info.code == SYS_SECCOMP {
        (info.syscall, info.call_address)
    } else {
        (-1, 0)
    };
    let report = Report::Violation {
        thread,
        syscall,
        address,
    };
    let mut buffer = [0_u8; 32];
    if let Ok(bytes) = postcard::to_slice(&report, &mut buffer) {
        // SAFETY: writes from a live buffer of that length. Descriptor 0 is the control socket, whose messages are
        // written whole or not at all.
        unsafe { libc::write(0, bytes.as_ptr().cast(), bytes.len()) };
    }
    let mut line = Line::default();
    line.text(b"seccomp: thread ");
    line.number(i64::from(thread));
    line.text(b" made system call ");
    line.number(i64::from(syscall));
    last_words(line.bytes());
    end(EXIT_VIOLATION)
}

/// Writes one line to the diagnostics pipe, if there is anybody to read it.
fn last_words(line: &[u8]) {
    for bytes in [b"worker: ", line, b"\n"] {
        // SAFETY: writes from a live buffer of that length. A closed pipe is an error that nobody is left to tell.
        unsafe { libc::write(2, bytes.as_ptr().cast(), bytes.len()) };
    }
}

/// Ends the process, all threads of it, without running any destructor.
pub(crate) fn end(status: c_int) -> ! {
    // SAFETY: _exit(2) has no preconditions. No destructor of this process has work that outlives it.
    unsafe { libc::_exit(status) }
}

/// A short line made without allocating.
struct Line {
    bytes: [u8; 96],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 96],
            length: 0,
        }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text) {
            *to = *from;
            self.length += 1;
        }
    }

    fn number(&mut self, value: i64) {
        if value < 0 {
            self.text(b"-");
        }
        let (mut digits, mut rest) = ([0_u8; 20], value.unsigned_abs());
        let mut count = 0;
        for digit in &mut digits {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            count += 1;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        let (used, _) = digits.split_at_mut(count);
        used.reverse();
        self.text(used);
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_made_without_allocating() {
        let mut line = Line::default();
        line.text(b"n ");
        for value in [0, 7, -159, i64::MAX, i64::MIN] {
            line.number(value);
            line.text(b" ");
        }
        assert_eq!(
            line.bytes(),
            b"n 0 7 -159 9223372036854775807 -9223372036854775808 "
        );
        line.text(&[b'x'; 200]);
        assert_eq!(line.bytes().len(), 96);
    }

    #[test]
    fn the_longest_violation_fits_its_buffer() {
        let report = Report::Violation {
            thread: i32::MIN,
            syscall: i32::MIN,
            address: u64::MAX,
        };
        let mut buffer = [0_u8; 32];
        let bytes = postcard::to_slice(&report, &mut buffer).unwrap();
        assert_eq!(baton_ipc::channel::decode::<Report>(bytes).unwrap(), report);
    }
}
