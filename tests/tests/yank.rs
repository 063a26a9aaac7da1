//! `yank` of `migration`, out of band: before the commit the old worker runs on, after it the new one.

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::continue_process;
use baton_tests::is_stopped;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

fn migration() -> Value {
    json!([{"type": "migration"}])
}

/// The new worker, once it stands still where the fault has stopped it.
fn stopped_worker(vm: &Vm, old: i32) -> i32 {
    until("the new worker is stopped", || {
        let workers = vm.site.workers();
        let new = workers.into_iter().find(|worker| *worker != old)?;
        is_stopped(new).then_some(new)
    })
}

fn send_yank(qmp: &mut Qmp) {
    let yank = json!({"exec-oob": "yank", "arguments": {"instances": migration()}});
    qmp.send(format!("{yank}\n"));
}

#[test]
fn an_upgrade_whose_new_worker_is_being_built_is_cut_off_and_the_next_one_succeeds() {
    let vm = Builder::faulty("S5:stop-new").start();
    let (guest, old) = (vm.witness(), vm.worker());
    let mut qmp = Qmp::connect(&vm);
    qmp.migrate();
    stopped_worker(&vm, old);
    let info = qmp.returns("query-migrate", json!({}));
    assert_eq!(info["status"], "setup", "{info}");
    assert_eq!(qmp.returns("query-yank", json!({})), migration());
    send_yank(&mut qmp);
    assert_eq!(qmp.answer(), json!({"return": {}}));
    assert_eq!(qmp.migrated()["status"], "cancelled");
    assert_eq!(qmp.returns("query-yank", json!({})), json!([]));
    vm.assert_only_runner(old);
    let guest = vm.assert_goes_on(&guest);
    let events = [
        "MIGRATION setup",
        "MIGRATION cancelling",
        "MIGRATION cancelled",
    ];
    assert_eq!(qmp.event_names_now(), events);
    qmp.migrate();
    assert_eq!(qmp.migrated()["status"], "completed");
    vm.assert_goes_on(&guest);
}

#[test]
fn one_that_is_committed_is_not_cut_off_before_it_is_recorded() {
    let vm = Builder::faulty("S10:stop-new").start();
    let (guest, old) = (vm.witness(), vm.worker());
    let mut qmp = Qmp::connect(&vm);
    qmp.migrate();
    let new = stopped_worker(&vm, old);
    // The commit is on its way, or there; whether it runs is not known to the broker yet.
    send_yank(&mut qmp);
    continue_process(new);
    let answer = qmp.answer();
    assert!(answer.get("error").is_some(), "{answer}");
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(qmp.returns("query-yank", json!({})), json!([]));
    vm.assert_only_runner(new);
    assert_eq!(vm.generation(), 2);
    assert_eq!(vm.audit_log().upgrades(), ["committed"]);
    vm.assert_goes_on(&guest);
}
