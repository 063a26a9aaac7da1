//! Network interfaces come and go while the guest runs, on taps that are there.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot do its work fails"
)]

use std::process::Command;

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::Wire;
use baton_tests::until;
use serde_json::Value;
use serde_json::json;

/// A tap of this test's own, which stays though nobody has it open.
struct Tap(String);

impl Tap {
    fn new(tag: char, more: &[&str]) -> Self {
        let name = format!("bn{tag}{}", std::process::id());
        ip(&[&["tuntap", "add", "dev", &name, "mode", "tap"], more].concat());
        ip(&["link", "set", &name, "up"]);
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "delete", &self.0])
            .status();
    }
}

fn ip(arguments: &[&str]) {
    let done = Command::new("ip").args(arguments).status();
    assert!(done.unwrap().success(), "ip {arguments:?}");
}

/// A guest that waits for a network interface, under the policy of this text.
fn waiting(policy: &str) -> Vm {
    let line = CommandLine::new()
        .net_rest()
        .hotplug()
        .console()
        .period_ms(50);
    let vm = Builder::release().policy(policy).line(line).start();
    vm.until_net("no interface", |net| net.state == DriverState::Absent);
    vm
}

fn netdev(id: &str, tap: &Tap) -> Value {
    json!({"type": "tap", "id": id, "ifname": tap.0, "script": "no", "downscript": "no"})
}

fn device(id: &str, netdev: &str) -> Value {
    json!({"driver": "virtio-net-pci", "id": id, "netdev": netdev, "mac": "52:54:00:00:00:05"})
}

/// Frames go both ways.
fn assert_works(vm: &Vm) {
    let received = vm.ram.net().received;
    vm.until_net("frames", |net| net.received > received + 100);
}

/// The descriptors of the worker's taps, as a proven audit names them.
fn audited(vm: &Vm) -> Vec<String> {
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let descriptors = audit["descriptors"].as_array().unwrap();
    let grants = descriptors.iter().filter_map(|one| one["grant"].as_str());
    let taps = grants.filter(|grant| grant.starts_with("net#"));
    taps.map(str::to_owned).collect()
}

fn await_end(qmp: &mut Qmp, id: &str) {
    until("DEVICE_DELETED", || {
        qmp.event_names_now();
        let data = json!({"device": id, "path": format!("/machine/peripheral/{id}")});
        let mut events = qmp.events.iter();
        let is = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"] == data;
        events.any(is).then_some(())
    });
    qmp.events.clear();
}

#[test]
fn an_interface_comes_works_over_upgrades_and_goes_and_another_takes_its_place() {
    let vm = waiting(baton_policy::BUILTIN);
    let mut qmp = Qmp::connect(&vm);
    for (tag, more, queues) in [('a', &[][..], 1), ('b', &["multi_queue"], 2)] {
        let tap = Tap::new(tag, more);
        let mut arguments = netdev("n", &tap);
        arguments["queues"] = queues.into();
        qmp.done("netdev_add", arguments);
        qmp.done("device_add", device("d", "n"));
        vm.until_net("an interface", |net| net.state == DriverState::Resting);
        let wire = Wire::new(&tap.0);
        vm.ram.mail(layout::COMMAND_NET_WORK);
        assert_works(&vm);
        for _ in 0..3 {
            vm.assert_upgrades();
            assert_works(&vm);
        }
        assert_eq!(audited(&vm).len(), queues);
        vm.assert_frames_arrived(&wire);

        let busy = qmp.refused("netdev_del", json!({"id": "n"}));
        assert!(busy.contains("Netdev n is in use"), "{busy}");
        qmp.done("device_del", json!({"id": "d"}));
        await_end(&mut qmp, "d");
        assert!(audited(&vm).is_empty());
        vm.assert_upgrades();
        qmp.done("netdev_del", json!({"id": "n"}));
        // Nobody has it any more.
        ip(&["link", "delete", &tap.0]);
    }
    let log = vm.audit_log();
    for event in [
        "netdev-add",
        "device-add",
        "device-deleted",
        "netdev-delete",
    ] {
        assert_eq!(log.count(event), 2, "{event}");
    }
}

