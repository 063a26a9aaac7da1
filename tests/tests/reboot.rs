//! A guest goes into a file, every process of it ends, and it comes back as if nothing had been (mode `cpr-reboot`).
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::path::Path;

use baton_tests::Builder;
use baton_tests::HugePages;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::transfer::channel;
use baton_tests::until;
use serde_json::json;
use sha2::Digest as _;
use sha2::Sha256;

fn file(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// Everything that follows `quit`: the guest is back in a broker that was told by `migrate-incoming`.
fn assert_comes_back(vm: &mut Vm, state: &Path) {
    let started = vm.run_again(&["--incoming", "defer"]).expect(0).json();
    let mut qmp = Qmp::connect(vm);
    assert_eq!(qmp.status(), "inmigrate");
    let busy = qmp.refused("migrate", json!({"uri": "file:/x"}));
    assert_eq!(busy, "Guest is waiting for an incoming migration");
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let busy = qmp.refused("migrate", json!({"uri": "file:/x"}));
    assert_eq!(busy, "Guest is waiting for an incoming migration");
    qmp.done("migrate-incoming", json!({"uri": file(state)}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    let again = qmp.refused("migrate-incoming", json!({"uri": file(state)}));
    assert_eq!(again, "The incoming migration has already been started");
    let events = [
        "MIGRATION setup",
        "MIGRATION active",
        "RESUME",
        "MIGRATION completed",
        "__org.baton_WORKER_REPLACED",
    ];
    assert_eq!(qmp.event_names(), events);
    assert_eq!(qmp.status(), "running");
    vm.is_now(&started);
}

fn comes_back_with_its_ram(builder: Builder, in_place: bool) {
    let mut vm = builder.state_files().cpus(2).disk("data", 1, "").start();
    let id = vm.status()["id"].clone();
    let before = vm.witness();
    let state = vm.site.path("state");
    let mut qmp = Qmp::connect(&vm);
    let info = vm.save_to(&mut qmp, &state);
    assert_eq!(info["status"], "completed", "{info}");
    assert!(info["downtime"].as_u64().unwrap() > 0, "{info}");
    let events = [
        "MIGRATION setup",
        "STOP",
        "MIGRATION active",
        "MIGRATION device",
        "MIGRATION completed",
    ];
    assert_eq!(qmp.event_names(), events);
    assert_eq!(qmp.status(), "postmigrate");
    until("nobody can run it any more", || {
        vm.site.workers().is_empty().then_some(())
    });
    assert!(!qmp.refused("cont", json!({})).is_empty());
    assert_eq!(
        qmp.refused("migrate", json!({"uri": file(&state)})),
        "Can't migrate the vm that was paused due to previous migration"
    );
    // The name, and what is locked, are the old broker's until its end.
    let taken = vm.run_again(&["--incoming", &file(&state)]).expect(3);
    assert!(taken.stderr.contains("is running already"), "{taken:?}");
    qmp.done("quit", json!({}));
    vm.assert_over();
    let length = std::fs::metadata(&state).unwrap().len();
    assert_eq!(length < 1 << 20, in_place, "{length} bytes");

    assert_comes_back(&mut vm, &state);
    let status = vm.status();
    assert_eq!((&status["id"], &status["generation"]), (&id, &json!(2)));
    vm.assert_goes_on(&before);
    vm.ask("audit").expect(0);
    assert_eq!(vm.audit_log().upgrades(), ["saved", "committed"]);
    // It can be upgraded, and go once more, from wherever its devices are by now.
    vm.assert_upgrades();
    let before = vm.witness();
    let state = vm.save_and_quit();
    let started = vm
        .run_again(&["--incoming", &file(&state)])
        .expect(0)
        .json();
    vm.is_now(&started);
    assert_eq!(vm.generation(), 4);
    vm.assert_goes_on(&before);
}

#[test]
fn a_guest_comes_back_with_its_ram_out_of_the_file() {
    comes_back_with_its_ram(Builder::release(), false);
}

#[test]
fn a_guest_comes_back_to_ram_that_stayed_in_place() {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = place.path().join("guest-ram");
    let lines = format!("path = \"{}\"", path.display());
    comes_back_with_its_ram(Builder::release().memory_lines(&lines), true);
    assert!(path.exists(), "it is its owner's");
}

#[test]
fn a_guest_comes_back_in_huge_pages_out_of_the_file_or_in_place() {
    // For 64 MiB in a memfd, then in a file.
    let pages = HugePages::set_aside(64);
    let lines = "pages = \"2M\"";
    comes_back_with_its_ram(Builder::release().memory_lines(lines), false);
    let path = pages.directory().join("guest-ram");
    let lines = format!("{lines}\npath = \"{}\"", path.display());
    comes_back_with_its_ram(Builder::release().memory_lines(&lines), true);
    assert!(path.exists(), "it is its owner's");
}

#[test]
fn a_paused_guest_comes_back_paused_and_one_with_s_too() {
    let mut vm = Builder::release().state_files().start();
    for paused_before in [true, false] {
        if paused_before {
            vm.ask("pause").expect(0);
        }
        let before = vm.witness();
        let state = vm.save_and_quit();
        let more = ["--incoming", &file(&state), "-S"];
        let more = &more[..if paused_before { 2 } else { 3 }];
        let started = vm.run_again(more).expect(0).json();
        vm.is_now(&started);
        assert_eq!(vm.state(), "paused");
        vm.assert_stands_still();
        vm.ask("resume").expect(0);
        vm.assert_goes_on(&before);
    }
}

#[test]
fn a_file_with_something_before_it_keeps_that() {
    let mut vm = Builder::release().state_files().start();
    let path = vm.site.write("both", vec![0x55; 8192]);
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let refused = qmp.refused("migrate", json!({"uri": file(&path)}));
    assert!(refused.contains("holds something else"), "{refused}");
    let before = vm.witness();
    let main = json!([{"channel-type": "main",
        "addr": {"transport": "file", "filename": path, "offset": 8192}}]);
    qmp.done("migrate", json!({"channels": main}));
    assert_eq!(qmp.migrated()["status"], "completed");
    qmp.done("quit", json!({}));
    vm.assert_over();
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes[..8192].iter().all(|byte| *byte == 0x55));
    let place = format!("{},offset=0x2000", file(&path));
    let started = vm.run_again(&["--incoming", &place]).expect(0).json();
    vm.is_now(&started);
    vm.assert_goes_on(&before);
}

#[test]
fn what_is_no_file_to_save_to_is_refused_and_nothing_happens() {
    let vm = Builder::release().state_files().start();
    let before = vm.witness();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let real = vm.site.path("real");
    std::fs::create_dir(&real).unwrap();
    let link = vm.site.path("link");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let end = vm.site.path("end");
    std::os::unix::fs::symlink(real.join("x"), &end).unwrap();
    let hard = vm.site.write("hard", "");
    std::fs::hard_link(&hard, vm.site.path("harder")).unwrap();
    for (uri, words) in [
        (json!("unix:/x"), "takes a file here"),
        (json!("file:relative"), "absolute path"),
        (json!("file:/etc/baton-state"), "grants no state file"),
        (json!(file(&real.join("../../x"))), "grants no state file"),
        (json!(file(&link.join("x"))), "symbolic link"),
        (json!(file(&end)), "symbolic link"),
        (json!(file(&hard)), "with one name"),
        (json!(file(&real)), "Is a directory"),
        (json!(file(&real.join("none/x"))), "No such file"),
    ] {
        let text = qmp.refused("migrate", json!({"uri": uri}));
        assert!(text.contains(words), "{uri}: {text}");
    }
    let to_file = |kind: &str| json!({"channel-type": kind, "addr": {"transport": "file", "filename": real.join("x"), "offset": 0}});
    let to_socket = |kind| channel(kind, &real.join("s"));
    let no_cpr = "mode 'cpr-reboot' has no cpr channel";
    for (arguments, words) in [
        (
            json!({"channels": [to_file("main"), to_socket("cpr")]}),
            no_cpr,
        ),
        (
            json!({"channels": [to_socket("main"), to_socket("cpr")]}),
            no_cpr,
        ),
        (
            json!({"channels": [to_socket("main")]}),
            "mode 'cpr-reboot' takes a file here: file:PATH[,offset=BYTES]",
        ),
        (
            json!({"uri": file(&real.join("x")), "resume": true}),
            "Cannot resume if there is no paused migration",
        ),
        (
            json!({"channels": [to_file("main")], "resume": true}),
            "Cannot resume if there is no paused migration",
        ),
        (json!({}), "need either 'uri' or 'channels' argument"),
        (json!({"channels": []}), "Channel list has no main entry"),
    ] {
        assert_eq!(qmp.refused("migrate", arguments), words);
    }
    assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
    assert_eq!(qmp.event_names_now(), [""; 0]);
    vm.assert_goes_on(&before);
}

#[test]
fn capabilities_that_clash_are_refused_in_qemus_words_and_the_others_change_nothing() {
    let mut vm = Builder::release().state_files().start();
    let before = vm.witness();
    let state = vm.site.path("state");
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let set = |qmp: &mut Qmp, name: &str, on: bool| {
        let switch = json!({"capabilities": [{"capability": name, "state": on}]});
        qmp.done("migrate-set-capabilities", switch);
    };
    // Written to a file, as QEMU's and ours are in this mode: it is none of the reasons below.
    set(&mut qmp, "mapped-ram", true);
    for (name, words) in [
        ("postcopy-ram", "Cannot use postcopy with CPR"),
        (
            "background-snapshot",
            "Cannot use background snapshot with CPR",
        ),
        ("x-colo", "Cannot use COLO with CPR"),
    ] {
        set(&mut qmp, name, true);
        let text = qmp.refused("migrate", json!({"uri": file(&state)}));
        assert_eq!(text, words);
        set(&mut qmp, name, false);
    }
    assert!(!state.exists());
    assert_eq!(qmp.event_names_now(), [""; 0]);
    for name in ["multifd", "x-ignore-shared", "return-path"] {
        set(&mut qmp, name, true);
    }
    qmp.done("migrate", json!({"uri": file(&state)}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    qmp.done("quit", json!({}));
    vm.assert_over();
    let started = vm.run_again(&["--incoming", &file(&state)]).expect(0);
    vm.is_now(&started.json());
    vm.assert_goes_on(&before);
}

#[test]
fn a_full_disk_and_a_cancel_leave_the_guest_running_and_no_file() {
    let mut vm = Builder::release().state_files().start();
    let small = vm.site.path("small");
    std::fs::create_dir(&small).unwrap();
    let mount = |arguments: &[&str]| {
        let done = std::process::Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(&small)
            .status();
        assert!(done.unwrap().success(), "{arguments:?}");
    };
    mount(&["mount", "-t", "tmpfs", "-o", "size=1M,mode=700", "tmpfs"]);
    let before = vm.witness();
    let mut qmp = Qmp::connect(&vm);
    let info = vm.save_to(&mut qmp, &small.join("state"));
    let left = std::fs::read_dir(&small).unwrap().count();
    mount(&["umount"]);
    assert_eq!(info["status"], "failed", "{info}");
    let why = info["error-desc"].as_str().unwrap();
    assert!(why.contains("No space left on device"), "{why}");
    assert_eq!(left, 0, "the file is gone");
    let events = [
        "MIGRATION setup",
        "STOP",
        "MIGRATION active",
        "MIGRATION device",
        "RESUME",
        "MIGRATION failed",
    ];
    assert_eq!(qmp.event_names_now(), events);
    let before = vm.assert_goes_on(&before);

    let hold = json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]});
    qmp.done("migrate-set-capabilities", hold);
    let state = vm.site.path("state");
    qmp.done("migrate", json!({"uri": file(&state)}));
    until("it waits", || {
        (qmp.returns("query-migrate", json!({}))["status"] == "pre-switchover").then_some(())
    });
    assert!(state.exists());
    let before = vm.assert_goes_on(&before);
    qmp.done("migrate_cancel", json!({}));
    assert_eq!(qmp.migrated()["status"], "cancelled");
    assert!(!state.exists());
    let before = vm.assert_goes_on(&before);

    qmp.done("migrate", json!({"uri": file(&state)}));
    until("it waits", || {
        (qmp.returns("query-migrate", json!({}))["status"] == "pre-switchover").then_some(())
    });
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated()["status"], "completed");
    qmp.done("quit", json!({}));
    vm.assert_over();
    let started = vm
        .run_again(&["--incoming", &file(&state)])
        .expect(0)
        .json();
    vm.is_now(&started);
    vm.assert_goes_on(&before);
}

