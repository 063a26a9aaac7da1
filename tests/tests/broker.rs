//! What the broker itself holds: of root's privilege no more than `policy/broker.toml` names, and every audit says so.

use std::fs;

use baton_policy::own::OwnPolicy;
use baton_policy::procfs::TaskStatus;
use baton_tests::Builder;
use serde_json::Value;

#[test]
fn the_broker_keeps_what_its_file_names_and_hands_none_of_it_on() {
    let vm = Builder::release().start();
    // After an upgrade as well as before it: it needed nothing more.
    vm.assert_upgrades();
    let text = fs::read_to_string(format!("/proc/{}/status", vm.broker)).unwrap();
    let status = TaskStatus::parse(&text).unwrap();
    let policy = OwnPolicy::builtin().unwrap();
    assert_eq!(policy.compare(&status), []);
    // Root has all of it to begin with; a full set would be 41 of them.
    let named = status.effective.mask().count_ones();
    assert_eq!(usize::try_from(named).unwrap(), policy.capabilities.len());
    assert_eq!(status.bounding, status.effective);
    let limits = fs::read_to_string(format!("/proc/{}/limits", vm.broker)).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");

    let audit = vm.ask("audit").expect(0).json();
    let checks = audit.get("checks").and_then(Value::as_array).unwrap();
    let own = checks
        .iter()
        .find(|check| check.get("what").is_some_and(|what| what == "broker"))
        .unwrap();
    let found = own.get("found").and_then(Value::as_str).unwrap();
    for (name, _) in &policy.capabilities {
        assert!(found.contains(name), "{name}: {found}");
    }
}
