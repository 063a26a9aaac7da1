//! A worker's build says what it needs, and is not executed to find out: an upgrade to one that needs more than the running
//! one is refused with the difference, unless policy approves of that build.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use baton_tests::Builder;
use baton_tests::Vm;
use serde_json::Value;
use sha2::Digest;

/// A copy of a worker in which some bytes are others, as many.
fn edited(worker: &Path, from: &[u8], to: &[u8], copy: PathBuf) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(worker).unwrap();
    let places: Vec<usize> = bytes
        .windows(from.len())
        .enumerate()
        .filter(|(_, window)| *window == from)
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "{} has no {from:?}", worker.display());
    for at in places {
        bytes
            .get_mut(at..at + to.len())
            .unwrap()
            .copy_from_slice(to);
    }
    fs::write(&copy, bytes).unwrap();
    copy
}

/// A build that needs more descriptors, beside the VM whose policy is to allow it.
fn needy(vm: &Vm) -> PathBuf {
    edited(
        &vm.site.binaries().worker(),
        b"nofile = 1024 ",
        b"nofile = 2048 ",
        vm.site.path("needy-worker"),
    )
}

fn digest(file: &Path) -> String {
    format!("{:x}", sha2::Sha256::digest(fs::read(file).unwrap()))
}

/// A VM under a policy file that says nothing but what the built-in one says.
fn vm() -> Vm {
    Builder::release().policy(baton_policy::BUILTIN).start()
}

fn allow(vm: &Vm, worker: &Path, more: &str) {
    let allowed = format!("digests = [\"{}\"]", digest(worker));
    let text = baton_policy::BUILTIN.replace("digests = []", &allowed);
    vm.site.write("policy.toml", text + more);
}

#[test]
fn a_build_that_needs_more_is_refused_with_the_difference() {
    let vm = vm();
    let (needy, old, before) = (needy(&vm), vm.worker(), vm.witness());
    allow(&vm, &needy, "");
    let refused = vm.upgrade_to(&needy).expect(30);
    let words = "the build's needs: widens rlimits: nofile 2048 instead of 1024";
    assert!(refused.stdout.contains(words), "{refused:?}");
    assert_eq!(vm.worker(), old);
    vm.assert_goes_on(&before);
    assert!(
        vm.audit_log()
            .0
            .iter()
            .any(|record| record.event == "upgrade-refused")
    );

    // The same by hand, of binaries.
    let words = ["policy", "diff"].map(OsStr::new);
    let worker = vm.site.binaries().worker();
    let diff = |old: &Path, new: &Path| {
        let files = [old.as_os_str().to_owned(), new.as_os_str().to_owned()];
        vm.site
            .baton(words.into_iter().map(OsStr::to_owned).chain(files))
    };
    diff(&worker, &needy).expect(1);
    diff(&needy, &worker).expect(0);
    diff(&worker, Path::new("default")).expect(0);
}

#[test]
fn policy_may_approve_of_one_build_and_the_record_says_so() {
    let vm = vm();
    let needy = needy(&vm);
    let approval = |build: &str| {
        format!("\n[[approve]]\nworker = \"sha256:{build}\"\nwhy = \"tried for a week\"\n")
    };
    allow(&vm, &needy, &approval(&"0".repeat(64)));
    vm.upgrade_to(&needy).expect(30);
    allow(&vm, &needy, &approval(&digest(&needy)));
    assert_eq!(vm.upgrade_to(&needy).upgrade().outcome, "committed");
    let log = vm.audit_log();
    let begin = log
        .0
        .iter()
        .rfind(|record| record.event == "upgrade-begin")
        .unwrap();
    let field = |name: &str| begin.fields.get(name).and_then(Value::as_str).unwrap();
    assert_eq!(field("approved"), "tried for a week");
    let by = |pointer: &str| begin.record.pointer(pointer).and_then(Value::as_str);
    let policy = vm.site.path("policy.toml").display().to_string();
    assert_eq!(by("/unmapped/approved_by/policy"), Some(&*policy));
    assert!(by("/unmapped/approved_by/policy_digest").is_some());
    assert!(field("widens").contains("nofile 2048"), "{begin:?}");
    // Back to the build that needs less: nothing to approve of.
    assert_eq!(vm.upgrade().outcome, "committed");
}

#[test]
fn a_build_that_does_not_say_what_it_needs_is_refused() {
    let vm = vm();
    let worker = vm.site.binaries().worker();
    let cases = [
        (
            &b"Baton\0\0\0baton-worker "[..],
            &b"Bator\0\0\0baton-worker "[..],
            "has no note",
        ),
        (
            b"nofile = 1024 ",
            b"nofile = many ",
            "the policy that it declares",
        ),
    ];
    for (number, (from, to, words)) in cases.into_iter().enumerate() {
        let copy = vm.site.path(&format!("worker-{number}"));
        let silent = edited(&worker, from, to, copy);
        allow(&vm, &silent, "");
        let refused = vm.upgrade_to(&silent).expect(3);
        assert!(refused.stdout.contains(words), "{refused:?}");
    }
    allow(&vm, &worker, "");
    vm.assert_upgrades();
}

#[test]
fn who_asks_may_approve_and_every_record_of_the_upgrade_names_them() {
    let vm = vm();
    let needy = needy(&vm);
    allow(&vm, &needy, "");
    let with_approval = [
        OsStr::new("--worker"),
        needy.as_os_str(),
        OsStr::new("--approve"),
        OsStr::new("seen by two of us"),
    ];
    vm.upgrade_to(&needy).expect(30);
    let answer = vm.baton("upgrade", with_approval);
    assert_eq!(answer.upgrade().outcome, "committed");
    let log = vm.audit_log();
    let begin = log.of("upgrade-begin").next().unwrap();
    let text = |pointer: &str| begin.record.pointer(pointer).and_then(Value::as_str);
    assert_eq!(text("/unmapped/approved"), Some("seen by two of us"));
    assert_eq!(text("/unmapped/approved_by/user/uid"), Some("0"));
    let process = begin.record.pointer("/unmapped/approved_by/process/pid");
    assert_eq!(process, begin.record.pointer("/actor/process/pid"));
    // The terminal record says who asked, too.
    let end = log.of("upgrade").next().unwrap();
    assert_eq!(end.record.pointer("/actor"), begin.record.pointer("/actor"));
    let shown = vm.site.baton(["log", "show", &vm.site.name]).expect(0);
    assert!(shown.stdout.contains("seen by two of us"), "{shown:?}");

    // What widens nothing takes no approval, and its record has none.
    let worker = vm.site.binaries().worker();
    allow(&vm, &worker, "");
    let answer = vm.baton("upgrade", ["--approve", "for nothing"]);
    assert_eq!(answer.upgrade().outcome, "committed");
    let log = vm.audit_log();
    let begin = log.of("upgrade-begin").last().unwrap();
    assert_eq!(
        begin.record.pointer("/unmapped/approved"),
        Some(&Value::Null)
    );
}
