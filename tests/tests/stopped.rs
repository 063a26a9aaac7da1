//! The fault matrix's rows `stop (hang)`, and the workers that hang, fail or make a forbidden call by themselves: deadlines
//! end what does not end by itself, and the guest is never left without a runner that could run it (I4).

use baton_tests::Builder;
use baton_tests::Faulted;
use baton_tests::Qmp;
use baton_tests::continue_process;
use baton_tests::is_stopped;
use baton_tests::signal_stop;
use baton_tests::stop_process;
use baton_tests::until;
use serde_json::json;

macro_rules! cells {
    ($($start:ident $name:ident: $fault:literal => $check:ident($($argument:expr),*);)*) => {
        $(
            #[test]
            fn $name() {
                Faulted::$start($fault).$check($($argument),*);
            }
        )*
    };
}

mod new_worker {
    use super::*;

    cells! {
        within_deadlines stopped_in_s3_is_aborted: "S3:stop-new" => assert_aborted_without_pause(&["agree"]);
        within_deadlines stopped_in_s4_is_aborted: "S4:stop-new" => assert_aborted_without_pause(&["build"]);
        within_deadlines stopped_in_s5_is_aborted: "S5:stop-new" => assert_aborted_without_pause(&["build"]);
        by stopped_in_s6_is_rolled_back: "S6:stop-new" => assert_old_runs();
        by stopped_in_s7_is_rolled_back: "S7:stop-new" => assert_old_runs();
        by stopped_in_s8_is_rolled_back: "S8:stop-new" => assert_old_runs();
        by stopped_in_s9_never_said_running: "S9:stop-new" => assert_aborted(&["run"]);
        by stopped_in_s10_is_decided_by_its_word: "S10:stop-new" => assert_one_of(&["aborted", "committed"]);

        within_deadlines hanging_before_its_offer_is_aborted: "new@agree:hang" => assert_aborted_without_pause(&["agree"]);
        within_deadlines hanging_in_its_build_is_aborted: "new@build:hang" => assert_aborted_without_pause(&["build"]);
        within_deadlines hanging_in_its_rehearsal_is_aborted: "new@rehearse:hang" => assert_aborted_without_pause(&["build"]);
        by hanging_before_it_loads_is_rolled_back: "new@validate:hang" => assert_aborted(&["save", "load"]);
        by hanging_half_loaded_is_rolled_back: "new@load:hang" => assert_aborted(&["save", "load"]);
        by hanging_with_the_commit_never_said_running: "new@commit:hang" => assert_aborted(&["run"]);

        by failing_before_its_offer_is_aborted: "new@agree:error" => assert_aborted_without_pause(&["agree"]);
        by failing_in_its_build_is_aborted: "new@build:error" => assert_aborted_without_pause(&["build"]);
        by failing_in_its_rehearsal_is_aborted: "new@rehearse:error" => assert_aborted_without_pause(&["build"]);
        by refusing_the_state_is_rolled_back: "new@validate:error" => assert_aborted(&["save", "load"]);
        by failing_half_loaded_is_rolled_back: "new@load:error" => assert_aborted(&["save", "load"]);
        by failing_with_the_commit_never_said_running: "new@commit:error" => assert_aborted(&["run"]);

        by killed_by_its_filter_in_its_rehearsal_is_aborted: "new@rehearse:violate" => assert_aborted_without_pause(&["build"]);
        by killed_by_its_filter_before_it_loads_is_rolled_back: "new@validate:violate" => assert_aborted(&["save", "load"]);
        by killed_by_its_filter_half_loaded_is_rolled_back: "new@load:violate" => assert_aborted(&["save", "load"]);
        by killed_by_its_filter_with_the_commit_never_ran: "new@commit:violate" => assert_aborted(&["run"]);
    }
}

mod old_worker {
    use super::*;

    cells! {
        by stopped_in_s6_is_rolled_back: "S6:stop-old" => assert_aborted(&["park"]);
        // It may have saved all before the signal is there; then it is stopped anyway.
        by stopped_in_s7_is_rolled_back_unless_all_was_saved: "S7:stop-old" => assert_one_of(&["aborted", "committed"]);
        by stopped_in_s8_rolls_forward: "S8:stop-old" => assert_committed();
        by stopped_in_s9_rolls_forward: "S9:stop-old" => assert_committed();
        by stopped_in_s10_rolls_forward: "S10:stop-old" => assert_committed();

        by failing_to_agree_is_aborted: "old@agree:error" => assert_aborted_without_pause(&["agree"]);
        by failing_to_park_is_rolled_back: "old@park:error" => assert_aborted(&["park"]);
        by failing_half_saved_is_rolled_back: "old@save:error" => assert_aborted(&["save"]);
        // The stream is cut in half, and called whole: the digest is never answered.
        by lying_of_a_whole_stream_is_rolled_back: "old@save:lie" => assert_aborted(&["save", "load"]);

        by dying_in_agreement_is_lost: "old@agree:die" => assert_lost();
        by dying_as_it_parks_is_lost: "old@park:die" => assert_lost();
        by killed_by_its_filter_as_it_parks_is_lost: "old@park:violate" => assert_lost();
    }

