//! `kill -9` of either worker at any instant of an upgrade, from outside and without fail points, in the build that people
//! run. Whatever the instant: at most one runs the guest, what is said is what is, and where anybody can run it, it is run.
#![expect(clippy::panic, reason = "an outcome that cannot be fails the test")]

use std::time::Duration;

use baton_tests::Builder;
use baton_tests::Upgrade;
use baton_tests::Vm;
use baton_tests::is_alive;
use baton_tests::kill_process;
use baton_tests::until;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Old,
    New,
}

/// Upgrades, and kills one side so long after the new worker has come up.
fn upgrade_and_kill(vm: &Vm, side: Side, after: Duration) -> (i32, i32, Upgrade) {
    let old = vm.worker();
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| vm.upgrade());
        let new = until("the new worker is there", || {
            let workers = vm.site.workers();
            workers.into_iter().find(|worker| *worker != old)
        });
        std::thread::sleep(after);
        let victim = if side == Side::Old { old } else { new };
        kill_process(victim);
        let upgrade = upgrade
            .join()
            .unwrap_or_else(|_| panic!("the upgrade has no outcome"));
        (old, victim, upgrade)
    })
}

fn killed_at_any_instant(side: Side) {
    let mut vm = Builder::release().start();
    for step in 0..16 {
        let before = vm.witness();
        let after = Duration::from_micros(step * step * 250);
        let (old, killed, upgrade) = upgrade_and_kill(&vm, side, after);
        // The kill may have come after the end, and then hit whoever was the VM or was not.
        let running = match (upgrade.outcome.as_str(), side) {
            ("aborted", Side::New) => {
                assert_eq!(upgrade.worker_pid, old);
                true
            }
            ("committed", Side::Old) => {
                assert_ne!(upgrade.worker_pid, old);
                true
            }
            // The first process that came up was the launcher's, and gone before the kill.
            ("committed", Side::New) if upgrade.worker_pid != killed => true,
            ("committed", Side::New) => {
                until("its loss is known", || (vm.state() == "lost").then_some(()));
                false
            }
            ("lost", _) => false,
            other => panic!(
                "{other:?} cannot come of that: {upgrade:?}",
                other = other.0
            ),
        };
        if running {
            vm.assert_only_runner(upgrade.worker_pid);
            vm.assert_goes_on(&before);
            assert!(is_alive(vm.broker));
        } else {
            until("nobody is left", || {
                vm.site.workers().is_empty().then_some(())
            });
            vm.assert_stands_still();
            assert_eq!(vm.state(), "lost");
            let log = vm.audit_log();
            assert_eq!(log.count("lost"), 1);
            let _checked = log.upgrades();
            drop(vm);
            vm = Builder::release().start();
        }
    }
    vm.assert_upgrades();
}

#[test]
fn the_old_worker() {
    killed_at_any_instant(Side::Old);
}

#[test]
fn the_new_worker() {
    killed_at_any_instant(Side::New);
}