#[test]
fn an_interface_that_came_goes_to_another_broker_with_its_guest() {
    let mut vm = waiting(baton_policy::BUILTIN);
    let mut qmp = Qmp::connect(&vm);
    let tap = Tap::new('a', &["multi_queue"]);
    let mut arguments = netdev("n", &tap);
    arguments["queues"] = 2.into();
    qmp.done("netdev_add", arguments);
    qmp.done("device_add", device("d", "n"));
    vm.until_net("an interface", |net| net.state == DriverState::Resting);
    let wire = Wire::new(&tap.0);
    vm.ram.mail(layout::COMMAND_NET_WORK);
    assert_works(&vm);
    // One that no device is made of would be nobody's.
    let spare = Tap::new('b', &[]);
    qmp.done("netdev_add", netdev("spare", &spare));
    let waiting = vm.wait_for_guest();
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let refusal = qmp.refused("migrate", json!({"channels": waiting.channels()}));
    let blocked =
        |qmp: &mut Qmp| qmp.returns("query-migrate", json!({}))["blocked-reasons"].clone();
    let reason = "netdev spare would be lost: no device is made of it";
    assert!(refusal.starts_with(reason), "{refusal}");
    assert_eq!(blocked(&mut qmp), json!([reason]));
    qmp.done("netdev_del", json!({"id": "spare"}));
    assert_eq!(blocked(&mut qmp), json!(null));
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "completed", "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    assert_works(&vm);
    assert_eq!(audited(&vm).len(), 2);
    vm.assert_upgrades();
    vm.assert_transfers();
    assert_works(&vm);
    vm.assert_frames_arrived(&wire);

    // The tap is this VM's alone as before, and has its name there; with its device and netdev the claim is gone.
    let mut qmp = Qmp::connect(&vm);
    let taken = qmp.refused("netdev_add", netdev("m", &tap));
    assert!(taken.contains("a tap belongs to one VM"), "{taken}");
    let busy = qmp.refused("netdev_del", json!({"id": "n"}));
    assert!(busy.contains("Netdev n is in use"), "{busy}");
    qmp.done("device_del", json!({"id": "d"}));
    await_end(&mut qmp, "d");
    assert!(audited(&vm).is_empty());
    qmp.done("netdev_del", json!({"id": "n"}));
    let mut again = netdev("m", &tap);
    again["queues"] = 2.into();
    qmp.done("netdev_add", again);
    qmp.done("netdev_del", json!({"id": "m"}));
    drop(qmp);
    vm.assert_transfers();
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_left_of_it() {
    let (tap, other) = (Tap::new('a', &[]), Tap::new('b', &[]));
    let vm = waiting(baton_policy::BUILTIN);
    let mut qmp = Qmp::connect(&vm);
    let with = |field: &str, value: Value| {
        let mut arguments = netdev("n", &tap);
        arguments[field] = value;
        arguments
    };
    for (arguments, said) in [
        (
            with("ifname", json!("no-such-tap")),
            "there is no tap no-such-tap",
        ),
        (with("ifname", json!("lo")), "it has to be a tap"),
        (with("ifname", json!("../lo")), "no interface name"),
        (with("id", json!("a b")), "no id"),
        (with("queues", json!(2)), "made with multi_queue"),
        (with("queues", json!(9)), "9 queues"),
        (with("queues", json!(-1)), "a number from 1 to 8"),
        (
            with("script", json!("/etc/qemu-ifup")),
            "'script' expects 'no'",
        ),
        (
            with("type", json!("user")),
            "'type' does not accept value 'user'",
        ),
    ] {
        let refusal = qmp.refused("netdev_add", arguments);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    qmp.done("netdev_add", netdev("n", &tap));
    for (arguments, said) in [
        (netdev("n", &other), "Duplicate ID 'n' for netdev"),
        (netdev("m", &tap), "a tap belongs to one VM"),
    ] {
        let refusal = qmp.refused("netdev_add", arguments);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    let with = |field: &str, value: Value| {
        let mut arguments = device("d", "n");
        arguments[field] = value;
        arguments
    };
    for (arguments, said) in [
        (with("netdev", json!("m")), "can't find value 'm'"),
        (
            with("mac", json!("53:54:00:00:00:01")),
            "no address of one interface",
        ),
        (
            with("drive", json!("n")),
            "Property 'virtio-net-pci.drive' not found",
        ),
        (with("id", json!("7")), "expects an identifier"),
        (
            with("addr", json!("1f")),
            "slot 31 function 0 is not available",
        ),
    ] {
        let refusal = qmp.refused("device_add", arguments);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
    assert!(audited(&vm).is_empty());
    let refusal = qmp.refused("netdev_del", json!({"id": "m"}));
    assert!(refusal.contains("Device 'm' not found"), "{refusal}");
    qmp.done("netdev_del", json!({"id": "n"}));
    vm.assert_upgrades();
}

#[test]
fn a_tap_that_policy_does_not_grant_is_not_opened() {
    let (before, net) = baton_policy::BUILTIN.split_once("name = \"net\"").unwrap();
    let net = net.replacen("/sys/class/net/*", "/sys/class/net/lan*", 1);
    let vm = waiting(&format!("{before}name = \"net\"{net}"));
    let mut qmp = Qmp::connect(&vm);
    let refusal = qmp.refused("netdev_add", netdev("n", &Tap::new('a', &[])));
    assert!(
        refusal.contains("does not grant the network interface n"),
        "{refusal}"
    );
}
