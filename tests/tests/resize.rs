//! A disk gets another size under its guest, which is told, and keeps it whoever runs the guest.
#![expect(clippy::expect_used, reason = "a test that cannot do its work fails")]

use std::path::Path;

use baton_guest::CommandLine;
use baton_tests::Builder;
use baton_tests::LoopDevice;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::json;

const MIB: u64 = 1 << 20;

fn busy() -> Builder {
    Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .disk("data", 4, "")
}

/// The guest and everybody who asks is told of this size, which the file has.
fn assert_size(vm: &Vm, qmp: &mut Qmp, bytes: u64) {
    vm.until_disk("the guest to be told", |disk| disk.bytes == bytes);
    let blocks = qmp.returns("query-block", json!({}));
    let told = |place| blocks.pointer(place).cloned();
    let size = told("/0/inserted/image/virtual-size");
    assert_eq!(size, Some(bytes.into()), "{blocks}");
    assert_eq!(told("/0/inserted/node-name"), Some("data".into()));
}

fn file_size(path: &Path) -> u64 {
    std::fs::metadata(path).expect("the disk's file").len()
}

#[test]
fn a_disk_grows_and_shrinks_under_its_guest_and_stays_so_over_upgrades_and_transfers() {
    let mut vm = busy().start();
    let file = vm.site.path("data.img");
    let mut qmp = Qmp::connect(&vm);
    vm.until_disk("a disk", |disk| disk.done > 100);
    let mut changes = vm.ram.disk().changes;
    for (name, mib) in [("device", 8), ("node-name", 6), ("device", 7)] {
        qmp.done("block_resize", json!({name: "data", "size": mib * MIB}));
        assert_eq!(file_size(&file), mib * MIB);
        assert_size(&vm, &mut qmp, mib * MIB);
        changes += 1;
        assert_eq!(vm.ram.disk().changes, changes);
        vm.assert_upgrades();
        let done = vm.ram.disk().done;
        vm.until_disk("requests", |disk| disk.done > done + 100);
        assert_size(&vm, &mut qmp, mib * MIB);
    }
    drop(qmp);
    vm.assert_transfers();
    let mut qmp = Qmp::connect(&vm);
    assert_size(&vm, &mut qmp, 7 * MIB);
    // What its operator has done to the file is taken, too; and a guest that stands still is told when it goes on.
    let owner = std::fs::File::options()
        .write(true)
        .open(&file)
        .expect("the disk's file");
    owner.set_len(9 * MIB).expect("the disk's file");
    qmp.done("stop", json!({}));
    qmp.done("block_resize", json!({"device": "data", "size": 9 * MIB}));
    assert_eq!(vm.upgrade().outcome, "committed");
    assert_eq!(vm.ram.disk().bytes, 7 * MIB);
    qmp.done("cont", json!({}));
    assert_size(&vm, &mut qmp, 9 * MIB);
    vm.assert_disk_is_whole("data.img");
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    assert_eq!(vm.audit_log().count("resize"), 4);
}

#[test]
fn a_guest_that_writes_all_over_its_disk_does_not_make_it_longer_again() {
    let vm = busy().start();
    let file = vm.site.path("data.img");
    let mut qmp = Qmp::connect(&vm);
    vm.until_disk("a disk", |disk| disk.done > 1000);
    for _ in 0..10 {
        for mib in [1, 4] {
            let size = json!({"device": "data", "size": mib * MIB});
            until("its requests to end in time", || {
                let answer = qmp.ask("block_resize", size.clone());
                let said = answer.to_string();
                let done = answer.get("return").is_some();
                assert!(done || said.contains("still in flight"), "{said}");
                done.then_some(())
            });
            let before = vm.ram.disk();
            vm.until_disk("requests", |disk| disk.done > before.done + 200);
            assert_eq!(file_size(&file), mib * MIB);
        }
    }
    // It was told that there is nothing.
    assert!(vm.ram.disk().errors > 0);
    vm.assert_upgrades();
}

#[test]
fn what_cannot_be_is_refused_and_nothing_changes() {
    let vm = busy().disk("rom", 4, "readonly = true").start();
    let mut qmp = Qmp::connect(&vm);
    let resize = |qmp: &mut Qmp, disk: &str, size: i64| {
        qmp.refused("block_resize", json!({"device": disk, "size": size}))
    };
    assert_eq!(
        resize(&mut qmp, "other", 4096),
        "Cannot find device='other' nor node-name=''"
    );
    assert_eq!(
        resize(&mut qmp, "data", -1),
        "Parameter 'size' expects a >0 size"
    );
    for (disk, size, said) in [
        ("data", 0, "a multiple of 512"),
        ("data", 4097, "a multiple of 512"),
        ("data", i64::MAX - 511, "File too large"),
        ("rom", 8192, "read-only"),
    ] {
        let refusal = resize(&mut qmp, disk, size);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    assert_eq!(file_size(&vm.site.path("data.img")), 4 * MIB);

    let switch =
        json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]});
    qmp.done("migrate-set-capabilities", switch);
    qmp.migrate();
    until("it waits", || {
        let info = qmp.returns("query-migrate", json!({}));
        (info["status"] == "pre-switchover").then_some(())
    });
    let busy = resize(&mut qmp, "data", 8192);
    assert!(busy.contains("is being upgraded"), "{busy}");
    qmp.done("migrate-continue", json!({"state": "pre-switchover"}));
    assert_eq!(qmp.migrated()["status"], "completed");
    let size = json!({"device": "data", "size": 8 * MIB});
    qmp.done("block_resize", size);
    assert_size(&vm, &mut qmp, 8 * MIB);
}

#[test]
fn a_block_device_has_the_size_that_it_has() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resize.img");
    let backing = std::fs::File::create(&path).expect("a file");
    backing.set_len(4 * MIB).expect("a file");
    let device = LoopDevice::on(&path);
    let vm = Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .disk_at("data", device.path())
        .start();
    let mut qmp = Qmp::connect(&vm);
    vm.until_disk("a disk", |disk| disk.done > 100);
    let size = json!({"device": "data", "size": 8 * MIB});
    let refusal = qmp.refused("block_resize", size.clone());
    assert!(refusal.contains("Cannot grow device files"), "{refusal}");
    backing.set_len(8 * MIB).expect("a file");
    device.refresh();
    qmp.done("block_resize", size);
    assert_size(&vm, &mut qmp, 8 * MIB);
    vm.assert_upgrades();
    // Any size that it has room for stands for the one that it has.
    backing.set_len(6 * MIB).expect("a file");
    device.refresh();
    qmp.done("block_resize", json!({"device": "data", "size": MIB}));
    assert_size(&vm, &mut qmp, 6 * MIB);
    vm.assert_upgrades();
    vm.end().expect(0);
}
