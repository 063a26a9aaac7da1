//! Somebody between two brokers, on the cpr socket, who hands one of a guest's descriptors on as another, with a description to
//! match: the workers see it on the main channel, which does not go through there.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::between::Handed;
use baton_tests::between::Swap;
use baton_tests::between::no_ram;
use baton_tests::between::other_ram;
use baton_tests::between::stand_between;
use baton_tests::transfer::channel;
use serde_json::json;

/// A console of the one in the middle, who would read what the guest prints and type to it.
fn other_console(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if key.name() != "console" {
        return Handed::Same;
    }
    let (end, other) = UnixStream::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    std::mem::forget(other);
    Handed::Other(end.into())
}

/// `/dev/kvm` through another node than the host's own would pass; the same node is the same.
fn same_kvm(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if key.name() != "kvm" {
        return Handed::Same;
    }
    let mut options = std::fs::File::options();
    let kvm = options.read(true).write(true).open("/dev/kvm");
    Handed::Other(kvm.unwrap().into())
}

#[test]
fn a_descriptor_put_in_anothers_place_is_named_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let cases: [(&str, Swap); 2] = [("ram#0", other_ram), ("console#0", other_console)];
    for (name, swap) in cases {
        let waiting = vm.wait_for_guest();
        let between = vm.site.path(&format!("between-{}", &name[..3]));
        let middle = stand_between(&between, &waiting.cpr, swap);
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        let channels = [channel("main", &waiting.main), channel("cpr", &between)];
        qmp.done("migrate", json!({"channels": channels}));
        let info = qmp.migrated();
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        let words = format!("descriptor {name} is not the old worker's");
        assert!(reason.contains(&words), "{reason}");
        assert!(!qmp.event_names().contains(&"STOP".to_owned()));
        drop(qmp);
        vm.assert_nobody_waits(&waiting);
        assert_eq!(middle.join().unwrap(), 1);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn who_only_passes_things_on_is_not_in_the_way() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let waiting = vm.wait_for_guest();
    let between = vm.site.path("between");
    let middle = stand_between(&between, &waiting.cpr, same_kvm);
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let channels = [channel("main", &waiting.main), channel("cpr", &between)];
    qmp.done("migrate", json!({"channels": channels}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    assert_eq!(middle.join().unwrap(), 1);
    vm.assert_goes_on(&before);
}

#[test]
fn who_drops_a_descriptor_ends_the_transfer_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let waiting = vm.wait_for_guest();
    let between = vm.site.path("between");
    let middle = stand_between(&between, &waiting.cpr, no_ram);
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let channels = [channel("main", &waiting.main), channel("cpr", &between)];
    qmp.done("migrate", json!({"channels": channels}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(
        reason.contains("0 descriptors came with entry ram#0"),
        "{reason}"
    );
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    assert_eq!(middle.join().unwrap(), 1);
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}
