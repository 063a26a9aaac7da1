//! The systemd unit gives the broker what it needs and no more: its capabilities are those of `policy/broker.toml` and
//! suffice, and each point that `systemd-analyze security` takes off is explained.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use baton_policy::own::OwnPolicy;
use baton_tests::Binaries;
use baton_tests::Site;
use serde_json::Value;

/// The exposure that `packaging/README.md` tells, in tenths.
const EXPOSURE: u32 = 71;

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
}

/// The capabilities of the unit's bounding set.
fn capabilities() -> BTreeSet<String> {
    let unit = fs::read_to_string(packaging().join("baton@.service")).unwrap();
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .unwrap();
    line.split(' ').map(str::to_owned).collect()
}

#[test]
fn the_unit_keeps_the_capabilities_of_the_brokers_own_file() {
    let own = OwnPolicy::builtin().unwrap();
    let expected: BTreeSet<String> = own.capabilities.into_iter().map(|one| one.0).collect();
    assert_eq!(capabilities(), expected);
}

#[test]
fn they_suffice_to_run_upgrade_and_audit_a_vm() {
    let site = Site::new(Binaries::release(), 10);
    let file = format!(
        "schema = 1\nname = \"{}\"\n[cpus]\ncount = 1\n[memory]\nsize = \"64M\"\n[boot]\nkernel = \"guest.elf\"\n\
         [console]\nkind = \"file\"\npath = \"console.log\"\n",
        site.name
    );
    let file = site.write("vm.toml", file);
    let kept: Vec<String> = capabilities()
        .iter()
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let plain = site.command();
    let started = Command::new("setpriv")
        .arg("--no-new-privs")
        .arg(format!("--bounding-set=-all,{}", kept.join(",")))
        .arg(plain.get_program())
        .args(plain.get_args())
        .args(["run", "--detach"])
        .arg(file)
        .envs(
            plain
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .output()
        .unwrap();
    assert!(started.status.success(), "{started:?}");
    site.baton(["upgrade", &site.name]).expect(0);
    let audit = site.baton(["audit", &site.name]).expect(0);
    let weaker = audit.json().get("weaker").cloned();
    assert_eq!(weaker, Some(Value::Array(Vec::new())), "{audit:?}");
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}

#[test]
fn each_point_that_the_unit_loses_is_explained() {
    let unit = packaging().join("baton@.service");
    let analyse = |arguments: &[&str]| {
        Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .args(arguments)
            .arg(&unit)
            .output()
            .expect("systemd-analyze, of Debian's package systemd")
    };
    // Exits with an error when the exposure, in tenths, is above the threshold.
    let judged = analyse(&[&format!("--threshold={EXPOSURE}")]);
    assert!(judged.status.success(), "{judged:?}");

    let report = analyse(&["--json=short"]);
    let rows: Vec<Value> = serde_json::from_slice(&report.stdout).unwrap();
    let text = fs::read_to_string(packaging().join("README.md")).unwrap();
    let explained: BTreeSet<&str> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.ends_with('='))
        .collect();
    let lost: BTreeSet<String> = rows
        .iter()
        .filter(|row| row.get("exposure").is_some_and(Value::is_string))
        .filter_map(|row| row.get("name")?.as_str())
        // `User=/DynamicUser=`, `RestrictNamespaces=~user`: the first option.
        .filter_map(|name| Some(format!("{}=", name.split_once('=')?.0)))
        .collect();
    let lost: BTreeSet<&str> = lost.iter().map(String::as_str).collect();
    assert!(lost.len() > 10, "{lost:?}");
    let unexplained: Vec<_> = lost.difference(&explained).collect();
    assert!(
        unexplained.is_empty(),
        "not in packaging/README.md: {unexplained:?}"
    );
    let kept: Vec<_> = explained
        .difference(&lost)
        .filter(|name| **name != "ReadWritePaths=")
        .collect();
    assert!(kept.is_empty(), "explained, but not lost: {kept:?}");
}
