//! `baton policy explain --vm` says before a VM runs what its worker then has, and what policy would refuse.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::collections::BTreeSet;

use baton_tests::Answer;
use baton_tests::Binaries;
use baton_tests::Site;
use serde_json::Value;

/// A place with a VM of a disk, an interface to other VMs' programs, a balloon and a console in a file.
fn site() -> Site {
    let site = Site::new(Binaries::release(), 20);
    site.write("disk.img", vec![0; 1 << 20]);
    site.write("data.img", vec![0; 1 << 20]);
    site.write("policy.toml", baton_policy::BUILTIN);
    site.write(
        "vm.toml",
        format!(
            "schema = 1\nname = \"{}\"\npolicy = \"policy.toml\"\n[cpus]\ncount = 2\n[memory]\nsize = \"32M\"\nballoon = true\n\
             [boot]\nkernel = \"guest.elf\"\ncmdline = \"{}\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n\
             [[disk]]\nid = \"root\"\npath = \"disk.img\"\nqueues = 2\n\
             [[disk]]\nid = \"data\"\npath = \"data.img\"\nreadonly = true\n\
             [vsock]\ncid = 3\nsocket = \"vsock\"\n",
            site.name,
            baton_guest::CommandLine::new().walk_bytes(1 << 20).console().period_ms(50)
        ),
    );
    site
}

fn explain(site: &Site, more: &[&str]) -> Answer {
    let file = site.path("vm.toml");
    let arguments = ["policy", "explain", "--vm", file.to_str().unwrap()];
    site.baton(arguments.iter().chain(more))
}

/// Each descriptor that a worker is foretold to have, with its access.
fn foretold(document: &Value) -> BTreeSet<(String, String)> {
    let mut all = BTreeSet::new();
    for one in document["descriptors"].as_array().unwrap() {
        assert_eq!(one["verdict"], "granted", "{one}");
        // The standard streams, which the audit knows by other names.
        let standard = one["name"] == "control" || one["name"] == "log";
        if one["holder"] == "worker" && !standard {
            let (first, last) = (
                one["ids"][0].as_u64().unwrap(),
                one["ids"][1].as_u64().unwrap(),
            );
            let access = one["access"].as_str().unwrap();
            let name = one["name"].as_str().unwrap();
            all.extend((first..=last).map(|id| (format!("{name}#{id}"), access.to_owned())));
        }
    }
    all
}

#[test]
fn what_is_foretold_is_what_the_worker_then_holds() {
    let site = site();
    let said = explain(&site, &[]).expect(0).json();
    assert_eq!(said["worker"]["allowed"], true, "{said}");
    let foretold = foretold(&said);
    site.run("vm.toml").expect(0);
    let audit = site.baton(["audit", &site.name]).expect(0).json();
    // What has a grant is called by it; what the worker made itself is told in words.
    let named = |one: &&Value| one["grant"].as_str().unwrap().contains('#');
    let mut held: BTreeSet<(String, String)> = audit["descriptors"]
        .as_array()
        .unwrap()
        .iter()
        .filter(named)
        .map(|one| {
            let text = |field: &str| one[field].as_str().unwrap().to_owned();
            (text("grant"), text("access"))
        })
        .collect();
    // Closed once the VM is made of it.
    held.insert(("kvm#0".to_owned(), "read-write".to_owned()));
    assert_eq!(held, foretold);
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}

#[test]
fn what_policy_would_refuse_or_is_not_there_is_said_and_nothing_is_made() {
    let site = site();
    explain(&site, &[]).expect(0);
    assert!(!site.path("vsock").exists() && !site.path("console.log").exists());
    let builtin = baton_policy::BUILTIN;
    let elsewhere = builtin.replace(
        "count = 64\npaths = [\"/**\"]\nwhy = \"a disk",
        "count = 64\npaths = [\"/srv/**\"]\nwhy = \"a disk",
    );
    assert_ne!(elsewhere, builtin);
    let policy = site.write("narrow.toml", &elsewhere);
    let refused = explain(&site, &[policy.to_str().unwrap()])
        .expect(30)
        .json();
    let disk = &refused["descriptors"].as_array().unwrap().iter();
    let disk = disk.clone().find(|one| one["name"] == "disk").unwrap();
    assert_eq!(disk["verdict"], "refused", "{disk}");
    // As the start says.
    site.write("policy.toml", &elsewhere);
    site.run("vm.toml").expect(30);
    // A worker that is not on the allow-list.
    let none = builtin.replace("beside_broker = true ", "beside_broker = false ");
    site.write("policy.toml", &none);
    let refused = explain(&site, &[]).expect(30).json();
    assert_eq!(refused["worker"]["allowed"], false, "{refused}");
    site.run("vm.toml").expect(30);
    // A disk that is not there.
    site.write("policy.toml", builtin);
    std::fs::remove_file(site.path("data.img")).unwrap();
    let unfit = explain(&site, &[]).expect(3).json();
    let unfit = unfit["descriptors"].as_array().unwrap();
    let disks: Vec<&str> = unfit
        .iter()
        .filter(|one| one["name"] == "disk")
        .map(|one| one["verdict"].as_str().unwrap())
        .collect();
    assert_eq!(disks, ["granted", "unfit"]);
    // A VM file that is wrong is told of as a start tells of it; one in the place of a policy is recognised.
    let file = site.path("vm.toml");
    let mistaken = site
        .baton(["policy", "explain", file.to_str().unwrap()])
        .expect(3);
    assert!(mistaken.stderr.contains("explain --vm"), "{mistaken:?}");
    site.write("vm.toml", "schema = 2\n");
    let wrong = explain(&site, &[]).expect(3);
    assert!(wrong.stderr.contains("schema 2"), "{wrong:?}");
    site.assert_nothing_left();
}
