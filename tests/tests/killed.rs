//! The fault matrix's rows `kill -9`: old worker, new worker or both, at each step of an upgrade. `aborted` stands for A
//! and R, `lost` for L, `committed` for F. Where the kill races with the victim, the cell names both outcomes, and each is
//! checked whole. In no cell do two run the guest (I1), after every abort the next upgrade succeeds (I8), and each upgrade
//! has one terminal record (I7).

use baton_tests::Faulted;
use baton_tests::until;

macro_rules! cells {
    ($($name:ident: $fault:literal => $check:ident($($argument:expr),*);)*) => {
        $(
            #[test]
            fn $name() {
                Faulted::by($fault).$check($($argument),*);
            }
        )*
    };
}

mod old_worker {
    use super::*;

    cells! {
        s3_agree_is_lost: "S3:kill-old" => assert_lost();
        s4_hand_over_is_lost: "S4:kill-old" => assert_lost();
        s5_build_is_lost: "S5:kill-old" => assert_lost();
        s6_park_is_lost: "S6:kill-old" => assert_lost();
        // Its whole stream may be out before the signal is there.
        s7_save_is_lost_unless_all_was_saved: "S7:kill-old" => assert_one_of(&["lost", "committed"]);
        s7_half_saved_is_lost: "old@save:die" => assert_lost();
        s8_load_rolls_forward: "S8:kill-old" => assert_committed();
        s9_commit_rolls_forward: "S9:kill-old" => assert_committed();
        s10_run_rolls_forward: "S10:kill-old" => assert_committed();
    }
}

mod new_worker {
    use super::*;

    cells! {
        s3_agree_is_aborted: "S3:kill-new" => assert_aborted_without_pause(&["agree"]);
        s3_before_its_offer_is_aborted: "new@agree:die" => assert_aborted_without_pause(&["agree"]);
        s4_hand_over_is_aborted: "S4:kill-new" => assert_aborted_without_pause(&["hand_over", "build"]);
        s5_build_is_aborted: "S5:kill-new" => assert_aborted_without_pause(&["build"]);
        s5_half_built_is_aborted: "new@build:die" => assert_aborted_without_pause(&["build"]);
        s5_rehearsing_is_aborted: "new@rehearse:die" => assert_aborted_without_pause(&["build"]);
        s6_park_is_rolled_back: "S6:kill-new" => assert_old_runs();
        s7_save_is_rolled_back: "S7:kill-new" => assert_old_runs();
        // It may have loaded all of it by then, and is dead when it is told of the commit.
        s8_load_is_rolled_back: "S8:kill-new" => assert_aborted(&["load", "run"]);
        s8_half_loaded_is_rolled_back: "new@load:die" => assert_aborted(&["save", "load"]);
        s8_validating_is_rolled_back: "new@validate:die" => assert_aborted(&["save", "load"]);
        s9_commit_never_said_running: "S9:kill-new" => assert_aborted(&["run"]);
        s10_before_running_never_ran: "new@commit:die" => assert_aborted(&["run"]);
        // "Running" said, and dead before KVM_RUN: the one window that cannot be closed.
        s10_after_running_is_lost: "new@running:die" => assert_lost();
        s10_run_is_decided_by_its_word: "S10:kill-new" => assert_decided_by_its_word();
    }
}

mod both_workers {
    use super::*;

    cells! {
        s4_hand_over_is_lost: "S4:kill-both" => assert_lost();
        s5_build_is_lost: "S5:kill-both" => assert_lost();
        s6_park_is_lost: "S6:kill-both" => assert_lost();
        s7_save_is_lost: "S7:kill-both" => assert_lost();
        s8_load_is_lost: "S8:kill-both" => assert_lost();
        s9_commit_is_lost: "S9:kill-both" => assert_lost();
        s10_run_is_lost: "S10:kill-both" => assert_decided_by_its_word();
    }

    /// The broker may hear of the new one's death first, and then cannot know yet that the old one has been killed too: the
    /// VM is lost all the same, and said to be.
    #[test]
    fn s3_agree_is_lost_though_the_upgrade_may_have_been_aborted_first() {
        let faulted = Faulted::by("S3:kill-both");
        assert_ne!(faulted.upgrade.outcome, "committed");
        let vm = &faulted.vm;
        until("the loss is known", || (vm.state() == "lost").then_some(()));
        until("nobody is left", || {
            vm.site.workers().is_empty().then_some(())
        });
        vm.assert_stands_still();
        assert_eq!(vm.audit_log().count("lost"), 1);
        assert_eq!(
            vm.audit_log().upgrades(),
            [faulted.upgrade.outcome.as_str()]
        );
    }
}
