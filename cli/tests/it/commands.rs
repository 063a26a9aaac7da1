//! What each command prints and how it exits, against a broker that answers as told.

use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;

use crate::canned::*;
use baton_ipc::control::AuditDescriptor;
use baton_ipc::control::AuditReport;
use baton_ipc::control::AuditThread;
use baton_ipc::control::Exit;
use baton_ipc::control::Finding;
use baton_ipc::control::Outcome;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::Step;
use baton_ipc::control::Verdict;
use serde_json::json;

fn upgrade_answer(end: Outcome) -> Arc<Answer> {
    Arc::new(move |_, _| {
        vec![
            (Reply::Progress(Step::Spawn), Vec::new()),
            (Reply::Progress(Step::Build), Vec::new()),
            (Reply::Upgrade(Box::new(outcome(end))), Vec::new()),
        ]
    })
}

#[test]
fn status_prints_what_the_surface_promises() {
    let dir = tempfile::tempdir().unwrap();
    start(
        dir.path(),
        "web1",
        always(Reply::Status(Box::new(status("web1")))),
    );
    let output = run(dir.path(), &["status", "web1", "--json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let document = document(&output);
    for (field, value) in [
        ("name", json!("web1")),
        ("state", json!("running")),
        ("broker_pid", json!(100)),
        ("worker_pid", json!(101)),
        ("generation", json!(2)),
        ("uptime_s", json!(61)),
        ("ram_bytes", json!(268_435_456)),
    ] {
        assert_eq!(document[field], value, "{field}");
    }
    assert_eq!(document["last_upgrade"]["blackout_us"], 1234);
    assert_eq!(
        document["last_upgrade"]["phases"],
        json!({ "spawn_us": 4000, "hand_over_us": 300 })
    );
    let text = stdout(&run(dir.path(), &["status", "web1"]));
    assert!(text.contains("state: running"), "{text}");
    assert!(text.contains("uptime: 1 min 1 s"), "{text}");
}

#[test]
fn a_worker_that_does_not_answer_is_pointed_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut silent = status("web1");
    silent.worker_answers = false;
    start(dir.path(), "web1", always(Reply::Status(Box::new(silent))));
    for arguments in [["status", "web1"].as_slice(), &["list"]] {
        let text = stdout(&run(dir.path(), arguments));
        let words = "running, and its worker does not answer";
        assert!(text.contains(words), "{text}");
    }
    let output = run(dir.path(), &["status", "web1", "--json"]);
    assert_eq!(document(&output)["worker_answers"], false);
}

#[test]
fn a_path_longer_than_a_sockets_address_works() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    start(
        &deep,
        "web1",
        always(Reply::Status(Box::new(status("web1")))),
    );
    assert_eq!(code(&run(&deep, &["status", "web1"])), 0);
}

#[test]
fn list_is_an_array_and_one_dead_vm_does_not_hide_the_others() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(document(&run(dir.path(), &["list", "--json"])), json!([]));
    for vm in ["b", "a"] {
        start(dir.path(), vm, always(Reply::Status(Box::new(status(vm)))));
    }
    std::fs::create_dir(dir.path().join("dead")).unwrap();
    let output = run(dir.path(), &["list", "--json"]);
    assert_eq!(code(&output), 0);
    let document = document(&output);
    assert_eq!(document[0]["name"], "a");
    assert_eq!(document[1]["name"], "b");
    assert_eq!(document.as_array().unwrap().len(), 2);
    assert!(stderr(&output).contains("dead has ended"));
    assert_eq!(stdout(&run(dir.path(), &["list"])).lines().count(), 2);
}

#[test]
fn an_upgrade_says_how_it_ended() {
    for (end, name, status) in [
        (Outcome::Committed, "committed", 0),
        (Outcome::Rehearsed, "rehearsed", 0),
        (Outcome::Aborted, "aborted", 10),
        (Outcome::Lost, "lost", 20),
    ] {
        let dir = tempfile::tempdir().unwrap();
        start(dir.path(), "web1", upgrade_answer(end));
        let output = run(dir.path(), &["upgrade", "web1", "--json"]);
        assert_eq!(code(&output), status, "{}", stderr(&output));
        let document = document(&output);
        assert_eq!(document["outcome"], name);
        assert_eq!(document["generation"], 2);
        assert_eq!(document["blackout_us"], 1234);
        assert_eq!(document["total_ms"], 48);
        assert_eq!(document["state_bytes"], 12_345);
        assert_eq!(document["phases"]["hand_over_us"], 300);
        if status != 0 {
            assert_eq!(document["failed_step"], "load");
            let text = stderr(&run(dir.path(), &["upgrade", "web1"]));
            assert!(text.contains("S8 load: the digests differ"), "{text}");
        }
    }
}

