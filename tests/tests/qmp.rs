//! QMP clients drive a VM as they drive QEMU, and their connections outlive its workers.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::io::ErrorKind;
use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::kill_process;
use baton_tests::petitioner;
use baton_tests::transfer::channel;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

/// What one upgrade tells, in this order.
const UPGRADE: [&str; 7] = [
    "MIGRATION setup",
    "STOP",
    "MIGRATION active",
    "MIGRATION device",
    "RESUME",
    "MIGRATION completed",
    "__org.baton_WORKER_REPLACED",
];

fn time_of(event: &Value) -> (i64, i64) {
    let part = |path: &str| event.pointer(path).and_then(Value::as_i64).unwrap();
    (part("/timestamp/seconds"), part("/timestamp/microseconds"))
}

/// The front's process, as the audit log has it.
fn front(vm: &baton_tests::Vm) -> i32 {
    let log = vm.audit_log();
    let confirmed = log.of("front-confirmed").last().unwrap();
    let pid = confirmed.fields.get("pid").and_then(Value::as_i64);
    i32::try_from(pid.unwrap()).unwrap()
}

#[test]
fn a_connection_survives_upgrades_and_its_events_come_in_order() {
    let vm = Builder::release().start();
    let (mut driver, mut watcher) = (Qmp::connect(&vm), Qmp::connect(&vm));
    let guest = vm.witness();
    for generation in 2..=4 {
        driver.migrate();
        let info = driver.migrated();
        assert_eq!(info["status"], "completed", "{info}");
        assert!(info["downtime"].as_i64().unwrap() > 0, "{info}");
        assert_eq!(driver.status(), "running");
        assert_eq!(vm.generation(), generation);
        let parameters = driver.returns("query-migrate-parameters", json!({}));
        assert_eq!(
            parameters["mode"], "normal",
            "the new side knows of no mode"
        );
    }
    vm.assert_goes_on(&guest);
    assert_eq!(watcher.status(), "running");
    for client in [&driver, &watcher] {
        assert_eq!(client.event_names(), UPGRADE.repeat(3));
        let times: Vec<_> = client.events.iter().map(time_of).collect();
        assert!(times.is_sorted(), "{times:?}");
    }
}

#[test]
fn a_guest_is_stopped_continued_reset_and_ended() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let capabilities = &qmp.greeting["QMP"]["capabilities"];
    assert_eq!(*capabilities, json!(["oob"]));
    for _ in 0..2 {
        qmp.done("stop", json!({}));
        assert_eq!(qmp.status(), "paused");
        vm.assert_stands_still();
    }
    // Its buttons can be pressed all the same.
    qmp.done("system_reset", json!({}));
    qmp.done("system_powerdown", json!({}));
    assert_eq!(qmp.status(), "paused");
    vm.assert_stands_still();
    for _ in 0..2 {
        qmp.done("cont", json!({}));
        assert_eq!(qmp.status(), "running");
    }
    let boots = |times: u64| {
        until("the guest boots again", || {
            let report = vm.ram.report().ok()?;
            (report.boots == times).then_some(())
        });
    };
    boots(2);
    qmp.done("system_reset", json!({}));
    boots(3);
    qmp.done("system_powerdown", json!({}));
    let cpus = qmp.returns("query-cpus-fast", json!({}));
    let thread = &cpus[0]["thread-id"];
    let task = format!("/proc/{}/task/{thread}", vm.worker());
    assert!(std::path::Path::new(&task).exists(), "{cpus}");
    let memory = qmp.returns("query-memory-size-summary", json!({}));
    assert_eq!(memory["base-memory"], 64 << 20);
    let name = qmp.returns("query-name", json!({}));
    assert_eq!(name["name"], *vm.site.name);
    qmp.done("quit", json!({}));
    while let Some(event) = qmp.receive() {
        qmp.events.push(event);
    }
    let mut names = qmp.event_names();
    // A reset is told of when it is done.
    names[1..3].sort_unstable();
    let all = [
        "STOP",
        "POWERDOWN",
        "RESET",
        "RESUME",
        "RESET",
        "POWERDOWN",
        "SHUTDOWN",
    ];
    assert_eq!(names, all);
    assert_eq!(qmp.events[4]["data"]["guest"], false);
    assert_eq!(qmp.events[6]["data"]["reason"], "host-qmp-quit");
}

