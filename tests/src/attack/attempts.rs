//! Making a system call and hearing the kernel's answer, a refusal too.
#![expect(
    unsafe_code,
    reason = "attempts system calls that no safe function would make, and survives their refusal"
)]

use std::ffi::c_int;
use std::ffi::c_long;
use std::ffi::c_void;
use std::io;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;

use baton_policy::bpf::Answer;
use baton_policy::bpf::Call;

/// The number of the call that was refused last; no call.
static REFUSED: AtomicI64 = AtomicI64::new(NONE);
const NONE: i64 = i64::MIN;

/// The right to attempt: the handler is in place. One thread at a time uses it.
#[derive(Clone, Copy, Debug)]
pub struct Attempts(());

/// What became of a call by the entry of 32-bit programs; usually nobody is left to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry32 {
    /// It was refused, and survived.
    Refused,
    /// It was executed.
    Executed(i32),
}

impl Attempts {
    /// Puts the handler in place, while this process still may.
    ///
    /// # Errors
    ///
    /// The error of sigaction(2).
    pub fn prepare() -> io::Result<Self> {
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = survive;
        // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask, no function.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler only stores to an atomic; the action lives through the call, and no old one is asked for.
        if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } == 0 {
            Ok(Self(()))
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes this call. ENOSYS is taken for the filter's answer: no call that is let through is one that kernels lack.
    #[must_use]
    pub fn make(self, call: &Call) -> Answer {
        let [a, b, c, d, e, f] = call.arguments;
        // The kernel looks at the lower half, as a number with a sign.
        let number = i32::from_ne_bytes(call.number.to_ne_bytes());
        REFUSED.store(NONE, Ordering::SeqCst);
        // SAFETY: either the call is refused and not executed, or it is one of the few that are let through, and then its
        // arguments name no descriptor, no memory and no length that exist (`calls`), or it harms nothing but a worker
        // that a test ends anyway (`routes`).
        let outcome = unsafe { libc::syscall(c_long::from(number), a, b, c, d, e, f) };
        let error = io::Error::last_os_error().raw_os_error();
        match REFUSED.load(Ordering::SeqCst) {
            NONE if outcome == -1 && error == Some(libc::ENOSYS) => Answer::Errno(38),
            NONE => Answer::Allow,
            refused if refused == i64::from(number) => Answer::Trap,
            // Another than was made.
            _ => Answer::Other(0),
        }
    }

    /// Makes a call by the entry of 32-bit programs, `int 0x80`.
    #[must_use]
    pub fn make_32(self, number: u32) -> Entry32 {
        REFUSED.store(NONE, Ordering::SeqCst);
        let mut result = number;
        // SAFETY: `ebx`, which the compiler keeps for itself, is restored; the other arguments are 0, so that no memory is
        // read or written by any of the calls that the tests make: getpid, and others with a null path.
        unsafe {
            std::arch::asm!(
                "push rbx",
                "xor ebx, ebx",
                "int 0x80",
                "pop rbx",
                inlateout("eax") result,
                inlateout("ecx") 0_u32 => _,
                inlateout("edx") 0_u32 => _,
                inlateout("esi") 0_u32 => _,
                inlateout("edi") 0_u32 => _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        if REFUSED.load(Ordering::SeqCst) == NONE {
            Entry32::Executed(i32::from_ne_bytes(result.to_ne_bytes()))
        } else {
            Entry32::Refused
        }
    }
}

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

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<libc::siginfo_t>());

extern "C" fn survive(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo_t, which is at least as long as SigsysInfo
    // (checked above) and suitably aligned (both begin with an int and contain a pointer-sized field).
    let info = unsafe { info.cast::<SigsysInfo>().read() };
    REFUSED.store(i64::from(info.syscall), Ordering::SeqCst);
}