#[test]
fn a_forged_or_foreign_file_is_refused_by_name_and_the_good_one_still_loads() {
    let mut vm = Builder::release().state_files().start();
    let before = vm.witness();
    let good = vm.save_and_quit();
    let bytes = std::fs::read(&good).unwrap();
    let bad = vm.site.path("bad");
    let try_it = |vm: &Vm, bytes: &[u8], words: &str| {
        vm.site.write("bad", bytes);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&bad, mode).unwrap();
        let answer = vm.run_again(&["--incoming", &file(&bad)]);
        assert_eq!(answer.code, Some(3), "{words}: {answer:?}");
        assert!(answer.stderr.contains(words), "{words}: {answer:?}");
        vm.site.assert_nothing_left();
    };
    try_it(&vm, b"", "0 bytes at offset 0");
    try_it(&vm, &[b"QCPR", &bytes[4..]].concat(), "no state file");
    try_it(&vm, &[b"BTNR\x02", &bytes[5..]].concat(), "version 2");
    try_it(&vm, &bytes[..bytes.len() / 2], "the state file");
    for (at, words) in [
        (28, "header"),
        (32, "state"),
        (8, "digest"),
        (24, "digest"),
        (bytes.len() / 2, "digest"),
        (bytes.len() - 1, "digest"),
    ] {
        let mut forged = bytes.clone();
        forged[at] ^= 0x40;
        if at == 28 || at == 32 {
            forged[at + 3] = 0xff;
        }
        try_it(&vm, &forged, words);
    }
    let toml = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    for (from, to, words) in [
        ("count = 1", "count = 2", "2 vCPUs, this one 1"),
        ("\"64M\"", "\"128M\"", "RAM"),
        ("balloon = false", "balloon = true", "device"),
    ] {
        assert!(toml.contains(from));
        vm.site.write("vm.toml", toml.replace(from, to));
        let answer = vm.run_again(&["--incoming", &file(&good)]).expect(3);
        assert!(
            answer.stderr.contains("saved on another machine"),
            "{answer:?}"
        );
        assert!(answer.stderr.contains(words), "{words}: {answer:?}");
    }
    vm.site.write("vm.toml", toml);
    let started = vm.run_again(&["--incoming", &file(&good)]).expect(0).json();
    vm.is_now(&started);
    vm.assert_goes_on(&before);
}

