//! An upgrade that does not happen: wherever it ends, the old worker runs the guest on, and the next upgrade succeeds.

mod harness;

use baton_guest::CommandLine;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use harness::Upgrade;
use harness::Vm;
use harness::Worker;
use harness::assert_goes_on;

fn guest() -> Vm {
    Vm::new(
        2,
        32,
        CommandLine::new()
            .timer_us(1000)
            .ipi_us(200)
            .walk_bytes(4 << 20),
    )
}

/// The guest goes on, and can be upgraded after all.
#[track_caller]
fn assert_can_upgrade(vm: &Vm, old: Worker, before: &baton_guest::Report) -> Worker {
    assert_goes_on(vm, before);
    let (new, _) = Upgrade::complete(vm, old, 2);
    assert_goes_on(vm, before);
    new
}

#[track_caller]
fn roll_back(old: &mut Worker) {
    old.order(&Order::Rollback);
    old.expect_resumed();
}

#[test]
fn before_the_offer() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let (old_end, new_end) = harness::main_channel();
    old.transfer(&old_end);
    drop(old_end);
    roll_back(&mut old);
    drop(new_end);
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn a_second_upgrade_has_to_wait() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let _first = Upgrade::agree(&vm, &mut old, 2);
    let (old_end, _new_end) = harness::main_channel();
    old.transfer(&old_end);
    assert!(old.expect_failed("transfer").contains("under way"));
    roll_back(&mut old);
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn a_new_worker_that_never_offers() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let (old_end, new_end) = harness::main_channel();
    old.transfer(&old_end);
    drop((old_end, new_end));
    assert!(old.expect_failed("agree").contains("before its offer"));
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn after_each_step() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for step in ["agreed", "built", "parked", "loaded", "ceded"] {
        let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
        if step != "agreed" {
            upgrade.build(&vm);
            if step != "built" {
                Upgrade::park(&mut old);
                let parked = vm.ram_bytes();
                if step != "parked" {
                    upgrade.expect_loaded();
                }
                if step == "ceded" {
                    old.order(&Order::Ceded);
                }
                assert!(vm.ram_bytes() == parked, "{step}");
            }
        }
        // The new worker goes first, as a broker's fence would have it.
        upgrade.new.kill();
        roll_back(&mut old);
        assert_goes_on(&vm, &before);
    }
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn the_broker_dies_before_the_pause() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    old.abandon();
    upgrade.new.abandon();
    // 1 when it sees the old worker let go first.
    assert!(upgrade.new.exit_code() <= 1);
    assert_goes_on(&vm, &before);
    assert!(old.child.try_wait().unwrap().is_none());
}

#[test]
fn the_broker_dies_in_the_pause() {
    for loaded in [false, true] {
        let vm = guest();
        let mut old = vm.start();
        let before = vm.wait_for_turns();
        let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
        upgrade.build(&vm);
        Upgrade::park(&mut old);
        if loaded {
            upgrade.expect_loaded();
        }
        upgrade.new.abandon();
        assert_eq!(upgrade.new.exit_code(), 0);
        old.abandon();
        assert_goes_on(&vm, &before);
    }
}

#[test]
fn the_broker_dies_after_ceding() {
    let vm = guest();
    let mut old = vm.start();
    vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    Upgrade::park(&mut old);
    upgrade.expect_loaded();
    old.order(&Order::Ceded);
    let parked = vm.ram_bytes();
    old.abandon();
    assert_eq!(old.exit_code(), 0);
    assert!(vm.ram_bytes() == parked);
    // The commit is what decides: with it, the new one runs though its broker is dead as well.
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    upgrade.new.abandon();
    vm.wait_for_turns();
}

#[test]
fn a_worker_whose_running_is_not_heard_does_not_run() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    Upgrade::park(&mut old);
    upgrade.expect_loaded();
    let parked = vm.ram_bytes();
    // A broker that asks and asks, and does not read the answers.
    for _ in 0..500 {
        upgrade.new.order_when_possible(&Order::Query);
    }
    upgrade.new.order_when_possible(&Order::Commit);
    assert_eq!(upgrade.new.exit_code(), 1);
    assert!(vm.ram_bytes() == parked);
    roll_back(&mut old);
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn the_broker_dies_between_commit_and_running() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    Upgrade::park(&mut old);
    upgrade.expect_loaded();
    old.order(&Order::Ceded);
    upgrade.new.signal(libc::SIGSTOP);
    upgrade.new.order(&Order::Commit);
    upgrade.new.abandon();
    old.abandon();
    assert_eq!(old.exit_code(), 0);
    upgrade.new.signal(libc::SIGCONT);
    assert_goes_on(&vm, &before);
}

#[test]
fn a_stopped_old_worker_obeys_when_it_goes_on() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    Upgrade::park(&mut old);
    old.signal(libc::SIGSTOP);
    upgrade.new.kill();
    old.order(&Order::Rollback);
    let parked = vm.ram_bytes();
    assert!(vm.ram_bytes() == parked);
    old.signal(libc::SIGCONT);
    old.expect_resumed();
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn a_stream_that_is_cut_off() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for cut in [0, 1, 4, 27, 28, 29, 40, 5000, 12_000, usize::MAX] {
        let (mut upgrade, tap) = Upgrade::agree_tapped(&vm, &mut old, 2);
        upgrade.build(&vm);
        let saved = Upgrade::park(&mut old);
        let stream = tap.stream(&saved);
        let cut = cut.min(stream.len() - 1);
        tap.send(&stream[..cut]);
        drop(tap);
        let reason = upgrade.new.expect_failed("load");
        assert!(
            reason.contains(&format!("ended after {cut} bytes")),
            "{reason}"
        );
        assert_eq!(upgrade.new.exit_code(), 1);
        roll_back(&mut old);
        assert_goes_on(&vm, &before);
    }
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn a_machine_that_differs() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for (change, wanted) in [
        (
            &(|config: &mut WorkerConfig| config.cpus = 1) as &dyn Fn(&mut WorkerConfig),
            "1 vCPUs, this one 2",
        ),
        (
            &|config| config.ram[0].size = 16 << 20,
            "RAM [(0, 1000000)]",
        ),
        (
            &|config| config.hide.push("sha_ni".parse().unwrap()),
            "hides the CPU features [\"sha_ni\"]",
        ),
    ] {
        let mut other = harness::Worker::spawn();
        other.expect_hello();
        let (old_end, new_end) = harness::main_channel();
        let mut changed = vm.config(2);
        change(&mut changed);
        other.configure(changed, Some(&new_end));
        old.transfer(&old_end);
        drop((old_end, new_end));
        let reason = old.expect_failed("agree");
        assert!(reason.contains(wanted), "{reason}");
        let reason = other.expect_failed("agree");
        assert!(
            reason.contains("refuses") && reason.contains(wanted),
            "{reason}"
        );
        assert_eq!(other.exit_code(), 1);
    }
    assert_can_upgrade(&vm, old, &before);
}

#[test]
fn reports_are_in_order() {
    let vm = guest();
    let mut old = vm.start();
    vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    // Everything at once: each order is obeyed in its turn.
    for order in [Order::Park, Order::Rollback, Order::Query] {
        old.order(&order);
    }
    let reports: Vec<_> = (0..4).map(|_| old.next().unwrap()).collect();
    assert!(
        matches!(
            reports.as_slice(),
            [
                Report::Parked { .. },
                Report::Saved { .. },
                Report::Resumed,
                Report::Status(_)
            ]
        ),
        "{reports:?}"
    );
    vm.wait_for_turns();
}
