//! A QEMU at one end of a transfer, and Baton at the other: neither takes the other's guest, and both guests run on.

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::json;

use crate::qemu::Qemu;
use crate::qemu::SMALL;

/// Why the broker that waited has ended.
fn last_words(vm: &Vm) -> String {
    let log = format!(".audit/{}.incoming.jsonl", vm.site.name);
    let text = std::fs::read_to_string(vm.site.run_dir().join(log)).unwrap();
    let mut failed = text.lines().filter(|line| line.contains("\"failed\""));
    failed.next_back().unwrap_or_default().to_owned()
}

#[test]
fn a_qemu_that_comes_is_refused_by_name_and_its_guest_and_ours_run_on() {
    let vm = Builder::release().start();
    let before = vm.witness();
    let dir = tempfile::tempdir().unwrap();
    for round in 0..5 {
        let waiting = vm.wait_for_guest();
        let qemu = Qemu::start(dir.path(), &format!("old{round}"), SMALL, &[]);
        let mut qmp = qemu.connect();
        qmp.done("qmp_capabilities", json!({}));
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        // It has written all of its state as soon as somebody listens: only where nobody does is its guest not gone for it.
        let answer = qmp.ask("migrate", json!({"channels": waiting.channels()}));
        // It is refused while it writes its CPR state, or when that is written.
        if answer["error"].is_null() {
            let info = qmp.migrated();
            assert_eq!(info["status"], "failed", "{info}");
        }
        assert_eq!(qmp.status(), "running");
        assert_eq!(qmp.event_names(), [""; 0], "it was never stopped");
        vm.assert_nobody_waits(&waiting);
        let words = last_words(&vm);
        assert!(words.contains("a QEMU's CPR state"), "{words}");
    }
    vm.assert_goes_on(&before);
    vm.assert_only_runner(vm.worker());
}

#[test]
fn a_guest_does_not_go_to_a_qemu_and_runs_on() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let (main, cpr) = (vm.site.path("qemu-main"), vm.site.path("qemu-cpr"));
    let channel = |kind, path: &std::path::Path| baton_tests::transfer::channel(kind, path);
    let dir = tempfile::tempdir().unwrap();
    for incoming in ["defer".to_owned(), format!("unix:{}", main.display())] {
        let there = channel("cpr", &cpr).to_string();
        let arguments = ["-incoming", &incoming, "-incoming", &there];
        let _qemu = Qemu::start(dir.path(), "new", SMALL, &arguments);
        until("it listens", || {
            let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
            // `bind` comes before `listen`, which has the flag SO_ACCEPTCON (0x10000).
            let mine = |line: &&str| line.ends_with(&*cpr.to_string_lossy());
            let line = sockets.lines().find(mine)?;
            line.contains(" 00010000 ").then_some(())
        });
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        let channels = [channel("main", &main), channel("cpr", &cpr)];
        qmp.done("migrate", json!({"channels": channels}));
        let info = qmp.migrated();
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(reason.contains("QEMU"), "{reason}");
        assert_eq!(qmp.status(), "running");
        assert!(!qmp.event_names().contains(&"STOP".to_owned()));
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}