#[test]
fn a_guest_is_reset_while_its_new_worker_waits_and_boots_once() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let switch = json!([{"capability": "pause-before-switchover", "state": true}]);
    qmp.done("migrate-set-capabilities", json!({"capabilities": switch}));
    for stands in [false, true] {
        if stands {
            qmp.done("stop", json!({}));
        }
        let before = vm.ram.report().unwrap().boots;
        qmp.migrate();
        until("it waits", || {
            let info = qmp.returns("query-migrate", json!({}));
            (info["status"] == "pre-switchover").then_some(())
        });
        qmp.done("system_reset", json!({}));
        qmp.done("system_powerdown", json!({}));
        if !stands {
            until("the guest boots again", || {
                let report = vm.ram.report().ok()?;
                (report.boots == before + 1).then_some(())
            });
        }
        qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
        let info = qmp.migrated();
        assert_eq!(info["status"], "completed", "{info}");
        if stands {
            vm.assert_stands_still();
            qmp.done("cont", json!({}));
        }
        until("the guest counts", || {
            let report = vm.ram.report().ok()?;
            (report.boots == before + 1 && report.slots[0].sequence > 0).then_some(())
        });
        let names = qmp.event_names_now();
        for name in ["RESET", "POWERDOWN"] {
            let count = names.iter().filter(|one| **one == name).count();
            assert_eq!(count, 1 + usize::from(stands), "{names:?}");
        }
        vm.assert_goes_on(&vm.witness());
    }
}

#[test]
fn migrate_is_refused_in_qemus_words() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let channel = |kind: &str| json!({"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": "x.sock"}});
    let elsewhere = |kind: &str, addr: Value| json!({"channel-type": kind, "addr": addr});
    let to_file = json!({"transport": "file", "filename": "/x", "offset": 0});
    let to_port =
        json!({"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "44444"});
    let neither = "need either 'uri' or 'channels' argument";
    assert_eq!(qmp.refused("migrate", json!({})), neither);
    let bogus = "Parameter 'mode' does not accept value 'bogus'";
    assert_eq!(
        qmp.refused("migrate-set-parameters", json!({"mode": "bogus"})),
        bogus
    );
    let exec = qmp.refused("migrate-set-parameters", json!({"mode": "cpr-exec"}));
    assert!(exec.contains("'cpr-exec' is not supported"), "{exec}");
    let normal = qmp.refused("migrate", json!({"uri": "unix:x"}));
    assert!(normal.contains("'normal'"), "{normal}");
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    for (arguments, text) in [
        (json!({"uri": "unix:x"}), "missing 'cpr' migration channel"),
        (
            json!({"uri": "unix:x", "channels": [channel("main")]}),
            neither,
        ),
        (
            json!({"channels": [channel("main")]}),
            "missing 'cpr' migration channel",
        ),
        (
            json!({"channels": [channel("cpr")]}),
            "Channel list has no main entry",
        ),
        (
            json!({"channels": [channel("main"), channel("main")]}),
            "Channel list has more than one main entry",
        ),
        (
            json!({"channels": [channel("cpr"), channel("cpr")]}),
            "Channel list has more than one cpr entry",
        ),
        (
            json!({"channels": [elsewhere("main", to_file), channel("cpr")]}),
            "Migration requires streamable transport (eg unix)",
        ),
        (
            json!({"channels": [channel("main"), elsewhere("cpr", to_port)]}),
            "bad cpr channel address; must be unix",
        ),
        (
            json!({"resume": true}),
            "Cannot resume if there is no paused migration",
        ),
        (
            json!({"channels": [channel("main"), channel("cpr")], "resume": true}),
            "Cannot resume if there is no paused migration",
        ),
    ] {
        assert_eq!(qmp.refused("migrate", arguments), text);
        // Nothing has begun, and so nothing has failed.
        assert_eq!(qmp.returns("query-migrate", json!({})), json!({}));
    }
    for (capability, text) in [
        ("postcopy-ram", "Cannot use postcopy with CPR"),
        (
            "background-snapshot",
            "Cannot use background snapshot with CPR",
        ),
        ("x-colo", "Cannot use COLO with CPR"),
        (
            "mapped-ram",
            "Migration requires seekable transport (e.g. file)",
        ),
    ] {
        let switch =
            |state: bool| json!({"capabilities": [{"capability": capability, "state": state}]});
        qmp.done("migrate-set-capabilities", switch(true));
        assert_eq!(qmp.refused("migrate", json!({})), text);
        qmp.done("migrate-set-capabilities", switch(false));
    }
    let incoming = qmp.refused("migrate-incoming", json!({"uri": "unix:x"}));
    assert_eq!(
        incoming,
        "'-incoming' was not specified on the command line"
    );
    // All of it cost the guest nothing, and the next one succeeds, with what is of no effect.
    assert_eq!(qmp.event_names(), [""; 0]);
    for capability in ["multifd", "return-path", "x-ignore-shared"] {
        let switch = json!({"capabilities": [{"capability": capability, "state": true}]});
        qmp.done("migrate-set-capabilities", switch);
    }
    qmp.migrate();
    assert_eq!(qmp.migrated()["status"], "completed");
}

#[test]
fn a_paused_guest_is_upgraded_and_stays_paused() {
    let vm = Builder::release().cpus(2).start();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("stop", json!({}));
    let guest = vm.witness();
    for generation in 2..=4 {
        qmp.migrate();
        let info = qmp.migrated();
        assert_eq!(info["status"], "completed", "{info}");
        assert_eq!(info["downtime"], 0, "it lost nothing: {info}");
        assert_eq!(vm.generation(), generation);
        assert_eq!(qmp.status(), "paused");
        assert_eq!(vm.state(), "paused");
        vm.assert_only_runner(vm.worker());
        vm.assert_stands_still();
    }
    // Also when nothing comes of it.
    let switch =
        json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]});
    qmp.done("migrate-set-capabilities", switch);
    qmp.migrate();
    until("it waits", || {
        let info = qmp.returns("query-migrate", json!({}));
        (info["status"] == "pre-switchover").then_some(())
    });
    assert_eq!(qmp.status(), "paused");
    qmp.done("migrate_cancel", json!({}));
    assert_eq!(qmp.migrated()["status"], "cancelled");
    assert_eq!(qmp.status(), "paused");
    vm.assert_stands_still();
    qmp.done("cont", json!({}));
    vm.assert_goes_on(&guest);
    let power = |name: &&String| *name == "STOP" || *name == "RESUME";
    let names = qmp.event_names();
    let power: Vec<&String> = names.iter().filter(power).collect();
    assert_eq!(power, ["STOP", "RESUME"], "the guest was told of no other");
    vm.assert_upgrades();
}