    /// Stopped before the pause: the upgrade is aborted, and the guest runs again when its worker can.
    fn stopped_before_the_pause(fault: &str) {
        let vm = Builder::faulty(fault).slowness(3).start();
        let (worker, before) = (vm.worker(), vm.witness());
        let upgrade = vm.upgrade();
        assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
        assert_eq!((upgrade.worker_pid, upgrade.pause_us), (worker, 0));
        vm.assert_stands_still();
        continue_process(worker);
        vm.assert_only_runner(worker);
        vm.assert_goes_on(&before);
        // Until it has heard of the abort, it is busy with the last upgrade.
        let next = until("it has heard of the abort", || {
            let answer = vm.ask("upgrade");
            (answer.code != Some(75)).then_some(answer)
        });
        assert_eq!(next.upgrade().outcome, "committed");
        vm.assert_goes_on(&before);
    }

    /// Stopped in the pause, told to go on, and stopped again before it can obey, for longer than its broker waits: what it
    /// says when it comes back at last is not held against it.
    #[test]
    fn slow_to_come_back_is_not_lost() {
        let vm = Builder::faulty("S6:stop-old").slowness(3).start();
        let (worker, before) = (vm.worker(), vm.witness());
        let over = std::sync::atomic::AtomicBool::new(false);
        let upgrade = std::thread::scope(|scope| {
            scope.spawn(|| {
                // From the fault's own stop on, it is stopped again and again.
                until("the fault stops it", || is_stopped(worker).then_some(()));
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    signal_stop(worker);
                }
            });
            let upgrade = vm.upgrade();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            upgrade
        });
        assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
        continue_process(worker);
        vm.assert_goes_on(&before);
        assert_eq!(vm.state(), "running");
        vm.assert_upgrades();
    }

    #[test]
    fn stopped_in_s3_is_aborted() {
        stopped_before_the_pause("S3:stop-old");
    }

    #[test]
    fn stopped_in_s4_is_aborted() {
        stopped_before_the_pause("S4:stop-old");
    }

    #[test]
    fn stopped_in_s5_is_aborted() {
        stopped_before_the_pause("S5:stop-old");
    }

    /// What the broker knows is said anyway, to `status` and over QMP, and that the worker does not answer.
    #[test]
    fn stopped_is_said_by_those_who_are_asked_how_the_vm_is() {
        let vm = Builder::release().slowness(1).start();
        let (worker, before) = (vm.worker(), vm.witness());
        stop_process(worker);
        let status = vm.status();
        assert_eq!(status["worker_answers"], false, "{status}");
        assert_eq!(status["state"], "running", "{status}");
        let listed = vm.site.baton(["list"]).expect(0).json();
        assert_eq!(listed[0]["worker_answers"], false, "{listed}");
        let mut qmp = Qmp::connect(&vm);
        assert_eq!(qmp.status(), "running");
        assert_eq!(qmp.returns("query-migrate", json!({})), json!({}));
        drop(qmp);
        continue_process(worker);
        until("the worker answers", || {
            (vm.status()["worker_answers"] == true).then_some(())
        });
        vm.assert_goes_on(&before);
        vm.assert_upgrades();
    }

    #[test]
    fn stopped_before_the_request_is_refused() {
        let vm = Builder::release().start();
        let (worker, before) = (vm.worker(), vm.witness());
        stop_process(worker);
        let refused = vm.ask("upgrade").expect(3);
        assert!(refused.stderr.contains("is stopped"), "{refused:?}");
        continue_process(worker);
        vm.assert_goes_on(&before);
        vm.assert_upgrades();
    }

    /// A hang of its one thread that could resume the guest: the abort is reported at the deadline, nobody else runs the
    /// guest, and the operator can still end it.
    fn hanging(fault: &str) {
        let vm = Builder::faulty(fault).slowness(3).start();
        let worker = vm.worker();
        let upgrade = vm.upgrade();
        assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
        assert_eq!(upgrade.worker_pid, worker);
        vm.assert_only_runner(worker);
        assert_eq!(vm.audit_log().upgrades(), ["aborted"]);
    }

    #[test]
    fn hanging_in_agreement_is_reported() {
        hanging("old@agree:hang");
    }

    #[test]
    fn hanging_as_it_parks_is_reported() {
        hanging("old@park:hang");
    }

    #[test]
    fn hanging_half_saved_is_reported() {
        hanging("old@save:hang");
    }
}
