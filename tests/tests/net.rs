//! A network interface keeps its wire, its tap and its grant, whatever happens to the workers.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use baton_guest::CommandLine;
use baton_guest::layout;
use baton_tests::Builder;
use baton_tests::Vm;
use baton_tests::Wire;
use baton_tests::until;

/// A tap of this test's own.
fn tap() -> String {
    format!("be{}", std::process::id())
}

fn busy(lines: &str) -> (Vm, Wire) {
    let tap = tap();
    let vm = Builder::release()
        .line(CommandLine::new().net_rest().console().period_ms(50))
        .net(&tap, lines)
        .start();
    let wire = Wire::new(&tap);
    vm.ram.mail(layout::COMMAND_NET_WORK);
    (vm, wire)
}

#[test]
fn every_frame_arrives_once_over_twenty_upgrades() {
    let (vm, wire) = busy("queues = 2");
    let mut received = 0;
    for _ in 0..20 {
        received = vm
            .until_net("frames", |net| net.received > received + 100)
            .received;
        vm.assert_upgrades();
    }
    vm.until_net("frames", |net| net.received > received + 100);
    vm.assert_frames_arrived(&wire);
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let descriptors = audit["descriptors"].as_array().unwrap();
    let taps = descriptors.iter().filter(|one| {
        let grant = one["grant"].as_str().unwrap_or_default();
        grant.starts_with("net#")
    });
    assert_eq!(taps.count(), 2, "{audit}");
}

#[test]
fn every_frame_arrives_once_over_transfers_and_the_tap_stays_one_vms_alone() {
    let (mut vm, wire) = busy("queues = 2");
    let mut received = 0;
    for _ in 0..3 {
        received = vm
            .until_net("frames", |net| net.received > received + 100)
            .received;
        vm.assert_transfers();
        // The brokers that had it are gone by now.
        assert_taken(&vm);
    }
    vm.until_net("frames", |net| net.received > received + 100);
    vm.assert_frames_arrived(&wire);
    let place = format!("/sys/class/net/{}", tap());
    vm.end().expect(0);
    until("the tap is gone", || {
        (!std::fs::exists(&place).unwrap()).then_some(())
    });
}

#[test]
fn a_tap_is_one_vms_alone_and_gone_with_it() {
    assert_alone("");
}

/// The kernel would let another VM have some of its queues.
#[test]
fn a_tap_of_several_queues_is_one_vms_alone_too() {
    assert_alone("queues = 2");
}

fn assert_alone(lines: &str) {
    let (vm, wire) = busy(lines);
    assert_taken(&vm);
    vm.assert_upgrades();
    vm.assert_frames_arrived(&wire);
    let place = format!("/sys/class/net/{}", tap());
    assert!(std::fs::exists(&place).unwrap());
    vm.end().expect(0);
    until("the tap is gone", || {
        (!std::fs::exists(&place).unwrap()).then_some(())
    });
}

/// Another VM does not get the tap that this one has.
fn assert_taken(vm: &Vm) {
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = text.replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1);
    vm.site.write("other.toml", other);
    let refusal = vm.site.run("other.toml").expect(3);
    let said = refusal.stdout + &refusal.stderr;
    assert!(
        said.contains("network interface net0") && said.contains("a tap belongs to one VM"),
        "{said}"
    );
}

#[test]
fn a_tap_that_policy_does_not_grant_is_not_made() {
    let (vm, _wire) = busy("");
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let granted = std::fs::read_to_string(&policy).unwrap();
    let narrowed = granted.replacen(
        "\"/sys/class/net/*\", \"/dev/net/tun\"",
        "\"/sys/class/net/lan*\"",
        1,
    );
    assert_ne!(granted, narrowed);
    std::fs::write(&policy, narrowed).unwrap();
    let policy = format!("{:?}", policy.display().to_string());
    for (name, said) in [
        (tap(), format!("from /sys/class/net/{}", tap())),
        ("no-such-tap".to_owned(), "from /dev/net/tun".to_owned()),
    ] {
        let other = text
            .replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1)
            .replacen("\"default\"", &policy, 1)
            .replacen(&tap(), &name, 1);
        vm.site.write("other.toml", other);
        let refusal = vm.site.run("other.toml").expect(30);
        let words = refusal.stdout + &refusal.stderr;
        assert!(
            words.contains("does not grant the network interface net0"),
            "{words}"
        );
        assert!(words.contains(&said), "{words}");
    }
    assert!(!std::fs::exists("/sys/class/net/no-such-tap").unwrap());
}
