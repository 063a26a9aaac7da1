//! How a side that is to wait is started.

use std::os::fd::AsRawFd as _;
use std::path::Path;

use baton_tests::Builder;
use baton_tests::is_alive;
use baton_tests::until;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketType;

use crate::cases::Here;
use crate::qemu::Qemu;
use crate::qemu::SMALL;

/// A cpr channel as `-incoming` names it, beside `-incoming defer`. `$fd` is the number of an inherited descriptor that listens,
/// `$dir` a directory.
pub(crate) struct Start {
    pub(crate) name: &'static str,
    pub(crate) cpr: &'static str,
    pub(crate) here: Option<Here>,
}

const fn differs(
    name: &'static str,
    cpr: &'static str,
    says: &'static str,
    why: &'static str,
) -> Start {
    Start {
        name,
        cpr,
        here: Some(Here { says, why }),
    }
}

const fn same(name: &'static str, cpr: &'static str) -> Start {
    Start {
        name,
        cpr,
        here: None,
    }
}

pub(crate) const STARTS: &[Start] = &[
    differs(
        "wait at a cpr channel that is no unix socket",
        r#"{"channel-type": "cpr", "addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "44444"}}"#,
        "ends: bad cpr channel socket type; must be unix or fd",
        "an inherited descriptor is taken, too",
    ),
    differs(
        "wait at an inherited descriptor",
        "cpr,addr.transport=socket,addr.type=fd,addr.str=$fd",
        "waits",
        "QEMU can from 10.1 on",
    ),
    same(
        "wait at a channel of no known type",
        r#"{"channel-type": "x", "addr": {}}"#,
    ),
    same(
        "wait at a channel with a key that nobody knows",
        "cpr,addr.transport=socket,addr.type=unix,addr.path=$dir/c,x=1",
    ),
    same(
        "wait at an address with a key that nobody knows",
        "cpr,addr.transport=socket,addr.type=unix,addr.path=$dir/c,addr.host=h",
    ),
    same(
        "wait at an address with a member that nobody knows",
        r#"{"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "$dir/c", "x": 1}}"#,
    ),
    same(
        "wait at an address with a key that has no value",
        "cpr,addr.transport=socket,addr.type=unix,addr.path",
    ),
    same(
        "wait at a path with a comma",
        "cpr,addr.transport=socket,addr.type=unix,addr.path=$dir/c,,d",
    ),
];

/// With a descriptor that a program inherits which is started meanwhile.
fn with_descriptor<T>(start: &Start, dir: &Path, f: impl FnOnce(&str) -> T) -> T {
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(
        &listener,
        &SocketAddrUnix::new(dir.join("inherited")).unwrap(),
    )
    .unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let number = listener.as_raw_fd().to_string();
    let cpr = start.cpr.replace("$fd", &number);
    f(&cpr.replace("$dir", &dir.display().to_string()))
}

/// What is said last, without who says it of what.
fn last_words(text: &str, cpr: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().replace(cpr, "CPR");
    let words = line
        .rsplit_once("CPR: ")
        .map_or(line.as_str(), |(_, words)| words);
    format!("ends: {}", words.trim_start_matches("qemu-system-x86_64: "))
}

pub(crate) fn qemu(start: &Start) -> String {
    let dir = tempfile::tempdir().unwrap();
    with_descriptor(start, dir.path(), |cpr| {
        let arguments = ["-incoming", "defer", "-incoming", cpr];
        let mut qemu = Qemu::start(dir.path(), "new", SMALL, &arguments);
        match qemu.ends() {
            Some(log) => last_words(&log, cpr),
            None => "waits".to_owned(),
        }
    })
}

pub(crate) fn baton(start: &Start) -> String {
    let vm = Builder::release().start();
    with_descriptor(start, &vm.site.path(""), |cpr| {
        let file = vm.site.path("vm.toml").display().to_string();
        let arguments = [
            "run",
            "--detach",
            &file,
            "--incoming",
            "defer",
            "--incoming",
            cpr,
        ];
        let answer = vm.site.baton(arguments);
        if answer.code != Some(0) {
            return last_words(&answer.stderr, cpr);
        }
        let started = answer.json();
        let pid = started
            .get("broker_pid")
            .and_then(serde_json::Value::as_i64);
        let pid = i32::try_from(pid.unwrap()).unwrap();
        let name = format!("{}.incoming", vm.site.name);
        vm.site.baton(["stop", "--force", &name]).expect(0);
        until("it has ended", || (!is_alive(pid)).then_some(()));
        "waits".to_owned()
    })
}
