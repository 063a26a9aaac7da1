//! The connections of a transfer break, between the brokers at each message, between the workers at any byte: by a hang-up, or by
//! nothing coming any more. Nobody dies of it: the guest runs on where it was, and the next transfer of it succeeds.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::Waiting;
use baton_tests::between::Breach;
use baton_tests::between::Break;
use baton_tests::between::break_link;
use baton_tests::between::break_stream;
use baton_tests::transfer::channel;
use serde_json::Value;
use serde_json::json;

/// Up to the new worker's being there: hello, offer, listening, greeting, agreed, ready. What is said after that, the verdict, is
/// said to whoever watches over the old broker's process; here that would be this test's.
const MESSAGES: usize = 6;

/// Deadlines of seconds, where nothing but a deadline ends it.
fn vm() -> Vm {
    Builder::release().slowness(2).start()
}

fn migrate(vm: &Vm, channels: Value) -> Value {
    let mut qmp = Qmp::connect(vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    qmp.done("migrate", json!({"channels": channels}));
    qmp.migrated()
}

fn assert_failed(vm: &Vm, waiting: &Waiting, old: i32, info: &Value) {
    assert_eq!(info["status"], "failed", "{info}");
    assert!(!info["error-desc"].as_str().unwrap().is_empty());
    vm.assert_nobody_waits(waiting);
    vm.assert_only_runner(old);
    assert_eq!(vm.state(), "running");
}

fn link_breaks(how: Break) {
    let mut vm = vm();
    let (before, old) = (vm.witness(), vm.worker());
    for after in 0..MESSAGES {
        let waiting = vm.wait_for_guest();
        let between = waiting.cpr.with_extension("between");
        let middle = break_link(&between, &waiting.cpr, Breach { after, how });
        let channels = json!([channel("main", &waiting.main), channel("cpr", &between)]);
        let info = migrate(&vm, channels);
        assert_failed(&vm, &waiting, old, &info);
        middle.join().unwrap();
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn the_brokers_link_is_cut_at_each_message() {
    link_breaks(Break::Cut);
}

#[test]
fn the_brokers_link_falls_silent_at_each_message() {
    link_breaks(Break::Silence);
}

fn stream_breaks(how: Break) {
    let mut vm = vm();
    let through = |vm: &Vm, breach: Option<Breach>| {
        let waiting = vm.wait_for_guest();
        let between = waiting.main.with_extension("between");
        let middle = break_stream(&between, &waiting.main, breach);
        let channels = json!([channel("main", &between), channel("cpr", &waiting.cpr)]);
        let info = migrate(vm, channels);
        (waiting, info, middle)
    };
    // How much there is; nobody minds who passes all of it on.
    let before = vm.witness();
    let (waiting, info, middle) = through(&vm, None);
    assert_eq!(info["status"], "completed", "{info}");
    vm.assert_taken_over(&waiting);
    let whole = middle.join().unwrap();
    assert!(whole > 4096, "{whole}");
    let old = vm.worker();
    // The nonce is first.
    for after in [0, 31, 32, 33, whole / 4, whole / 2, whole / 10 * 9] {
        let (waiting, info, middle) = through(&vm, Some(Breach { after, how }));
        assert_failed(&vm, &waiting, old, &info);
        assert_eq!(middle.join().unwrap(), after);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn the_workers_channel_is_cut_at_any_byte() {
    stream_breaks(Break::Cut);
}

#[test]
fn the_workers_channel_falls_silent_at_any_byte() {
    stream_breaks(Break::Silence);
}