#[test]
fn an_upgrade_waits_before_its_pause_is_continued_or_cancelled_and_retried() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let guest = vm.witness();
    let on = |name: &str| json!({"capability": name, "state": true});
    let all = ["pause-before-switchover", "return-path", "multifd"];
    let switch = json!({"capabilities": all.map(on)});
    qmp.done("migrate-set-capabilities", switch.clone());
    let before = qmp.refused("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(before, "Migration not in expected state: none");
    let held = |qmp: &mut Qmp| {
        qmp.migrate();
        until("it waits", || {
            let info = qmp.returns("query-migrate", json!({}));
            (info["status"] == "pre-switchover").then_some(())
        });
    };
    held(&mut qmp);
    assert_eq!(qmp.status(), "running");
    let in_progress = "There's a migration process in progress";
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    assert_eq!(qmp.refused("migrate", json!({})), in_progress);
    assert_eq!(qmp.refused("migrate-set-capabilities", switch), in_progress);
    let stopped = qmp.refused("stop", json!({}));
    assert!(
        stopped.contains("is being upgraded, so `pause` is not possible"),
        "{stopped}"
    );
    assert_eq!(qmp.status(), "running");
    let migration = json!([{"type": "migration"}]);
    assert_eq!(qmp.returns("query-yank", json!({})), migration);
    // What is set meanwhile is for the next one.
    qmp.done("migrate-set-parameters", json!({"mode": "normal"}));
    let guest = vm.assert_goes_on(&guest);
    qmp.done("migrate_cancel", json!({}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "cancelled", "{info}");
    qmp.done("migrate_cancel", json!({}));
    assert_eq!(qmp.returns("query-yank", json!({})), json!([]));
    let guest = vm.assert_goes_on(&guest);
    assert_eq!(vm.generation(), 1);
    held(&mut qmp);
    let yank = json!({"exec-oob": "yank", "arguments": {"instances": migration}});
    qmp.send(format!("{yank}\n"));
    assert_eq!(qmp.answer(), json!({"return": {}}));
    assert_eq!(qmp.migrated()["status"], "cancelled");
    let guest = vm.assert_goes_on(&guest);
    held(&mut qmp);
    qmp.done("migrate-set-parameters", json!({"mode": "normal"}));
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated()["status"], "completed");
    let late = qmp.ask("yank", json!({"instances": migration}));
    assert_eq!(late["error"]["class"], "DeviceNotFound", "{late}");
    vm.assert_goes_on(&guest);
    let cancelled = [
        "MIGRATION setup",
        "MIGRATION active",
        "MIGRATION pre-switchover",
        "MIGRATION cancelling",
        "MIGRATION cancelled",
    ];
    let completed = [
        "MIGRATION setup",
        "MIGRATION active",
        "MIGRATION pre-switchover",
        "STOP",
        "MIGRATION device",
        "RESUME",
        "MIGRATION completed",
        "__org.baton_WORKER_REPLACED",
    ];
    let all = [&cancelled[..], &cancelled, &completed].concat();
    assert_eq!(qmp.event_names(), all);
}

