//! The names, numbers and arguments of the system calls that a policy may speak of (x86-64).
//!
//! Numbers are libc's, so they are the kernel's own (`arch/x86/entry/syscalls/syscall_64.tbl`). Argument types
//! are those of the `SYSCALL_DEFINEn` in the kernel: a filter that compares 64 bits of an `int` can be made to
//! miss by the garbage that the ABI permits in the upper half, one that compares 32 bits of a `long` by a value
//! that differs above. This module decides nothing about what is permitted.

use std::fmt;

use crate::constants::Family;

/// One system call of x86-64, by its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Syscall(u32);

/// How much of an argument register the kernel looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// 32 bits: `int`, `unsigned int`.
    Dword,
    /// 64 bits: `long`, `unsigned long`, pointers.
    Qword,
}

/// An argument of a system call that a rule may constrain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// The name in the kernel's definition (or its manual page).
    pub name: &'static str,
    /// 0 to 5, in the order of the registers.
    pub index: u8,
    /// How much of it the kernel looks at.
    pub width: Width,
    /// The constants that may be named for it.
    pub family: Family,
}

macro_rules! table {
    ($($name:ident,)*) => {
        /// Every name (with libc's prefix) and its number.
        const TABLE: &[(&str, libc::c_long)] = &[$((stringify!($name), libc::$name),)*];
    };
}

