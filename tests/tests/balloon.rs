//! What a guest does not use goes back to the host, in every generation of its worker.

use baton_guest::BalloonReport;
use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::json;

fn wait_for(vm: &Vm, what: &str, mut wanted: impl FnMut(&BalloonReport) -> bool) -> BalloonReport {
    until(what, || {
        let report = vm.ram.balloon();
        wanted(&report).then_some(report)
    })
}

#[test]
fn memory_that_the_guest_reports_is_the_hosts_again_over_upgrades() {
    let line = CommandLine::new().walk_bytes(4 << 20).balloon();
    let vm = Builder::release()
        .line(line.console().period_ms(20))
        .balloon()
        .start();
    wait_for(&vm, "a balloon", |balloon| {
        balloon.state == DriverState::Working
    });
    // What the guest takes elsewhere meanwhile.
    let other = 4 << 20;
    for round in 1..=3 {
        vm.ram.mail(layout::COMMAND_BALLOON_FILL);
        wait_for(&vm, "memory to be filled", |balloon| {
            balloon.filled == round
        });
        let full = vm.ram.taken();
        assert!(full > layout::BALLOON_BYTES, "{full}");
        // A new worker maps what is there, and takes no more.
        vm.assert_upgrades();
        assert!(vm.ram.taken() < full + other);
        vm.ram.mail(layout::COMMAND_BALLOON_REPORT);
        wait_for(&vm, "a report", |balloon| balloon.reported == round);
        let freed = vm.ram.taken();
        assert!(
            freed < full + other - layout::BALLOON_BYTES,
            "{full} {freed}"
        );
        vm.assert_upgrades();
        assert!(vm.ram.taken() < freed + other, "{freed}");
    }
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
}

#[test]
fn memory_that_was_reported_stays_the_hosts_over_transfers() {
    let line = CommandLine::new().walk_bytes(4 << 20).balloon();
    let mut vm = Builder::release()
        .line(line.console().period_ms(20))
        .balloon()
        .start();
    let other = 4 << 20;
    for round in 1..=2 {
        vm.ram.mail(layout::COMMAND_BALLOON_FILL);
        wait_for(&vm, "memory to be filled", |balloon| {
            balloon.filled == round
        });
        let full = vm.ram.taken();
        vm.ram.mail(layout::COMMAND_BALLOON_REPORT);
        wait_for(&vm, "a report", |balloon| balloon.reported == round);
        let freed = vm.ram.taken();
        assert!(
            freed < full + other - layout::BALLOON_BYTES,
            "{full} {freed}"
        );
        vm.assert_transfers();
        assert!(vm.ram.taken() < freed + other, "{freed}");
    }
}

#[test]
fn an_operator_takes_memory_from_the_guest_and_gives_it_back_over_upgrades() {
    let line = CommandLine::new().walk_bytes(4 << 20).balloon();
    let vm = Builder::release()
        .line(line.console().period_ms(20))
        .balloon()
        .start();
    wait_for(&vm, "a balloon", |balloon| {
        balloon.state == DriverState::Working
    });
    let mut qmp = Qmp::connect(&vm);
    let left = |qmp: &mut Qmp| qmp.returns("query-balloon", json!({}))["actual"].clone();
    let all = 64_u64 << 20;
    let less = all - layout::BALLOON_BYTES;
    assert_eq!(left(&mut qmp), all);
    vm.ram.mail(layout::COMMAND_BALLOON_FILL);
    wait_for(&vm, "memory to be filled", |balloon| balloon.filled == 1);
    let full = vm.ram.taken();
    // More than the guest can give: it gives what it can.
    qmp.done("balloon", json!({"value": less - (8 << 20)}));
    // Whichever worker the guest finds at it.
    vm.assert_upgrades();
    until("the guest to give its memory up", || {
        (left(&mut qmp) == less).then_some(())
    });
    let freed = vm.ram.taken();
    assert!(
        freed < full - layout::BALLOON_BYTES + (4 << 20),
        "{full} {freed}"
    );
    vm.assert_upgrades();
    assert_eq!(left(&mut qmp), less);
    assert!(vm.ram.taken() < freed + (4 << 20));
    assert_eq!(vm.status()["balloon"], less);
    qmp.done("balloon", json!({"value": all}));
    vm.assert_upgrades();
    until("the guest to take its memory back", || {
        (left(&mut qmp) == all).then_some(())
    });
    // Told of both, the last number last.
    until("the last event", || {
        qmp.event_names_now();
        let told = qmp.events.iter();
        let told: Vec<_> = told
            .filter(|event| event["event"] == "BALLOON_CHANGE")
            .map(|event| event["data"]["actual"].clone())
            .collect();
        (told.contains(&json!(less)) && told.last() == Some(&json!(all))).then_some(())
    });
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
}

#[test]
fn what_a_balloon_cannot_do_is_refused_in_qemus_words() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    for (command, arguments) in [
        ("balloon", json!({"value": 32 << 20})),
        ("query-balloon", json!({})),
    ] {
        let answer = qmp.ask(command, arguments);
        assert_eq!(answer["error"]["class"], "DeviceNotActive", "{answer}");
    }
    drop(vm);
    let vm = Builder::release().balloon().start();
    let mut qmp = Qmp::connect(&vm);
    for value in [0, -4096] {
        let refused = qmp.refused("balloon", json!({"value": value}));
        assert_eq!(refused, "Parameter 'target' expects a size");
    }
    // A guest without a driver leaves it alone.
    qmp.done("balloon", json!({"value": 32 << 20}));
    assert_eq!(
        qmp.returns("query-balloon", json!({})),
        json!({"actual": 64 << 20})
    );
    vm.assert_upgrades();
}
