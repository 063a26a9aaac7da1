//! Disks come and go while the guest runs, whoever runs it.
#![expect(clippy::expect_used, reason = "a test that cannot do its work fails")]

use std::fs::File;
use std::path::PathBuf;

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A guest that waits for a disk. A broker that runs reaches the directories that its policy names, and `/**` names none.
fn waiting() -> Builder {
    let (before, disk) = baton_policy::BUILTIN
        .split_once("name = \"disk\"")
        .expect("a grant of disks");
    let here = format!("\"/**\", \"{}/**\"", std::env::temp_dir().display());
    let disk = disk.replacen("\"/**\"", &here, 1);
    let policy = format!("{before}name = \"disk\"{disk}");
    Builder::release().policy(&policy).line(
        CommandLine::new()
            .disk_irq()
            .hotplug()
            .console()
            .period_ms(50),
    )
}

fn image(vm: &Vm, name: &str) -> PathBuf {
    let path = vm.site.path(name);
    let file = File::create(&path).expect("an image");
    file.set_len(4 * MIB).expect("an image");
    path
}

fn node(vm: &Vm, name: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": image(vm, &format!("{name}.img"))})
}

fn device(id: &str, node: &str) -> Value {
    json!({"driver": "virtio-blk-pci", "id": id, "drive": node, "serial": id})
}

fn plug(vm: &Vm, qmp: &mut Qmp, id: &str, node_name: &str) {
    qmp.done("blockdev-add", node(vm, node_name));
    qmp.done("device_add", device(id, node_name));
}

/// The guest works on its disk.
fn assert_works(vm: &Vm) {
    let done = vm.ram.disk().done;
    let report = vm.until_disk("requests", |disk| disk.done > done + 100);
    assert_eq!(report.faults(), 0, "{report:?}");
}

/// What is said of the end of a device.
fn await_event(qmp: &mut Qmp, name: &str, id: &str) {
    until(name, || {
        qmp.event_names_now();
        let data = json!({"device": id, "path": format!("/machine/peripheral/{id}")});
        let mut events = qmp.events.iter();
        events
            .any(|event| {
                event.get("event") == Some(&name.into()) && event.get("data") == Some(&data)
            })
            .then_some(())
    });
    qmp.events.clear();
}

/// The descriptors of the worker's disks, as a proven audit names them.
fn audited(vm: &Vm) -> Vec<String> {
    let audit = vm.ask("audit").expect(0).json();
    let text =
        |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    assert_eq!(
        text(&audit, "verdict").as_deref(),
        Some("proven"),
        "{audit}"
    );
    let listed = audit.get("descriptors").and_then(Value::as_array);
    let grants = listed.expect("descriptors").iter();
    let grants = grants.filter_map(|one| text(one, "grant"));
    grants.filter(|grant| grant.starts_with("disk#")).collect()
}

#[test]
fn a_disk_comes_works_over_upgrades_and_goes_and_another_takes_its_place() {
    let vm = waiting().start();
    vm.until_disk("no disk", |disk| disk.state == DriverState::Absent);
    let mut qmp = Qmp::connect(&vm);
    let mut residue = None;
    for round in 1..=3 {
        plug(&vm, &mut qmp, "d", "n");
        vm.until_disk("a disk", |disk| {
            disk.came == round && disk.state == DriverState::Working
        });
        assert_works(&vm);
        assert_eq!(audited(&vm), ["disk#1"]);
        for _ in 0..3 {
            vm.assert_upgrades();
            assert_works(&vm);
        }
        let blocks = qmp.returns("query-block", json!({}));
        let place = |place| blocks.pointer(place).cloned();
        assert_eq!(place("/0/qdev"), Some("d".into()), "{blocks}");
        assert_eq!(place("/0/inserted/node-name"), Some("n".into()));
        assert_eq!(audited(&vm), ["disk#1"]);
        // At its end the image is what the guest says that it wrote.
        vm.assert_disk_is_whole("n.img");
        vm.ram.mail(layout::COMMAND_DISK_WORK);
        assert_works(&vm);

        qmp.events.clear();
        qmp.done("device_del", json!({"id": "d"}));
        await_event(&mut qmp, "DEVICE_DELETED", "d");
        assert_eq!(vm.ram.disk().went, round);
        assert!(audited(&vm).is_empty());
        assert_eq!(qmp.returns("query-block", json!({})), json!([]));
        vm.assert_upgrades();
        assert!(audited(&vm).is_empty());
        qmp.done("blockdev-del", json!({"node-name": "n"}));
        let left = residue.get_or_insert_with(|| vm.residue());
        // When those who asked have left, too.
        until("nothing more to be left", || {
            (vm.residue() == *left).then_some(())
        });
    }
    let log = vm.audit_log();
    for (event, count) in [("node-add", 3), ("device-add", 3), ("device-deleted", 3)] {
        assert_eq!(log.count(event), count, "{event}");
    }
}

