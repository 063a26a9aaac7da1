//! A running guest goes from one broker to another, and cannot tell; its name, disks, console and audit log go with it.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::io::Read;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::is_alive;
use baton_tests::transfer::channel;
use baton_tests::until;
use serde_json::json;

#[test]
fn the_guest_the_name_and_the_log_go_to_the_new_broker() {
    let mut vm = Builder::release().start();
    let (before, old, old_broker) = (vm.witness(), vm.worker(), vm.broker);
    let id = vm.status()["id"].clone();
    let waiting = vm.wait_for_guest();
    let waits = vm
        .site
        .baton(["status", &format!("{}.incoming", vm.site.name)]);
    assert_eq!(waits.expect(0).json()["state"], "incoming");
    assert_eq!(
        vm.worker(),
        old,
        "the name is the old broker's until the commit"
    );

    let mut qmp = Qmp::connect(&vm);
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "completed", "{info}");
    assert!(info["downtime"].as_u64().unwrap() > 0, "{info}");
    // The old side, as QEMU's: it has no guest, and says so to those who stay.
    assert_eq!(qmp.status(), "postmigrate");
    let told = [
        "MIGRATION setup",
        "STOP",
        "MIGRATION active",
        "MIGRATION device",
        "MIGRATION completed",
        "__org.baton_WORKER_REPLACED",
    ];
    assert_eq!(qmp.event_names(), told);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let again = qmp.refused("migrate", json!({"channels": waiting.channels()}));
    assert_eq!(
        again,
        "Can't migrate the vm that was paused due to previous migration"
    );
    assert!(qmp.refused("cont", json!({})).contains("another broker"));
    qmp.done("quit", json!({}));
    vm.assert_taken_over(&waiting);
    assert!(!is_alive(old) && !is_alive(old_broker));

    // The new side is an ordinary broker of the same VM.
    let status = vm.status();
    assert_eq!(status["id"], id);
    assert_eq!(status["generation"], 2);
    assert_eq!(status["state"], "running");
    assert_eq!(status["last_upgrade"]["outcome"], "committed");
    vm.assert_only_runner(vm.worker());
    vm.assert_goes_on(&before);
    vm.ask("audit").expect(0);
    let mut qmp = Qmp::connect(&vm);
    assert_eq!(
        qmp.returns("query-migrate", json!({}))["status"],
        "completed"
    );
    assert_eq!(
        qmp.returns("query-migrate-parameters", json!({}))["mode"],
        "normal"
    );
    vm.assert_upgrades();
    let log = vm.audit_log();
    assert_eq!(log.upgrades(), ["committed", "committed"]);
    assert_eq!((log.count("taken-over"), log.count("vm-end")), (1, 0));
    for path in [&waiting.main, &waiting.cpr] {
        assert!(!path.exists(), "{}", path.display());
    }
}

#[test]
fn the_logs_of_both_brokers_answer_for_each_other() {
    let mut vm = Builder::release().start();
    vm.assert_transfers();
    vm.assert_transfers();
    let verify = || vm.site.baton(["log", "verify", &vm.site.name]);
    verify().expect(0);
    let audit = vm.site.run_dir().join(".audit");
    let waited = audit.join(format!("{}.incoming.jsonl", vm.site.name));
    let text = std::fs::read_to_string(&waited).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["metadata"]["event_code"], "continued");
    let head = last["unmapped"]["in"]["head"].as_str().unwrap();
    let log = std::fs::read_to_string(audit.join(format!("{}.jsonl", vm.site.name))).unwrap();
    assert!(log.contains(&format!("\"prev\":\"{head}\"")), "{head}");

    // Without its end, as a whole, and gone: each is seen from the VM's own log.
    let shorter = text.trim_end().rfind('\n').unwrap();
    for (remains, words) in [(&text[..=shorter], "end-removed"), ("", "end-removed")] {
        std::fs::write(&waited, remains).unwrap();
        let said = verify().expect(1);
        assert!(said.stdout.contains(words), "{said:?}");
    }
    std::fs::remove_file(&waited).unwrap();
    verify().expect(1);
    std::fs::write(&waited, &text).unwrap();
    verify().expect(0);
}

#[test]
fn fifty_brokers_follow_each_other() {
    let mut vm = Builder::release().start();
    let first = vm.witness();
    for _ in 0..50 {
        vm.assert_transfers();
    }
    let last = vm.assert_goes_on(&first);
    assert_eq!(last.report().nonce, first.report().nonce);
    let lines = vm.status_lines().lines;
    assert!(lines.iter().all(|line| line.nonce == first.report().nonce));
    assert_eq!(vm.audit_log().upgrades(), ["committed"; 50]);
}