table! {
    SYS_read, SYS_write, SYS_open, SYS_close, SYS_stat, SYS_fstat, SYS_lstat, SYS_poll, SYS_lseek, SYS_mmap,
    SYS_mprotect, SYS_munmap, SYS_brk, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_ioctl,
    SYS_pread64, SYS_pwrite64, SYS_readv, SYS_writev, SYS_access, SYS_pipe, SYS_select, SYS_sched_yield,
    SYS_mremap, SYS_msync, SYS_mincore, SYS_madvise, SYS_shmget, SYS_shmat, SYS_shmctl, SYS_dup, SYS_dup2,
    SYS_pause, SYS_nanosleep, SYS_getitimer, SYS_alarm, SYS_setitimer, SYS_getpid, SYS_sendfile, SYS_socket,
    SYS_connect, SYS_accept, SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_shutdown, SYS_bind,
    SYS_listen, SYS_getsockname, SYS_getpeername, SYS_socketpair, SYS_setsockopt, SYS_getsockopt, SYS_clone,
    SYS_fork, SYS_vfork, SYS_execve, SYS_exit, SYS_wait4, SYS_kill, SYS_uname, SYS_semget, SYS_semop,
    SYS_semctl, SYS_shmdt, SYS_msgget, SYS_msgsnd, SYS_msgrcv, SYS_msgctl, SYS_fcntl, SYS_flock, SYS_fsync,
    SYS_fdatasync, SYS_truncate, SYS_ftruncate, SYS_getdents, SYS_getcwd, SYS_chdir, SYS_fchdir, SYS_rename,
    SYS_mkdir, SYS_rmdir, SYS_creat, SYS_link, SYS_unlink, SYS_symlink, SYS_readlink, SYS_chmod, SYS_fchmod,
    SYS_chown, SYS_fchown, SYS_lchown, SYS_umask, SYS_gettimeofday, SYS_getrlimit, SYS_getrusage, SYS_sysinfo,
    SYS_times, SYS_ptrace, SYS_getuid, SYS_syslog, SYS_getgid, SYS_setuid, SYS_setgid, SYS_geteuid, SYS_getegid,
    SYS_setpgid, SYS_getppid, SYS_getpgrp, SYS_setsid, SYS_setreuid, SYS_setregid, SYS_getgroups, SYS_setgroups,
    SYS_setresuid, SYS_getresuid, SYS_setresgid, SYS_getresgid, SYS_getpgid, SYS_setfsuid, SYS_setfsgid,
    SYS_getsid, SYS_capget, SYS_capset, SYS_rt_sigpending, SYS_rt_sigtimedwait, SYS_rt_sigqueueinfo,
    SYS_rt_sigsuspend, SYS_sigaltstack, SYS_utime, SYS_mknod, SYS_uselib, SYS_personality, SYS_ustat,
    SYS_statfs, SYS_fstatfs, SYS_sysfs, SYS_getpriority, SYS_setpriority, SYS_sched_setparam,
    SYS_sched_getparam, SYS_sched_setscheduler, SYS_sched_getscheduler, SYS_sched_get_priority_max,
    SYS_sched_get_priority_min, SYS_sched_rr_get_interval, SYS_mlock, SYS_munlock, SYS_mlockall, SYS_munlockall,
    SYS_vhangup, SYS_modify_ldt, SYS_pivot_root, SYS__sysctl, SYS_prctl, SYS_arch_prctl, SYS_adjtimex,
    SYS_setrlimit, SYS_chroot, SYS_sync, SYS_acct, SYS_settimeofday, SYS_mount, SYS_umount2, SYS_swapon,
    SYS_swapoff, SYS_reboot, SYS_sethostname, SYS_setdomainname, SYS_iopl, SYS_ioperm, SYS_init_module,
    SYS_delete_module, SYS_quotactl, SYS_nfsservctl, SYS_getpmsg, SYS_putpmsg, SYS_afs_syscall, SYS_tuxcall,
    SYS_security, SYS_gettid, SYS_readahead, SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr, SYS_getxattr,
    SYS_lgetxattr, SYS_fgetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_removexattr,
    SYS_lremovexattr, SYS_fremovexattr, SYS_tkill, SYS_time, SYS_futex, SYS_sched_setaffinity,
    SYS_sched_getaffinity, SYS_set_thread_area, SYS_io_setup, SYS_io_destroy, SYS_io_getevents, SYS_io_submit,
    SYS_io_cancel, SYS_get_thread_area, SYS_lookup_dcookie, SYS_epoll_create, SYS_epoll_ctl_old,
    SYS_epoll_wait_old, SYS_remap_file_pages, SYS_getdents64, SYS_set_tid_address, SYS_restart_syscall,
    SYS_semtimedop, SYS_fadvise64, SYS_timer_create, SYS_timer_settime, SYS_timer_gettime, SYS_timer_getoverrun,
    SYS_timer_delete, SYS_clock_settime, SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep,
    SYS_exit_group, SYS_epoll_wait, SYS_epoll_ctl, SYS_tgkill, SYS_utimes, SYS_vserver, SYS_mbind,
    SYS_set_mempolicy, SYS_get_mempolicy, SYS_mq_open, SYS_mq_unlink, SYS_mq_timedsend, SYS_mq_timedreceive,
    SYS_mq_notify, SYS_mq_getsetattr, SYS_kexec_load, SYS_waitid, SYS_add_key, SYS_request_key, SYS_keyctl,
    SYS_ioprio_set, SYS_ioprio_get, SYS_inotify_init, SYS_inotify_add_watch, SYS_inotify_rm_watch,
    SYS_migrate_pages, SYS_openat, SYS_mkdirat, SYS_mknodat, SYS_fchownat, SYS_futimesat, SYS_newfstatat,
    SYS_unlinkat, SYS_renameat, SYS_linkat, SYS_symlinkat, SYS_readlinkat, SYS_fchmodat, SYS_faccessat,
    SYS_pselect6, SYS_ppoll, SYS_unshare, SYS_set_robust_list, SYS_get_robust_list, SYS_splice, SYS_tee,
    SYS_sync_file_range, SYS_vmsplice, SYS_move_pages, SYS_utimensat, SYS_epoll_pwait, SYS_signalfd,
    SYS_timerfd_create, SYS_eventfd, SYS_fallocate, SYS_timerfd_settime, SYS_timerfd_gettime, SYS_accept4,
    SYS_signalfd4, SYS_eventfd2, SYS_epoll_create1, SYS_dup3, SYS_pipe2, SYS_inotify_init1, SYS_preadv,
    SYS_pwritev, SYS_rt_tgsigqueueinfo, SYS_perf_event_open, SYS_recvmmsg, SYS_fanotify_init, SYS_fanotify_mark,
    SYS_prlimit64, SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_clock_adjtime, SYS_syncfs, SYS_sendmmsg,
    SYS_setns, SYS_getcpu, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kcmp, SYS_finit_module,
    SYS_sched_setattr, SYS_sched_getattr, SYS_renameat2, SYS_seccomp, SYS_getrandom, SYS_memfd_create,
    SYS_kexec_file_load, SYS_bpf, SYS_execveat, SYS_userfaultfd, SYS_membarrier, SYS_mlock2,
    SYS_copy_file_range, SYS_preadv2, SYS_pwritev2, SYS_pkey_mprotect, SYS_pkey_alloc, SYS_pkey_free, SYS_statx,
    SYS_rseq, SYS_pidfd_send_signal, SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
    SYS_open_tree, SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_fspick, SYS_pidfd_open,
    SYS_clone3, SYS_close_range, SYS_openat2, SYS_pidfd_getfd, SYS_faccessat2, SYS_process_madvise,
    SYS_epoll_pwait2, SYS_mount_setattr, SYS_quotactl_fd, SYS_landlock_create_ruleset, SYS_landlock_add_rule,
    SYS_landlock_restrict_self, SYS_memfd_secret, SYS_process_mrelease, SYS_futex_waitv,
    SYS_set_mempolicy_home_node, SYS_fchmodat2, SYS_mseal,
}