#[test]
fn a_worker_that_cannot_take_over_says_why() {
    // The new worker refuses the state that it is sent.
    let vm = Builder::faulty("new@load:error").start();
    let mut qmp = Qmp::connect(&vm);
    let guest = vm.witness();
    qmp.migrate();
    let info = qmp.migrated();
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("new worker cannot"), "{reason}");
    assert_eq!(qmp.status(), "running", "before `failed` is said");
    let names = qmp.event_names();
    assert_eq!(names.last().map(String::as_str), Some("MIGRATION failed"));
    assert!(
        names.iter().rposition(|name| name == "RESUME")
            > names.iter().rposition(|name| name == "STOP")
    );
    let guest = vm.assert_goes_on(&guest);
    qmp.migrate();
    assert_eq!(qmp.migrated()["status"], "completed");
    vm.assert_goes_on(&guest);
}

#[test]
fn a_paused_guest_whose_new_worker_fails_in_the_pause_stays_paused() {
    let vm = Builder::faulty("new@load:error").start();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("stop", json!({}));
    let guest = vm.witness();
    qmp.migrate();
    assert_eq!(qmp.migrated()["status"], "failed");
    assert_eq!(qmp.status(), "paused");
    vm.assert_stands_still();
    qmp.migrate();
    assert_eq!(qmp.migrated()["status"], "completed");
    assert_eq!(qmp.status(), "paused");
    vm.assert_stands_still();
    qmp.done("cont", json!({}));
    vm.assert_goes_on(&guest);
}

#[test]
fn modes_that_are_known_and_not_offered_are_refused_by_name() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let text = qmp.refused("migrate-set-parameters", json!({"mode": "cpr-exec"}));
    assert!(
        text.contains("cpr-exec") && text.contains("not supported"),
        "{text}"
    );
    qmp.done("migrate-set-parameters", json!({"mode": "normal"}));
    let text = qmp.refused("migrate", json!({"uri": "unix:x"}));
    assert!(
        text.contains("'normal'") && text.contains("not supported"),
        "{text}"
    );
    // QEMU makes an ordinary migration of these.
    let channel = |kind| channel(kind, std::path::Path::new("x.sock"));
    let both = json!({"channels": [channel("main"), channel("cpr")]});
    assert_eq!(qmp.refused("migrate", both), text);
    assert_eq!(qmp.returns("query-migrate", json!({})), json!({}));
    assert_eq!(qmp.status(), "running");
}

#[test]
fn fifty_generations_follow_each_other() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let guest = vm.witness();
    while vm.generation() <= 50 {
        qmp.migrate();
        let info = qmp.migrated();
        let overloaded = info["error-desc"]
            .as_str()
            .is_some_and(|why| why.contains("did not answer within"));
        assert!(info["status"] == "completed" || overloaded, "{info}");
    }
    vm.assert_goes_on(&guest);
}

