//! A VM whose broker is dead and whose worker runs on.

use std::path::Path;
use std::process::Child;
use std::process::Command;

use crate::canned::*;
use serde_json::json;

/// A process that stands for a worker; killed with the test at the latest.
struct Worker(Child);

impl Worker {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    /// Field 22 of its /proc/PID/stat; its name has no spaces.
    fn start_time(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        stat.split(' ').nth(21).unwrap().parse().unwrap()
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn leave_behind(run_dir: &Path, worker: &Worker, worker_start: u64) {
    let directory = run_dir.join("web1");
    std::fs::create_dir(&directory).unwrap();
    // A socket file that nobody listens on any more.
    drop(listen(&directory));
    let state = json!({
        "name": "web1",
        "broker_pid": 4_194_304,
        "broker_start": 1,
        "worker_pid": worker.0.id(),
        "worker_start": worker_start,
        "generation": 3,
        "ram_bytes": 268_435_456,
    });
    write(&directory, "state.json", state.to_string());
}

#[test]
fn it_is_shown_as_orphaned_and_ended_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let mut worker = Worker::start();
    leave_behind(dir.path(), &worker, worker.start_time());
    write(&dir.path().join("web1"), "broker.log", "kept");

    let status = run(dir.path(), &["status", "web1", "--json"]);
    assert_eq!(code(&status), 0, "{}", stderr(&status));
    assert_eq!(document(&status)["state"], "orphaned");
    assert_eq!(document(&status)["worker_pid"], worker.0.id());
    assert_eq!(
        document(&run(dir.path(), &["list", "--json"]))[0]["state"],
        "orphaned"
    );
    for command in ["stop", "pause", "upgrade"] {
        let output = run(dir.path(), &[command, "web1"]);
        assert_eq!(code(&output), 3);
        assert!(
            stderr(&output).contains("baton stop --force web1"),
            "{}",
            stderr(&output)
        );
    }
    assert!(worker.runs());

    let output = run(dir.path(), &["stop", "web1", "--force", "--json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(document(&output)["result"], "ended");
    assert!(!worker.runs());
    let left = dir.path().join("web1");
    assert!(!left.join("state.json").exists() && !left.join("control.sock").exists());
    assert!(
        left.join("broker.log").exists(),
        "what may explain it is kept"
    );
}

#[test]
fn a_process_that_only_has_the_workers_pid_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut stranger = Worker::start();
    leave_behind(dir.path(), &stranger, stranger.start_time() - 1);
    let output = run(dir.path(), &["stop", "web1", "--force"]);
    assert_eq!(code(&output), 3);
    assert!(
        stderr(&output).contains("web1 has ended"),
        "{}",
        stderr(&output)
    );
    assert!(stranger.runs());
}

#[test]
fn a_worker_and_its_successor_are_both_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut successor) = (Worker::start(), Worker::start());
    leave_behind(dir.path(), &worker, worker.start_time());
    let state = dir.path().join("web1/state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    let mut document: serde_json::Value = serde_json::from_str(&text).unwrap();
    document["successor"] = json!({"pid": successor.0.id(), "start": successor.start_time()});
    std::fs::write(&state, document.to_string()).unwrap();
    let output = run(dir.path(), &["stop", "web1", "--force"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(!worker.runs() && !successor.runs());
}
