//! `baton policy learn`: what a policy lacks and what it has too much is found by running a guest, and nobody runs one without its
//! filters by accident.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::ffi::OsStr;

use baton_tests::Answer;
use baton_tests::Binaries;
use baton_tests::Site;
use serde_json::Value;

/// What a person asks for who wants to learn.
const LEARN: &str = "\n[learn]\nwhy = \"a test\"\n";

/// A place with a VM under this policy.
fn site(policy: &str) -> Site {
    // Each call of a worker takes a turn of another process.
    let site = Site::new(Binaries::release(), 100);
    site.write("policy.toml", policy);
    site.write("disk.img", vec![0; 1 << 20]);
    site.write(
        "vm.toml",
        format!(
            "schema = 1\nname = \"{}\"\npolicy = \"policy.toml\"\n[memory]\nsize = \"32M\"\n\
             [boot]\nkernel = \"guest.elf\"\ncmdline = \"{}\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n\
             [[disk]]\nid = \"root\"\npath = \"disk.img\"\n",
            site.name,
            baton_guest::CommandLine::new().walk_bytes(1 << 20).console().period_ms(50)
        ),
    );
    site
}

/// `baton policy learn`, with this script meanwhile.
fn learn(site: &Site, script: &str) -> Answer {
    let file = site.path("vm.toml");
    site.baton(
        ["policy", "learn"]
            .map(OsStr::new)
            .into_iter()
            .chain([file.as_os_str()])
            .chain(["--", "sh", "-ec", script].map(OsStr::new)),
    )
}

fn calls(document: &Value, list: &str) -> Vec<String> {
    let all = document[list].as_array().unwrap().iter();
    all.map(|one| one["call"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn what_a_policy_lacks_is_proposed_and_what_nothing_uses_is_named() {
    let builtin = baton_policy::BUILTIN;
    // Without these two a worker does not come to life, or does not stop for an upgrade.
    let lacking: String = builtin
        .lines()
        .filter(|line| {
            !line.contains("call = \"set_robust_list\"") && !line.contains("call = \"tgkill\"")
        })
        .map(|line| format!("{line}\n"))
        .collect();
    assert_ne!(lacking.lines().count(), builtin.lines().count());
    let site = site(&format!("{lacking}{LEARN}"));
    let baton = site.binaries().baton().display().to_string();
    let script = format!(
        "baton() {{ '{baton}' --run-dir \"$BATON_RUN_DIR\" --json \"$@\"; }}\n\
         baton upgrade \"$BATON_VM\"\n\
         if baton audit \"$BATON_VM\" > '{0}'; then exit 9; fi\n",
        site.path("audit.json").display()
    );
    let learnt = learn(&site, &script).expect(1).json();
    assert_eq!(
        calls(&learnt, "missing"),
        ["tgkill", "set_robust_list"],
        "{learnt}"
    );
    let proposal = learnt["proposal"].as_str().unwrap();
    assert!(proposal.contains("call = \"tgkill\""), "{proposal}");
    // A person gives the reasons; then it is a policy under which nothing is missing.
    let reasoned = proposal.replace("\"\"", "\"a test\"");
    site.write("policy.toml", format!("{lacking}{LEARN}{reasoned}"));
    let unused = calls(&learnt, "unused");
    // The guest discards nothing, and the host's disk is no block device.
    assert!(unused.iter().any(|call| call == "fallocate"), "{unused:?}");
    assert!(!unused.iter().any(|call| call == "execveat"), "{unused:?}");
    assert!(learnt["observed"].as_u64().unwrap() > 100, "{learnt}");

    // While it ran, the audit said what it was.
    let audit: Value =
        serde_json::from_slice(&std::fs::read(site.path("audit.json")).unwrap()).unwrap();
    let findings = audit["findings"].as_array().unwrap();
    let rules: Vec<&str> = findings
        .iter()
        .filter_map(|one| one["rule"].as_str())
        .collect();
    assert_eq!(rules, ["learn"], "{audit}");
    assert!(
        findings[0]["found"].as_str().unwrap().contains("a test"),
        "{audit}"
    );
    site.assert_nothing_left();

    learn(&site, "true").expect(0);
    site.assert_nothing_left();
}

#[test]
fn a_policy_that_learns_is_for_nothing_else_and_no_other_policy_learns() {
    let site = site(&format!("{}{LEARN}", baton_policy::BUILTIN));
    let refused = site.run("vm.toml").expect(30);
    assert!(refused.stderr.contains("learn"), "{refused:?}");
    site.assert_nothing_left();

    // A VM that runs does not become one.
    site.write("policy.toml", baton_policy::BUILTIN);
    let refused = learn(&site, "true").expect(30);
    assert!(refused.stderr.contains("does not learn"), "{refused:?}");
    site.run("vm.toml").expect(0);
    site.write("policy.toml", format!("{}{LEARN}", baton_policy::BUILTIN));
    let refused = site.baton(["upgrade", &site.name]).expect(30);
    assert!(refused.stderr.contains("deny nothing"), "{refused:?}");
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}