#[test]
fn a_disk_stays_open_and_locked() {
    let mut vm = Builder::release().disk("root", 8, "").start();
    vm.assert_transfers();
    vm.assert_transfers();
    let other = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = other.replace(&vm.site.name, &format!("{}-thief", vm.site.name));
    vm.site.write("thief.toml", other);
    let refused = vm.site.run("thief.toml").expect(3);
    assert!(refused.stderr.contains("is locked"), "{refused:?}");
}

#[test]
fn who_listens_to_the_console_goes_on_listening() {
    let mut vm = Builder::release().start();
    let mut console = vm.at_console(&[]);
    let mut stream = console.stdout.take().unwrap();
    let mut seen = String::new();
    let mut read_on = |seen: &mut String, until_longer_than: usize| {
        let mut buffer = [0; 4096];
        while seen.len() <= until_longer_than {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "the console hung up");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    read_on(&mut seen, 200);
    vm.assert_transfers();
    let length = seen.len();
    read_on(&mut seen, length + 4096);
    let log = baton_guest::StatusLog::parse(&seen);
    assert!(log.unwrap().lines.len() > 10, "every line once, in order");
    console.kill().unwrap();
    console.wait().unwrap();
}

#[test]
fn a_paused_guest_stays_paused() {
    let mut vm = Builder::release().start();
    vm.ask("pause").expect(0);
    vm.assert_stands_still();
    let waiting = vm.wait_for_guest();
    let mut qmp = Qmp::connect(&vm);
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "completed", "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    assert_eq!(vm.state(), "paused");
    vm.assert_stands_still();
    let before = vm.witness();
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);
}

#[test]
fn a_guest_that_comes_to_a_paused_side_stands_still_there() {
    let mut vm = Builder::release().start();
    let waiting = vm.wait_from("vm.toml", &["-S"]);
    let mut qmp = Qmp::connect(&vm);
    assert_eq!(vm.migrate_to(&mut qmp, &waiting)["status"], "completed");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    until("it is paused", || (vm.state() == "paused").then_some(()));
    vm.assert_stands_still();
    let before = vm.witness();
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);
}

#[test]
fn nobody_waits_for_ever_for_a_migrate_incoming() {
    for (old_faults, new_faults, reason) in [
        (
            "defer-hurries",
            "",
            "`migrate-incoming` on the other side did not come in time",
        ),
        (
            "",
            "defer-hurries",
            "the new side: `migrate-incoming` did not come in time",
        ),
    ] {
        let mut vm = Builder::faulty(old_faults).start();
        let (before, old) = (vm.witness(), vm.worker());
        vm.site.environment("BATON_FAIL", new_faults);
        let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
        vm.site.environment("BATON_FAIL", "");
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        let info = qmp.migrated();
        assert_eq!(info["status"], "failed", "{info}");
        assert_eq!(info["error-desc"], reason, "{info}");
        drop(qmp);
        vm.assert_nobody_waits(&waiting);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
        vm.assert_transfers();
    }
}

