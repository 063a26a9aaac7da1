//! The system calls that no crate of this workspace offers safely. The only unsafe code of this package, so that
//! the broker needs none.
//!
//! Every function here is safe to call with any argument: pointers that go to the kernel are to memory that lives
//! through the call and is as long as the kernel is told.
#![expect(
    unsafe_code,
    reason = "seccomp(2), ptrace(2), netdevice(7), TUNSETIFF, VFIO, signal(2), sched_setattr(2) and close_range(2) have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::program::{Instruction, MAX_INSTRUCTIONS, Program};

pub mod vfio;

/// `PTRACE_SECCOMP_GET_FILTER` (`linux/ptrace.h`).
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
/// `SECCOMP_IOCTL_NOTIF_RECV`, `_IOWR('!', 0, struct seccomp_notif)` (`linux/seccomp.h`).
const SECCOMP_IOCTL_NOTIF_RECV: libc::c_ulong = 0xc050_2100;
/// `SECCOMP_IOCTL_NOTIF_SEND`, `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SECCOMP_IOCTL_NOTIF_SEND: libc::c_ulong = 0xc018_2101;
/// The call is executed as if there were no listener.
const SECCOMP_USER_NOTIF_FLAG_CONTINUE: u32 = 1;
/// `TUNSETIFF` (`linux/if_tun.h`).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// `TUNSETVNETHDRSZ` (`linux/if_tun.h`).
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// A tap, with frames and without the four bytes of packet information (`linux/if_tun.h`).
pub const IFF_TAP: u16 = 0x0002;
/// No packet information before each frame.
pub const IFF_NO_PI: u16 = 0x1000;
/// A `virtio_net_hdr` before each frame.
pub const IFF_VNET_HDR: u16 = 0x4000;
/// Several queues, one descriptor each.
pub const IFF_MULTI_QUEUE: u16 = 0x0100;

/// `SCHED_ATTR_SIZE_VER0` (`linux/sched/types.h`), in bytes.
const SCHED_ATTR_SIZE: u32 = 48;

/// Puts `program` on the calling thread (`SECCOMP_SET_MODE_FILTER`, no flags).
///
/// # Errors
///
/// As [`Program::install`].
pub fn seccomp_install(program: &Program) -> io::Result<()> {
    install(program, 0).map(drop)
}

/// The same, with a listener for what the program answers with `SECCOMP_RET_USER_NOTIF`. The descriptor is close-on-exec. Once a
/// report was taken, only a fatal signal interrupts its caller (`SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, Linux 5.19).
///
/// # Errors
///
/// As [`Program::install`]; EBUSY when the thread has such a filter.
pub(crate) fn seccomp_install_listened(program: &Program) -> io::Result<OwnedFd> {
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let descriptor = RawFd::try_from(install(program, flags)?)
        .map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// A call that waits for the listener's answer.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    id: u64,
    /// The thread, in the pid namespace of whoever asks.
    pub tid: u32,
    /// The call's number.
    pub number: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// Takes the next report, waiting for one.
///
/// # Errors
///
/// ENOENT when its thread has died meanwhile, EINTR.
pub fn seccomp_next(listener: BorrowedFd<'_>) -> io::Result<Report> {
    // SAFETY: a structure of integers, for which all zeros are a value, and which the kernel wants zeroed.
    let mut report: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the request writes one `struct seccomp_notif` to `report`, which lives through the call.
    let outcome = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut report,
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Report {
        id: report.id,
        tid: report.pid,
        number: u32::try_from(report.data.nr).unwrap_or(u32::MAX),
        arguments: report.data.args,
    })
}

