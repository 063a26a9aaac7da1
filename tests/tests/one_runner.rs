//! Rules 1 to 3 and I1 against an old worker that lies: it says that it is parked and saved, and runs on.

use baton_tests::Builder;
use baton_tests::continue_process;
use baton_tests::is_alive;
use baton_tests::stop_process;
use baton_tests::until;

#[test]
fn an_old_worker_that_runs_on_is_stopped_before_the_new_one_runs() {
    let vm = Builder::faulty("old@park:lie").cpus(2).start();
    let old = vm.worker();
    let upgrade = vm.upgrade();
    assert_eq!(upgrade.outcome, "committed", "{upgrade:?}");
    until("the liar is gone", || (!is_alive(old)).then_some(()));
    vm.assert_only_runner(upgrade.worker_pid);

    // What the liar changed after it had saved shows, at most once a vCPU: the new worker's guest finds memory that it did
    // not leave so. Two that ran at once would go on breaking each other's turns.
    let turns = || {
        stop_process(upgrade.worker_pid);
        let report = vm.ram.report().unwrap();
        continue_process(upgrade.worker_pid);
        report
    };
    let first = turns();
    assert!(
        first.slots.iter().all(|slot| slot.breaks <= 1),
        "{first:#?}"
    );
    let later = until("a hundred thousand turns more", || {
        let later = turns();
        let mut pairs = later.slots.iter().zip(&first.slots);
        pairs
            .all(|(later, first)| later.sequence > first.sequence + 100_000)
            .then_some(later)
    });
    for (later, first) in later.slots.iter().zip(&first.slots) {
        assert_eq!(later.breaks, first.breaks);
        assert_eq!(later.walk.errors, first.walk.errors);
    }
    assert_eq!(vm.audit_log().upgrades(), ["committed"]);
}

#[test]
fn a_stopped_worker_is_not_taken_for_a_parked_one() {
    // Stopped before it parks, an old worker never says so: there is nothing to take over, and nobody else runs.
    let faulted = baton_tests::Faulted::by("S6:stop-old");
    faulted.assert_aborted(&["park"]);
    assert_eq!(faulted.upgrade.state_bytes, 0);
}
