//! Only a process of the broker's own user is at the other end of a transfer's Unix sockets, whoever made them.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs::Permissions;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::transfer::channel;
use rustix::fs::Gid;
use rustix::fs::Uid;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketType;
use rustix::thread::set_thread_groups;
use rustix::thread::set_thread_res_gid;
use rustix::thread::set_thread_res_uid;
use serde_json::json;

/// A user that nobody else in these tests is.
const STRANGER: u32 = 65_002;

/// As that user, in a thread of its own: whose ids end with it.
fn as_stranger<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let acted = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(STRANGER), Gid::from_raw(STRANGER));
            set_thread_groups(&[gid]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            act()
        });
        acted.join().unwrap()
    })
}

/// In a place that everybody may pass, and a directory there in which everybody may make sockets.
fn vm() -> Vm {
    Builder::release().start_in(|site| {
        std::fs::set_permissions(site.path(""), Permissions::from_mode(0o711)).unwrap();
        std::fs::create_dir(site.path("open")).unwrap();
        std::fs::set_permissions(site.path("open"), Permissions::from_mode(0o777)).unwrap();
    })
}

/// Listens where the broker does not: the socket, and what it is called as a channel of this kind.
fn to_inherit(kind: &str, path: &Path) -> (OwnedFd, String) {
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    let fd = listener.as_raw_fd();
    let place = format!("{kind},addr.transport=socket,addr.type=fd,addr.str={fd}");
    (listener, place)
}

/// Hung up on without a word.
fn assert_refused(mut stream: UnixStream) {
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    assert!(said.is_empty());
}

#[test]
fn strangers_at_an_inherited_socket_are_hung_up_on_and_a_guest_comes_over_two() {
    let mut vm = vm();
    let before = vm.witness();
    let cpr = vm.site.path("open/inherited");
    let main = vm.site.path("open/inherited-main");
    let (cpr_listener, cpr_place) = to_inherit("cpr", &cpr);
    let (main_listener, main_place) = to_inherit("main", &main);
    // Open to everybody: what the broker makes itself has mode 600.
    std::fs::set_permissions(&cpr, Permissions::from_mode(0o666)).unwrap();
    let places = ["--incoming", &main_place, "--incoming", &cpr_place];
    let waiting = vm.wait_from("vm.toml", &places);
    drop((cpr_listener, main_listener));
    for _ in 0..3 {
        assert_refused(as_stranger(|| UnixStream::connect(&cpr).unwrap()));
    }
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let channels = [channel("main", &main), channel("cpr", &cpr)];
    qmp.done("migrate", json!({"channels": channels}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
    // They are not the broker's, and stay.
    assert!(cpr.exists() && main.exists());
}

#[test]
fn nobody_connects_to_where_a_stranger_listens() {
    let mut vm = vm();
    let before = vm.witness();
    let trap = vm.site.path("open/trap");
    let listener = as_stranger(|| UnixListener::bind(&trap).unwrap());
    listener.set_nonblocking(true).unwrap();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let to =
        |main: &Path, cpr: &Path| json!({"channels": [channel("main", main), channel("cpr", cpr)]});
    let words = format!("user {STRANGER} listens at '{}'", trap.display());
    let refused = qmp.refused("migrate", to(&vm.site.path("main"), &trap));
    assert!(refused.contains(&words), "{refused}");
    let (mut stream, _) = listener.accept().unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "it was told something");
    // The main channel: nothing goes there either.
    let waiting = vm.wait_for_guest();
    qmp.done("migrate", to(&trap, &waiting.cpr));
    let info = qmp.migrated();
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap_or_default();
    assert!(reason.contains(&words), "{reason}");
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_to_end(&mut said).unwrap();
    assert!(said.is_empty(), "it was told something");
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}
