//! `baton upgrade --all`: the order, the canaries, and the worst end.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;

use crate::canned::*;
use baton_ipc::control::Exit;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use serde_json::Value;

/// Brokers `vm0`, `vm1`, … whose upgrades end so; gives the order in which they were asked.
fn fleet(run_dir: &Path, ends: &[Result<Outcome, Exit>]) -> Arc<Mutex<Vec<usize>>> {
    let order = Arc::new(Mutex::new(Vec::new()));
    for (index, end) in ends.iter().copied().enumerate() {
        let order = order.clone();
        start(
            run_dir,
            &format!("vm{index}"),
            Arc::new(move |_, _| {
                order.lock().unwrap().push(index);
                let reply = match end {
                    Ok(end) => Reply::Upgrade(Box::new(outcome(end))),
                    Err(exit) => Reply::Refused(refusal(exit)),
                };
                vec![(reply, Vec::new())]
            }),
        );
    }
    order
}

fn outcomes(document: &Value) -> Vec<&str> {
    let vms = document["vms"].as_array().unwrap();
    vms.iter()
        .map(|vm| vm["outcome"].as_str().unwrap())
        .collect()
}

#[test]
fn every_vm_is_upgraded() {
    let dir = tempfile::tempdir().unwrap();
    let order = fleet(dir.path(), &[Ok(Outcome::Committed); 7]);
    let output = run(
        dir.path(),
        &[
            "upgrade",
            "--all",
            "--canary",
            "2",
            "--parallel",
            "3",
            "--json",
        ],
    );
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let document = document(&output);
    assert_eq!(document["succeeded"], 7);
    assert_eq!(outcomes(&document), ["committed"; 7]);
    let order = order.lock().unwrap();
    assert_eq!(order[..2], [0, 1], "the canaries come first, one by one");
    assert_eq!(order.len(), 7);
}

#[test]
fn the_first_canary_that_is_not_committed_is_the_last_vm() {
    for (bad, status) in [
        (Ok(Outcome::Aborted), 10),
        (Ok(Outcome::Lost), 20),
        (Err(Exit::Refused), 30),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let ends = [
            Ok(Outcome::Committed),
            bad,
            Ok(Outcome::Committed),
            Ok(Outcome::Committed),
        ];
        let order = fleet(dir.path(), &ends);
        let output = run(dir.path(), &["upgrade", "--all", "--canary", "3", "--json"]);
        assert_eq!(code(&output), status);
        let document = document(&output);
        assert_eq!(*order.lock().unwrap(), [0, 1]);
        assert_eq!(document["skipped"], 2);
        assert_eq!(outcomes(&document)[2..], ["skipped", "skipped"]);
    }
}

#[test]
fn after_the_canaries_an_abort_does_not_stop_the_rest_but_a_loss_does() {
    let dir = tempfile::tempdir().unwrap();
    let ends = [
        Ok(Outcome::Aborted),
        Err(Exit::Busy),
        Ok(Outcome::Committed),
    ];
    let order = fleet(dir.path(), &ends);
    let arguments = ["upgrade", "--all", "--parallel", "1", "--json"];
    let output = run(dir.path(), &arguments);
    assert_eq!(code(&output), 10, "the worst of 10, 75 and 0");
    assert_eq!(order.lock().unwrap().len(), 3);
    assert_eq!(document(&output)["vms"][1]["error"]["code"], 75);

    let dir = tempfile::tempdir().unwrap();
    let order = fleet(dir.path(), &[Ok(Outcome::Lost), Ok(Outcome::Committed)]);
    assert_eq!(code(&run(dir.path(), &arguments)), 20);
    assert_eq!(*order.lock().unwrap(), [0]);
}

#[test]
fn a_pipe_gets_a_line_per_vm_and_an_empty_fleet_is_done() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(code(&run(dir.path(), &["upgrade", "--all"])), 0);
    fleet(dir.path(), &[Ok(Outcome::Committed), Ok(Outcome::Aborted)]);
    let output = run(dir.path(), &["upgrade", "--all"]);
    assert_eq!(
        stdout(&output),
        "vm0\tcommitted\t2\t1.23 ms\t48 ms\t\nvm1\taborted\t2\t1.23 ms\t48 ms\tin S8 load: the digests differ\n"
    );
}

#[test]
fn each_vm_reads_the_same_worker_from_its_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let worker = write(dir.path(), "worker", "a worker");
    let got = Arc::new(Mutex::new(Vec::new()));
    for index in 0..4 {
        let got = got.clone();
        start(
            dir.path(),
            &format!("vm{index}"),
            Arc::new(move |_, descriptors: Vec<OwnedFd>| {
                let mut text = String::new();
                for descriptor in descriptors {
                    std::fs::File::from(descriptor)
                        .read_to_string(&mut text)
                        .unwrap();
                }
                got.lock().unwrap().push(text);
                vec![(
                    Reply::Upgrade(Box::new(outcome(Outcome::Committed))),
                    Vec::new(),
                )]
            }),
        );
    }
    let worker = worker.to_str().unwrap();
    assert_eq!(
        code(&run(dir.path(), &["upgrade", "--all", "--worker", worker])),
        0
    );
    assert_eq!(*got.lock().unwrap(), ["a worker"; 4]);
}