#[test]
fn the_new_worker_goes_over_as_a_descriptor_and_never_as_a_path() {
    let dir = tempfile::tempdir().unwrap();
    let worker = write(dir.path(), "worker", "a worker");
    let got = Arc::new(Mutex::new(Vec::new()));
    let seen = got.clone();
    let heard = start(
        dir.path(),
        "web1",
        Arc::new(move |_, descriptors: Vec<OwnedFd>| {
            for descriptor in descriptors {
                let mut text = String::new();
                std::fs::File::from(descriptor)
                    .read_to_string(&mut text)
                    .unwrap();
                seen.lock().unwrap().push(text);
            }
            vec![(
                Reply::Upgrade(Box::new(outcome(Outcome::Committed))),
                Vec::new(),
            )]
        }),
    );
    let worker = worker.to_str().unwrap();
    let output = run(
        dir.path(),
        &["upgrade", "web1", "--worker", worker, "--dry-run"],
    );
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(*got.lock().unwrap(), ["a worker"]);
    assert_eq!(heard.requests(), [Request::Upgrade { dry_run: true }]);

    for (path, words) in [
        ("/nonexistent/worker", "check the path"),
        ("/dev/null", "not a regular file"),
    ] {
        let output = run(dir.path(), &["upgrade", "web1", "--worker", path]);
        assert_eq!(code(&output), 3);
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn a_refusal_gives_its_exit_status_reason_and_remedy() {
    for (exit, status) in [
        (Exit::Refused, 30),
        (Exit::Busy, 75),
        (Exit::Unfit, 3),
        // Whatever a broker says, a refusal is no success.
        (Exit::Done, 3),
    ] {
        let dir = tempfile::tempdir().unwrap();
        start(dir.path(), "web1", always(Reply::Refused(refusal(exit))));
        for command in [
            "upgrade", "status", "pause", "resume", "reset", "stop", "audit", "console",
        ] {
            let output = run(dir.path(), &[command, "web1", "--json"]);
            assert_eq!(code(&output), status, "{command}");
            assert_eq!(
                stderr(&output),
                "error: another upgrade is under way\n  wait for it\n"
            );
            assert_eq!(
                document(&output)["error"]["reason"],
                "another upgrade is under way"
            );
        }
    }
}

#[test]
fn each_order_is_the_request_that_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let heard = start(dir.path(), "web1", always(Reply::Done));
    for command in ["pause", "resume", "reset"] {
        let output = run(dir.path(), &[command, "web1", "--json"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert_eq!(document(&output)["name"], "web1");
    }
    assert_eq!(
        heard.requests(),
        [Request::Pause, Request::Resume, Request::Reset]
    );
}

#[test]
fn a_stop_waits_for_the_broker_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let heard = start(dir.path(), "web1", Arc::new(|_, _| Vec::new()));
    for (arguments, force) in [
        (&["stop", "web1"][..], false),
        (&["stop", "web1", "--force"], true),
    ] {
        let output = run(dir.path(), &[arguments, &["--json"]].concat());
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert_eq!(document(&output)["result"], "ended");
        assert_eq!(heard.requests().last(), Some(&Request::Stop { force }));
    }
}

#[test]
fn an_answer_that_does_not_fit_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path(), "web1", always(Reply::Console));
    for command in ["upgrade", "status", "pause", "audit", "console"] {
        assert_eq!(code(&run(dir.path(), &[command, "web1"])), 3, "{command}");
    }
}

#[test]
fn a_broker_of_another_version_is_not_spoken_to() {
    let dir = tempfile::tempdir().unwrap();
    let heard = start_speaking(dir.path(), "web1", PROTOCOL + 1, always(Reply::Done));
    let output = run(dir.path(), &["pause", "web1"]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("use the `baton` that started this VM"));
    assert!(heard.requests().is_empty());
}

#[test]
fn a_broker_that_hangs_up_in_an_upgrade_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path(), "web1", Arc::new(|_, _| Vec::new()));
    let output = run(dir.path(), &["upgrade", "web1"]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("baton status web1"));
}

#[test]
fn an_unknown_vm_names_those_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &["status", "web1"]);
    assert_eq!(code(&output), 3);
    assert!(
        stderr(&output).contains("baton run VM.toml"),
        "{}",
        stderr(&output)
    );
    start(dir.path(), "db1", always(Reply::Done));
    assert!(stderr(&run(dir.path(), &["status", "web1"])).contains("here: db1"));
    for name in ["../db1", ".", "", "a/b"] {
        assert_eq!(code(&run(dir.path(), &["status", name])), 2, "{name}");
    }
}

