//! The QMP front's policy is narrow: it parses bytes, and may do nothing else.

use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::Syscall;

#[test]
fn the_front_reads_and_writes_and_does_nothing_else() {
    let policy = Policy::front().unwrap();
    policy.compile().unwrap();
    let steady = policy.allowed(Role::Control);
    for name in [
        "ioctl",
        "openat",
        "socket",
        "connect",
        "accept4",
        "execve",
        "execveat",
        "clone",
        "seccomp",
        "prctl",
        "kill",
        "ptrace",
        "mount",
        "memfd_create",
        "io_uring_setup",
        "getsockopt",
        "rt_sigaction",
    ] {
        let call = Syscall::from_name(name).unwrap();
        assert!(!steady.contains_key(&call), "{name}");
    }
    assert!(steady.len() < 35, "{} calls", steady.len());
    let worker = Policy::builtin().unwrap();
    assert_eq!(policy.namespaces, worker.namespaces);
    assert_eq!(policy.landlock, worker.landlock);
}