/// Calls that libc does not name yet (`syscall_64.tbl` of Linux 6.17).
const NEWER: &[(&str, u32)] = &[
    ("io_pgetevents", 333),
    ("cachestat", 451),
    ("map_shadow_stack", 453),
    ("futex_wake", 454),
    ("futex_wait", 455),
    ("futex_requeue", 456),
    ("statmount", 457),
    ("listmount", 458),
    ("lsm_get_self_attr", 459),
    ("lsm_set_self_attr", 460),
    ("lsm_list_modules", 461),
    ("setxattrat", 463),
    ("getxattrat", 464),
    ("listxattrat", 465),
    ("removexattrat", 466),
    ("open_tree_attr", 467),
    ("file_getattr", 468),
    ("file_setattr", 469),
];

/// The arguments that rules may constrain, from the kernel's definitions of the calls.
const ARGUMENTS: &[(&str, &[Argument])] = &[
    (
        "arch_prctl",
        &[arg("option", 0, Width::Dword, Family::ArchPrctl)],
    ),
    ("clone", &[arg("flags", 0, Width::Qword, Family::Clone)]),
    (
        "epoll_create1",
        &[arg("flags", 0, Width::Dword, Family::Number)],
    ),
    ("epoll_ctl", &[arg("op", 1, Width::Dword, Family::Number)]),
    ("eventfd2", &[arg("flags", 1, Width::Dword, Family::Number)]),
    ("execveat", &[arg("flags", 4, Width::Dword, Family::At)]),
    (
        "fallocate",
        &[arg("mode", 1, Width::Dword, Family::Fallocate)],
    ),
    (
        "fcntl",
        &[
            arg("cmd", 1, Width::Dword, Family::Fcntl),
            arg("arg", 2, Width::Qword, Family::Number),
        ],
    ),
    ("futex", &[arg("op", 1, Width::Dword, Family::Futex)]),
    (
        "getsockopt",
        &[
            arg("level", 1, Width::Dword, Family::Socket),
            arg("optname", 2, Width::Dword, Family::Socket),
        ],
    ),
    (
        "ioctl",
        &[
            arg("request", 1, Width::Dword, Family::Ioctl),
            arg("arg", 2, Width::Qword, Family::Number),
        ],
    ),
    (
        "kill",
        &[
            arg("pid", 0, Width::Dword, Family::Number),
            arg("sig", 1, Width::Dword, Family::Signal),
        ],
    ),
    ("lseek", &[arg("whence", 2, Width::Dword, Family::Whence)]),
    (
        "madvise",
        &[arg("advice", 2, Width::Dword, Family::Madvise)],
    ),
    (
        "mmap",
        &[
            arg("prot", 2, Width::Qword, Family::Prot),
            arg("flags", 3, Width::Qword, Family::Map),
        ],
    ),
    ("mprotect", &[arg("prot", 2, Width::Qword, Family::Prot)]),
    ("mremap", &[arg("flags", 3, Width::Qword, Family::Number)]),
    ("newfstatat", &[arg("flags", 3, Width::Dword, Family::At)]),
    (
        "pidfd_send_signal",
        &[arg("sig", 1, Width::Dword, Family::Signal)],
    ),
    (
        "prctl",
        &[
            arg("option", 0, Width::Dword, Family::Prctl),
            arg("arg2", 1, Width::Qword, Family::Number),
        ],
    ),
    (
        "prlimit64",
        &[
            arg("pid", 0, Width::Dword, Family::Number),
            arg("resource", 1, Width::Dword, Family::Number),
            arg("new_limit", 2, Width::Qword, Family::Number),
        ],
    ),
    (
        "recvfrom",
        &[arg("flags", 3, Width::Dword, Family::Message)],
    ),
    ("recvmsg", &[arg("flags", 2, Width::Dword, Family::Message)]),
    (
        "rt_sigaction",
        &[arg("sig", 0, Width::Dword, Family::Signal)],
    ),
    (
        "seccomp",
        &[
            arg("op", 0, Width::Dword, Family::Seccomp),
            arg("flags", 1, Width::Dword, Family::Number),
        ],
    ),
    ("sendmsg", &[arg("flags", 2, Width::Dword, Family::Message)]),
    (
        "sendto",
        &[
            arg("flags", 3, Width::Dword, Family::Message),
            arg("addr", 4, Width::Qword, Family::Number),
        ],
    ),
    ("socket", &[arg("domain", 0, Width::Dword, Family::Socket)]),
    (
        "socketpair",
        &[arg("domain", 0, Width::Dword, Family::Socket)],
    ),
    ("statx", &[arg("flags", 2, Width::Dword, Family::At)]),
    (
        "tgkill",
        &[
            arg("tgid", 0, Width::Dword, Family::Number),
            arg("sig", 2, Width::Dword, Family::Signal),
        ],
    ),
    (
        "timerfd_settime",
        &[arg("flags", 1, Width::Dword, Family::Number)],
    ),
    ("tkill", &[arg("sig", 1, Width::Dword, Family::Signal)]),
];

