//! `baton run`: how a broker is started, what is made of its start report, and how the two end.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use crate::canned::*;
use baton_ipc::control::Exit;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::StartReport;
use baton_ipc::control::Started;
use serde_json::json;

/// A broker in shell: leaves its arguments in `arguments`, sends `report`, then does `then`.
fn broker(dir: &Path, report: Option<&StartReport>, then: &str) -> PathBuf {
    let send = match report {
        Some(report) => {
            let path = write(dir, "report", postcard::to_stdvec(report).unwrap());
            // One write, one message; standard input is the socket.
            format!("cat {} >&0", path.display())
        }
        None => String::new(),
    };
    let arguments = dir.join("arguments");
    let script = format!(
        "#!/bin/sh\nprintf '%s\\n' \"$@\" > {}\n{send}\n{then}\n",
        arguments.display()
    );
    let path = write(dir, "baton-broker", script);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn started() -> StartReport {
    StartReport::Started(Started {
        name: "web1".to_owned(),
        broker_pid: 100,
        worker_pid: 101,
        generation: 1,
        directory: "/run/baton/web1".to_owned(),
        start_us: 12_345,
        notes: vec!["removed a stale socket".to_owned()],
    })
}

fn start_vm(dir: &Path, broker: &Path, arguments: &[&str]) -> Command {
    let mut command = baton(dir, arguments);
    command.env("BATON_BROKER", broker).stdin(Stdio::null());
    command
}

#[test]
fn a_detached_start_prints_what_the_surface_promises() {
    let dir = tempfile::tempdir().unwrap();
    let broker = broker(dir.path(), Some(&started()), "");
    let output = start_vm(
        dir.path(),
        &broker,
        &[
            "run",
            "web1.toml",
            "--detach",
            "--worker",
            "w",
            "--log",
            "--json",
        ],
    )
    .output()
    .unwrap();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(
        document(&output),
        json!({ "name": "web1", "broker_pid": 100, "worker_pid": 101, "generation": 1, "qmp": "/run/baton/web1/qmp.sock" })
    );
    assert!(stderr(&output).contains("note: removed a stale socket"));
    let arguments = std::fs::read_to_string(dir.path().join("arguments")).unwrap();
    assert_eq!(
        arguments.lines().collect::<Vec<_>>(),
        [
            "serve",
            "--run-dir",
            dir.path().to_str().unwrap(),
            "--worker",
            "w",
            "--log",
            "--detach",
            "web1.toml"
        ]
    );
}

#[test]
fn a_failed_start_gives_the_brokers_reason_and_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let report = StartReport::Failed(refusal(Exit::Refused));
    let broker = broker(dir.path(), Some(&report), "");
    let output = start_vm(dir.path(), &broker, &["run", "web1.toml"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 30);
    assert_eq!(
        stderr(&output),
        "error: another upgrade is under way\n  wait for it\n"
    );
}

#[test]
fn a_broker_that_dies_in_silence_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let broker = broker(dir.path(), None, "exit 7");
    let output = start_vm(dir.path(), &broker, &["run", "web1.toml"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 3);
    assert!(
        stderr(&output).contains("exit status: 7"),
        "{}",
        stderr(&output)
    );

    let output = start_vm(dir.path(), Path::new("/nonexistent"), &["run", "web1.toml"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 3);
    assert!(
        stderr(&output).contains("/nonexistent"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_attached_run_ends_as_its_broker_ends() {
    for (then, status) in [
        ("exit 0", 0),
        ("exit 20", 20),
        ("exit 99", 3),
        ("kill -9 $$", 3),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let broker = broker(dir.path(), Some(&started()), then);
        let output = start_vm(dir.path(), &broker, &["run", "web1.toml"])
            .output()
            .unwrap();
        assert_eq!(code(&output), status, "{then}: {}", stderr(&output));
    }
}

#[test]
fn a_stdio_console_and_json_cannot_share_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "web1.toml", "[console]\nkind = \"stdio\"\n");
    let broker = broker(dir.path(), Some(&started()), "");
    let output = start_vm(
        dir.path(),
        &broker,
        &["run", file.to_str().unwrap(), "--json"],
    )
    .output()
    .unwrap();
    assert_eq!(code(&output), 2);
    assert!(
        !dir.path().join("arguments").exists(),
        "nothing was started"
    );
}

/// Sends SIGINT to the group that a process of this test leads, as a terminal does on Ctrl-C.
fn interrupt(child: &std::process::Child) {
    let group = rustix::process::Pid::from_child(child);
    rustix::process::kill_process_group(group, rustix::process::Signal::INT).unwrap();
}

#[test]
fn the_first_interrupt_asks_the_guest_and_the_second_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    // Ends when the test says so; an interrupt that reached it would end it too early.
    let end = dir.path().join("end");
    let script = format!(
        "until [ -e {} ]; do sleep 0.05; done; exit 0",
        end.display()
    );
    let broker = broker(dir.path(), Some(&started()), &script);
    let heard = start(dir.path(), "web1", always(Reply::Done));
    let mut child = start_vm(dir.path(), &broker, &["run", "web1.toml"])
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 13];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    assert_eq!(&line, b"web1: running");
    interrupt(&child);
    wait_for("the first request", || !heard.requests().is_empty());
    interrupt(&child);
    wait_for("the second request", || heard.requests().len() == 2);
    write(dir.path(), "end", "");
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(
        heard.requests(),
        [
            Request::Stop { force: false },
            Request::Stop { force: true }
        ]
    );
}

#[test]
fn an_interrupt_cancels_an_upgrade_and_its_outcome_is_still_told() {
    use baton_ipc::control::Outcome;
    use std::sync::Condvar;
    use std::sync::Mutex;

    let dir = tempfile::tempdir().unwrap();
    let cancelled = Arc::new((Mutex::new(false), Condvar::new()));
    let heard = start(
        dir.path(),
        "web1",
        Arc::new(move |request, _| match request {
            Request::Cancel => {
                *cancelled.0.lock().unwrap() = true;
                cancelled.1.notify_all();
                vec![(Reply::Done, Vec::new())]
            }
            _ => {
                let lock = cancelled.0.lock().unwrap();
                let patience = Duration::from_secs(20);
                drop(
                    cancelled
                        .1
                        .wait_timeout_while(lock, patience, |done| !*done),
                );
                vec![(
                    Reply::Upgrade(Box::new(outcome(Outcome::Aborted))),
                    Vec::new(),
                )]
            }
        }),
    );
    let child = baton(dir.path(), &["upgrade", "web1", "--json"])
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the upgrade begins", || !heard.requests().is_empty());
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 10, "{}", stderr(&output));
    assert_eq!(document(&output)["outcome"], "aborted");
    assert_eq!(
        heard.requests(),
        [Request::Upgrade { dry_run: false }, Request::Cancel]
    );
}
