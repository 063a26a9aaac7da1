//! Two brokers and two workers, and each of them killed at each step of a transfer, or hung: never two runners. Before the commit the
//! old worker runs on, and another transfer of the same guest succeeds; after it the new one does, under whichever broker is left,
//! or as an orphan that is found by its name.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot do its work fails"
)]

use std::time::Duration;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::Waiting;
use baton_tests::Witness;
use baton_tests::continue_process;
use baton_tests::is_alive;
use baton_tests::is_stopped;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

/// A transfer that meets its fault.
struct Faulted {
    vm: Vm,
    old: i32,
    before: Witness,
    waiting: Waiting,
    /// What the old side says in the end; none when it is dead.
    info: Option<Value>,
}

/// With these faults in the old broker and its worker, and these in the new broker and its worker.
fn transferring(old_faults: &str, new_faults: &str) -> Faulted {
    transferring_while(Builder::faulty(old_faults).start(), new_faults, |_, _| ())
}

/// Deadlines of seconds, which are all that ends it.
fn impatient(faults: &str) -> Vm {
    Builder::faulty(faults).slowness(2).start()
}

/// The old broker hangs at this step, until the new one has given up, or will not, since the old one alone decides.
fn with_old_broker_hung(step: &str, gives_up: bool) -> Faulted {
    let vm = impatient(&format!("{step}:stop-broker"));
    transferring_while(vm, "", |vm, waiting| {
        until("the old broker hangs", || {
            is_stopped(vm.broker).then_some(())
        });
        if gives_up {
            vm.assert_nobody_waits(waiting);
        } else {
            // Past every bound of the pause.
            std::thread::sleep(Duration::from_secs(1));
            assert!(is_alive(waiting.broker));
        }
        continue_process(vm.broker);
    })
}

/// The old broker hangs at this step after the commit, until the new one has gone on with the audit log.
fn with_old_broker_hung_until_the_log_is_gone(step: &str) -> Faulted {
    let vm = impatient(&format!("{step}:stop-broker"));
    transferring_while(vm, "", |vm, _| {
        until("the old broker hangs", || {
            is_stopped(vm.broker).then_some(())
        });
        until("the new broker has the log", || {
            (vm.audit_log().count("taken-over") == 1).then_some(())
        });
        continue_process(vm.broker);
    })
}

/// The new broker hangs in the pause or after it, which is no matter of its: with ordinary deadlines, so that no busy machine ends
/// the pause before.
fn with_new_broker_hung_from(step: &str) -> Faulted {
    let faults = format!("{step}:stop-other-broker");
    continued_when_it_hangs(transferring(&faults, ""))
}

/// The new broker hangs before the pause, until the old one has ended the transfer.
fn with_new_broker_hung(step: &str) -> Faulted {
    let faults = format!("{step}:stop-broker");
    continued_when_it_hangs(transferring_while(impatient(""), &faults, |_, _| ()))
}

fn continued_when_it_hangs(hung: Faulted) -> Faulted {
    until("the new broker hangs", || {
        is_stopped(hung.waiting.broker).then_some(())
    });
    continue_process(hung.waiting.broker);
    hung
}