#[test]
fn a_guest_that_keeps_its_disk_is_asked_again_and_a_new_worker_goes_on_asking() {
    let vm = waiting().slowness(4).start();
    let mut qmp = Qmp::connect(&vm);
    plug(&vm, &mut qmp, "d", "n");
    assert_works(&vm);
    vm.ram.tell(layout::COMMAND_HOTPLUG_KEEP);
    qmp.done("device_del", json!({"id": "d"}));
    let twice = qmp.refused("device_del", json!({"id": "d"}));
    assert!(
        twice.contains("already in the process of unplug"),
        "{twice}"
    );
    await_event(&mut qmp, "DEVICE_UNPLUG_GUEST_ERROR", "d");
    assert_works(&vm);
    assert_eq!(audited(&vm), ["disk#1"]);
    qmp.done("device_del", json!({"id": "d"}));
    vm.assert_upgrades();
    assert_works(&vm);
    vm.ram.mail(layout::COMMAND_HOTPLUG_YIELD);
    await_event(&mut qmp, "DEVICE_DELETED", "d");
    assert!(audited(&vm).is_empty());
    vm.assert_upgrades();
}

#[test]
fn disks_that_came_go_to_another_broker_with_their_guest() {
    let mut vm = waiting().start();
    let mut qmp = Qmp::connect(&vm);
    plug(&vm, &mut qmp, "d", "n");
    plug(&vm, &mut qmp, "e", "m");
    vm.until_disk("two disks", |disk| disk.came == 2);
    let spare = json!({"driver": "file", "node-name": "spare", "filename": image(&vm, "s.img")});
    qmp.done("blockdev-add", spare);
    let waiting = vm.wait_for_guest();
    let channels = json!({"channels": waiting.channels()});
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let refusal = qmp.refused("migrate", channels);
    assert!(refusal.contains("node spare would be lost"), "{refusal}");
    qmp.done("blockdev-del", json!({"node-name": "spare"}));
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info.get("status"), Some(&json!("completed")), "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    assert_works(&vm);
    assert_eq!(audited(&vm), ["disk#1", "disk#2"]);
    let mut qmp = Qmp::connect(&vm);
    vm.assert_upgrades();
    // The lock is held as before.
    let mut again = node(&vm, "again");
    let taken = vm.site.path("n.img");
    if let Some(place) = again.get_mut("filename") {
        *place = json!(taken);
    }
    let refusal = qmp.refused("blockdev-add", again);
    assert!(refusal.contains("is locked"), "{refusal}");
    for (id, node) in [("d", "n"), ("e", "m")] {
        qmp.done("device_del", json!({"id": id}));
        await_event(&mut qmp, "DEVICE_DELETED", id);
        qmp.done("blockdev-del", json!({"node-name": node}));
    }
    assert!(audited(&vm).is_empty());
    drop(qmp);
    vm.assert_transfers();
}

#[test]
fn a_reset_keeps_a_disk_and_takes_one_that_was_to_go() {
    let vm = waiting().start();
    let mut qmp = Qmp::connect(&vm);
    plug(&vm, &mut qmp, "d", "n");
    assert_works(&vm);
    let reset = |qmp: &mut Qmp| {
        let nonce = vm.ram.report().expect("a report").nonce;
        qmp.done("system_reset", json!({}));
        until("another boot", || {
            let report = vm.ram.report().ok()?;
            (report.nonce != nonce).then_some(())
        });
    };
    reset(&mut qmp);
    vm.until_disk("the disk", |disk| disk.state == DriverState::Working);
    assert_works(&vm);
    vm.ram.tell(layout::COMMAND_HOTPLUG_KEEP);
    qmp.done("device_del", json!({"id": "d"}));
    reset(&mut qmp);
    await_event(&mut qmp, "DEVICE_DELETED", "d");
    vm.until_disk("no disk", |disk| disk.state == DriverState::Absent);
    vm.assert_upgrades();
    assert!(audited(&vm).is_empty());
}