#[test]
fn a_guest_comes_out_of_its_file_once() {
    let mut vm = Builder::release().state_files().start();
    let state = vm.save_and_quit();
    let started = vm.run_again(&["--incoming", &file(&state)]).expect(0);
    vm.is_now(&started.json());
    vm.site.baton(["stop", "--force", &vm.site.name]).expect(0);
    vm.assert_over();
    let answer = vm.run_again(&["--incoming", &file(&state)]).expect(3);
    assert!(answer.stderr.contains("was let out of it"), "{answer:?}");
    vm.site.assert_nothing_left();
}

/// The same steps over a real boot of a host whose KVM takes offsets are `tests/linux/reboot.sh`.
#[test]
fn a_guest_of_before_the_hosts_boot_needs_a_tsc_offset() {
    let mut vm = Builder::release().state_files().start();
    let before = vm.witness();
    let state = vm.save_and_quit();
    let mut bytes = std::fs::read(&state).unwrap();
    // The first field of the header, after the prelude.
    bytes[36] ^= 1;
    let end = bytes.len() - 32;
    let digest = Sha256::digest(&bytes[..end]);
    bytes[end..].copy_from_slice(&digest);
    std::fs::write(&state, bytes).unwrap();
    let answer = vm.run_again(&["--incoming", &file(&state)]);
    if answer.code == Some(0) {
        vm.is_now(&answer.json());
        vm.assert_goes_on(&before);
    } else {
        // kvm-pvm's answer.
        let answer = answer.expect(3);
        assert!(answer.stderr.contains("TSC offset"), "{answer:?}");
        // It never ran, and can still come out of it elsewhere.
        assert_eq!(std::fs::read(&state).unwrap().get(..4), Some(&b"BTNR"[..]));
    }
}

