//! What the built-in policy promises, attempted for real: each test starts a process that confines itself as a
//! launcher does, executes a sealed copy of itself, and then tries one thing.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

/// The subject.
fn subject() -> Command {
    Command::new(env!("CARGO_BIN_EXE_confined"))
}

fn run(words: &str) -> Output {
    subject()
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    format!(
        "{:?} {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The result of the call, which must have been let through to the kernel.
#[track_caller]
fn executed(words: &str) -> i64 {
    let output = run(words);
    assert!(output.status.success(), "{words}: {}", text(&output));
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// The call must have ended the process by SIGSYS.
#[track_caller]
fn denied(words: &str) {
    let output = run(words);
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGSYS),
        "{words}: {}",
        text(&output)
    );
}

#[test]
fn a_static_rust_program_starts_and_makes_threads_under_the_build_filters() {
    let output = run("start");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(output.stdout, b"started\n");
}

#[test]
fn exec_takes_an_open_descriptor_and_no_other_flag() {
    let output = run("exec-flags");
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGSYS),
        "{}",
        text(&output)
    );
    denied("build execve");
    // Let through, for a descriptor that is not there.
    assert_eq!(
        executed("build execveat 99 0 0 0 0x1000"),
        -i64::from(libc::EFAULT)
    );
}

#[test]
fn clone3_openat_and_readlink_are_answered_with_enosys_while_building() {
    for call in ["clone3", "openat", "readlink"] {
        assert_eq!(
            executed(&format!("build {call}")),
            -i64::from(libc::ENOSYS),
            "{call}"
        );
    }
}

#[test]
fn building_makes_no_process_no_socket_no_file_and_no_code() {
    for words in [
        // fork, as glibc makes it; vfork; a thread in another file table.
        "build clone 0x1200011",
        "build clone 0x4111",
        "build clone 0x3d0b00",
        "build fork",
        "build vfork",
        "build socket 1 1 0",
        "build socketpair 1 1 0",
        "build connect",
        "build bind",
        "build open",
        "build openat2",
        "build memfd_create",
        "build mmap 0 4096 7 0x22",
        "build mmap 0 4096 5 0x22",
        "build mprotect 0 4096 4",
        "build mprotect 0 4096 0xffffffff00000004",
        "build pkey_mprotect",
        "build io_uring_setup",
        "build ptrace",
        "build process_vm_readv",
        "build unshare",
        "build setns",
        "build mount",
        "build bpf",
        "build userfaultfd",
        "build personality 0x0400000",
        "build kill",
        "build fcntl 0 4 0x800",
        "build fcntl 0 37",
        "build fcntl 0 1033",
        "build ioctl 0 0x5421",
        "build ioctl 0 0x400454ca",
        "build ioctl 0 0x5412",
        "build prctl 4 1",
        "build seccomp 0",
        "build seccomp 1 1",
        "build prlimit64 0 7 0x1000",
        "build sendto 0 0 0 0 1",
        "build setuid",
        "build capset",
        // read as x32 has it, and a call that there is none of.
        "build 1073741824",
        "build 600",
    ] {
        denied(words);
    }
}

#[test]
fn a_settled_thread_opens_makes_and_narrows_nothing() {
    let calls = [
        "open",
        "openat",
        "openat2",
        "creat",
        "socket",
        "socketpair",
        "connect",
        "bind",
        "listen",
        "accept4",
        "execve",
        "execveat 99 0 0 0 0x1000",
        "memfd_create",
        "clone 0x3d0f00",
        "clone 0x11",
        "clone3",
        "fork",
        "io_uring_setup",
        "io_uring_enter",
        "ptrace",
        "seccomp 1",
        "prctl 15",
        "prctl 38 1",
        "readlink",
        "stat",
        "statx",
        "unlink",
        "mmap 0 4096 7 0x22",
        "mmap 0 4096 3 0x1 0",
        "mprotect 0 4096 4",
        "dup",
        "dup2",
        "rt_sigaction 31",
        "ioctl kvm 0xae01",
        "ioctl kvm 0xae41",
        "ioctl kvm 0x4020ae46",
        "ioctl kvm 0xae60",
        "ioctl kvm 0x4068aea3",
        "madvise 0 0 23",
        "madvise 0 0 100",
        "timerfd_create",
        "landlock_restrict_self",
        "rseq",
        "600",
    ];
    for role in ["control", "vcpu", "io"] {
        for call in calls {
            denied(&format!("{role} {call}"));
        }
    }
}

#[test]
fn each_role_has_its_own_ioctls() {
    let not_kvm = -i64::from(libc::EBADF);
    let expectations = [
        // KVM_RUN, KVM_SET_REGS: vCPUs only. KVM_SET_IRQCHIP, KVM_IRQFD: the main thread only.
        // TUNSETOFFLOAD: I/O threads only.
        ("0xae80", "vcpu", ["control", "io"]),
        ("0x4090ae82", "vcpu", ["control", "io"]),
        ("0x8208ae63", "control", ["vcpu", "io"]),
        ("0x4020ae76", "control", ["vcpu", "io"]),
        ("0x400454d0", "io", ["vcpu", "control"]),
    ];
    for (request, may, may_not) in expectations {
        assert_eq!(
            executed(&format!("{may} ioctl 99 {request}")),
            not_kvm,
            "{may} {request}"
        );
        for role in may_not {
            denied(&format!("{role} ioctl 99 {request}"));
        }
    }
}

