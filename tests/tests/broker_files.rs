//! Which files the broker reaches: those of the places that `policy/broker.toml` names, and no others, in a Landlock domain that
//! each audit attempts to leave.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use baton_policy::own::Holder;
use baton_policy::own::OwnPolicy;
use baton_policy::own::Place;
use baton_policy::own::Places;
use baton_policy::procfs::TaskStatus;
use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Site;
use serde_json::Value;

/// Set for the process that makes the attempts, which stays in its domain: a directory, and a process outside.
const ATTEMPT: &str = "BATON_TEST_ATTEMPT";

#[test]
fn outside_of_its_places_the_domain_denies_what_root_may_do_otherwise() {
    if let Some(directory) = std::env::var_os(ATTEMPT) {
        let wrong = attempts(Path::new(&directory));
        wrong.iter().for_each(|what| eprintln!("wrong: {what}"));
        std::process::exit(if wrong.is_empty() { 7 } else { 1 });
    }
    let directory = tempfile::tempdir().unwrap();
    for name in ["vm", "cgroup", "program", "vsock", "elsewhere", "run"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    for name in [
        "vm/old",
        "vsock/old",
        "program/old",
        "elsewhere/old",
        "cgroup/old",
    ] {
        fs::write(directory.path().join(name), "text").unwrap();
    }
    fs::create_dir(directory.path().join("elsewhere/directory")).unwrap();
    let _abstract = UnixListener::bind_addr(&abstract_name(std::process::id())).unwrap();
    let attempt = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("outside_of_its_places_the_domain_denies_what_root_may_do_otherwise")
        .env(ATTEMPT, directory.path())
        .output()
        .unwrap();
    assert_eq!(attempt.status.code(), Some(7), "{attempt:?}");
}

fn abstract_name(process: u32) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("baton-test-{process}")).unwrap()
}

/// What was otherwise than it should be.
fn attempts(directory: &Path) -> Vec<String> {
    let parent = std::os::unix::process::parent_id();
    let at = |name: &str| directory.join(name);
    let vsock = UnixListener::bind(at("elsewhere/socket")).unwrap();
    let places = Places::from([
        (Place::Records, vec!["/proc".into()]),
        (Place::Null, vec!["/dev/null".into()]),
        (Place::RunDirectory, vec![at("run")]),
        (Place::VmDirectory, vec![at("vm")]),
        (Place::Cgroups, vec![at("cgroup")]),
        (Place::Programs, vec![at("program"), at("not-there")]),
        (Place::Vsock, vec![at("vsock")]),
    ]);
    type Attempt<'a> = (&'static str, Box<dyn Fn() -> io::Result<()> + 'a>);
    let open = |path: &str| fs::File::open(directory.join(path)).map(drop);
    // What may not be known of a process's memory is empty (proc_pid_maps(5)).
    let read = |path: &str| match fs::read(directory.join(path))?.is_empty() {
        true => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
        false => Ok(()),
    };
    let write = |path: &str| {
        fs::OpenOptions::new()
            .write(true)
            .open(directory.join(path))
            .map(drop)
    };
    let denied: Vec<Attempt<'_>> = vec![
        ("to list /", Box::new(|| fs::read_dir("/").map(drop))),
        ("to read a file", Box::new(|| read("/etc/shadow"))),
        ("to read one beside", Box::new(|| read("elsewhere/old"))),
        (
            "to read where it may remove",
            Box::new(|| read("vsock/old")),
        ),
        ("to write one beside", Box::new(|| write("elsewhere/old"))),
        ("to write to a program", Box::new(|| write("program/old"))),
        (
            "to write its own memory",
            Box::new(|| write("/proc/self/mem")),
        ),
        (
            "to write a sysctl",
            Box::new(|| write("/proc/sys/vm/swappiness")),
        ),
        ("to open /dev/kvm", Box::new(|| open("/dev/kvm"))),
        ("to open a disk", Box::new(|| open("/dev/vda"))),
        (
            "to make a file",
            Box::new(|| fs::write(at("elsewhere/new"), "")),
        ),
        (
            "to make a file of a cgroup",
            Box::new(|| fs::write(at("cgroup/new"), "")),
        ),
        (
            "to make a directory",
            Box::new(|| fs::create_dir(at("vm/directory"))),
        ),
        (
            "to make a link",
            Box::new(|| symlink("/", at("elsewhere/link"))),
        ),
        (
            "to remove a file",
            Box::new(|| fs::remove_file(at("elsewhere/old"))),
        ),
        (
            "to remove a directory",
            Box::new(|| fs::remove_dir(at("elsewhere/directory"))),
        ),
        (
            "to move a file in",
            Box::new(|| fs::rename(at("elsewhere/old"), at("vm/stolen"))),
        ),
        (
            "to move a file out",
            Box::new(|| fs::rename(at("vm/old"), at("elsewhere/gone"))),
        ),
        (
            "to truncate a file",
            Box::new(|| fs::File::create(at("elsewhere/old")).map(drop)),
        ),
        (
            "to bind a socket",
            Box::new(|| UnixListener::bind(at("elsewhere/new")).map(drop)),
        ),
        (
            "to execute",
            Box::new(|| Command::new("/bin/true").status().map(drop)),
        ),
        (
            "TCP",
            Box::new(|| TcpListener::bind("127.0.0.1:0").map(drop)),
        ),
        (
            "an abstract socket",
            Box::new(|| UnixStream::connect_addr(&abstract_name(parent)).map(drop)),
        ),
        (
            "memory of others",
            Box::new(|| read(&format!("/proc/{parent}/mem"))),
        ),
        (
            "maps of others",
            Box::new(|| read(&format!("/proc/{parent}/maps"))),
        ),
        (
            "what others execute",
            Box::new(|| fs::metadata(format!("/proc/{parent}/exe")).map(drop)),
        ),
        (
            "descriptors of others",
            Box::new(|| fs::read_link(format!("/proc/{parent}/fd/0")).map(drop)),
        ),
        (
            "the root of others",
            Box::new(|| fs::read_dir(format!("/proc/{parent}/root/")).map(drop)),
        ),
        (
            "environment of others",
            Box::new(|| read(&format!("/proc/{parent}/environ"))),
        ),
    ];
    let permitted: Vec<Attempt<'_>> = vec![
        (
            "a record",
            Box::new(|| read(&format!("/proc/{parent}/status"))),
        ),
        ("/dev/null", Box::new(|| write("/dev/null"))),
        (
            "its file",
            Box::new(|| fs::write(at("vm/new"), "x").and_then(|()| read("vm/new"))),
        ),
        (
            "a new name",
            Box::new(|| fs::rename(at("vm/new"), at("vm/old"))),
        ),
        (
            "its socket",
            Box::new(|| UnixListener::bind(at("vm/socket")).map(drop)),
        ),
        ("its link", Box::new(|| symlink("x", at("vm/link")))),
        ("a cgroup's file", Box::new(|| write("cgroup/old"))),
        (
            "a socket's end",
            Box::new(|| fs::remove_file(at("vsock/old"))),
        ),
        (
            "a directory",
            Box::new(|| fs::create_dir(at("run/x")).and_then(|()| fs::remove_dir(at("run/x")))),
        ),
        (
            "a socket by its path",
            Box::new(|| UnixStream::connect(at("elsewhere/socket")).map(drop)),
        ),
    ];
    // Without the domain, what changes nothing is permitted: so it is the domain that denies it.
    let harmless = [
        "to list /",
        "to read a file",
        "to read one beside",
        "TCP",
        "an abstract socket",
        "maps of others",
        "what others execute",
        "descriptors of others",
        "the root of others",
        "to write its own memory",
        "to open /dev/kvm",
    ];
    let mut wrong: Vec<String> = Vec::new();
    for (what, attempt) in denied.iter().filter(|one| harmless.contains(&one.0)) {
        if let Err(error) = attempt() {
            wrong.push(format!("{what} proves nothing: {error}"));
        }
    }
    // As the broker is: with CAP_PERFMON, for one, any memory map could be read (kernel/fork.c, may_access_mm).
    let policy = OwnPolicy::builtin().unwrap();
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let status = TaskStatus::parse(&status).unwrap();
    policy.enter(Holder::Broker, &status).unwrap();
    let domain = policy.restrict(&places, parent).unwrap();
    assert_eq!(domain.places(), 7);
    for (what, attempt) in &denied {
        let kind = attempt().map_err(|error| error.kind());
        // Between directories that have no right to it, EXDEV says the same (landlock(7)).
        let is_denied = matches!(
            kind,
            Err(io::ErrorKind::PermissionDenied | io::ErrorKind::CrossesDevices)
        );
        // A host need not have this disk.
        let is_absent = *what == "to open a disk" && kind == Err(io::ErrorKind::NotFound);
        if !is_denied && !is_absent {
            wrong.push(format!("{what}: {kind:?}"));
        }
    }
    for (what, attempt) in &permitted {
        if let Err(error) = attempt() {
            wrong.push(format!("{what}: {error}"));
        }
    }
    drop(vsock);
    if let Err(error) = domain.attempt() {
        wrong.push(error.to_string());
    }
    wrong
}