#[test]
fn ram_that_went_on_or_is_gone_is_not_taken_for_the_guests() {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = place.path().join("guest-ram");
    let lines = format!("path = \"{}\"", path.display());
    let mut vm = Builder::release()
        .state_files()
        .memory_lines(&lines)
        .start();
    let before = vm.witness();
    let state = vm.save_and_quit();
    let ram = std::fs::read(&path).unwrap();
    let refused = |vm: &Vm, words: &str| {
        let answer = vm.run_again(&["--incoming", &file(&state)]).expect(3);
        assert!(answer.stderr.contains(words), "{words}: {answer:?}");
    };
    let write = |at: usize, byte: u8| {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, &[byte], at as u64).unwrap();
    };
    let at = ram.iter().position(|byte| *byte != 0).unwrap();
    write(at, ram[at] ^ 1);
    refused(&vm, "is not as it was when it was saved");
    write(at, ram[at]);
    std::fs::rename(&path, place.path().join("elsewhere")).unwrap();
    refused(&vm, "memory.path");
    std::fs::rename(place.path().join("elsewhere"), &path).unwrap();
    let started = vm
        .run_again(&["--incoming", &file(&state)])
        .expect(0)
        .json();
    vm.is_now(&started);
    vm.assert_goes_on(&before);
    // It is one VM's at a time.
    let toml = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = toml.replace(&vm.site.name, &format!("{}-b", vm.site.name));
    vm.site.write("other.toml", other);
    let answer = vm.site.run("other.toml").expect(3);
    assert!(answer.stderr.contains("locked"), "{answer:?}");
}

