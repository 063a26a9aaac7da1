//! A broker for tests: it speaks the protocol over a real control socket, and answers what the test tells it to.

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Exit;
use baton_ipc::control::Outcome;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::PhaseTime;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::SOCKET;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

/// What a broker does with a request; an answer of none hangs up.
pub(crate) type Answer = dyn Fn(Request, Vec<OwnedFd>) -> Vec<(Reply, Vec<OwnedFd>)> + Send + Sync;

/// What the broker was asked, in order.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<Request>>>);

impl Heard {
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.0.lock().unwrap().clone()
    }
}

/// Starts one for `vm`. It lives as long as the test's process.
pub(crate) fn start(run_dir: &Path, vm: &str, answer: Arc<Answer>) -> Heard {
    start_speaking(run_dir, vm, PROTOCOL, answer)
}

pub(crate) fn start_speaking(
    run_dir: &Path,
    vm: &str,
    protocol: u32,
    answer: Arc<Answer>,
) -> Heard {
    let directory = run_dir.join(vm);
    std::fs::create_dir_all(&directory).unwrap();
    let listener = listen(&directory);
    let heard = Heard::default();
    let log = heard.clone();
    std::thread::spawn(move || {
        loop {
            let connection = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
            let (log, answer) = (log.clone(), answer.clone());
            std::thread::spawn(move || serve(connection, protocol, &log, &*answer));
        }
    });
    heard
}

/// A control socket with nobody who accepts; bound through the directory's descriptor, as its path may be long.
pub(crate) fn listen(directory: &Path) -> OwnedFd {
    let listener = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let directory = std::fs::File::open(directory).unwrap();
    let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 16).unwrap();
    listener
}

fn serve(connection: OwnedFd, protocol: u32, log: &Heard, answer: &Answer) {
    let mut channel = Channel::<Reply, Request>::new(FdSocket::from(connection));
    let hello = Reply::Hello {
        protocol,
        build: "canned".to_owned(),
    };
    if channel.send(&hello).is_err() {
        return;
    }
    loop {
        match channel.receive().unwrap() {
            Received::Message(request, descriptors) => {
                log.0.lock().unwrap().push(request.clone());
                let replies = answer(request, descriptors);
                if replies.is_empty() {
                    return;
                }
                for (reply, descriptors) in replies {
                    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                    if channel.send_with(&reply, &descriptors).is_err() {
                        return;
                    }
                }
            }
            Received::Empty => {
                rustix::event::poll(&mut [PollFd::new(&channel, PollFlags::IN)], None).unwrap();
            }
            Received::HungUp => return,
        }
    }
}

/// One that gives the same final reply to everything.
pub(crate) fn always(reply: Reply) -> Arc<Answer> {
    Arc::new(move |_, _| vec![(reply.clone(), Vec::new())])
}

pub(crate) fn status(name: &str) -> VmStatus {
    VmStatus {
        name: name.to_owned(),
        id: "0f".repeat(16),
        state: VmState::Running,
        broker_pid: 100,
        worker_pid: 101,
        worker_answers: true,
        generation: 2,
        worker_digest: "ab".repeat(32),
        worker_build: "baton-worker 0.1.0".to_owned(),
        uptime_s: 61,
        ram_bytes: 256 << 20,
        cpus: 1,
        paused: false,
        disks: Vec::new(),
        vcpu_threads: vec![103],
        tsc_khz: 2_000_000,
        console_dropped: 0,
        last_upgrade: Some(outcome(Outcome::Committed)),
        last_cancelled: false,
        vm_file: "/srv/vm/web1.toml".to_owned(),
        balloon: None,
        vhost_user: Vec::new(),
        vfio: Vec::new(),
        awaits: None,
        netdevs: Vec::new(),
        blocks_transfer: Vec::new(),
        blocks_save: Vec::new(),
    }
}

pub(crate) fn outcome(outcome: Outcome) -> UpgradeOutcome {
    let failed = matches!(outcome, Outcome::Aborted | Outcome::Lost);
    UpgradeOutcome {
        outcome,
        generation: 2,
        worker_pid: 101,
        worker_digest: "ab".repeat(32),
        blackout_us: 1234,
        pause_us: 1500,
        total_ms: 48,
        state_bytes: 12_345,
        state_digest: "cd".repeat(32),
        phases: vec![
            PhaseTime {
                step: Step::Spawn,
                us: 4000,
            },
            PhaseTime {
                step: Step::HandOver,
                us: 300,
            },
        ],
        failed_step: failed.then_some(Step::Load),
        reason: if failed { "the digests differ" } else { "" }.to_owned(),
    }
}

pub(crate) fn refusal(exit: Exit) -> Refusal {
    Refusal {
        exit,
        reason: "another upgrade is under way".to_owned(),
        remedy: "wait for it".to_owned(),
    }
}

/// The program under test, in `run_dir`.
pub(crate) fn baton(run_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command
        .arg("--run-dir")
        .arg(run_dir)
        .args(arguments)
        .env_remove("BATON_BROKER")
        .env("NO_COLOR", "1");
    command
}

pub(crate) fn run(run_dir: &Path, arguments: &[&str]) -> Output {
    baton(run_dir, arguments).output().unwrap()
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The one JSON document on standard output.
pub(crate) fn document(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{error}: {:?} {:?}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// A file with these bytes.
pub(crate) fn write(directory: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Waits until `condition` holds; a test that waits in vain fails.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