#[test]
fn the_human_monitors_verbs_work() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let mut hmp = |line: &str| {
        let text = qmp.returns("human-monitor-command", json!({"command-line": line}));
        text.as_str().unwrap().to_owned()
    };
    assert_eq!(hmp("info status"), "VM status: running\r\n");
    assert_eq!(hmp("stop"), "");
    assert_eq!(hmp("info status"), "VM status: paused\r\n");
    assert_eq!(hmp("cont"), "");
    assert_eq!(
        hmp("migrate -d unix:x"),
        "Error: mode 'normal', which copies RAM, is not supported by this VMM: set mode 'cpr-transfer' or 'cpr-reboot'\r\n"
    );
    assert_eq!(hmp("migrate_set_parameter mode cpr-transfer"), "");
    // As in QEMU, its `migrate` cannot name a cpr channel.
    assert_eq!(
        hmp("migrate unix:x"),
        "Error: missing 'cpr' migration channel\r\n"
    );
    assert_eq!(hmp("migrate"), "");
    until("the worker is replaced", || {
        (vm.generation() == 2).then_some(())
    });
    until("it says so", || {
        hmp("info migrate")
            .starts_with("Migration status: completed\r\ntotal time: ")
            .then_some(())
    });
    let info = hmp("info migrate");
    for label in ["downtime: ", "setup: ", "transferred ram: "] {
        assert!(info.contains(&format!("\r\n{label}")), "{info}");
    }
    assert!(hmp("fly").starts_with("unknown command"));
}

#[test]
fn a_front_that_dies_takes_its_connections_and_nothing_else() {
    let vm = Builder::release().start();
    let mut first = Qmp::connect(&vm);
    assert_eq!(first.status(), "running");
    let guest = vm.witness();
    kill_process(front(&vm));
    assert!(first.receive().is_none(), "its connection is gone");
    vm.assert_goes_on(&guest);
    let mut second = Qmp::connect(&vm);
    assert_eq!(second.status(), "running");
    second.migrate();
    assert_eq!(second.migrated()["status"], "completed");
}

#[test]
fn a_front_that_dies_within_an_upgrade_is_followed_by_one_that_knows_of_it() {
    let vm = Builder::release().start();
    let guest = vm.witness();
    let migration = json!([{"type": "migration"}]);
    // Capabilities are frozen while it is under way.
    let newcomer = || {
        let mut qmp = Qmp::at(&vm.site.run_dir().join(&vm.site.name).join("qmp.sock"));
        qmp.done("qmp_capabilities", json!({}));
        qmp
    };
    let held = || {
        let mut qmp = Qmp::connect(&vm);
        let switch =
            json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]});
        qmp.done("migrate-set-capabilities", switch);
        qmp.migrate();
        until("it is held", || {
            let info = qmp.returns("query-migrate", json!({}));
            (info["status"] == "pre-switchover").then_some(())
        });
        kill_process(front(&vm));
        assert!(qmp.receive().is_none(), "its connection is gone");
        newcomer()
    };
    // Each by a client that begins with it.
    let mut qmp = held();
    assert_eq!(qmp.returns("query-yank", json!({})), migration);
    qmp.done("yank", json!({"instances": migration}));
    assert_eq!(qmp.migrated()["status"], "cancelled");
    drop(qmp);
    let mut qmp = held();
    qmp.done("migrate_cancel", json!({}));
    kill_process(front(&vm));
    assert!(qmp.receive().is_none(), "its connection is gone");
    let mut qmp = Qmp::connect(&vm);
    assert_eq!(
        qmp.migrated()["status"],
        "cancelled",
        "as it was known before"
    );
    drop(qmp);
    let guest = vm.assert_goes_on(&guest);
    assert_eq!(vm.generation(), 1);
    let mut qmp = held();
    let in_progress = "There's a migration process in progress";
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    assert_eq!(qmp.refused("migrate", json!({})), in_progress);
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated()["status"], "completed");
    vm.assert_goes_on(&guest);
    assert_eq!(vm.generation(), 2);
}

