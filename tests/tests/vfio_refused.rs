//! No guest has a PCI device of the host that policy does not name, and what cannot be done with one is refused by name, before
//! anything is opened. A host that has such a device is `tests/linux/vfio.sh`'s.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;

use baton_tests::Binaries;
use baton_tests::Site;

/// A function of the last device of the last bus of the last domain: no host's.
const NOWHERE: &str = "ffff:ff:1f.7";

/// A VM file under this policy, with a device of the host and these further lines of `[memory]`.
fn file(site: &Site, policy: &str, memory: &str) {
    let file = format!(
        "schema = 1\nname = \"{}\"\npolicy = \"{policy}\"\n[memory]\nsize = \"64M\"\n{memory}\n[boot]\n\
         kernel = \"guest.elf\"\n[[vfio]]\nid = \"nic\"\ndevice = \"{NOWHERE}\"\n",
        site.name
    );
    site.write("vm.toml", file);
}

fn refusal(site: &Site, code: i32) -> String {
    let refusal = site.run("vm.toml").expect(code);
    refusal.stdout + &refusal.stderr
}

/// The built-in policy with these paths of the host's devices.
fn granting(site: &Site, paths: &str) {
    let policy = fs::read_to_string(site.write_policy(&[])).unwrap();
    let granted = policy.replace("\npaths = []\n", &format!("\npaths = [{paths}]\n"));
    assert_ne!(granted, policy, "the built-in policy grants none");
    site.write("policy.toml", granted);
}

#[test]
fn a_device_is_granted_by_its_address_alone() {
    let site = Site::new(Binaries::release(), 10);
    file(&site, "default", "");
    let said = refusal(&site, 30);
    assert!(
        said.contains(&format!("does not grant the host's PCI device {NOWHERE}")),
        "{said}"
    );
    assert!(said.contains("vfio-device"), "{said}");

    file(&site, "policy.toml", "");
    granting(
        &site,
        "\"/sys/bus/pci/devices/ffff:ff:1f.6\", \"/sys/bus/pci/devices/0000:*\"",
    );
    assert!(refusal(&site, 30).contains("does not grant"));
    granting(&site, "\"/sys/bus/pci/devices/ffff:ff:1f.*\"");
    let vm = site.path("vm.toml");
    let arguments = ["policy", "explain", "--vm"].map(std::ffi::OsStr::new);
    let foretold = site.baton(arguments.into_iter().chain([vm.as_os_str()]));
    let foretold = foretold.expect(3).json().to_string();
    assert!(
        foretold.contains("the host has no such device"),
        "{foretold}"
    );
    let said = refusal(&site, 3);
    assert!(
        said.contains(&format!("vfio nic: {NOWHERE}: the host has no such device")),
        "{said}"
    );
    site.assert_nothing_left();
}

#[test]
fn what_does_not_go_with_pinned_memory_is_refused() {
    let site = Site::new(Binaries::release(), 10);
    for (memory, expected) in [
        ("balloon = true", "vfio with memory.balloon"),
        ("share = false", "vfio with memory.share = false"),
    ] {
        file(&site, "default", memory);
        let said = refusal(&site, 3);
        assert!(said.contains(expected), "{expected}: {said}");
    }
    site.assert_nothing_left();
}

#[test]
fn such_a_guest_stays_with_its_broker() {
    let site = Site::new(Binaries::release(), 10);
    file(&site, "default", "");
    let (cpr, vm) = (site.path("cpr.sock"), site.path("vm.toml"));
    let cpr = format!(
        "{{\"channel-type\": \"cpr\", \"addr\": {{\"transport\": \"socket\", \"type\": \"unix\", \"path\": {cpr:?}}}}}"
    );
    for incoming in [&[&*cpr, "defer"][..], &["file:/var/lib/baton/state"]] {
        let mut arguments = vec![
            "run".to_owned(),
            vm.display().to_string(),
            "--detach".to_owned(),
        ];
        for one in incoming {
            arguments.extend(["--incoming".to_owned(), (*one).to_owned()]);
        }
        let refusal = site.baton(&arguments).expect(3);
        let said = refusal.stdout + &refusal.stderr;
        assert!(said.contains("stays with its broker"), "{said}");
    }
    site.assert_nothing_left();
}
