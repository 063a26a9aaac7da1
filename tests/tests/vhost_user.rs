//! A disk or a file system that another process implements keeps its work, and its process, whatever happens to the workers.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_tests::Backend;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::continue_process;
use baton_tests::stop_process;
use baton_tests::until;

const DISK: &str = "[[vhost_user]]\nid = \"data\"\nkind = \"blk\"\nsocket = \"d.sock\"\n";

fn builder() -> Builder {
    Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .tables(DISK)
}

fn start(builder: Builder) -> (Vm, Backend) {
    let mut backend = None;
    let vm = builder.start_in(|site| {
        let (image, socket) = (site.path("data.img"), site.path("d.sock"));
        backend = Some(Backend::storage_daemon(&image, 4, &socket));
    });
    (vm, backend.unwrap())
}

/// So many more requests are done, and an interrupt comes.
fn assert_works(vm: &Vm) {
    let before = vm.ram.disk();
    vm.until_disk("requests and interrupts", |disk| {
        disk.done > before.done + 100 && disk.interrupts > before.interrupts
    });
}

#[test]
fn every_request_is_completed_once_over_fifty_upgrades_and_the_process_stays() {
    let (vm, mut backend) = start(builder());
    assert_works(&vm);
    let sockets = backend.sockets();
    for _ in 0..50 {
        assert_works(&vm);
        vm.assert_upgrades();
    }
    assert_works(&vm);
    assert_eq!(backend.sockets(), sockets);
    assert!(backend.runs());
    vm.assert_disk_is_whole("data.img");
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let listed = audit["descriptors"].as_array().unwrap();
    assert!(
        listed.iter().any(|one| one["grant"] == "vhost-user#1"),
        "{audit}"
    );
}

#[test]
fn a_process_that_does_not_stop_its_rings_costs_the_upgrade_and_not_the_guest() {
    let (vm, backend) = start(builder());
    assert_works(&vm);
    let before = vm.witness();
    stop_process(backend.pid());
    for _ in 0..2 {
        let upgrade = vm.upgrade();
        assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
        assert!(upgrade.reason.contains("vhost-user backend"), "{upgrade:?}");
        assert_eq!(vm.state(), "running");
        let _ = vm.assert_goes_on(&before);
    }
    continue_process(backend.pid());
    assert_works(&vm);
    vm.assert_upgrades();
    assert_works(&vm);
    vm.assert_disk_is_whole("data.img");
}

const SHARE: &str =
    "[[vhost_user]]\nid = \"share\"\nkind = \"fs\"\nsocket = \"f.sock\"\ntag = \"home\"\n";

#[test]
fn a_file_system_loses_no_write_over_thirty_upgrades_and_its_process_stays() {
    let mut backend = None;
    let vm = Builder::release()
        .line(CommandLine::new().fs().console().period_ms(50))
        .tables(SHARE)
        .start_in(|site| {
            let (share, socket) = (site.path("share"), site.path("f.sock"));
            backend = Some(Backend::virtiofsd(&share, &socket));
        });
    let mut backend = backend.unwrap();
    let works = || {
        let before = vm.ram.fs().records();
        until("records", || {
            (vm.ram.fs().records() > before + 100).then_some(())
        });
    };
    works();
    let sockets = backend.sockets();
    for _ in 0..30 {
        works();
        vm.assert_upgrades();
    }
    works();
    assert_eq!(backend.sockets(), sockets);
    assert!(backend.runs());
    vm.ram.mail(layout::COMMAND_FS_REST);
    let report = until("rest", || {
        let report = vm.ram.fs();
        (report.state == DriverState::Resting).then_some(report)
    });
    assert_eq!(report.errors, 0, "{report:?}");
    let file = std::fs::read(vm.site.path("share/guest")).unwrap();
    let nonce = vm.ram.report().unwrap().nonce;
    assert!(report.check(nonce, &file).unwrap() > 100, "{report:?}");
    vm.ask("audit").expect(0);
}

#[test]
fn a_process_that_dies_breaks_its_device_and_nothing_else() {
    let (vm, mut backend) = start(builder());
    assert_works(&vm);
    let before = vm.witness();
    backend.kill();
    vm.until_disk("a broken disk", |disk| disk.state == DriverState::Broken);
    let _ = vm.assert_goes_on(&before);
    for _ in 0..3 {
        vm.assert_upgrades();
    }
    assert_eq!(vm.ram.disk().state, DriverState::Broken);
    assert_eq!(vm.state(), "running");
}

#[test]
fn the_process_stays_when_the_guest_goes_to_another_broker() {
    let (mut vm, mut backend) = start(builder());
    assert_works(&vm);
    let sockets = backend.sockets();
    for _ in 0..2 {
        vm.assert_transfers();
        assert_works(&vm);
    }
    vm.assert_upgrades();
    assert_works(&vm);
    assert_eq!(backend.sockets(), sockets);
    assert!(backend.runs());
    vm.assert_disk_is_whole("data.img");
}

#[test]
fn another_process_than_the_running_vms_is_refused_to_another_broker() {
    let (vm, _backend) = start(builder());
    assert_works(&vm);
    let (image, socket) = (vm.site.path("other.img"), vm.site.path("o.sock"));
    let _other = Backend::storage_daemon(&image, 4, &socket);
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    vm.site
        .write("other.toml", text.replace("d.sock", "o.sock"));
    let waiting = vm.wait_from("other.toml", &[]);
    let mut qmp = Qmp::connect(&vm);
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "failed", "{info}");
    let said = info["error-desc"].to_string();
    assert!(
        said.contains("vhost_user data: the running VM's process"),
        "{info}"
    );
    assert_works(&vm);
    vm.assert_upgrades();
    vm.assert_disk_is_whole("data.img");
}

#[test]
fn a_guest_that_is_paused_and_reset_finds_its_disk() {
    let (vm, _backend) = start(builder());
    assert_works(&vm);
    vm.ask("pause").expect(0);
    let before = vm.ram.disk().done;
    vm.assert_stands_still();
    vm.upgrade();
    vm.ask("resume").expect(0);
    vm.until_disk("requests", |disk| disk.done > before + 100);
    let boots = vm.ram.report().unwrap().boots;
    vm.ask("reset").expect(0);
    until("it boots again", || {
        let report = vm.ram.report().ok()?;
        (report.boots > boots && vm.ram.disk().done > 100).then_some(())
    });
    assert_works(&vm);
    vm.assert_upgrades();
    vm.assert_disk_is_whole("data.img");
}