#[test]
fn a_deferred_side_says_what_is_missing_and_goes_on_when_told() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
    let mut old = Qmp::connect(&vm);
    let mut new = Qmp::connect_to(&vm, &format!("{}.incoming", vm.site.name));
    // Before there is a CPR state: it can be asked, configured and told to quit.
    assert_eq!(new.status(), "inmigrate");
    let awaits = |qmp: &mut Qmp| {
        let info = qmp.returns("query-migrate", json!({}));
        let what = info["__org.baton_awaits"].as_str().map(str::to_owned);
        (what, info["__org.baton_awaits-ms"].as_u64())
    };
    let (what, left) = awaits(&mut new);
    assert_eq!(what.as_deref(), Some("another broker on the cpr channel"));
    assert_eq!(left, None);
    assert_eq!(awaits(&mut old), (None, None));
    new.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let waits = new.refused("migrate", json!({}));
    assert_eq!(waits, "Guest is waiting for an incoming migration");
    let elsewhere = old.refused("migrate-incoming", json!({"uri": "unix:/nowhere"}));
    assert_eq!(
        elsewhere,
        "'-incoming' was not specified on the command line"
    );

    old.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    old.done("migrate", json!({"channels": waiting.channels()}));
    new.wait_for_cpr_state();
    // As in QEMU, it is migrating from `migrate-incoming` on, and nothing is in the way of capabilities.
    let info = new.returns("query-migrate", json!({}));
    assert_eq!(info.get("status"), None, "{info}");
    let events = json!([{"capability": "events", "state": true}]);
    new.done("migrate-set-capabilities", json!({"capabilities": events}));
    let waits = new.refused("migrate", json!({}));
    assert_eq!(waits, "Guest is waiting for an incoming migration");
    vm.assert_goes_on(&before);
    assert_eq!(old.returns("query-migrate", json!({}))["status"], "setup");
    // Both say what is missing, and how long they wait for it: for ten minutes, not for the seconds of any other step.
    for (qmp, whose) in [
        (&mut old, "`migrate-incoming` on the other side"),
        (&mut new, "`migrate-incoming`"),
    ] {
        let (what, left) = awaits(qmp);
        assert_eq!(what.as_deref(), Some(whose));
        assert!(left.is_some_and(|ms| ms > 60_000), "{left:?}");
    }
    let [main, cpr] = [channel("main", &waiting.main), channel("cpr", &waiting.cpr)];
    for wrong in [json!([main, cpr]), json!([cpr]), json!([])] {
        assert_eq!(
            new.refused("migrate-incoming", json!({"channels": wrong})),
            "Channel list must have only one entry, for type 'main'"
        );
    }
    let main = json!({"channels": [main]});
    let started = "The incoming migration has already been started";
    new.done("migrate-incoming", main.clone());
    assert_eq!(new.refused("migrate-incoming", main.clone()), started);
    assert_eq!(old.migrated()["status"], "completed");
    until("the new side has it, too", || {
        new.event_names_now()
            .contains(&"MIGRATION completed".to_owned())
            .then_some(())
    });
    let names = new.event_names();
    let at = |name: &str| names.iter().position(|one| one == name).unwrap();
    assert!(at("MIGRATION setup") < at("RESUME"), "{names:?}");
    assert!(at("RESUME") < at("MIGRATION completed"), "{names:?}");
    assert_eq!(new.status(), "running");
    assert_eq!(new.refused("migrate-incoming", main), started);
    until("nothing is waited for", || {
        (awaits(&mut new).0.is_none()).then_some(())
    });
    drop(old);
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
}

#[test]
fn a_transfer_is_cancelled_and_tried_again() {
    for cut in ["migrate_cancel", "yank"] {
        let mut vm = Builder::release().start();
        let (before, old) = (vm.witness(), vm.worker());
        let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
        let mut new = Qmp::connect_to(&vm, &format!("{}.incoming", vm.site.name));
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        // Before that it has nothing to give up, and waits on.
        new.wait_for_cpr_state();
        drop(new);
        let second = qmp.refused("migrate", json!({"channels": waiting.channels()}));
        assert_eq!(second, "There's a migration process in progress");
        match cut {
            "yank" => qmp.done("yank", json!({"instances": [{"type": "migration"}]})),
            _ => qmp.done("migrate_cancel", json!({})),
        }
        qmp.done("migrate_cancel", json!({}));
        assert_eq!(qmp.migrated()["status"], "cancelled");
        assert_eq!(qmp.status(), "running");
        assert!(!qmp.event_names().contains(&"STOP".to_owned()));
        // The waiting side is told, and gives up with the reason.
        vm.assert_nobody_waits(&waiting);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
        drop(qmp);
        vm.assert_transfers();
    }
}

/// Why the broker that waited has given up.
fn last_words(vm: &baton_tests::Vm) -> String {
    let log = format!(".audit/{}.incoming.jsonl", vm.site.name);
    let text = std::fs::read_to_string(vm.site.run_dir().join(log)).unwrap();
    let mut failed = text.lines().filter(|line| line.contains("\"failed\""));
    failed.next_back().unwrap_or_default().to_owned()
}