const fn arg(name: &'static str, index: u8, width: Width, family: Family) -> Argument {
    Argument {
        name,
        index,
        width,
        family,
    }
}

impl Syscall {
    /// The call of this name, as in the kernel's table.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all()
            .find(|(known, _)| *known == name)
            .map(|(_, call)| call)
    }

    /// The call of this number, if the table knows it.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::all()
            .map(|(_, call)| call)
            .find(|call| call.0 == number)
    }

    /// Every call that the table knows, with its name.
    pub fn all() -> impl Iterator<Item = (&'static str, Self)> {
        let from_libc = TABLE.iter().filter_map(|(name, number)| {
            let name = name.strip_prefix("SYS_")?;
            Some((name, Self(u32::try_from(*number).ok()?)))
        });
        from_libc.chain(NEWER.iter().map(|(name, number)| (*name, Self(*number))))
    }

    /// The number that goes into `rax`.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The name in the kernel's table.
    #[must_use]
    pub fn name(self) -> &'static str {
        // Every value was made from the table, so the fallback is never seen.
        Self::all()
            .find(|(_, call)| *call == self)
            .map_or("?", |(name, _)| name)
    }

    /// The arguments that a rule about this call may constrain.
    #[must_use]
    pub fn arguments(self) -> &'static [Argument] {
        let name = self.name();
        ARGUMENTS
            .iter()
            .find(|(call, _)| *call == name)
            .map_or(&[], |(_, arguments)| arguments)
    }
}

impl fmt::Display for Syscall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Syscall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_numbers_are_unique_and_invert() {
        let mut numbers = BTreeSet::new();
        let mut names = BTreeSet::new();
        for (name, call) in Syscall::all() {
            assert!(
                numbers.insert(call.number()),
                "{name} repeats number {}",
                call.number()
            );
            assert!(names.insert(name), "{name} twice");
            assert_eq!(Syscall::from_name(name), Some(call));
            assert_eq!(call.name(), name);
        }
        assert_eq!(Syscall::from_name("read").map(Syscall::number), Some(0));
        assert_eq!(
            Syscall::from_name("execveat").map(Syscall::number),
            Some(322)
        );
        assert_eq!(Syscall::from_name("clone3").map(Syscall::number), Some(435));
        assert_eq!(Syscall::from_name("SYS_read"), None);
    }

    #[test]
    fn every_described_argument_is_of_a_known_call() {
        for (name, arguments) in ARGUMENTS {
            assert!(Syscall::from_name(name).is_some(), "{name}");
            assert!(
                arguments.iter().all(|argument| argument.index < 6),
                "{name}"
            );
        }
    }
}
