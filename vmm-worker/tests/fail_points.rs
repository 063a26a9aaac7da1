//! Every deterministic fault, and that it leaves the guest with exactly one worker that runs it.
#![cfg(feature = "fail-points")]

mod harness;

use baton_guest::CommandLine;
use baton_ipc::FailAction;
use baton_ipc::FailPoint;
use baton_ipc::FailSite;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use harness::Upgrade;
use harness::Vm;
use harness::Worker;
use harness::assert_goes_on;

fn guest() -> Vm {
    Vm::new(2, 16, CommandLine::new().timer_us(1000))
}

fn arm(worker: &Worker, site: FailSite, action: FailAction) {
    worker.order(&Order::Fail(FailPoint { site, action }));
}

#[track_caller]
fn assert_rolls_back(vm: &Vm, old: &mut Worker, before: &baton_guest::Report) {
    old.order(&Order::Rollback);
    old.expect_resumed();
    assert_goes_on(vm, before);
}

/// Lets a new worker come as far as it does with a fault armed before its configuration.
fn new_worker(vm: &Vm, old: &mut Worker, site: FailSite, action: FailAction) -> Worker {
    let mut new = Worker::spawn();
    new.expect_hello();
    arm(&new, site, action);
    let (old_end, new_end) = harness::main_channel();
    new.configure(vm.config(2), Some(&new_end));
    old.transfer(&old_end);
    new
}

/// getppid(2).
const GETPPID: i32 = 110;

#[track_caller]
fn expect_violation(worker: &mut Worker) {
    worker.expect("a violation", |report| match report {
        Report::Violation {
            syscall: GETPPID,
            thread,
            ..
        } if thread > 0 => Ok(()),
        other => Err(other),
    });
    assert_eq!(worker.exit_code(), 159);
}

#[test]
fn faults_before_the_pause() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for (site, step) in [
        (FailSite::Agree, "agree"),
        (FailSite::Build, "build"),
        (FailSite::Rehearse, "rehearse"),
    ] {
        for action in [
            FailAction::Error,
            FailAction::Die,
            FailAction::Violate,
            FailAction::Hang,
        ] {
            let mut new = new_worker(&vm, &mut old, site, action);
            if site != FailSite::Agree {
                old.expect("agreed", |report| {
                    if report == Report::Agreed {
                        Ok(())
                    } else {
                        Err(report)
                    }
                });
                new.hand_over_to(&vm, 2);
            }
            match action {
                FailAction::Error => {
                    let reason = new.expect_failed(step);
                    assert!(reason.contains("fail point"), "{reason}");
                    assert_eq!(new.exit_code(), 1);
                }
                FailAction::Violate => expect_violation(&mut new),
                FailAction::Die => assert_eq!(new.exit_code(), 1),
                _ => assert!(new.says_nothing()),
            }
            new.kill();
            if site == FailSite::Agree {
                old.expect_failed("agree");
            }
            assert_rolls_back(&vm, &mut old, &before);
        }
    }
    let (_new, _) = Upgrade::complete(&vm, old, 2);
    assert_goes_on(&vm, &before);
}

#[test]
fn the_old_worker_fails_in_the_pause() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for (site, step) in [(FailSite::Park, "park"), (FailSite::Save, "save")] {
        let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
        upgrade.build(&vm);
        arm(&old, site, FailAction::Error);
        old.order(&Order::Park);
        if site == FailSite::Save {
            old.expect("parked", |report| {
                if matches!(report, Report::Parked { .. }) {
                    Ok(())
                } else {
                    Err(report)
                }
            });
        }
        old.expect_failed(step);
        assert_rolls_back(&vm, &mut old, &before);
        assert!(upgrade.new.expect_failed("load").contains("ended after"));
    }
    let (_new, _) = Upgrade::complete(&vm, old, 2);
    assert_goes_on(&vm, &before);
}

#[test]
fn the_new_worker_fails_in_the_pause() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    for site in [FailSite::Validate, FailSite::Load, FailSite::Commit] {
        for action in [
            FailAction::Error,
            FailAction::Die,
            FailAction::Violate,
            FailAction::Hang,
        ] {
            let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
            upgrade.build(&vm);
            arm(&upgrade.new, site, action);
            Upgrade::park(&mut old);
            if site == FailSite::Commit {
                upgrade.expect_loaded();
                upgrade.new.order(&Order::Commit);
            }
            let parked = vm.ram_bytes();
            match action {
                FailAction::Error => {
                    let step = if site == FailSite::Commit {
                        "commit"
                    } else {
                        "load"
                    };
                    upgrade.new.expect_failed(step);
                    assert_eq!(upgrade.new.exit_code(), 1);
                }
                FailAction::Violate => expect_violation(&mut upgrade.new),
                FailAction::Die => assert_eq!(upgrade.new.exit_code(), 1),
                _ => assert!(upgrade.new.says_nothing()),
            }
            upgrade.new.kill();
            assert!(vm.ram_bytes() == parked, "{site:?} {action:?}");
            assert_rolls_back(&vm, &mut old, &before);
        }
    }
    let (_new, _) = Upgrade::complete(&vm, old, 2);
    assert_goes_on(&vm, &before);
}

#[test]
fn a_new_worker_that_says_running_and_does_not_run() {
    for (site, action) in [
        (FailSite::Running, FailAction::Error),
        (FailSite::Commit, FailAction::Lie),
    ] {
        let vm = guest();
        let mut old = vm.start();
        vm.wait_for_turns();
        let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
        upgrade.build(&vm);
        arm(&upgrade.new, site, action);
        Upgrade::park(&mut old);
        upgrade.expect_loaded();
        let parked = vm.ram_bytes();
        upgrade.new.order(&Order::Commit);
        upgrade.new.expect("running", |report| {
            if report == Report::Running {
                Ok(())
            } else {
                Err(report)
            }
        });
        assert!(upgrade.new.says_nothing());
        assert!(vm.ram_bytes() == parked);
    }
}

#[test]
fn an_old_worker_that_lies_about_parking_runs_on() {
    let vm = guest();
    let mut old = vm.start();
    vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    arm(&old, FailSite::Park, FailAction::Lie);
    Upgrade::park(&mut old);
    upgrade.expect_loaded();
    // This is what a broker has to fence.
    let then = vm.report().unwrap().slots[0].sequence;
    vm.wait_for("turns while parked", |report| {
        report.slots[0].sequence > then + 1000
    });
    // What stops it is a stop, not its word.
    old.signal(libc::SIGSTOP);
    old.wait_stopped();
    let still = vm.ram_bytes();
    assert!(vm.ram_bytes() == still);
    upgrade.new.kill();
    old.order(&Order::Rollback);
    old.signal(libc::SIGCONT);
    old.expect_resumed();
    vm.wait_for_turns();
}

#[test]
fn lies_about_saving_and_loading() {
    let vm = guest();
    let mut old = vm.start();
    let before = vm.wait_for_turns();
    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    arm(&old, FailSite::Save, FailAction::Lie);
    Upgrade::park(&mut old);
    assert!(
        upgrade.new.says_nothing(),
        "half a stream was taken for a whole one"
    );
    upgrade.new.kill();
    assert_rolls_back(&vm, &mut old, &before);

    let mut upgrade = Upgrade::agree(&vm, &mut old, 2);
    upgrade.build(&vm);
    arm(&upgrade.new, FailSite::Load, FailAction::Lie);
    let saved = Upgrade::park(&mut old);
    assert_eq!(upgrade.expect_loaded(), saved.digest);
    upgrade.new.kill();
    assert_rolls_back(&vm, &mut old, &before);
}