#[test]
fn the_waiting_side_is_told_of_the_end_wherever_it_is() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let name = format!("{}.incoming", vm.site.name);
    // It has the CPR state; it has a worker, built and lent.
    for (arguments, hold) in [(&["--incoming", "defer"][..], false), (&[], true)] {
        let waiting = vm.wait_from("vm.toml", arguments);
        let mut qmp = Qmp::connect(&vm);
        let hold = json!([{"capability": "pause-before-switchover", "state": hold}]);
        qmp.done("migrate-set-capabilities", json!({"capabilities": hold}));
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        let awaited = if arguments.is_empty() {
            "`migrate-continue`"
        } else {
            "`migrate-incoming` on the other side"
        };
        until("it waits", || {
            let info = qmp.returns("query-migrate", json!({}));
            (info["__org.baton_awaits"] == awaited).then_some(())
        });
        qmp.done("migrate_cancel", json!({}));
        assert_eq!(qmp.migrated()["status"], "cancelled");
        vm.assert_nobody_waits(&waiting);
        let words = last_words(&vm);
        assert!(
            words.contains("the old broker gave up: the operator cancelled it"),
            "{words}"
        );
        for path in [&waiting.main, &waiting.cpr] {
            assert!(!path.exists(), "{}", path.display());
        }
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    // The other way round: its operator has it quit while the old side waits, for it or for its own operator.
    let migration = json!({"instances": [{"type": "migration"}]});
    let (ended, cancelled) = ("it was told to end", "it was cancelled there");
    for (arguments, hold, status, cut, reason) in [
        (&[][..], true, "pre-switchover", "quit", ended),
        // It says itself that this can be yanked.
        (&[], true, "pre-switchover", "yank", cancelled),
        (&[], true, "pre-switchover", "migrate_cancel", cancelled),
        (&["--incoming", "defer"], false, "setup", "quit", ended),
    ] {
        let waiting = vm.wait_from("vm.toml", arguments);
        let (mut qmp, mut new) = (Qmp::connect(&vm), Qmp::connect_to(&vm, &name));
        let hold = json!([{"capability": "pause-before-switchover", "state": hold}]);
        qmp.done("migrate-set-capabilities", json!({"capabilities": hold}));
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        until("it waits", || {
            let info = qmp.returns("query-migrate", json!({}));
            (info["status"] == status).then_some(())
        });
        if status == "setup" {
            new.wait_for_cpr_state();
        }
        let listed = new.returns("query-yank", json!({}));
        let lists = status == "pre-switchover";
        assert_eq!(listed == migration["instances"], lists, "{listed}");
        match cut {
            "yank" => new.done(cut, migration.clone()),
            _ => new.done(cut, json!({})),
        }
        let info = qmp.migrated();
        assert_eq!(info["status"], "failed", "{info}");
        let said = info["error-desc"].as_str().unwrap();
        assert!(said.contains(reason), "{said}");
        drop((qmp, new));
        vm.assert_nobody_waits(&waiting);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn a_cancel_at_any_moment_leaves_one_side_with_the_guest() {
    let mut vm = Builder::release().start();
    let mut cancelled = 0;
    for wait_us in [0, 1_000, 5_000, 20_000, 50_000, 100_000, 200_000, 400_000] {
        let (before, old, generation) = (vm.witness(), vm.worker(), vm.generation());
        let waiting = vm.wait_for_guest();
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        qmp.done("migrate", json!({"channels": waiting.channels()}));
        std::thread::sleep(std::time::Duration::from_micros(wait_us));
        for _ in 0..2 {
            qmp.done("migrate_cancel", json!({}));
        }
        let info = qmp.migrated();
        // After the end it is no error either, and changes nothing.
        qmp.done("migrate_cancel", json!({}));
        let after = qmp.returns("query-migrate", json!({}));
        assert_eq!(after["status"], info["status"]);
        drop(qmp);
        if info["status"] == "completed" {
            vm.assert_taken_over(&waiting);
            assert_eq!(vm.generation(), generation + 1);
        } else {
            assert_eq!(info["status"], "cancelled", "{info}");
            cancelled += 1;
            // One that nobody has connected to yet waits on.
            vm.site
                .baton(["stop", "--force", &format!("{}.incoming", vm.site.name)]);
            vm.assert_nobody_waits(&waiting);
            assert_eq!((vm.worker(), vm.state()), (old, "running".to_owned()));
        }
        vm.assert_only_runner(vm.worker());
        vm.assert_goes_on(&before);
    }
    assert!(cancelled > 0, "a cancel at once comes before everything");
    vm.assert_transfers();
}

#[test]
fn a_cancel_after_a_failure_changes_nothing_and_a_retry_succeeds() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    vm.site
        .write("other.toml", file.replace("count = 1", "count = 2"));
    let waiting = vm.wait_from("other.toml", &[]);
    let mut qmp = Qmp::connect(&vm);
    let failed = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(failed["status"], "failed", "{failed}");
    qmp.done("migrate_cancel", json!({}));
    let info = qmp.returns("query-migrate", json!({}));
    assert_eq!(info["status"], "failed");
    assert_eq!(info["error-desc"], failed["error-desc"]);
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}

#[test]
fn before_its_pause_it_waits_and_is_continued() {
    let mut vm = Builder::release().start();
    let waiting = vm.wait_for_guest();
    let mut qmp = Qmp::connect(&vm);
    let hold = json!([{"capability": "pause-before-switchover", "state": true}]);
    qmp.done("migrate-set-capabilities", json!({"capabilities": hold}));
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    qmp.done("migrate", json!({"channels": waiting.channels()}));
    until("it waits", || {
        let info = qmp.returns("query-migrate", json!({}));
        (info["status"] == "pre-switchover").then_some(())
    });
    let before = vm.witness();
    vm.assert_goes_on(&before);
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated()["status"], "completed");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
}
