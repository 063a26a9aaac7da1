//! A disk keeps its work, its lock and its grant, whatever happens to the workers.

use baton_guest::CommandLine;
use baton_tests::Builder;

fn busy() -> Builder {
    Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .disk("data", 4, "")
}

#[test]
fn every_request_is_completed_once_over_twenty_upgrades() {
    let vm = busy().start();
    let mut done = 0;
    for _ in 0..20 {
        let before = vm.until_disk("requests", |disk| disk.done > done + 100);
        done = before.done;
        vm.assert_upgrades();
        vm.until_disk("interrupts", |disk| disk.interrupts > before.interrupts);
    }
    vm.until_disk("requests", |disk| disk.done > done + 100);
    vm.assert_disk_is_whole("data.img");
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    for (field, name) in [
        ("threads", "io"),
        ("descriptors", "disk#1"),
        ("descriptors", "kick#32"),
    ] {
        let listed = audit[field].as_array().unwrap();
        let is = |one: &serde_json::Value| one["role"] == name || one["grant"] == name;
        assert!(listed.iter().any(is), "{name}: {audit}");
    }
}

#[test]
fn a_writable_disk_is_one_vms_alone_until_that_ends() {
    let vm = busy().start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let other = text.replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1);
    vm.site.write("other.toml", other);
    for _ in 0..2 {
        let refusal = vm.site.run("other.toml").expect(3);
        let said = refusal.stdout + &refusal.stderr;
        assert!(
            said.contains("disk data") && said.contains("is locked"),
            "{said}"
        );
        vm.assert_upgrades();
    }
    vm.assert_disk_is_whole("data.img");
    vm.end().expect(0);
    vm.site.run("other.toml").expect(0);
    let other = format!("{}-other", vm.site.name);
    vm.site.baton(["stop", &other, "--force"]).expect(0);
}

#[test]
fn a_disk_that_policy_does_not_grant_is_refused() {
    let vm = busy().start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let granted = std::fs::read_to_string(&policy).unwrap();
    let (before, disk) = granted.split_once("name = \"disk\"").unwrap();
    let disk = disk.replacen("\"/**\"", "\"/srv/disks/**\"", 1);
    std::fs::write(&policy, format!("{before}name = \"disk\"{disk}")).unwrap();
    let other = text
        .replacen(&vm.site.name, &format!("{}-other", vm.site.name), 1)
        .replacen(
            "\"default\"",
            &format!("{:?}", policy.display().to_string()),
            1,
        );
    vm.site.write("other.toml", other);
    let refusal = vm.site.run("other.toml").expect(30);
    let said = refusal.stdout + &refusal.stderr;
    assert!(said.contains("does not grant the disk data"), "{said}");
}
