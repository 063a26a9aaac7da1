//! A disk whose worker is replaced under its load: every request is completed, none twice, and what the guest wrote is
//! what the file holds.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use baton_guest::CommandLine;
use baton_guest::DiskReport;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_ipc::worker::Order;
use baton_ipc::worker::RateLimit;
use harness::Upgrade;
use harness::Vm;

fn vm(line: CommandLine) -> Vm {
    let mut vm = Vm::new(1, 32, line);
    vm.add_disk(4, |_| {});
    vm
}

/// Lets the guest come to rest, and compares the whole disk with what it says that it wrote.
#[track_caller]
fn assert_whole(vm: &Vm) -> DiskReport {
    vm.command(layout::COMMAND_DISK_REST);
    let report = vm.wait_for_disk("rest", |disk| disk.state == DriverState::Resting);
    assert_eq!((report.faults(), report.flying), (0, 0), "{report:?}");
    let mut disk = vec![0; 4 << 20];
    rustix::io::pread(vm.disk(), &mut disk, 0).unwrap();
    let nonce = vm.report().unwrap().nonce;
    let checked = report.check(nonce, &disk).unwrap();
    assert!(checked > 32, "{report:?}");
    report
}

#[test]
fn the_guest_finds_its_disk_and_what_it_writes_is_there() {
    let vm = vm(CommandLine::new().disk());
    let _worker = vm.start();
    vm.wait_for_disk("requests", |disk| disk.done > 5000);
    let report = assert_whole(&vm);
    assert_eq!(report.interrupts, 0);
    vm.command(layout::COMMAND_DISK_WORK);
    vm.wait_for_disk("more requests", |disk| disk.done > report.done + 1000);
}

#[test]
fn every_request_is_completed_once_over_upgrades_under_load() {
    let vm = vm(CommandLine::new().disk());
    let mut worker = vm.start();
    let mut done = 0;
    for generation in 2..22 {
        let report = vm.wait_for_disk("requests", |disk| disk.done > done + 200);
        done = report.done;
        (worker, _) = Upgrade::complete(&vm, worker, generation);
    }
    vm.wait_for_disk("requests", |disk| disk.done > done + 200);
    assert_whole(&vm);
    let guest = vm.report().unwrap();
    assert_eq!((guest.boots, guest.faults()), (1, 0), "{guest:?}");
}

#[test]
fn interrupts_come_in_every_generation() {
    let vm = vm(CommandLine::new().disk_irq());
    let mut worker = vm.start();
    let mut before = vm.wait_for_disk("interrupts", |disk| disk.interrupts > 50);
    for generation in 2..6 {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        before = vm.wait_for_disk("interrupts", |disk| {
            disk.interrupts > before.interrupts + 50
        });
    }
    assert_whole(&vm);
}

#[test]
fn a_worker_that_is_not_committed_leaves_notifications_and_disk_alone() {
    let vm = vm(CommandLine::new().disk());
    let mut old = vm.start();
    vm.wait_for_disk("requests", |disk| disk.done > 1000);
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    let saved = Upgrade::park(&mut old);
    // A notification that nobody may take yet.
    rustix::io::write(vm.first_kick(), &1_u64.to_ne_bytes()).unwrap();
    let done = vm.disk_report().done;
    let disk = contents(&vm);
    assert_eq!(upgrade.expect_loaded(), saved.digest);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let mut count = [0; 8];
    rustix::io::read(vm.first_kick(), &mut count).unwrap();
    assert!(u64::from_ne_bytes(count) >= 1);
    assert!(contents(&vm) == disk);
    // Taken here, it is not missed: a worker looks at every queue when it begins.
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    vm.wait_for_disk("requests", |disk| disk.done > done + 1000);
    assert_whole(&vm);
}

fn contents(vm: &Vm) -> Vec<u8> {
    let mut disk = vec![0; 4 << 20];
    rustix::io::pread(vm.disk(), &mut disk, 0).unwrap();
    disk
}

#[test]
fn a_rollback_goes_on_with_what_was_under_way() {
    let vm = vm(CommandLine::new().disk());
    let mut old = vm.start();
    let mut done = 0;
    for _ in 0..5 {
        done = vm
            .wait_for_disk("requests", |disk| disk.done > done + 500)
            .done;
        Upgrade::roll_back(&vm, &mut old, 2);
    }
    vm.wait_for_disk("requests", |disk| disk.done > done + 500);
    assert_whole(&vm);
}

#[test]
fn a_guests_reset_begins_with_a_fresh_device() {
    let vm = vm(CommandLine::new().disk_irq());
    let mut worker = vm.start();
    vm.wait_for_disk("requests", |disk| disk.done > 500);
    vm.command(layout::COMMAND_RESET);
    vm.wait_for("another boot", |report| report.boots == 2);
    vm.wait_for_disk("requests again", |disk| {
        disk.done > 500 && disk.interrupts > 50
    });
    worker.expect("reset", |report| match report {
        baton_ipc::worker::Report::Guest(baton_ipc::worker::GuestEvent::Reset) => Ok(()),
        other => Err(other),
    });
    let (_worker, _) = Upgrade::complete(&vm, worker, 2);
    assert_whole(&vm);
}

#[test]
fn a_limit_holds_over_upgrades() {
    let mut vm = Vm::new(1, 32, CommandLine::new().disk());
    vm.add_disk(4, |block| {
        block.limits.operations = Some(RateLimit {
            per_second: 500,
            burst: 20,
        });
    });
    let mut worker = vm.start();
    vm.wait_for_disk("work", |disk| disk.state == DriverState::Working);
    let begun = std::time::Instant::now();
    let first = vm.disk_report().done;
    let mut generation = 2;
    while begun.elapsed() < std::time::Duration::from_secs(1) {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        generation += 1;
    }
    let report = vm.disk_report();
    // A bucket that were full again in each generation would let 20 more through each time.
    let most = 500 * u64::try_from(begun.elapsed().as_millis()).unwrap() / 1000 + 20;
    assert!(
        (50..=most).contains(&(report.done - first)),
        "{} requests in {:?}, at most {most}, {generation} generations",
        report.done - first,
        begun.elapsed()
    );
    assert_eq!(report.faults(), 0);
}