#[test]
fn every_audit_attempts_to_leave_the_brokers_domain() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    let audit = vm.ask("audit").expect(0).json();
    let checks = audit.get("checks").and_then(Value::as_array).unwrap();
    let of = |what: &str| {
        let mut found = checks.iter().filter(|check| check["what"] == what);
        found.next().unwrap()["found"].as_str().unwrap().to_owned()
    };
    assert!(of("broker").contains("attempted just now"), "{audit}");
    assert!(!of("launcher").contains("Landlock"), "{audit}");
}

#[test]
fn a_directory_that_came_later_is_out_of_reach_until_another_broker_has_the_vm() {
    let site = Site::new(Binaries::release(), 10);
    let (there, aside) = (site.path("policies"), site.path("aside"));
    fs::create_dir(&there).unwrap();
    fs::write(there.join("policy.toml"), baton_policy::BUILTIN).unwrap();
    site.write(
        "vm.toml",
        format!(
            "schema = 1\nname = \"{}\"\npolicy = \"policies/policy.toml\"\n[memory]\nsize = \"64M\"\n[boot]\nkernel = \"guest.elf\"\n",
            site.name
        ),
    );
    site.run("vm.toml").expect(0);
    let upgrade = || site.baton(["upgrade", &site.name]);
    // A file that was replaced is another file in the same directory.
    fs::write(there.join("new"), baton_policy::BUILTIN).unwrap();
    fs::rename(there.join("new"), there.join("policy.toml")).unwrap();
    upgrade().expect(0);

    fs::rename(&there, &aside).unwrap();
    fs::create_dir(&there).unwrap();
    fs::write(there.join("policy.toml"), baton_policy::BUILTIN).unwrap();
    let refused = upgrade().expect(3);
    assert!(refused.stderr.contains("out of reach"), "{refused:?}");
    assert!(
        refused.stderr.contains("baton upgrade --broker"),
        "{refused:?}"
    );
    site.baton(["upgrade", "--broker", &site.name]).expect(0);
    upgrade().expect(0);
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}
