//! What `query-migrate` says of time: nobody who looks from outside finds more of the guest lost than it says, and the guest
//! itself has lost no less.
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::time::Duration;
use std::time::Instant;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::continue_process;
use baton_tests::is_stopped;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

/// How long the new worker stands still as it is to load the state.
const HELD: Duration = Duration::from_millis(60);

fn number(info: &Value, member: &str) -> u64 {
    let number = info.get(member).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("{member} of {info}"))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap()
}

/// Has the new worker, which was stopped, stand still for that long; for how long it did at least.
fn hold_new_worker(vm: &Vm, old: i32) -> Duration {
    let new = until("the new worker is stopped", || {
        let workers = vm.site.workers();
        let new = workers.into_iter().find(|worker| *worker != old)?;
        is_stopped(new).then_some(new)
    });
    let since = Instant::now();
    std::thread::sleep(HELD);
    let held = since.elapsed();
    continue_process(new);
    held
}

/// How long the guest went without a turn at most, by its own clock, in microseconds.
fn longest_gap(vm: &Vm) -> u64 {
    let khz = vm.status()["tsc_khz"].as_u64().unwrap();
    let report = vm.ram.report().unwrap();
    let ticks = report.slots.iter().map(|slot| slot.max_gap).max().unwrap();
    u64::try_from(u128::from(ticks) * 1_000 / u128::from(khz)).unwrap()
}

/// Everything that `query-migrate` says of an upgrade in whose pause the new worker was held that long.
fn assert_true(info: &Value, held: Duration, whole: Duration) {
    assert_eq!(info["status"], "completed", "{info}");
    let (downtime, lost) = (
        number(info, "downtime"),
        number(info, "__org.baton_downtime-us"),
    );
    assert!(lost >= micros(held), "held for {held:?}: {info}");
    assert_eq!(downtime, lost.div_ceil(1_000), "{info}");
    let (total, setup) = (number(info, "total-time"), number(info, "setup-time"));
    // Each is rounded by itself.
    assert!(setup + downtime <= total + 2, "{info}");
    assert!(
        u128::from(total) <= whole.as_millis() + 1,
        "{whole:?}: {info}"
    );
    let ram = info["ram"].as_object().unwrap();
    let state = number(&info["ram"], "transferred");
    assert!(state > 0, "{info}");
    for (member, value) in ram {
        let expected = match member.as_str() {
            "transferred" | "downtime-bytes" => state,
            "page-size" => 4096,
            _ => 0,
        };
        assert_eq!(value.as_f64(), Some(expected as f64), "{member} of {info}");
    }
}

#[test]
fn what_the_guest_lost_in_place_is_said() {
    let vm = Builder::faulty("S8:stop-new").start();
    let (before, old) = (vm.witness(), vm.worker());
    let mut qmp = Qmp::connect(&vm);
    let began = Instant::now();
    qmp.migrate();
    let held = hold_new_worker(&vm, old);
    let info = qmp.migrated();
    assert_true(&info, held, began.elapsed());
    let lost = number(&info, "__org.baton_downtime-us");
    until("the guest has noticed", || {
        (longest_gap(&vm) >= lost).then_some(())
    });
    vm.assert_goes_on(&before);
}

#[test]
fn what_the_guest_lost_on_its_way_to_another_broker_is_said_on_both_sides() {
    let mut vm = Builder::faulty("S8:stop-new").start();
    let (before, old) = (vm.witness(), vm.worker());
    vm.site.environment("BATON_FAIL", "");
    let waiting = vm.wait_for_guest();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let began = Instant::now();
    qmp.done("migrate", json!({"channels": waiting.channels()}));
    let held = hold_new_worker(&vm, old);
    let info = qmp.migrated();
    let whole = began.elapsed();
    assert_true(&info, held, whole);
    drop(qmp);
    vm.assert_taken_over(&waiting);
    let lost = number(&info, "__org.baton_downtime-us");
    until("the guest has noticed", || {
        (longest_gap(&vm) >= lost).then_some(())
    });
    vm.assert_goes_on(&before);
    // As the old side has told the new one.
    let there = Qmp::connect(&vm).migrated();
    assert_true(&there, held, whole);
    assert_eq!(number(&there, "__org.baton_downtime-us"), lost);
}