#[test]
fn private_ram_blocks_cpr_transfer_in_qemus_words_and_goes_into_a_file() {
    const NOT_SHARED: &str = "Memory region ram is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required.";
    let mut vm = Builder::release()
        .state_files()
        .memory_lines("share = false")
        .start_unseen();
    // Every line once and in order is all that can be seen of this one.
    let lines = |vm: &Vm, more_than: usize| -> usize {
        until("the guest prints", || {
            let lines = vm.status_lines().lines.len();
            (lines > more_than).then_some(lines)
        })
    };
    let printed = lines(&vm, 2);
    let mut qmp = Qmp::connect(&vm);
    let reasons = |qmp: &mut Qmp, mode: &str| {
        qmp.done("migrate-set-parameters", json!({"mode": mode}));
        qmp.returns("query-migrate", json!({}))["blocked-reasons"].clone()
    };
    assert_eq!(reasons(&mut qmp, "cpr-reboot"), json!(null));
    assert_eq!(reasons(&mut qmp, "cpr-transfer"), json!([NOT_SHARED]));
    let text = qmp.refused("migrate", json!({}));
    assert!(text.starts_with(NOT_SHARED), "{text}");
    assert_eq!(vm.ask("upgrade").code, Some(3));
    let printed = lines(&vm, printed);
    drop(qmp);
    let state = vm.save_and_quit();
    let started = vm
        .run_again(&["--incoming", &file(&state)])
        .expect(0)
        .json();
    vm.is_now(&started);
    lines(&vm, printed);
    let log = vm.status_lines();
    let first = log.lines.first().unwrap().nonce;
    assert!(log.lines.iter().all(|line| line.nonce == first), "{log:?}");
}

#[test]
fn a_device_blocks_one_mode() {
    let vm = Builder::release().state_files().vsock().start();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let blocked = "State blocked by non-migratable device 'vsock'";
    let info = qmp.returns("query-migrate", json!({}));
    assert_eq!(info["blocked-reasons"], json!([blocked]));
    let uri = json!({"uri": file(&vm.site.path("state"))});
    assert!(qmp.refused("migrate", uri).starts_with(blocked));
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let info = qmp.returns("query-migrate", json!({}));
    assert_eq!(info, json!({}));
    vm.assert_upgrades();
}
