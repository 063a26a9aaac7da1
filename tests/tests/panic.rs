//! A guest whose kernel panics: what its operator is told, and what becomes of it, over upgrades too.

use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::until;
use serde_json::json;

fn wait_for_panic(vm: &Vm) {
    until("the guest's panic to be known", || {
        (vm.state() == "guest-panicked").then_some(())
    });
}

/// How often the audit log has this event of the guest's.
fn recorded(vm: &Vm, what: &str) -> usize {
    let log = vm.audit_log();
    log.of("guest")
        .filter(|event| event.fields.get("what") == Some(&json!(what)))
        .count()
}

#[test]
fn a_guest_that_panics_stands_still_over_upgrades_until_it_is_let_go_on() {
    let vm = Builder::release().cpus(2).start();
    let mut qmp = Qmp::connect(&vm);
    vm.assert_upgrades();
    qmp.event_names_now();
    qmp.events.clear();
    for round in 1..=2 {
        let before = vm.witness();
        vm.ram.mail(layout::COMMAND_PANIC);
        wait_for_panic(&vm);
        vm.assert_stands_still();
        assert_eq!(qmp.event_names_now(), ["GUEST_PANICKED", "STOP"]);
        assert_eq!(qmp.events[0]["data"], json!({"action": "pause"}));
        assert_eq!(recorded(&vm, "Panicked"), round);
        // A new worker lets it stand as it stood.
        assert_eq!(vm.upgrade().outcome, "committed");
        vm.assert_stands_still();
        assert_eq!(vm.state(), "guest-panicked");
        assert_eq!(qmp.status(), "guest-panicked");
        qmp.done("stop", json!({}));
        qmp.done("cont", json!({}));
        assert_eq!(qmp.status(), "running");
        vm.assert_goes_on(&before);
        qmp.event_names_now();
        qmp.events.clear();
    }
    // Paused by its operator, it has not panicked.
    vm.ask("pause").expect(0);
    assert_eq!(vm.state(), "paused");
    vm.ask("resume").expect(0);
    vm.assert_upgrades();
    assert_eq!(vm.audit_log().upgrades(), ["committed"; 4]);
}

#[test]
fn what_a_guest_does_after_its_panic_waits_too() {
    let vm = Builder::release().start();
    vm.ram.mail(layout::COMMAND_PANIC_RESET);
    wait_for_panic(&vm);
    vm.assert_stands_still();
    assert_eq!(vm.upgrade().outcome, "committed");
    assert_eq!(vm.ram.report().unwrap().boots, 1);
    vm.ask("resume").expect(0);
    until("the guest to boot again", || {
        (vm.ram.report().ok()?.boots == 2).then_some(())
    });
    until("the guest to count", || {
        (vm.ram.report().ok()?.slots.first()?.sequence > 0).then_some(())
    });
    assert_eq!(vm.state(), "running");
    assert_eq!(recorded(&vm, "Panicked"), 1);
    // The next boot may panic as the first one did.
    vm.ram.mail(layout::COMMAND_PANIC);
    wait_for_panic(&vm);
}

#[test]
fn a_panic_ends_the_upgrade_that_is_under_way() {
    let vm = Builder::release().start();
    let mut qmp = Qmp::connect(&vm);
    let hold = json!([{"capability": "pause-before-switchover", "state": true}]);
    qmp.done("migrate-set-capabilities", json!({"capabilities": hold}));
    qmp.migrate();
    until("the upgrade to wait", || {
        let info = qmp.returns("query-migrate", json!({}));
        (info["status"] == "pre-switchover").then_some(())
    });
    let before = vm.witness();
    vm.ram.mail(layout::COMMAND_PANIC);
    let info = qmp.migrated();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(
        info["error-desc"].as_str().unwrap().contains("panicked"),
        "{info}"
    );
    wait_for_panic(&vm);
    vm.assert_stands_still();
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);
    vm.assert_upgrades();
}

#[test]
fn a_guest_that_is_to_run_on_is_heard_once_a_boot() {
    let vm = Builder::release().on_panic("run").start();
    let mut qmp = Qmp::connect(&vm);
    let before = vm.witness();
    for (command, what) in [
        (layout::COMMAND_PANIC, "Panicked"),
        (layout::COMMAND_CRASH_LOADED, "CrashLoaded"),
    ] {
        vm.ram.mail(command);
        until("the guest to be heard", || {
            (recorded(&vm, what) == 1).then_some(())
        });
    }
    assert_eq!(
        qmp.event_names_now(),
        ["GUEST_PANICKED", "GUEST_CRASHLOADED"]
    );
    assert_eq!(qmp.events[0]["data"], json!({"action": "run"}));
    assert_eq!(qmp.events[1]["data"], json!({"action": "run"}));
    vm.assert_upgrades();
    // Said before, in another worker.
    for command in [layout::COMMAND_PANIC, layout::COMMAND_CRASH_LOADED] {
        vm.ram.mail(command);
        vm.assert_goes_on(&vm.witness());
    }
    vm.assert_goes_on(&before);
    vm.assert_upgrades();
    assert_eq!(recorded(&vm, "Panicked"), 1);
    assert_eq!(recorded(&vm, "CrashLoaded"), 1);
}

#[test]
fn a_panic_or_a_shutdown_through_pvpanic_ends_the_vm() {
    for (command, events, reason) in [
        (
            layout::COMMAND_PANIC,
            ["GUEST_PANICKED", "STOP", "SHUTDOWN"].as_slice(),
            "guest-panic",
        ),
        (
            layout::COMMAND_PV_SHUTDOWN,
            &["GUEST_PVSHUTDOWN", "SHUTDOWN"],
            "guest-shutdown",
        ),
    ] {
        let vm = Builder::release().on_panic("poweroff").start();
        vm.assert_upgrades();
        let mut qmp = Qmp::connect(&vm);
        vm.ram.mail(command);
        while let Some(event) = qmp.receive() {
            qmp.events.push(event);
        }
        assert_eq!(qmp.event_names(), events);
        let ended = json!({"guest": true, "reason": reason});
        assert_eq!(qmp.events.last().unwrap()["data"], ended);
        vm.site.assert_nothing_left();
    }
}