/// Has a reported call executed (`SECCOMP_USER_NOTIF_FLAG_CONTINUE`).
///
/// # Errors
///
/// ENOENT when its thread has died meanwhile.
pub fn seccomp_go_on(listener: BorrowedFd<'_>, report: &Report) -> io::Result<()> {
    let mut answer = libc::seccomp_notif_resp {
        id: report.id,
        val: 0,
        error: 0,
        flags: SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    };
    // SAFETY: the request reads one `struct seccomp_notif_resp` from `answer`, which lives through the call.
    let outcome = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            SECCOMP_IOCTL_NOTIF_SEND,
            &raw mut answer,
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn install(program: &Program, flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let mut filter: Vec<libc::sock_filter> = program
        .instructions()
        .map(|Instruction { code, jt, jf, k }| libc::sock_filter { code, jt, jf, k })
        .collect();
    let len =
        u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let fprog = libc::sock_fprog {
        len,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `fprog` points at `len` initialised instructions that live until the end of this function; the kernel
    // copies them and keeps no pointer. Installing a filter changes no memory of this process.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const fprog,
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(outcome)
}

/// Gives SIGCHLD its default action, whatever whoever started this process had it set to.
///
/// # Errors
///
/// None that signal(2) has for this signal.
pub fn default_sigchld() -> io::Result<()> {
    // SAFETY: SIG_DFL is no function, so none of ours can be run in a signal's context.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    if before == libc::SIG_ERR {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads filter number `index` of thread `tid`; 0 is the one that was installed first.
///
/// # Errors
///
/// ENOENT when the thread has no such filter; ESRCH when the thread is not stopped under the caller's ptrace;
/// EACCES when the caller lacks CAP_SYS_ADMIN in the initial user namespace or has a filter itself; EINVAL when the
/// kernel was built without `CONFIG_CHECKPOINT_RESTORE`; `InvalidData` when the program changed between its length
/// and its text.
pub fn seccomp_get_filter(tid: i32, index: u32) -> io::Result<Program> {
    let ask = |buffer: *mut libc::sock_filter| -> io::Result<usize> {
        // SAFETY: with a null buffer the kernel only counts. Otherwise the buffer has room for MAX_INSTRUCTIONS,
        // more than which no filter has, and lives through the call. The raw system call is used because glibc's
        // wrapper takes the sign of a result for an error.
        let count = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::c_long::from(PTRACE_SECCOMP_GET_FILTER),
                libc::c_long::from(tid),
                libc::c_long::from(index),
                buffer,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    };
    let expected = ask(std::ptr::null_mut())?;
    let empty = libc::sock_filter {
        code: 0,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let mut buffer = vec![empty; MAX_INSTRUCTIONS];
    let got = ask(buffer.as_mut_ptr())?;
    if got != expected {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{got} instructions, {expected} announced"),
        ));
    }
    let instructions = buffer
        .into_iter()
        .take(got)
        .map(|libc::sock_filter { code, jt, jf, k }| Instruction { code, jt, jf, k });
    Program::from_instructions(instructions)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Makes `tun`, a fresh descriptor of `/dev/net/tun`, the tap called `name`, and returns the name that the kernel
/// gave it (they differ when `name` has a `%d`). The interface is created when there is none of that name.
///
/// # Errors
///
/// EINVAL when `name` is empty, has a NUL or is longer than 15 bytes (`IFNAMSIZ` less its NUL), EPERM without
/// CAP_NET_ADMIN over the network namespace (and without being the tap's owner), EBUSY when it is in use.
pub fn tun_set_iff(tun: BorrowedFd<'_>, name: &str, flags: u16) -> io::Result<String> {
    let mut request = interface_request(name)?;
    put_flags(&mut request, flags);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which is what `request` has room for, and keeps no
    // pointer to it. On a descriptor of another kind the request is unknown (ENOTTY) and nothing is written.
    let outcome = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    let given = request
        .iter()
        .take(libc::IFNAMSIZ)
        .copied()
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8(given).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Says how long the header before each frame of a tap is, in bytes: 10, or 12 with a count of buffers (`virtio_net.h`).
/// It holds for all queues of the interface.
///
/// # Errors
///
/// EINVAL for less than 10 bytes, EBADFD when `tun` is no interface's, ENOTTY when it is none of `/dev/net/tun`.
pub fn tun_set_vnet_header(tun: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives through the call, and keeps no pointer to it.
    let outcome = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The largest packet that interface `name` of this network namespace takes, in bytes without its link header
/// (SIOCGIFMTU, netdevice(7)).
///
/// # Errors
///
/// EINVAL for a name that no interface can have, ENODEV when there is none of that name.
pub fn interface_mtu(name: &str) -> io::Result<i32> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFMTU, &mut request)?;
    Ok(i32::from_ne_bytes(head(&request)))
}

/// Brings interface `name` of this network namespace up (SIOCSIFFLAGS with IFF_UP, netdevice(7)).
///
/// # Errors
///
/// As [`interface_mtu`]; EPERM without CAP_NET_ADMIN over the namespace.
pub fn interface_up(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
    let [a, b, _, _] = head(&request);
    // IFF_UP is the lowest bit (`linux/if.h`).
    put_flags(&mut request, u16::from_ne_bytes([a, b]) | 1);
    interface_ioctl(libc::SIOCSIFFLAGS, &mut request)
}

/// `struct ifreq` (`linux/if.h`): the name in 16 bytes, then a union of 24.
type InterfaceRequest = [u8; 40];

fn interface_request(name: &str) -> io::Result<InterfaceRequest> {
    let mut request = [0; 40];
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|byte| byte == 0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in request.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    Ok(request)
}

fn put_flags(request: &mut InterfaceRequest, flags: u16) {
    let union = request.iter_mut().skip(libc::IFNAMSIZ);
    for (to, from) in union.zip(flags.to_ne_bytes()) {
        *to = from;
    }
}

/// The first bytes of the union.
fn head(request: &InterfaceRequest) -> [u8; 4] {
    let mut head = [0; 4];
    for (to, from) in head.iter_mut().zip(request.iter().skip(libc::IFNAMSIZ)) {
        *to = *from;
    }
    head
}

fn interface_ioctl(number: libc::c_ulong, request: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: makes a descriptor, which is owned at once.
    let socket = unsafe {
        match libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) {
            -1 => return Err(io::Error::last_os_error()),
            socket => OwnedFd::from_raw_fd(socket),
        }
    };
    // SAFETY: the requests of this file read and write one `struct ifreq`, for which `request` has room, and use no
    // pointer in it; the kernel keeps none to it.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), number, request.as_mut_ptr()) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The shortest slice that the scheduler gives, in nanoseconds (`__setparam_fair`, kernel/sched/syscalls.c).
const SHORTEST_SLICE: u64 = 100_000;

/// Has the calling thread, which takes a processor seldom and for a short time, get it soon after it was woken on a busy host:
/// its slice is 100 µs from here on, not some 3 ms (sched(7), `sched_runtime` of SCHED_OTHER, Linux 6.12; earlier kernels have one
/// slice for all). Its share of the processor stays what it was, and threads and processes that it makes have the ordinary slice
/// (SCHED_FLAG_RESET_ON_FORK).
///
/// # Errors
///
/// EPERM, where whoever started this forbids it.
pub fn shorten_slice() -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: SCHED_ATTR_SIZE,
        sched_policy: 0, // SCHED_OTHER
        sched_flags: 1,  // SCHED_FLAG_RESET_ON_FORK
        sched_nice: rustix::process::getpriority_process(None)?,
        sched_priority: 0,
        sched_runtime: SHORTEST_SLICE,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the call reads one `struct sched_attr`, which lives through it, and changes no memory of this process.
    let outcome = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec: what an exec inherits is then exactly what is below, and
/// what was unmarked afterwards on purpose.
///
/// # Errors
///
/// EINVAL for a negative `first` and on kernels before 5.11, ENOSYS before 5.9.
pub fn close_range_cloexec(first: RawFd) -> io::Result<()> {
    let first =
        libc::c_uint::try_from(first).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: only sets a flag of descriptors. No descriptor is closed before an exec, so no owner of one is left
    // with a number that means something else.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_tap_name_must_fit_the_kernels_field() {
        let file = File::open("/dev/null").unwrap();
        for name in ["", "sixteen-letters!", "a\0b"] {
            let error = tun_set_iff(file.as_fd(), name, IFF_TAP).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{name:?}");
        }
        let error = tun_set_iff(file.as_fd(), "tap0", IFF_TAP).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        let error = tun_set_vnet_header(file.as_fd(), 12).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn an_interface_is_asked_for_by_name() {
        assert!(interface_mtu("lo").unwrap() >= 68);
        let error = interface_mtu("no-such-one").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        let error = interface_up("sixteen-letters!").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_short_slice_is_the_threads_own() {
        let attributes = || {
            // SAFETY: a structure of integers, for which all zeros are a value.
            let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
            // SAFETY: the call writes at most so many bytes to `attributes`, which has them.
            let outcome = unsafe {
                libc::syscall(
                    libc::SYS_sched_getattr,
                    0,
                    &raw mut attributes,
                    SCHED_ATTR_SIZE,
                    0,
                )
            };
            assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
            attributes
        };
        // A thread of the test's, which goes with it.
        let test = move || {
            let before = attributes();
            shorten_slice().unwrap();
            let after = attributes();
            assert_eq!(after.sched_nice, before.sched_nice);
            // Linux before 6.12 shows and has none.
            let shown = before.sched_runtime > 0;
            assert_eq!(after.sched_runtime, if shown { SHORTEST_SLICE } else { 0 });
            let child = std::thread::spawn(attributes).join().unwrap();
            assert_eq!(child.sched_runtime, before.sched_runtime);
            assert_eq!(child.sched_flags, 0);
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_filter_of_a_thread_that_is_not_traced_is_not_given() {
        let error = seccomp_get_filter(1, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
