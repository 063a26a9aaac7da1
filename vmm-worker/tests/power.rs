//! What an operator and a guest can do to the machine: pause, resume, reset, power off, crash; and what a worker does
//! with orders that it cannot carry out.

mod harness;

use std::time::Duration;

use baton_guest::CommandLine;
use baton_guest::layout;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use harness::Upgrade;
use harness::Vm;
use harness::Worker;

fn guest() -> Vm {
    Vm::new(2, 16, CommandLine::new().console().timer_us(2000))
}

#[track_caller]
fn expect_event(worker: &mut Worker, event: &GuestEvent) {
    worker.expect("a guest event", |report| match report {
        Report::Guest(found) if found == *event => Ok(()),
        other => Err(other),
    });
}

#[track_caller]
fn expect_paused(worker: &mut Worker) {
    worker.expect("paused", |report| {
        if report == Report::Paused {
            Ok(())
        } else {
            Err(report)
        }
    });
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let vm = guest();
    let mut worker = vm.start();
    vm.wait_for_turns();
    for _ in 0..3 {
        worker.order(&Order::Pause);
        expect_paused(&mut worker);
        let still = vm.ram_bytes();
        std::thread::sleep(Duration::from_millis(30));
        assert!(vm.ram_bytes() == still);
        worker.order(&Order::Resume);
        worker.expect_resumed();
        assert_eq!(vm.wait_for_turns().faults(), 0);
    }
}

#[test]
fn no_kick_is_lost_between_exits() {
    let vm = Vm::new(
        2,
        16,
        CommandLine::new()
            .console()
            .period_ms(1)
            .timer_us(300)
            .ipi_us(50),
    );
    let mut worker = vm.start();
    let before = vm.wait_for_turns();
    for _ in 0..300 {
        worker.order(&Order::Pause);
        expect_paused(&mut worker);
        worker.order(&Order::Resume);
        worker.expect_resumed();
    }
    harness::assert_goes_on(&vm, &before);
}

/// A way to reset a machine.
type Way<'a> = &'a dyn Fn(&Vm, &Worker);

