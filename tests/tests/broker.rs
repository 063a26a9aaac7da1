//! What the broker itself may do: of root's privilege and of the kernel's calls no more than `policy/broker.toml` names, in every
//! audit, and each thing that it may not do is attempted.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    reason = "calls that no safe function makes are attempted; a test that cannot do its work fails"
)]

use std::fs;
use std::io;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::process::Command;

use baton_policy::own::Holder;
use baton_policy::own::OwnPolicy;
use baton_policy::procfs::TaskStatus;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::kill_process;
use baton_tests::until;
use serde_json::Value;

fn status(pid: i32) -> TaskStatus {
    TaskStatus::parse(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap()).unwrap()
}

fn launcher(vm: &Vm) -> i32 {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", vm.broker)).unwrap();
    let is_launcher = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"launcher")
    };
    children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .find(is_launcher)
        .unwrap()
}

fn names_of(policy: &OwnPolicy, holder: Holder) -> Vec<&str> {
    let of_holder = |one: &&(String, Vec<Holder>, String)| one.1.contains(&holder);
    let named = policy.capabilities.iter().filter(of_holder);
    named.map(|one| one.0.as_str()).collect()
}

#[test]
fn the_broker_keeps_what_its_file_names_and_hands_none_of_it_on() {
    let vm = Builder::release().start();
    // After an upgrade as well as before it: it needed nothing more.
    vm.assert_upgrades();
    let policy = OwnPolicy::builtin().unwrap();
    let audit = vm.ask("audit").expect(0).json();
    let checks = audit.get("checks").and_then(Value::as_array).unwrap();
    for (what, holder, pid, filters) in [
        ("broker", Holder::Broker, vm.broker, 1),
        ("launcher", Holder::Launcher, launcher(&vm), 0),
    ] {
        let status = status(pid);
        assert_eq!(policy.compare(holder, &status), []);
        // Root has all of it to begin with; a full set would be 41 of them.
        assert_eq!(status.effective, policy.keep(holder), "{what}");
        assert_eq!(status.bounding, status.effective, "{what}");
        let own = self::status(i32::try_from(std::process::id()).unwrap());
        assert_eq!(status.seccomp_filters, own.seccomp_filters + filters);
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core"))
            .unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");

        let check = checks
            .iter()
            .find(|check| check.get("what").is_some_and(|found| found == what))
            .unwrap();
        assert_eq!(check.get("evidence").unwrap(), "kernel", "{check}");
        let found = check.get("found").and_then(Value::as_str).unwrap();
        for name in names_of(&policy, holder) {
            assert!(found.contains(name), "{name}: {found}");
        }
        assert_eq!(found.contains("byte for byte"), filters == 1, "{found}");
    }
}

#[test]
fn without_its_launcher_a_broker_serves_its_guest_and_refuses_the_rest() {
    let vm = Builder::release().start();
    let before = vm.witness();
    kill_process(launcher(&vm));
    until("the death is recorded", || {
        let log = vm.audit_log();
        log.0
            .iter()
            .any(|record| record.event == "launcher-died")
            .then_some(())
    });
    let before = vm.assert_goes_on(&before);
    let said = format!("{:?}", vm.ask("upgrade"));
    assert!(said.contains("launcher is gone: it has died"), "{said}");
    let said = format!("{:?}", vm.ask("audit"));
    assert!(said.contains("launcher is gone: it has died"), "{said}");
    assert_eq!(vm.generation(), 1);
    vm.assert_goes_on(&before);
    vm.end();
}

/// What a call said, when it is one that ends in an error for whoever is permitted it.
fn raw(number: libc::c_long, arguments: [libc::c_long; 5]) -> Option<i32> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the calls of the table below, with these arguments, name no memory, no descriptor and no process; each fails
    // before it changes anything.
    let outcome = unsafe { libc::syscall(number, a, b, c, d, e) };
    (outcome < 0)
        .then(io::Error::last_os_error)
        .and_then(|error| error.raw_os_error())
}

