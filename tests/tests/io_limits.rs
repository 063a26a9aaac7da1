//! What a VM may cost its host's disks and network is its policy's to say, whatever the VM file asks for.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::fs::OpenOptions;
use std::io::Write;

use baton_policy::BUILTIN;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::json;

/// The least that a policy can say, in bytes.
const CONSOLE: u64 = 65_536;

/// Somebody has printed more into the console's file than it may have: what the guest prints next has the oldest let go.
fn assert_bounded(vm: &Vm) {
    let path = vm.site.path("console.log");
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    let lines = (0..8_000).map(|number| format!("old line {number:04}\n"));
    // In one call: the broker writes there, too.
    file.write_all(lines.collect::<String>().as_bytes())
        .unwrap();
    let text = until("the oldest lines are let go", || {
        let text = fs::read_to_string(&path).ok()?;
        let bounded = text.len() as u64 <= CONSOLE;
        let goes_on = text.lines().next_back()?.contains("old line");
        (bounded && !goes_on && text.contains("old line 7999")).then_some(text)
    });
    assert!(!text.contains("old line 0000"), "the newest are kept");
    assert!(
        text.starts_with("old line "),
        "whole lines: {:?}",
        text.get(..40)
    );
}

#[test]
fn a_guest_that_prints_without_end_fills_no_disk() {
    let policy = BUILTIN.replace("console_file = 67_108_864", "console_file = 65_536");
    let mut vm = Builder::release().policy(&policy).start();
    assert_bounded(&vm);
    vm.assert_upgrades();
    assert_bounded(&vm);
    vm.assert_transfers();
    assert_bounded(&vm);
    vm.ask("audit").expect(0);
}

fn limiting(operations: u64) -> String {
    let (before, here) = (
        "disk_operations = \"unlimited\"",
        format!("disk_operations = {operations}"),
    );
    BUILTIN.replace(before, &here)
}

#[test]
fn a_disk_is_limited_as_policy_demands_or_its_vm_does_not_run() {
    let vm = Builder::release()
        .disk("root", 4, "limit = { operations = 1000 }")
        .policy(&limiting(1000))
        .start();
    vm.assert_upgrades();
    // What comes by QMP has no limit.
    let mut qmp = Qmp::connect(&vm);
    let spare = vm.site.path("spare.img");
    fs::File::create(&spare).unwrap().set_len(1 << 20).unwrap();
    qmp.done(
        "blockdev-add",
        json!({"driver": "file", "node-name": "n", "filename": spare}),
    );
    let refused = qmp.refused(
        "device_add",
        json!({"driver": "virtio-blk-pci", "id": "d", "drive": "n", "serial": "late"}),
    );
    let said = "lets disk late have 1000 operations a second, and it is not limited";
    assert!(refused.contains(said), "{refused}");
    qmp.done("blockdev-del", json!({"node-name": "n"}));
    drop(qmp);
    // A policy that gives less keeps the guest from no worker that it has, and from the next one.
    vm.site.write("policy.toml", limiting(999));
    let refused = vm.ask("upgrade").expect(30);
    let said = "lets disk root have 999 operations a second, and it is limited to 1000";
    assert!(refused.stdout.contains(said), "{refused:?}");
    let guest = vm.witness();
    vm.assert_goes_on(&guest);
    assert_eq!(vm.generation(), 2);
    // No other broker takes it under such a policy either.
    let waiting = vm.wait_for_guest();
    let mut qmp = Qmp::connect(&vm);
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "failed", "{info}");
    assert!(
        info["error-desc"].as_str().unwrap().contains(said),
        "{info}"
    );
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    vm.assert_goes_on(&guest);
    // And none begins.
    vm.site.baton(["stop", "--force", &vm.site.name]).expect(0);
    let refused = vm.site.run("vm.toml").expect(30);
    assert!(refused.stdout.contains(said), "{refused:?}");
}