#[test]
fn a_console_copies_both_ways_until_the_guest_closes_it() {
    let dir = tempfile::tempdir().unwrap();
    start(
        dir.path(),
        "web1",
        Arc::new(|_, _| {
            let (theirs, mut ours) = UnixStream::pair().unwrap();
            std::thread::spawn(move || {
                let mut typed = [0; 6];
                ours.write_all(b"login: ").unwrap();
                ours.read_exact(&mut typed).unwrap();
                ours.write_all(b"hello ").unwrap();
                ours.write_all(&typed).unwrap();
            });
            vec![(Reply::Console, vec![theirs.into()])]
        }),
    );
    let mut child = baton(dir.path(), &["console", "web1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"guest\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 0);
    assert_eq!(stdout(&output), "login: hello guest\n");
}

fn report(findings: Vec<Finding>) -> AuditReport {
    AuditReport {
        verdict: if findings.is_empty() {
            Verdict::Proven
        } else {
            Verdict::Findings
        },
        worker_pid: 101,
        generation: 1,
        worker_digest: "ab".repeat(32),
        policy: "default".to_owned(),
        policy_digest: "cd".repeat(32),
        pause_us: 300,
        checks: Vec::new(),
        threads: vec![AuditThread {
            tid: 101,
            role: "control".to_owned(),
            filters: 2,
            proof: "compared byte for byte".to_owned(),
        }],
        descriptors: vec![AuditDescriptor {
            fd: 3,
            target: "/dev/kvm".to_owned(),
            grant: "kvm#0".to_owned(),
            kind: Some(baton_ipc::DescriptorKind::Kvm),
            access: Some(baton_ipc::Access::ReadWrite),
            identity: (5, 77),
            seals: Vec::new(),
        }],
        findings,
        weaker: vec!["no huge pages".to_owned()],
    }
}

#[test]
fn an_audit_with_findings_exits_with_one() {
    let dir = tempfile::tempdir().unwrap();
    start(
        dir.path(),
        "good",
        always(Reply::Audit(Box::new(report(Vec::new())))),
    );
    let finding = Finding {
        rule: "capabilities".to_owned(),
        subject: "thread 101".to_owned(),
        declared: "none".to_owned(),
        found: "CAP_NET_ADMIN".to_owned(),
    };
    start(
        dir.path(),
        "bad",
        always(Reply::Audit(Box::new(report(vec![finding.clone()])))),
    );
    // A verdict that its own findings contradict.
    start(
        dir.path(),
        "liar",
        always(Reply::Audit(Box::new(AuditReport {
            verdict: Verdict::Proven,
            ..report(vec![finding])
        }))),
    );
    let output = run(dir.path(), &["audit", "good", "--json"]);
    assert_eq!(code(&output), 0);
    assert_eq!(document(&output)["verdict"], "proven");
    assert_eq!(document(&output)["threads"][0]["role"], "control");
    assert_eq!(document(&output)["descriptors"][0]["access"], "read-write");
    let output = run(dir.path(), &["audit", "bad", "--json"]);
    assert_eq!(code(&output), 1);
    assert_eq!(document(&output)["findings"][0]["found"], "CAP_NET_ADMIN");
    assert_eq!(code(&run(dir.path(), &["audit", "liar"])), 1);

    let path = |name: &str| dir.path().join(name).display().to_string();
    let (sarif, html) = (path("all.sarif"), path("all.html"));
    let all = [
        "audit", "--all", "--json", "--sarif", &sarif, "--html", &html,
    ];
    let output = run(dir.path(), &all);
    assert_eq!(code(&output), 1);
    let names: Vec<_> = document(&output)
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].clone())
        .collect();
    assert_eq!(names, ["bad", "good", "liar"]);
    let text = std::fs::read_to_string(sarif).unwrap();
    let sarif: serde_json::Value = serde_json::from_str(&text).unwrap();
    let results = sarif["runs"][0]["results"].as_array().unwrap();
    let failed = results.iter().filter(|one| one["kind"] == "fail");
    assert_eq!(failed.count(), 2, "{sarif}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("3 VMs, 2 with findings"));
}

#[test]
fn a_wrong_command_line_exits_with_two() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["upgrade"][..],
        &["upgrade", "--all", "web1"],
        &["upgrade", "web1", "--canary", "1"],
        &["upgrade", "--all", "--parallel", "0"],
        &["audit"],
        &["audit", "--all", "web1"],
        &["no-such-command"],
        &["stop"],
    ] {
        assert_eq!(code(&run(dir.path(), arguments)), 2, "{arguments:?}");
    }
}
