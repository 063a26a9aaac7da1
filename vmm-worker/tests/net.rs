//! A network interface whose worker is replaced under its load: every frame arrives once, in order, both ways.

mod harness;

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::NetReport;
use baton_guest::layout;
use baton_ipc::worker::Order;
use baton_ipc::worker::RateLimit;
use harness::Upgrade;
use harness::Vm;
use harness::wire::Wire;

fn vm(queues: u8) -> (Vm, Wire) {
    let mut vm = Vm::new(1, 32, CommandLine::new().net());
    let wire = vm.add_net(queues, |_| {});
    (vm, wire)
}

/// Lets the guest come to rest, and compares what both ends say. A lost frame would also have ended the traffic: each
/// end sends only what the other one's acknowledgements let it.
#[track_caller]
fn assert_whole(vm: &Vm, wire: &Wire) -> NetReport {
    vm.command(layout::COMMAND_NET_REST);
    let mut report = vm.wait_for_net("rest", |net| net.state == DriverState::Resting);
    let peer = wire.peer();
    // The answer to the guest's last frame may have acknowledged earlier than others arrived.
    if report.received != peer.sent {
        report = vm.wait_for_net("the last answer", |net| net.received == peer.sent);
    }
    assert_eq!(
        (report.faults(), peer.faults()),
        (0, 0),
        "{report:?} {peer:?}"
    );
    assert_eq!(
        (report.sent, peer.sent),
        (peer.received, peer.received),
        "{report:?} {peer:?}"
    );
    report
}

#[test]
fn frames_arrive_once_and_in_order_over_upgrades_under_load() {
    let (vm, wire) = vm(1);
    let mut worker = vm.start();
    let mut received = 0;
    for generation in 2..22 {
        received = vm
            .wait_for_net("frames", |net| net.received > received + 300)
            .received;
        (worker, _) = Upgrade::complete(&vm, worker, generation);
    }
    vm.wait_for_net("frames", |net| net.received > received + 300);
    assert_whole(&vm, &wire);
    let guest = vm.report().unwrap();
    assert_eq!((guest.boots, guest.faults()), (1, 0), "{guest:?}");
}

#[test]
fn a_driver_of_one_pair_gets_the_frames_of_all_queues_of_its_tap() {
    let (vm, wire) = vm(2);
    let mut worker = vm.start();
    let mut received = 0;
    for generation in 2..5 {
        received = vm
            .wait_for_net("frames", |net| net.received > received + 300)
            .received;
        (worker, _) = Upgrade::complete(&vm, worker, generation);
    }
    assert_whole(&vm, &wire);
}

#[test]
fn a_worker_that_is_not_committed_leaves_frames_in_the_tap() {
    let (vm, wire) = vm(1);
    let mut old = vm.start();
    vm.wait_for_net("frames", |net| net.received > 500);
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    let saved = Upgrade::park(&mut old);
    let before = vm.net_report();
    assert_eq!(upgrade.expect_loaded(), saved.digest);
    // What was answered meanwhile is in the tap, and neither of the two takes it.
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(vm.net_report(), before);
    upgrade.new.order(&Order::Commit);
    upgrade.new.expect_running();
    vm.wait_for_net("frames", |net| net.received > before.received + 500);
    assert_whole(&vm, &wire);
}

#[test]
fn a_rollback_goes_on_with_every_frame() {
    let (vm, wire) = vm(1);
    let mut old = vm.start();
    let mut received = 0;
    for _ in 0..5 {
        received = vm
            .wait_for_net("frames", |net| net.received > received + 300)
            .received;
        Upgrade::roll_back(&vm, &mut old, 2);
    }
    vm.wait_for_net("frames", |net| net.received > received + 300);
    assert_whole(&vm, &wire);
}

#[test]
fn a_limit_holds_over_upgrades() {
    let mut vm = Vm::new(1, 32, CommandLine::new().net());
    let wire = vm.add_net(1, |net| {
        net.limits.operations = Some(RateLimit {
            per_second: 500,
            burst: 20,
        });
    });
    let mut worker = vm.start();
    vm.wait_for_net("work", |net| net.state == DriverState::Working);
    let begun = std::time::Instant::now();
    let first = wire.peer().received;
    let mut generation = 2;
    while begun.elapsed() < std::time::Duration::from_secs(1) {
        (worker, _) = Upgrade::complete(&vm, worker, generation);
        generation += 1;
    }
    let sent = wire.peer().received - first;
    // A bucket that were full again in each generation would let 20 more through each time.
    let most = 500 * u64::try_from(begun.elapsed().as_millis()).unwrap() / 1000 + 20;
    assert!(
        (50..=most).contains(&sent),
        "{sent} frames in {:?}, at most {most}, {generation} generations",
        begun.elapsed()
    );
    assert_whole(&vm, &wire);
}