#[test]
fn every_kind_of_reset_boots_the_guest_again() {
    let vm = guest();
    let mut worker = vm.start();
    let mut before = vm.wait_for_turns();
    let asked = |command| move |vm: &Vm, _: &Worker| vm.command(command);
    let by_operator = |_: &Vm, worker: &Worker| worker.order(&Order::Reset);
    let ways: [(Way<'_>, GuestEvent); 4] = [
        (&asked(layout::COMMAND_RESET), GuestEvent::Reset),
        (&asked(layout::COMMAND_ACPI_RESET), GuestEvent::Reset),
        (&asked(layout::COMMAND_CRASH), GuestEvent::TripleFault),
        (&by_operator, GuestEvent::Reset),
    ];
    for (reset, event) in &ways {
        reset(&vm, &worker);
        expect_event(&mut worker, event);
        let boots = before.boots + 1;
        vm.wait_for("another boot", |report| report.boots == boots);
        let after = vm.wait_for_turns();
        assert_ne!(after.nonce, before.nonce);
        assert_eq!(after.faults(), 0);
        before = after;
    }
    // A worker that took the guest over can boot it again too.
    let (mut worker, _) = Upgrade::complete(&vm, worker, 2);
    vm.command(layout::COMMAND_RESET);
    expect_event(&mut worker, &GuestEvent::Reset);
    vm.wait_for("another boot", |report| report.boots == before.boots + 1);
    let (_worker, _) = Upgrade::complete(&vm, worker, 3);
    vm.wait_for_turns();
}

#[test]
fn a_guest_that_is_reset_while_paused_stays_paused() {
    let vm = guest();
    let mut worker = vm.start();
    vm.wait_for_turns();
    worker.order(&Order::Pause);
    expect_paused(&mut worker);
    worker.order(&Order::Reset);
    expect_event(&mut worker, &GuestEvent::Reset);
    let still = vm.ram_bytes();
    std::thread::sleep(Duration::from_millis(30));
    assert!(vm.ram_bytes() == still);
    worker.order(&Order::Resume);
    worker.expect_resumed();
    assert_eq!(
        vm.wait_for("the second boot", |report| report.boots == 2)
            .faults(),
        0
    );
    vm.wait_for_turns();
}

#[test]
fn a_guest_that_powers_off_is_off_and_its_worker_ends_with_the_broker() {
    let vm = guest();
    let mut worker = vm.start();
    vm.wait_for_turns();
    vm.command(layout::COMMAND_ACPI_OFF);
    expect_event(&mut worker, &GuestEvent::Shutdown);
    let still = vm.ram_bytes();
    worker.order(&Order::Resume);
    worker.expect_failed("order");
    assert!(vm.ram_bytes() == still);
    worker.abandon();
    assert_eq!(worker.exit_code(), 0);
}

#[test]
fn a_power_event_of_a_parked_guest_is_acted_on_by_whoever_runs() {
    // The guest asks for its reset while the kick is on its way; either worker may be the one to see it.
    for delay in 0..6 {
        let vm = guest();
        let mut old = vm.start();
        let before = vm.wait_for_turns();
        let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
        upgrade.build(&vm);
        vm.command(layout::COMMAND_RESET);
        std::thread::sleep(Duration::from_micros(100 * delay));
        old.order(&Order::Park);
        let mut reports = Vec::new();
        while !matches!(reports.last(), Some(Report::Saved { .. })) {
            reports.push(old.next().unwrap());
        }
        upgrade.expect_loaded();
        upgrade.new.order(&Order::Commit);
        vm.wait_for("the second boot", |report| report.boots == before.boots + 1);
        vm.wait_for_turns();
    }
}

#[test]
fn a_guest_that_kvm_cannot_go_on_with_is_stuck_and_its_worker_is_not() {
    // mov eax, 0xd0000000; jmp rax: fetches instructions where there is no memory.
    let kernel = harness::kernel_of(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]);
    let vm = Vm::with_kernel(&kernel, 1, 8, CommandLine::new());
    let mut worker = vm.start();
    worker.expect("a guest that is stuck", |report| match report {
        Report::Guest(GuestEvent::Stuck(reason)) if reason.starts_with("vCPU 0: ") => Ok(()),
        other => Err(other),
    });
    worker.order(&Order::Park);
    assert!(worker.expect_failed("order").contains("off"));
    worker.order(&Order::Query);
    worker.expect("status", |report| {
        if matches!(report, Report::Status(_)) {
            Ok(())
        } else {
            Err(report)
        }
    });
}

#[test]
fn an_order_that_does_not_fit_changes_nothing() {
    let vm = guest();
    let mut worker = Worker::spawn();
    worker.expect_hello();
    worker.build_cold(&vm);
    for order in [
        Order::Commit,
        Order::Park,
        Order::Resume,
        Order::Pause,
        Order::Reset,
        Order::Rollback,
        Order::Ceded,
    ] {
        worker.order(&order);
        let reason = worker.expect_failed("order");
        assert!(reason.contains("built"), "{reason}");
    }
    assert!(vm.report().is_err());
    worker.order(&Order::Start);
    worker.expect_running();
    let before = vm.wait_for_turns();
    for order in [Order::Start, Order::Commit, Order::Resume, Order::Ceded] {
        worker.order(&order);
        worker.expect_failed("order");
    }
    worker.order(&Order::Park);
    worker.expect_failed("park");
    worker.order(&Order::Transfer { elsewhere: false });
    worker.expect_failed("transfer");
    harness::assert_goes_on(&vm, &before);
}

#[test]
fn bytes_that_are_no_order_end_the_worker() {
    let vm = guest();
    let mut worker = vm.start();
    worker.send_raw(&[0xff; 9]);
    assert_eq!(worker.exit_code(), 1);
}

#[test]
fn a_person_gets_help_and_a_reason() {
    let run = |arguments: &[&str]| {
        std::process::Command::new(env!("CARGO_BIN_EXE_baton-worker"))
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    };
    assert!(String::from_utf8_lossy(&run(&["--version"]).stdout).starts_with("baton-worker "));
    assert!(run(&["--help"]).status.success());
    let by_hand = run(&[]);
    assert!(!by_hand.status.success());
    assert!(String::from_utf8_lossy(&by_hand.stderr).contains("started by baton-broker"));
}
