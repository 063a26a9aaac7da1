//! Who may connect to a broker and means it harm: others are served meanwhile, and its deadlines are kept.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use baton_ipc::control::Request;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::petitioner;
use baton_tests::petitioner::Connection;
use baton_tests::until;

/// Users that nobody else in these tests is. The first may look.
const VIEWER: u32 = 65_101;
const OTHER_VIEWER: u32 = 65_102;
const STRANGER: u32 = 65_103;

fn vm(builder: Builder) -> Vm {
    let own = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../policy/default.toml"
    ));
    let access = format!(
        "\n[[access]]\nto = [\"view\"]\nusers = [{VIEWER}, {OTHER_VIEWER}]\nwhy = \"monitoring\"\n"
    );
    let text = own.unwrap() + &access;
    builder.policy(&text).start_in(|site| {
        // The test's own directory is closed to others, which is not what this is about.
        fs::set_permissions(site.path(""), fs::Permissions::from_mode(0o711)).unwrap();
    })
}

fn socket(vm: &Vm) -> PathBuf {
    vm.site.run_dir().join(&vm.site.name).join("control.sock")
}

/// Somebody who does the same thing over and over, until it is dropped.
struct Flood {
    over: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// So many threads of this user's.
    fn of(
        user: u32,
        threads: usize,
        socket: &Path,
        act: impl Fn(&Path, &mut Vec<Connection>) + Clone + Send + 'static,
    ) -> Self {
        let (over, done) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let threads = (0..threads).map(|_| {
            let (over, done): (_, Arc<AtomicU64>) = (Arc::clone(&over), Arc::clone(&done));
            let (socket, act) = (socket.to_owned(), act.clone());
            std::thread::spawn(move || {
                petitioner::become_user(user);
                let mut held = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    act(&socket, &mut held);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let threads = threads.collect();
        let flood = Self {
            over,
            done,
            threads,
        };
        flood.assert_goes_on();
        flood
    }

    /// It has not been stopped by anything.
    fn assert_goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        until("the flood goes on", || {
            (self.done.load(Ordering::Relaxed) > before + 10).then_some(())
        });
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic has been printed, and is one of the test's own.
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

/// What root may expect of a broker that somebody floods: its answers, and upgrades whose every step keeps its deadline.
fn assert_serves(vm: &Vm) {
    for _ in 0..3 {
        assert_eq!(vm.state(), "running");
    }
    vm.assert_upgrades();
    assert_eq!(vm.state(), "running");
}

#[test]
fn who_has_no_right_and_connects_without_end_keeps_nobody_out() {
    let vm = vm(Builder::release());
    let first = vm.witness();
    let flood = Flood::of(STRANGER, 4, &socket(&vm), |socket, _| {
        drop(petitioner::connect(socket));
    });
    assert_serves(&vm);
    flood.assert_goes_on();
    drop(flood);
    vm.assert_goes_on(&first);
}

/// Keeps the socket full of one request, and reads no answer until there are some: one that reads nothing is hung up on.
fn pipeline(socket: &Path, held: &mut Vec<Connection>, request: &Request) {
    while held.is_empty() {
        let mut connection = petitioner::connect(socket);
        held.extend(petitioner::is_greeted(&mut connection).then_some(connection));
    }
    for connection in held.iter_mut() {
        for _ in 0..64 {
            // Full is as good as sent.
            drop(connection.send(request));
        }
        while let Ok(baton_ipc::Received::Message(..)) = connection.receive() {}
    }
}

#[test]
fn requests_without_end_starve_nobody_and_no_deadline() {
    // A new worker that says nothing is given up when its time is over, and not when the flood is.
    let vm = vm(Builder::faulty("new@build:hang").slowness(3));
    let (first, old) = (vm.witness(), vm.worker());
    let heads = Flood::of(VIEWER, 2, &socket(&vm), |socket, held| {
        pipeline(socket, held, &Request::LogHead);
    });
    let denied = Flood::of(OTHER_VIEWER, 2, &socket(&vm), |socket, held| {
        pipeline(socket, held, &Request::Pause);
    });
    let upgrade = vm.upgrade();
    assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
    assert_eq!(vm.worker(), old);
    assert_serves(&vm);
    heads.assert_goes_on();
    denied.assert_goes_on();
    drop((heads, denied));
    vm.assert_goes_on(&first);
    // What was denied is in the log, as far as its rate allows; and the log is a log.
    assert!(vm.audit_log().of("request-refused").count() > 0);
}

#[test]
fn who_holds_connections_leaves_room_for_root_and_for_others() {
    let vm = vm(Builder::release());
    let path = socket(&vm);
    let greeted_of = |user: u32, count: usize| {
        let path = path.clone();
        let held = std::thread::spawn(move || {
            petitioner::become_user(user);
            let mut all: Vec<Connection> = Vec::new();
            for _ in 0..count {
                let mut connection = petitioner::connect(&path);
                all.extend(petitioner::is_greeted(&mut connection).then_some(connection));
            }
            all
        });
        held.join().unwrap()
    };
    let of_one = greeted_of(VIEWER, 40);
    assert_eq!(of_one.len(), 8);
    let of_other = greeted_of(OTHER_VIEWER, 40);
    assert_eq!(of_other.len(), 8);
    assert_serves(&vm);
    // Root has as many as there are left.
    let of_root = greeted_of(0, 40);
    assert_eq!(of_root.len(), 16);
    drop(of_one);
    until("what was let go of is free again", || {
        (greeted_of(VIEWER, 1).len() == 1).then_some(())
    });
}