/// Calls with arguments that are in error, by names.
#[rustfmt::skip]
const CALLS: &[(&str, libc::c_long, [libc::c_long; 5])] = &[
    ("execve",            libc::SYS_execve,            [0; 5]),
    ("execveat",          libc::SYS_execveat,          [-1, 0, 0, 0, 0]),
    ("clone3",            libc::SYS_clone3,            [0; 5]),
    ("ptrace",            libc::SYS_ptrace,            [-1, -1, 0, 0, 0]),
    ("process_vm_readv",  libc::SYS_process_vm_readv,  [1, 0, -1, 0, 0]),
    ("pidfd_getfd",       libc::SYS_pidfd_getfd,       [-1, 0, 0, 0, 0]),
    ("kill",              libc::SYS_kill,              [i32::MAX as i64, 0, 0, 0, 0]),
    ("kcmp",              libc::SYS_kcmp,              [-1, -1, 0, 0, 0]),
    ("mount",             libc::SYS_mount,             [0; 5]),
    ("umount2",           libc::SYS_umount2,           [0, -1, 0, 0, 0]),
    ("pivot_root",        libc::SYS_pivot_root,        [0; 5]),
    ("chroot",            libc::SYS_chroot,            [0; 5]),
    ("fsopen",            libc::SYS_fsopen,            [0, -1, 0, 0, 0]),
    ("open_tree",         libc::SYS_open_tree,         [-1, 0, -1, 0, 0]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0, 0, 0]),
    ("unshare",           libc::SYS_unshare,           [1, 0, 0, 0, 0]),
    ("setns",             libc::SYS_setns,             [-1, 0, 0, 0, 0]),
    ("bpf",               libc::SYS_bpf,               [-1, 0, 0, 0, 0]),
    ("perf_event_open",   libc::SYS_perf_event_open,   [0; 5]),
    ("userfaultfd",       libc::SYS_userfaultfd,       [-1, 0, 0, 0, 0]),
    ("io_uring_setup",    libc::SYS_io_uring_setup,    [0; 5]),
    ("keyctl",            libc::SYS_keyctl,            [-1, 0, 0, 0, 0]),
    ("add_key",           libc::SYS_add_key,           [0; 5]),
    ("init_module",       libc::SYS_init_module,       [0; 5]),
    ("finit_module",      libc::SYS_finit_module,      [-1, 0, 0, 0, 0]),
    ("kexec_file_load",   libc::SYS_kexec_file_load,   [-1, -1, 0, 0, -1]),
    ("reboot",            libc::SYS_reboot,            [0; 5]),
    ("setgroups",         libc::SYS_setgroups,         [-1, 0, 0, 0, 0]),
    ("capset",            libc::SYS_capset,            [0; 5]),
    ("prctl",             libc::SYS_prctl,             [-1, 0, 0, 0, 0]),
    ("seccomp",           libc::SYS_seccomp,           [-1, 0, 0, 0, 0]),
    ("mknodat",           libc::SYS_mknodat,           [-1, 0, 0, 0, 0]),
    ("linkat",            libc::SYS_linkat,            [-1, 0, -1, 0, 0]),
    ("fchownat",          libc::SYS_fchownat,          [-1, 0, 0, 0, 0]),
    ("setxattr",          libc::SYS_setxattr,          [0; 5]),
    ("memfd_secret",      libc::SYS_memfd_secret,      [-1, 0, 0, 0, 0]),
    ("socket, AF_NETLINK", libc::SYS_socket,           [libc::AF_NETLINK as i64, -1, 0, 0, 0]),
    ("socket, AF_VSOCK",  libc::SYS_socket,            [libc::AF_VSOCK as i64, -1, 0, 0, 0]),
    ("socket, AF_ALG",    libc::SYS_socket,            [libc::AF_ALG as i64, -1, 0, 0, 0]),
    ("ioctl, TUNSETIFF",  libc::SYS_ioctl,             [-1, 0x4004_54ca, 0, 0, 0]),
    ("ioctl, KVM_CREATE_VM", libc::SYS_ioctl,          [-1, 0xae01, 0, 0, 0]),
    ("ioctl, TIOCSTI",    libc::SYS_ioctl,             [-1, 0x5412, 0, 0, 0]),
    ("mmap, executable",  libc::SYS_mmap,              [0, 0, 4, 0x22, -1]),
    ("mmap, shared",      libc::SYS_mmap,              [0, 0, 3, 0x01, -1]),
    ("mprotect, executable", libc::SYS_mprotect,       [1, 4096, 4, 0, 0]),
    ("fcntl, F_SETOWN",   libc::SYS_fcntl,             [-1, 8, 0, 0, 0]),
    ("pidfd_send_signal, SIGSEGV", libc::SYS_pidfd_send_signal, [-1, 11, 0, 0, 0]),
    ("tgkill, SIGKILL",   libc::SYS_tgkill,            [-1, -1, 9, 0, 0]),
];

/// Set for the process that makes the attempts: this test once more, since a filter stays and the broker's knows no end of a
/// thread.
const ATTEMPT: &str = "BATON_TEST_ATTEMPT";

#[test]
fn what_the_brokers_filter_does_not_let_through_is_not_executed() {
    if std::env::var_os(ATTEMPT).is_some() {
        let wrong = attempts();
        wrong.iter().for_each(|what| eprintln!("wrong: {what}"));
        std::process::exit(if wrong.is_empty() { 7 } else { 1 });
    }
    let attempt = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("what_the_brokers_filter_does_not_let_through_is_not_executed")
        .env(ATTEMPT, "1")
        .output()
        .unwrap();
    assert_eq!(attempt.status.code(), Some(7), "{attempt:?}");
}

/// What was otherwise than it should be.
fn attempts() -> Vec<String> {
    let filter = OwnPolicy::builtin().unwrap().filter().unwrap();
    let free: Vec<_> = CALLS.iter().map(|call| raw(call.1, call.2)).collect();
    Command::new("/bin/true").status().unwrap();
    UdpSocket::bind("127.0.0.1:0").unwrap();
    baton_policy::no_new_privs().unwrap();
    filter.install().unwrap();
    let held: Vec<_> = CALLS.iter().map(|call| raw(call.1, call.2)).collect();

    let mut wrong = Vec::new();
    let mut meant = 0;
    for ((call, free), held) in CALLS.iter().zip(free).zip(held) {
        // A host may forbid one or the other by itself.
        meant += usize::from(free != Some(libc::EPERM));
        if free.is_none() || held != Some(libc::EPERM) {
            wrong.push(format!("{}: {free:?} without, {held:?} with it", call.0));
        }
    }
    if meant < CALLS.len() - 4 {
        wrong.push(format!("only {meant} attempts prove anything"));
    }
    let mut denied = |what: &str, error: Option<io::Error>| {
        if error.and_then(|error| error.raw_os_error()) != Some(libc::EPERM) {
            wrong.push(what.to_owned());
        }
    };
    denied("a process", Command::new("/bin/true").status().err());
    denied("a thread", std::thread::Builder::new().spawn(|| ()).err());
    denied("UDP", UdpSocket::bind("127.0.0.1:0").err());
    denied("TCP", TcpListener::bind("127.0.0.1:0").err());
    // What it does all day it may do.
    if fs::read_to_string("/proc/self/status").is_err() || UnixStream::pair().is_err() {
        wrong.push("what is permitted".to_owned());
    }
    wrong
}
