//! Attempts that an intruder would make, by name, with arguments that work where nothing is refused.

use std::ffi::CStr;

use baton_policy::bpf::Call;

/// One of them.
#[derive(Clone, Debug)]
pub struct Route {
    /// In words.
    pub what: &'static str,
    number: i64,
    arguments: [u64; 6],
}

impl Route {
    /// The call.
    #[must_use]
    pub fn call(&self) -> Call {
        Call::new(
            u32::try_from(self.number).unwrap_or(u32::MAX),
            self.arguments,
        )
    }
}

/// `AT_FDCWD` (`linux/fcntl.h`).
const HERE: u64 = -100_i64 as u64;

/// `AF_MAX` of Linux 6.18 is 46 (`linux/socket.h`).
const FAMILIES: u64 = 46;

fn text(text: &'static CStr) -> u64 {
    text.as_ptr() as u64
}

/// All of them. None is ever let through, whatever its arguments, so that nobody has to survive one.
#[must_use]
pub fn routes() -> Vec<Route> {
    let mut all = Vec::new();
    let mut add = |what, number, arguments: &[u64]| {
        let mut padded = [0; 6];
        for (to, from) in padded.iter_mut().zip(arguments) {
            *to = *from;
        }
        all.push(Route {
            what,
            number,
            arguments: padded,
        });
    };
    let root = text(c"/");
    let own = text(c"/proc/self/fd/1");
    let kvm = text(c"/dev/kvm");

    add("open a path", libc::SYS_open, &[kvm, 2]);
    add(
        "open a path from a directory",
        libc::SYS_openat,
        &[HERE, kvm, 2],
    );
    add(
        "open a path with openat2",
        libc::SYS_openat2,
        &[HERE, kvm, root, 24],
    );
    add("open its own descriptor again", libc::SYS_open, &[own, 2]);
    add(
        "open its own descriptor again from a directory",
        libc::SYS_openat,
        &[HERE, own, 2],
    );
    add("create a file", libc::SYS_creat, &[text(c"/file"), 0o600]);
    add(
        "make a nameless file",
        libc::SYS_openat,
        &[HERE, root, 0o20_200_002, 0o600],
    );
    add("open by handle", libc::SYS_open_by_handle_at, &[1, root, 2]);
    add(
        "ask for a handle",
        libc::SYS_name_to_handle_at,
        &[HERE, root, 0, 0, 0],
    );
    add("make a memfd", libc::SYS_memfd_create, &[root, 0]);
    add("make a secret memfd", libc::SYS_memfd_secret, &[0]);
    add("read a link", libc::SYS_readlink, &[own, root, 0]);
    add("ask about a path", libc::SYS_stat, &[root, 0]);
    add("list a directory", libc::SYS_getdents64, &[0, 0, 0]);
    add("change directory", libc::SYS_chdir, &[root]);
    add("change root", libc::SYS_chroot, &[root]);
    add(
        "link a descriptor",
        libc::SYS_linkat,
        &[1, text(c""), HERE, text(c"/link"), 0x1000],
    );
    add("rename", libc::SYS_rename, &[root, root]);
    add(
        "make a device",
        libc::SYS_mknod,
        &[text(c"/kvm"), 0o20_600, 0x0ae8],
    );
    add("truncate by descriptor", libc::SYS_ftruncate, &[1, 0]);
    add("send a file", libc::SYS_sendfile, &[1, 1, 0, 1]);
    add("splice", libc::SYS_splice, &[1, 0, 1, 0, 1, 0]);
    add("watch files", libc::SYS_inotify_init1, &[0]);
    add("watch everybody's files", libc::SYS_fanotify_init, &[0, 0]);

    for family in 0..FAMILIES {
        // Streams, datagrams and raw ones (`linux/net.h`).
        for kind in 1..=3 {
            add("make a socket", libc::SYS_socket, &[family, kind, 0]);
        }
    }
    add(
        "make a pair of sockets",
        libc::SYS_socketpair,
        &[1, 1, 0, root],
    );
    add("connect its socket", libc::SYS_connect, &[0, root, 16]);
    add("bind its socket", libc::SYS_bind, &[0, root, 16]);
    add("listen", libc::SYS_listen, &[0, 1]);
    add("accept", libc::SYS_accept4, &[0, 0, 0, 0]);
    add(
        "set an option of a socket",
        libc::SYS_setsockopt,
        &[0, 1, 16, root, 4],
    );
    add("ask who its peer is", libc::SYS_getpeername, &[0, 0, 0]);
    add(
        "send many messages at once",
        libc::SYS_sendmmsg,
        &[0, 0, 0, 0],
    );

    for victim in [1_u64, 2, -1_i64 as u64] {
        add("signal a process", libc::SYS_kill, &[victim, 0]);
        add(
            "signal a thread of any process",
            libc::SYS_tkill,
            &[victim, 0],
        );
        add("queue a signal", libc::SYS_rt_sigqueueinfo, &[victim, 9, 0]);
        add("trace a process", libc::SYS_ptrace, &[16, victim, 0, 0]);
        add("hold a process", libc::SYS_pidfd_open, &[victim, 0]);
        add(
            "read a process's memory",
            libc::SYS_process_vm_readv,
            &[victim, 0, 0, 0, 0, 0],
        );
        add(
            "write a process's memory",
            libc::SYS_process_vm_writev,
            &[victim, 0, 0, 0, 0, 0],
        );
        add(
            "compare with a process",
            libc::SYS_kcmp,
            &[1, victim, 0, 0, 0],
        );
        add(
            "move a process to other processors",
            libc::SYS_sched_setaffinity,
            &[victim, 8, root],
        );
        add(
            "change a process's limits",
            libc::SYS_prlimit64,
            &[victim, 7, root, 0],
        );
    }
    add(
        "take a process's descriptor",
        libc::SYS_pidfd_getfd,
        &[0, 0, 0],
    );
    add(
        "signal by descriptor",
        libc::SYS_pidfd_send_signal,
        &[0, 0, 0, 0],
    );
    add("be traced", libc::SYS_ptrace, &[0, 0, 0, 0]);
    add("ask who started it", libc::SYS_getppid, &[]);

    add("make a process", libc::SYS_fork, &[]);
    add("make a process that shares memory", libc::SYS_vfork, &[]);
    add(
        "make a process by clone",
        libc::SYS_clone,
        &[17, 0, 0, 0, 0],
    );
    add(
        "make a thread in new namespaces",
        libc::SYS_clone,
        &[0x7e02_0000 | 17, 0, 0, 0, 0],
    );
    add("make a process by clone3", libc::SYS_clone3, &[0, 0]);
    add(
        "execute a file",
        libc::SYS_execve,
        &[text(c"/proc/self/exe"), 0, 0],
    );
    add(
        "execute a file from a directory",
        libc::SYS_execveat,
        &[HERE, own, 0, 0, 0],
    );

    add("leave its namespaces", libc::SYS_unshare, &[0x7e02_0000]);
    add("enter a namespace", libc::SYS_setns, &[1, 0]);
    add(
        "mount",
        libc::SYS_mount,
        &[root, root, text(c"tmpfs"), 0, 0],
    );
    add("unmount", libc::SYS_umount2, &[root, 2]);
    add("swap roots", libc::SYS_pivot_root, &[root, root]);
    add("open a file system", libc::SYS_fsopen, &[text(c"proc"), 0]);
    add("open a tree", libc::SYS_open_tree, &[HERE, root, 1]);
    add(
        "move a mount",
        libc::SYS_move_mount,
        &[HERE, root, HERE, root, 0],
    );
    add(
        "change a mount",
        libc::SYS_mount_setattr,
        &[HERE, root, 0, 0, 0],
    );
    add("set the host's name", libc::SYS_sethostname, &[root, 1]);

    add(
        "add a key",
        libc::SYS_add_key,
        &[text(c"user"), root, root, 1, 0],
    );
    add(
        "ask for a key",
        libc::SYS_request_key,
        &[text(c"user"), root, 0, 0],
    );
    add("control keys", libc::SYS_keyctl, &[0, 0]);
    add("load a BPF program", libc::SYS_bpf, &[5, root, 128]);
    add(
        "count events",
        libc::SYS_perf_event_open,
        &[root, 0, 0, 0, 0],
    );
    add("handle page faults", libc::SYS_userfaultfd, &[1]);
    add("make an I/O ring", libc::SYS_io_uring_setup, &[1, root]);
    add(
        "enter an I/O ring",
        libc::SYS_io_uring_enter,
        &[0, 1, 0, 0, 0, 0],
    );
    add(
        "register with an I/O ring",
        libc::SYS_io_uring_register,
        &[0, 0, 0, 0],
    );
    add("make asynchronous I/O", libc::SYS_io_setup, &[1, root]);
    add("load a module", libc::SYS_finit_module, &[0, root, 0]);
    add("load a kernel", libc::SYS_kexec_file_load, &[0, 0, 0, 0, 0]);
    add("reboot", libc::SYS_reboot, &[0, 0, 0, 0]);
    add("ports", libc::SYS_iopl, &[3]);
    add("segments", libc::SYS_modify_ldt, &[1, root, 16]);
    add("shared memory", libc::SYS_shmget, &[0, 4096, 0o600]);
    add("a message queue", libc::SYS_mq_open, &[root, 0, 0, 0]);
    add("the kernel's log", libc::SYS_syslog, &[3, 0, 0]);

    add("be another user", libc::SYS_setresuid, &[0, 0, 0]);
    add("be of another group", libc::SYS_setresgid, &[0, 0, 0]);
    add("take capabilities", libc::SYS_capset, &[root, root]);
    add("be of other groups", libc::SYS_setgroups, &[0, 0]);
    add("raise its limits", libc::SYS_setrlimit, &[4, root]);
    add("be dumped", libc::SYS_prctl, &[4, 1]);
    add("keep capabilities", libc::SYS_prctl, &[8, 1]);
    add("change securebits", libc::SYS_prctl, &[28, 0]);
    add("raise ambient capabilities", libc::SYS_prctl, &[47, 2, 21]);
    add(
        "let others trace it",
        libc::SYS_prctl,
        &[0x5961_6d61, -1_i64 as u64],
    );
    add("change its parent-death signal", libc::SYS_prctl, &[1, 0]);
    add("dispatch calls itself", libc::SYS_prctl, &[59, 1, 0, 0, 0]);
    add(
        "be another personality",
        libc::SYS_personality,
        &[0x0040_0000],
    );
    add("lock memory", libc::SYS_mlockall, &[3]);
    add(
        "leave Landlock's domain",
        libc::SYS_landlock_restrict_self,
        &[0, 0],
    );
    add("a filter that is heard", libc::SYS_seccomp, &[1, 8, root]);
    add(
        "make code",
        libc::SYS_mmap,
        &[0, 4096, 7, 0x22, u64::MAX, 0],
    );
    add(
        "make code of what it has",
        libc::SYS_mprotect,
        &[0, 4096, 5],
    );
    add(
        "make code with a key",
        libc::SYS_pkey_mprotect,
        &[0, 4096, 5, 0],
    );
    add("make its descriptors block", libc::SYS_fcntl, &[0, 4, 0]);
    add("lock a file", libc::SYS_fcntl, &[1, 37, root]);
    add("seal further", libc::SYS_fcntl, &[1, 1033, 8]);
    add("type into a terminal", libc::SYS_ioctl, &[1, 0x5412, root]);
    add("attach to a tap", libc::SYS_ioctl, &[1, 0x4004_54ca, root]);
    all
}