#[test]
fn the_front_is_confined_under_a_user_of_its_own() {
    let vm = Builder::release().start();
    let socket = vm.site.run_dir().join(&vm.site.name).join("qmp.sock");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let _client = Qmp::connect(&vm);
    let pid = front(&vm);
    let status = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |text: &str, name: &str| -> String {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].trim().to_owned()
    };
    let (mine, workers) = (status(pid), status(vm.worker()));
    assert_eq!(field(&mine, "Threads:"), "1");
    assert_eq!(field(&mine, "NoNewPrivs:"), "1");
    assert_eq!(field(&mine, "Seccomp:"), "2");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&mine, set), "0000000000000000", "{set}");
    }
    let uid = field(&mine, "Uid:");
    assert!(
        uid != field(&workers, "Uid:") && !uid.starts_with("0\t"),
        "{uid}"
    );
    let root = std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
    assert_eq!(root.count(), 0, "its root is empty");
    for namespace in ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup"] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(pid), of(vm.worker()), "{namespace}");
        assert_ne!(of(pid), of(vm.broker), "{namespace}");
    }
    // Sockets and the pipe that it prints to, and nothing else.
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        let target = std::fs::read_link(entry.path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        assert!(
            target.starts_with("socket:") || target.starts_with("pipe:"),
            "{target}"
        );
    }
}

#[test]
fn only_root_and_the_brokers_user_are_served_whatever_the_sockets_mode() {
    const STRANGER: u32 = 65_002;
    // What it may ask at the control socket is another matter.
    let rule = format!(
        "{}\n[[access]]\nto = [\"view\", \"power\"]\nusers = [{STRANGER}]\nwhy = \"a test\"\n",
        baton_policy::BUILTIN
    );
    let open = |path: std::path::PathBuf, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let vm = Builder::release()
        .policy(&rule)
        .start_in(|site| open(site.path(""), 0o711));
    let socket = vm.site.run_dir().join(&vm.site.name).join("qmp.sock");
    open(socket.clone(), 0o666);
    let mut root = Qmp::connect(&vm);
    let knock = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut said = Vec::new();
        // It may be hung up on before it has said anything.
        let _ = stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n");
        let over = stream.read_to_end(&mut said);
        let hung_up = over.is_ok() || over.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset);
        (hung_up, said)
    };
    let refused = std::thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            petitioner::become_user(STRANGER);
            (0..3).map(|_| knock()).collect::<Vec<_>>()
        });
        stranger.join().unwrap()
    });
    assert_eq!(refused, vec![(true, Vec::new()); 3], "without a word");
    assert_eq!(root.status(), "running");
    assert_eq!(Qmp::connect(&vm).status(), "running");
    let log = vm.audit_log();
    let clients: Vec<_> = log
        .of("qmp-client")
        .map(|one| {
            let user = one.record["actor"]["user"]["uid"]
                .as_str()
                .unwrap()
                .to_owned();
            (user, one.fields["admitted"].as_bool().unwrap())
        })
        .collect();
    let stranger = (STRANGER.to_string(), false);
    let root = ("0".to_owned(), true);
    let expected = [&root, &stranger, &stranger, &stranger, &root].map(Clone::clone);
    assert_eq!(clients, expected);
}

#[test]
fn what_a_client_asks_is_logged_as_that_client() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("stop", json!({}));
    qmp.done("cont", json!({}));
    let log = vm.audit_log();
    let mine: Vec<&str> = log
        .of("request")
        .filter(|one| {
            let actor = &one.record["actor"];
            actor["user"]["uid"] == "0" && actor["process"]["pid"] == std::process::id()
        })
        .map(|one| one.fields["request"].as_str().unwrap())
        .collect();
    assert_eq!(mine, ["pause", "resume"]);
}

#[test]
fn baton_qmp_sends_one_command() {
    let vm = Builder::release().start();
    let answer = vm.baton("qmp", ["query-status"]).expect(0);
    assert_eq!(answer.json(), json!({"running": true, "status": "running"}));
    let command = r#"{"execute": "migrate-set-parameters", "arguments": {"mode": "cpr-transfer"}}"#;
    assert_eq!(vm.baton("qmp", [command]).expect(0).json(), json!({}));
    vm.baton("qmp", ["migrate"]).expect(0);
    until("the worker is replaced", || {
        (vm.generation() == 2).then_some(())
    });
    let refused = vm.baton("qmp", ["no-such-command"]).expect(3);
    assert!(refused.stderr.contains("CommandNotFound"), "{refused:?}");
    vm.baton("qmp", ["{"]).expect(2);
}