#[test]
fn a_guest_may_let_go_what_came_while_it_works_and_nothing_else() {
    let vm = waiting().disk("own", 4, "").start();
    let mut qmp = Qmp::connect(&vm);
    assert_works(&vm);
    plug(&vm, &mut qmp, "d", "n");
    vm.until_disk("another disk", |disk| disk.came == 1);
    vm.ram.mail(layout::COMMAND_HOTPLUG_EJECT);
    await_event(&mut qmp, "DEVICE_DELETED", "d");
    assert_eq!(audited(&vm), ["disk#1"]);
    qmp.done("blockdev-del", json!({"node-name": "n"}));
    vm.assert_upgrades();
}

#[test]
fn a_guest_may_let_a_disk_go_with_requests_under_way() {
    let vm = waiting().start();
    let mut qmp = Qmp::connect(&vm);
    for _ in 0..5 {
        plug(&vm, &mut qmp, "d", "n");
        assert_works(&vm);
        vm.ram.mail(layout::COMMAND_HOTPLUG_EJECT);
        await_event(&mut qmp, "DEVICE_DELETED", "d");
        assert!(audited(&vm).is_empty());
        qmp.done("blockdev-del", json!({"node-name": "n"}));
        vm.assert_upgrades();
    }
}

#[test]
fn a_disk_comes_to_a_guest_that_stands_still() {
    let vm = waiting().start();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("stop", json!({}));
    plug(&vm, &mut qmp, "d", "n");
    assert_eq!(vm.upgrade().outcome, "committed");
    assert_eq!(audited(&vm), ["disk#1"]);
    qmp.done("cont", json!({}));
    assert_works(&vm);
    // Its size, too.
    let size = json!({"node-name": "n", "size": 8 * MIB});
    qmp.done("block_resize", size);
    vm.until_disk("another size", |disk| disk.bytes == 8 * MIB);
    vm.assert_upgrades();
    assert_works(&vm);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_left_of_it() {
    let vm = waiting().disk("own", 4, "").start();
    let mut qmp = Qmp::connect(&vm);
    let file =
        |name: &str, path: &str| json!({"driver": "file", "node-name": name, "filename": path});
    let own = vm.site.path("own.img").display().to_string();
    let directory = vm.site.path("").display().to_string();
    let leads = |name: &str, to: PathBuf| {
        let link = vm.site.path(name);
        std::os::unix::fs::symlink(to, &link).expect("a link");
        link
    };
    let link = leads("link.img", image(&vm, "real.img"))
        .display()
        .to_string();
    let through = leads("link", vm.site.path("")).join("real.img");
    let through = through.display().to_string();
    for (arguments, said) in [
        (
            file("own", "/dev/null"),
            "Duplicate nodes with node-name='own'",
        ),
        (file("a", "/nonexistent"), "cannot open /nonexistent"),
        (file("a", "relative.img"), "no absolute path"),
        (file("a", &link), "a symbolic link lies in the path"),
        (file("a", &through), "a symbolic link lies in the path"),
        (
            file("a", "/dev/null"),
            "neither a regular file nor a block device",
        ),
        (file("a", &directory), "disk a: cannot"),
        (file("a", &own), "is locked"),
        (file("a b", &own), "no id or serial number"),
    ] {
        let refusal = qmp.refused("blockdev-add", arguments);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    qmp.done("blockdev-add", node(&vm, "n"));
    let again = json!({"driver": "file", "node-name": "n", "filename": vm.site.path("n.img")});
    let refusal = qmp.refused("blockdev-add", again);
    assert!(
        refusal.contains("Duplicate nodes with node-name='n'"),
        "{refusal}"
    );
    let with = |field: &str, value: Value| {
        let mut arguments = device("d", "n");
        if let Some(members) = arguments.as_object_mut() {
            members.insert(field.to_owned(), value);
        }
        arguments
    };
    for (arguments, said) in [
        (
            with("driver", json!("e1000")),
            "'e1000' is not a valid device model name",
        ),
        (with("drive", json!("m")), "can't find value 'm'"),
        (with("id", json!("own")), "Duplicate device ID 'own'"),
        (with("id", json!("7")), "expects an identifier"),
        (
            with("addr", json!("1")),
            "slot 1 function 0 is not available",
        ),
        (
            with("addr", json!("0")),
            "slot 0 function 0 is not available",
        ),
        (
            with("addr", json!("1f")),
            "slot 31 function 0 is not available",
        ),
        (with("addr", json!("99")), "doesn't take value '99'"),
        (with("num-queues", json!(9)), "1 to 8"),
        (with("bus", json!("usb.0")), "Bus 'usb.0' not found"),
    ] {
        let refusal = qmp.refused("device_add", arguments);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    let absent = qmp.ask("device_del", json!({"id": "d"}));
    assert_eq!(
        absent.pointer("/error/class"),
        Some(&json!("DeviceNotFound")),
        "{absent}"
    );
    let refusal = qmp.refused("device_del", json!({"id": "own"}));
    assert!(refusal.contains("is the VM file's"), "{refusal}");
    assert_eq!(audited(&vm), ["disk#1"]);

    qmp.done("device_add", with("num-queues", json!(8)));
    let refusal = qmp.refused("device_add", device("e", "n"));
    assert!(refusal.contains("already in use"), "{refusal}");
    let refusal = qmp.refused("blockdev-del", json!({"node-name": "n"}));
    assert!(refusal.contains("Node n is in use"), "{refusal}");
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let info = qmp.returns("query-migrate", json!({}));
    let blocked = info.pointer("/blocked-reasons/0").cloned();
    assert_eq!(
        blocked,
        Some("State blocked by device 'd': no VM file has it".into())
    );
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let switch =
        json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]});
    qmp.done("migrate-set-capabilities", switch);
    qmp.migrate();
    until("it waits", || {
        let info = qmp.returns("query-migrate", json!({}));
        (info.get("status") == Some(&json!("pre-switchover"))).then_some(())
    });
    for (command, arguments) in [
        ("blockdev-add", node(&vm, "m")),
        ("device_add", device("e", "n")),
        ("device_del", json!({"id": "d"})),
        ("blockdev-del", json!({"node-name": "n"})),
    ] {
        let busy = qmp.refused(command, arguments);
        let words = match command.split_once('_') {
            Some(("device", _)) => format!("{command} not allowed while migrating"),
            _ => "is being upgraded".to_owned(),
        };
        assert!(busy.contains(&words), "{command}: {busy}");
    }
    // What the guest lets go meanwhile is gone when the upgrade is over.
    vm.ram.mail(layout::COMMAND_HOTPLUG_EJECT);
    vm.until_disk("it to be let go", |disk| disk.went == 1);
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated().get("status"), Some(&json!("completed")));
    await_event(&mut qmp, "DEVICE_DELETED", "d");
    assert_eq!(audited(&vm), ["disk#1"]);
    vm.assert_upgrades();
}

#[test]
fn a_disk_that_policy_does_not_grant_is_not_opened() {
    let binaries = baton_tests::Site::new(baton_tests::Binaries::release(), 10);
    let policy = binaries.write_policy(&[&binaries.binaries().worker()]);
    let granted = std::fs::read_to_string(policy).expect("a policy");
    let (before, disk) = granted
        .split_once("name = \"disk\"")
        .expect("a grant of disks");
    let disk = disk.replacen("\"/**\"", "\"/srv/disks/**\"", 1);
    let vm = waiting()
        .policy(&format!("{before}name = \"disk\"{disk}"))
        .start();
    let mut qmp = Qmp::connect(&vm);
    let refusal = qmp.refused("blockdev-add", node(&vm, "n"));
    assert!(refusal.contains("does not grant the disk n"), "{refusal}");
    assert_eq!(vm.audit_log().count("node-add"), 0);
}