#[test]
fn only_the_low_half_of_an_ioctl_request_counts_as_for_the_kernel() {
    let not_kvm = -i64::from(libc::EBADF);
    assert_eq!(executed("vcpu ioctl 99 0xffffffff8090ae81"), not_kvm);
    assert_eq!(executed("build ioctl 99 0xdeadbeef0000ae80"), not_kvm);
}

#[test]
fn what_a_settled_thread_needs_is_let_through() {
    for role in ["control", "vcpu", "io"] {
        for call in [
            "mmap 0 4096 3 0x22",
            "mmap 0 4096 3 0x28",
            "mmap 0 4096 0 0x4022",
            "getpid",
            "sched_yield",
            "clock_gettime 1 0",
            "munmap 0x1000 4096",
        ] {
            executed(&format!("{role} {call}"));
        }
        assert_eq!(
            executed(&format!("{role} read 99")),
            -i64::from(libc::EBADF)
        );
        assert_eq!(
            executed(&format!("{role} futex 0 0x81")),
            0,
            "nobody to wake"
        );
        denied(&format!("{role} futex 0 6"));
    }
    assert_eq!(executed("io fallocate 99 3 0 1"), -i64::from(libc::EBADF));
    denied("io fallocate 99 0 0 1");
    denied("vcpu fallocate 99 3 0 1");
}

#[test]
fn kvm_itself_answers_through_the_build_filter() {
    // KVM_GET_API_VERSION (`linux/kvm.h`: always 12), on a descriptor that was open before the confinement.
    assert_eq!(executed("build ioctl kvm 0xae00"), 12);
    assert!(
        executed("build ioctl kvm 0xae01") > 2,
        "KVM_CREATE_VM gives a descriptor"
    );
}

#[test]
fn the_kernel_and_the_policy_agree_on_a_settled_worker() {
    let mut child = subject()
        .args(["control", "steady"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "steady\n");
    let verdicts = observe::judge(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let (verdict, other) = verdicts;
    assert!(verdict.is_proven(), "{:#?}", verdict.findings);
    assert_eq!(verdict.evidence, baton_policy::proof::Evidence::Bytes);
    assert!(
        !other.is_proven(),
        "three vCPUs were declared, the worker has two"
    );
}

/// The broker's part: reads the records, has every filter read back, and asks for the judgement.
mod observe {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs::read_to_string;

    use baton_policy::procfs::{TaskStat, TaskStatus};
    use baton_policy::proof::{Declared, Moment, Observed, ObservedThread, Verdict, prove};
    use baton_policy::{Capabilities, Policy, kernel};
    use nix::sys::{ptrace, wait};
    use nix::unistd::Pid;

    pub(crate) fn judge(pid: u32) -> (Verdict, Verdict) {
        let own = TaskStatus::parse(&read_to_string("/proc/self/status").unwrap()).unwrap();
        assert_eq!(
            own.seccomp, 0,
            "reading filters back takes a caller without one"
        );
        let mut threads = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let path = entry.unwrap().path();
            let status = TaskStatus::parse(&read_to_string(path.join("status")).unwrap()).unwrap();
            let stat = TaskStat::parse(&read_to_string(path.join("stat")).unwrap()).unwrap();
            let filters = filters(&status);
            threads.push(ObservedThread {
                status,
                stat,
                filters: Some(filters),
            });
        }
        let observed = Observed {
            threads,
            namespaces: BTreeMap::new(),
            own_namespaces: BTreeMap::new(),
        };
        let compiled = Policy::builtin().unwrap().compile().unwrap();
        let (uid, gid) = (own.uids[0], own.gids[0]);
        // The subject has no namespaces of its own and, started by root, root's groups.
        let namespaces = BTreeSet::new();
        let declared = |vcpus| Declared {
            compiled: &compiled,
            inherited_filters: 0,
            keep: Capabilities::NONE,
            uid,
            gid,
            namespaces: &namespaces,
            moment: Moment::Settled { vcpus, io: 1 },
        };
        (
            prove(&declared(2), &observed),
            prove(&declared(3), &observed),
        )
    }

    fn filters(status: &TaskStatus) -> Vec<baton_policy::Program> {
        let tid = Pid::from_raw(i32::try_from(status.pid).unwrap());
        ptrace::seize(tid, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(tid).unwrap();
        wait::waitpid(tid, Some(wait::WaitPidFlag::__WALL)).unwrap();
        let all = (0..status.seccomp_filters)
            .map(|index| kernel::seccomp_get_filter(tid.as_raw(), index).unwrap())
            .collect();
        ptrace::detach(tid, None).unwrap();
        all
    }
}
