//! `baton demo` against a broker and a guest that behave as told: what it finds, and that it leaves nothing behind.

use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_ipc::control::AuditReport;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::StartReport;
use baton_ipc::control::Started;
use baton_ipc::control::Verdict;

use crate::canned::*;

/// What goes wrong, and after how many upgrades.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    AbortedOnce,
    Aborted,
    Errors,
    Rebooted,
    LineLost,
    Finding,
    Silent,
}

/// A broker in shell that says where its run dir is, waits for the test to serve it, and ends when told to.
fn script(dir: &Path) -> PathBuf {
    let report = StartReport::Started(Started {
        name: "demo".to_owned(),
        broker_pid: 100,
        worker_pid: 101,
        generation: 1,
        directory: String::new(),
        start_us: 12_345,
        notes: Vec::new(),
    });
    let report = write(dir, "report", postcard::to_stdvec(&report).unwrap());
    let wait = |name: &str| {
        format!(
            "until [ -e {} ]; do sleep 0.02; done",
            dir.join(name).display()
        )
    };
    let text = format!(
        "#!/bin/sh\necho $$ > {0}/pid\necho $3 > {0}/new && mv {0}/new {0}/run-dir\n{1}\ncat {2} >&0\n{3}\n",
        dir.display(),
        wait("serving"),
        report.display(),
        wait("end")
    );
    let path = write(dir, "baton-broker", text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Prints lines until nobody listens; obeys `clear`.
fn guest(mut stream: UnixStream, upgrades: &AtomicU32, fault: Fault) {
    stream
        .set_read_timeout(Some(Duration::from_millis(5)))
        .unwrap();
    let mut line = 0;
    let mut typed = [0; 6];
    loop {
        line += 1;
        let hit = upgrades.load(Ordering::Acquire) >= 2;
        if hit && fault == Fault::Silent {
            // Holds the console open and says no more.
            while stream.read(&mut typed).map_or(true, |count| count > 0) {}
            return;
        }
        if hit && fault == Fault::LineLost && line % 2 == 0 {
            line += 1;
        }
        let (nonce, boot) = if hit && fault == Fault::Rebooted {
            (2, 2)
        } else {
            (1, 1)
        };
        let errors = u32::from(hit && fault == Fault::Errors);
        let text = format!(
            "baton-guest nonce={nonce:016x} boot={boot} line={line} seq={line}00 sweeps=3 errors={errors} back=0 maxgap_ticks=5000 tsc_khz=1\n"
        );
        if stream.write_all(text.as_bytes()).is_err() {
            return;
        }
        if matches!(stream.read(&mut typed), Ok(6)) {
            assert_eq!(&typed, b"clear\n");
            stream.write_all(b"baton-guest command=clear\n").unwrap();
        }
    }
}

fn serve(dir: &Path, fault: Fault) -> Heard {
    wait_for("the broker's start", || dir.join("run-dir").exists());
    let run_dir = std::fs::read_to_string(dir.join("run-dir")).unwrap();
    let run_dir = PathBuf::from(run_dir.trim());
    let upgrades = Arc::new(AtomicU32::new(0));
    let end = dir.join("end");
    let heard = start(
        &run_dir,
        "demo",
        Arc::new(move |request, _| {
            let reply = match request {
                Request::Status => Reply::Status(Box::new(status("demo"))),
                Request::Console => {
                    let (theirs, ours) = UnixStream::pair().unwrap();
                    let upgrades = upgrades.clone();
                    std::thread::spawn(move || guest(ours, &upgrades, fault));
                    return vec![(Reply::Console, vec![theirs.into()])];
                }
                Request::Upgrade { .. } => {
                    let number = upgrades.fetch_add(1, Ordering::AcqRel) + 1;
                    let ends = match fault {
                        Fault::AbortedOnce if number == 2 => Outcome::Aborted,
                        Fault::Aborted if number >= 2 => Outcome::Aborted,
                        _ => Outcome::Committed,
                    };
                    let mut outcome = outcome(ends);
                    outcome.generation = number + 1;
                    outcome.blackout_us = u64::from(number) * 1000;
                    Reply::Upgrade(Box::new(outcome))
                }
                Request::Audit => {
                    let verdict = match fault {
                        Fault::Finding => Verdict::Findings,
                        _ => Verdict::Proven,
                    };
                    Reply::Audit(Box::new(AuditReport {
                        verdict,
                        worker_pid: 101,
                        generation: 1,
                        worker_digest: "ab".repeat(32),
                        policy: "default".to_owned(),
                        policy_digest: "cd".repeat(32),
                        pause_us: 300,
                        checks: Vec::new(),
                        threads: Vec::new(),
                        descriptors: Vec::new(),
                        findings: Vec::new(),
                        weaker: Vec::new(),
                    }))
                }
                Request::Stop { force: true } => {
                    std::fs::write(&end, "").unwrap();
                    return Vec::new();
                }
                _ => Reply::Refused(refusal(baton_ipc::control::Exit::Usage)),
            };
            vec![(reply, Vec::new())]
        }),
    );
    write(dir, "serving", "");
    heard
}

fn demo(dir: &Path) -> Command {
    let broker = script(dir);
    // Any static program passes for a worker; nobody runs it.
    let worker = env!("CARGO_BIN_EXE_baton");
    let arguments = ["demo", "--upgrades", "3", "--json", "--worker", worker];
    let mut command = baton(dir, &arguments);
    std::fs::create_dir(dir.join("tmp")).unwrap();
    command
        .env("BATON_BROKER", broker)
        .env("TMPDIR", dir.join("tmp"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn nothing_is_left(dir: &Path) {
    let left: Vec<_> = std::fs::read_dir(dir.join("tmp")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let pid = std::fs::read_to_string(dir.join("pid")).unwrap();
    assert!(
        !Path::new("/proc").join(pid.trim()).exists(),
        "the broker still runs"
    );
}

fn run_with(fault: Fault) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let child = demo(dir.path()).spawn().unwrap();
    serve(dir.path(), fault);
    let output = child.wait_with_output().unwrap();
    nothing_is_left(dir.path());
    output
}

#[test]
fn it_prints_what_the_surface_promises() {
    let output = run_with(Fault::None);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let document = document(&output);
    assert_eq!(
        document["blackout_us"],
        serde_json::json!([1000, 2000, 3000])
    );
    // 5,000 ticks at 2 GHz, rounded down.
    assert_eq!(document["guest_gap_us"], 2);
    assert_eq!(document["nonce"], "0000000000000001");
    assert_eq!(document["upgrades"][2]["generation"], 4);
    assert_eq!(document["audit"]["verdict"], "proven");
    assert_eq!(document["guest"]["errors"], 0);
}

#[test]
fn whatever_the_guest_notices_is_a_finding() {
    for (fault, words) in [
        (Fault::Errors, "not as it had left them"),
        (Fault::Rebooted, "console is broken"),
        (Fault::LineLost, "console is broken"),
    ] {
        let output = run_with(fault);
        assert_eq!(code(&output), 1, "{fault:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn an_audit_that_proves_nothing_is_not_passed_over() {
    let output = run_with(Fault::Finding);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert_eq!(document(&output)["audit"]["verdict"], "findings");
}

#[test]
fn an_aborted_upgrade_is_tried_again_and_not_hidden() {
    let output = run_with(Fault::AbortedOnce);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let document = document(&output);
    assert_eq!(document["upgrades"].as_array().unwrap().len(), 3);
    assert_eq!(
        document["blackout_us"],
        serde_json::json!([1000, 3000, 4000])
    );
    assert_eq!(document["aborts"][0]["failed_step"], "load");
}

#[test]
fn an_upgrade_that_does_not_go_through_ends_it() {
    let output = run_with(Fault::Aborted);
    assert_eq!(code(&output), 10);
    assert!(
        stderr(&output).contains("upgrade 2 did not go through in S8 load: the digests differ"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_interrupt_ends_everything() {
    let dir = tempfile::tempdir().unwrap();
    let child = demo(dir.path()).spawn().unwrap();
    let heard = serve(dir.path(), Fault::Silent);
    // It waits for the guest that has fallen silent, or is just about to.
    wait_for("the second upgrade", || {
        let requests = heard.requests();
        let upgrades = requests
            .iter()
            .filter(|request| matches!(request, Request::Upgrade { .. }));
        upgrades.count() == 2
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 3, "{}", stderr(&output));
    assert!(
        stderr(&output).contains("interrupted"),
        "{}",
        stderr(&output)
    );
    assert!(heard.requests().contains(&Request::Stop { force: true }));
    nothing_is_left(dir.path());
}