/// Something is done as soon as it has been asked for.
fn transferring_while(
    mut vm: Vm,
    new_faults: &str,
    meanwhile: impl FnOnce(&Vm, &Waiting),
) -> Faulted {
    let (old, before) = (vm.worker(), vm.witness());
    vm.site.environment("BATON_FAIL", new_faults);
    let waiting = vm.wait_for_guest();
    vm.site.environment("BATON_FAIL", "");
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let migrate = json!({"execute": "migrate", "arguments": {"channels": waiting.channels()}});
    qmp.flood(format!("{migrate}\n").as_bytes());
    meanwhile(&vm, &waiting);
    let info = loop {
        // Nobody may be there any more.
        qmp.flood(b"{\"execute\": \"query-migrate\"}\n");
        let answer = loop {
            match qmp.receive() {
                Some(message) if message.get("event").is_some() => {}
                other => break other,
            }
        };
        let Some(answer) = answer else {
            break None;
        };
        if answer.get("error").is_some() {
            // There was still somebody to say so.
            until("the broker is dead", || {
                (!is_alive(vm.broker)).then_some(())
            });
            break None;
        }
        let info = answer["return"].clone();
        let status = info["status"].as_str().unwrap_or_default();
        if matches!(status, "completed" | "failed" | "cancelled") {
            break Some(info);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    Faulted {
        vm,
        old,
        before,
        waiting,
        info,
    }
}

impl Faulted {
    fn status(&self) -> &str {
        self.info
            .as_ref()
            .and_then(|info| info["status"].as_str())
            .unwrap_or("dead")
    }

    /// One terminal record, whoever has written it (I7).
    fn assert_recorded(&self, outcome: &str) {
        let log = self.vm.audit_log();
        let outcomes = log
            .of("upgrade")
            .map(|record| record.fields["outcome"].clone());
        assert_eq!(outcomes.collect::<Vec<_>>(), [json!(outcome)]);
    }

    /// The old worker runs the guest under the old broker, nobody waits, and the next transfer succeeds.
    fn assert_old_runs(mut self) {
        self.assert_recorded("aborted");
        assert_eq!(self.status(), "failed", "{:?}", self.info);
        let reason = &self.info.as_ref().expect("an answer")["error-desc"];
        assert!(
            reason.as_str().is_some_and(|text| !text.is_empty()),
            "{reason}"
        );
        self.vm.assert_nobody_waits(&self.waiting);
        assert_eq!(self.vm.worker(), self.old);
        assert_eq!(self.vm.state(), "running");
        self.vm.assert_only_runner(self.old);
        self.vm.assert_goes_on(&self.before);
        // On the same guest (I8); what the dead have left goes with it.
        self.vm.assert_transfers();
    }

    /// The same, when the old worker goes on, whom nobody has waited for.
    fn assert_old_runs_when_it_can(self) {
        assert_eq!(self.status(), "failed", "{:?}", self.info);
        let status = self.vm.status();
        assert_eq!(
            (&status["state"], &status["worker_answers"]),
            (&json!("running"), &json!(false)),
            "{status}"
        );
        self.vm.assert_stands_still();
        continue_process(self.old);
        until("it has heard that nothing comes of it", || {
            (self.vm.status()["worker_answers"] == true).then_some(())
        });
        self.assert_old_runs();
    }

    /// The old broker is dead, its worker runs on without it, and the side that waited is gone.
    fn assert_old_orphaned(self) {
        assert_eq!(self.status(), "dead", "{:?}", self.info);
        self.vm.assert_nobody_waits(&self.waiting);
        self.vm.assert_only_runner(self.old);
        self.vm.assert_goes_on(&self.before);
        let status = self.vm.status();
        assert_eq!(status["state"], "orphaned", "{status}");
        assert_eq!(status["worker_pid"], self.old, "{status}");
    }

    /// The new worker runs the guest under the new broker.
    fn assert_new_runs(mut self) {
        self.vm.assert_taken_over(&self.waiting);
        let new = self.vm.worker();
        assert_ne!(new, self.old);
        assert_eq!(self.vm.generation(), 2);
        until("the new broker has the log", || {
            (self.vm.audit_log().count("taken-over") == 1).then_some(())
        });
        self.assert_recorded("committed");
        self.vm.assert_only_runner(new);
        self.vm.assert_goes_on(&self.before);
        self.vm.assert_transfers();
    }

    /// The new broker died after the commit: its worker runs the guest, and is found.
    fn assert_new_orphaned(self) {
        assert_eq!(self.status(), "completed", "{:?}", self.info);
        // Its end continues the worker, if a test has stopped that.
        self.vm.assert_nobody_waits(&self.waiting);
        until("the old worker is gone", || {
            (!is_alive(self.old)).then_some(())
        });
        self.assert_recorded("committed");
        let workers = self.vm.site.workers();
        let [new] = workers.as_slice() else {
            panic!("one has to run the guest: {workers:?}");
        };
        self.vm.assert_goes_on(&self.before);
        let status = self.vm.status();
        assert_eq!(status["state"], "orphaned", "{status}");
        assert_eq!(status["worker_pid"], *new, "{status}");
    }

    /// Rolled back if the old broker saw the new one's end before the commit; a dying process hangs up when it comes to that.
    fn assert_old_runs_or_new_orphaned(self) {
        match self.status() {
            "failed" => self.assert_old_runs(),
            _ => self.assert_new_orphaned(),
        }
    }

    /// Nobody runs the guest, and that is said.
    fn assert_lost(self) {
        assert_eq!(self.status(), "failed", "{:?}", self.info);
        self.vm.assert_nobody_waits(&self.waiting);
        until("nobody is left", || {
            self.vm.site.workers().is_empty().then_some(())
        });
        self.vm.assert_stands_still();
        assert_eq!(self.vm.state(), "lost");
        self.assert_recorded("lost");
    }

    /// Whichever the race between the signal and its victim made of it: that, whole.
    fn assert_decided(self) {
        match self.status() {
            "completed" => {
                // It ran for a moment, was the VM, and died.
                until("nobody is left", || {
                    self.vm.site.workers().is_empty().then_some(())
                });
                self.vm.assert_stands_still();
            }
            _ if self.vm.state() == "lost" => self.assert_lost(),
            _ => self.assert_old_runs(),
        }
    }

    /// Rolled back for its being late, or committed: one of them, whole.
    fn assert_either_runs(self) {
        match self.status() {
            "failed" => self.assert_old_runs(),
            _ => self.assert_new_runs(),
        }
    }

    fn assert_lost_or_new_runs(self) {
        match self.status() {
            "failed" => self.assert_lost(),
            _ => self.assert_new_runs(),
        }
    }
}

macro_rules! cells {
    ($($name:ident: $old:literal, $new:literal => $check:ident;)*) => {
        $(
            #[test]
            fn $name() {
                transferring($old, $new).$check();
            }
        )*
    };
}

/// The old broker dies after the commit and before its word of it: what it would have said of the guest is the worker's to say.
#[test]
fn a_guest_that_stood_still_stands_on_when_its_broker_dies_at_the_commit() {
    for fault in ["S10:kill-broker", "committed-is-lost"] {
        let vm = Builder::faulty(fault).start();
        vm.ask("pause").expect(0);
        let Faulted {
            mut vm,
            old,
            before,
            waiting,
            info: _,
        } = transferring_while(vm, "", |_, _| ());
        vm.assert_taken_over(&waiting);
        assert_ne!(vm.worker(), old, "{fault}");
        assert_eq!(vm.state(), "paused", "{fault}");
        vm.assert_stands_still();
        // It stays so in the next worker, until somebody lets it go on.
        let upgrade = vm.upgrade();
        assert_eq!(upgrade.outcome, "committed", "{upgrade:?}");
        assert_eq!(vm.state(), "paused", "{fault}");
        vm.assert_stands_still();
        vm.ask("resume").expect(0);
        vm.assert_goes_on(&before);
        vm.assert_transfers();
    }
}

mod new_broker {
    use super::*;

    cells! {
        s2_spawn_is_aborted: "", "S2:kill-broker" => assert_old_runs;
        s3_agree_is_aborted: "", "S3:kill-broker" => assert_old_runs;
        s4_hand_over_is_aborted: "", "S4:kill-broker" => assert_old_runs;
        s5_build_is_aborted: "", "S5:kill-broker" => assert_old_runs;
        s6_park_is_decided_by_what_is_seen: "S6:kill-other-broker", "" => assert_old_runs_or_new_orphaned;
        s7_save_is_decided_by_what_is_seen: "S7:kill-other-broker", "" => assert_old_runs_or_new_orphaned;
        s8_load_is_decided_by_what_is_seen: "S8:kill-other-broker", "" => assert_old_runs_or_new_orphaned;
        s9_commit_rolls_forward: "S9:kill-other-broker", "" => assert_new_orphaned;
        s10_run_rolls_forward: "S10:kill-other-broker", "" => assert_new_orphaned;
        s11_kick_rolls_forward: "S11:kill-other-broker", "" => assert_new_orphaned;
        s12_retire_rolls_forward: "S12:kill-other-broker", "" => assert_new_orphaned;
    }
}

mod old_broker {
    use super::*;

    cells! {
        s2_the_old_one_runs_on: "S2:kill-broker", "" => assert_old_orphaned;
        s3_the_old_one_runs_on: "S3:kill-broker", "" => assert_old_orphaned;
        s4_the_old_one_runs_on: "S4:kill-broker", "" => assert_old_orphaned;
        s5_the_old_one_runs_on: "S5:kill-broker", "" => assert_old_orphaned;
        s6_the_old_one_runs_on: "S6:kill-broker", "" => assert_old_orphaned;
        s7_the_old_one_resumes: "S7:kill-broker", "" => assert_old_orphaned;
        s8_the_old_one_resumes_though_it_was_stopped: "S8:kill-broker", "" => assert_old_orphaned;
        s9_before_it_ceded_the_old_one_resumes: "S9:kill-broker", "" => assert_old_orphaned;
        s10_the_new_side_takes_over_by_itself: "S10:kill-broker", "" => assert_new_runs;
        s11_the_new_side_takes_over_by_itself: "S11:kill-broker", "" => assert_new_runs;
        s12_the_new_side_takes_over_by_itself: "S12:kill-broker", "" => assert_new_runs;
        s10_the_new_side_takes_over_though_it_is_not_told: "committed-is-lost", "" => assert_new_runs;
    }
}

mod new_worker {
    use super::*;

    cells! {
        s2_spawn_is_aborted: "", "S2:kill-new" => assert_old_runs;
        s3_before_its_offer_is_aborted: "", "new@agree:die" => assert_old_runs;
        s4_hand_over_is_aborted: "", "S4:kill-new" => assert_old_runs;
        s5_building_is_aborted: "", "new@build:die" => assert_old_runs;
        s5_rehearsing_is_aborted: "", "new@rehearse:error" => assert_old_runs;
        s6_park_is_rolled_back: "S6:kill-new", "" => assert_old_runs;
        s7_save_is_rolled_back: "S7:kill-new", "" => assert_old_runs;
        s8_half_loaded_is_rolled_back: "", "new@load:die" => assert_old_runs;
        s8_refusing_is_rolled_back: "", "new@validate:error" => assert_old_runs;
        s8_hung_is_rolled_back: "S8:stop-new", "" => assert_old_runs;
        s9_commit_never_said_running: "S9:kill-new", "" => assert_old_runs;
        s9_hung_never_ran: "S9:stop-new", "" => assert_old_runs;
        s10_before_running_never_ran: "", "new@commit:die" => assert_old_runs;
        s10_hung_before_running_never_ran: "", "new@commit:hang" => assert_old_runs;
        s10_after_running_is_lost: "", "new@running:die" => assert_lost;
        s10_run_is_decided_by_its_word: "S10:kill-new", "" => assert_decided;
        s11_kick_is_lost_by_the_new_side: "S11:kill-new", "" => assert_decided;
        s12_retire_is_lost_by_the_new_side: "S12:kill-new", "" => assert_decided;
    }
}

mod old_worker {
    use super::*;

    cells! {
        s2_spawn_is_lost: "S2:kill-old", "" => assert_lost;
        s3_agree_is_lost: "S3:kill-old", "" => assert_lost;
        s4_hand_over_is_lost: "S4:kill-old", "" => assert_lost;
        s5_build_is_lost: "S5:kill-old", "" => assert_lost;
        s6_park_is_lost: "S6:kill-old", "" => assert_lost;
        s7_half_saved_is_lost: "old@save:die", "" => assert_lost;
        s7_refusing_is_rolled_back: "old@save:error", "" => assert_old_runs;
        s8_load_rolls_forward: "S8:kill-old", "" => assert_lost_or_new_runs;
        s9_commit_rolls_forward: "S9:kill-old", "" => assert_new_runs;
        s10_run_rolls_forward: "S10:kill-old", "" => assert_new_runs;
        s11_kick_rolls_forward: "S11:kill-old", "" => assert_new_runs;
    }
}

/// One that hangs neither runs the guest twice nor loses it, and is as good as any other when it goes on.
mod hung {
    use super::*;

    macro_rules! cells {
        ($($name:ident: $hung:expr => $check:ident;)*) => {
            $(
                #[test]
                fn $name() {
                    $hung.$check();
                }
            )*
        };
    }

    cells! {
        new_broker_s2: with_new_broker_hung("S2") => assert_old_runs;
        new_broker_s3: with_new_broker_hung("S3") => assert_old_runs;
        new_broker_s4: with_new_broker_hung("S4") => assert_old_runs;
        new_broker_s5: with_new_broker_hung("S5") => assert_old_runs;
        new_broker_s6: with_new_broker_hung_from("S6") => assert_new_runs;
        new_broker_s7: with_new_broker_hung_from("S7") => assert_new_runs;
        new_broker_s8: with_new_broker_hung_from("S8") => assert_new_runs;
        new_broker_s9: with_new_broker_hung_from("S9") => assert_new_runs;
        new_broker_s10: with_new_broker_hung_from("S10") => assert_new_runs;
        new_broker_s11: with_new_broker_hung_from("S11") => assert_new_runs;
        new_broker_s12: with_new_broker_hung_from("S12") => assert_new_runs;
        old_broker_s2: with_old_broker_hung("S2", true) => assert_old_runs;
        old_broker_s3: with_old_broker_hung("S3", true) => assert_old_runs;
        old_broker_s4: with_old_broker_hung("S4", true) => assert_old_runs;
        old_broker_s5: with_old_broker_hung("S5", true) => assert_old_runs;
        old_broker_s6: with_old_broker_hung("S6", false) => assert_either_runs;
        old_broker_s7: with_old_broker_hung("S7", false) => assert_either_runs;
        old_broker_s8: with_old_broker_hung("S8", false) => assert_either_runs;
        old_broker_s9: with_old_broker_hung("S9", false) => assert_either_runs;
        old_broker_s10: with_old_broker_hung("S10", false) => assert_either_runs;
        old_broker_s11: with_old_broker_hung_until_the_log_is_gone("S11") => assert_new_runs;
        old_broker_s12: with_old_broker_hung_until_the_log_is_gone("S12") => assert_new_runs;
        old_worker_s2: transferring_while(impatient("S2:stop-old"), "", |_, _| ()) => assert_old_runs_when_it_can;
        old_worker_s3: transferring_while(impatient("S3:stop-old"), "", |_, _| ()) => assert_old_runs_when_it_can;
        old_worker_s4: transferring_while(impatient("S4:stop-old"), "", |_, _| ()) => assert_old_runs_when_it_can;
        old_worker_s5: transferring_while(impatient("S5:stop-old"), "", |_, _| ()) => assert_old_runs_when_it_can;
        old_worker_s6: transferring_while(impatient("S6:stop-old"), "", |_, _| ()) => assert_either_runs;
        old_worker_s7: transferring_while(impatient("S7:stop-old"), "", |_, _| ()) => assert_either_runs;
        new_worker_s2: transferring_while(impatient(""), "S2:stop-new", |_, _| ()) => assert_old_runs;
        new_worker_s3: transferring_while(impatient(""), "S3:stop-new", |_, _| ()) => assert_old_runs;
        new_worker_s4: transferring_while(impatient(""), "S4:stop-new", |_, _| ()) => assert_old_runs;
        new_worker_s5: transferring_while(impatient(""), "S5:stop-new", |_, _| ()) => assert_old_runs;
        new_worker_s6: transferring_while(impatient("S6:stop-new"), "", |_, _| ()) => assert_old_runs;
        new_worker_s7: transferring_while(impatient("S7:stop-new"), "", |_, _| ()) => assert_old_runs;
    }
}
