//! A worker runs that a key of the policy has signed, and no other: the bytes that were signed are those that run.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::path::PathBuf;

use baton_tests::Answer;
use baton_tests::Builder;
use baton_tests::Vm;
use minisign::KeyPair;

fn keys() -> KeyPair {
    KeyPair::generate_unencrypted_keypair().unwrap()
}

/// A policy that allows the worker beside the broker, and those that this key has signed.
fn policy(key: &KeyPair) -> String {
    let (table, rest) = baton_policy::BUILTIN.split_once("\n[ids]").unwrap();
    let key = key.pk.to_base64();
    format!(
        "{table}\n[[workers.key]]\nminisign = \"{key}\"\nwhy = \"a test's build machine\"\n\n[ids]{rest}"
    )
}

/// Another build, as far as an allow-list is concerned: the same worker with more at its end.
fn build(vm: &Vm, name: &str, more: &[u8]) -> PathBuf {
    let beside = vm.site.binaries().broker().with_file_name("baton-worker");
    let mut bytes = fs::read(beside).unwrap();
    bytes.extend_from_slice(more);
    vm.site.write(name, bytes)
}

fn sign(key: &KeyPair, bytes: &[u8]) -> String {
    minisign::sign(None, &key.sk, Cursor::new(bytes), Some("a test"), None)
        .unwrap()
        .into_string()
}

fn signature_of(worker: &Path) -> PathBuf {
    let mut path = worker.as_os_str().to_owned();
    path.push(".minisig");
    path.into()
}

fn refused(answer: Answer, says: &str) {
    let answer = answer.expect(30);
    assert!(
        answer.stderr.contains("not on the policy's allow-list"),
        "{answer:?}"
    );
    assert!(answer.stderr.contains(says), "{answer:?}");
}

#[test]
fn a_worker_that_a_key_of_the_policy_has_signed_runs_and_any_other_is_refused() {
    let (ours, other) = (keys(), keys());
    let vm = Builder::release().policy(&policy(&ours)).start();
    let worker = build(&vm, "another-worker", b"another build");
    let bytes = fs::read(&worker).unwrap();
    let beside = signature_of(&worker);

    refused(vm.upgrade_to(&worker), "allow-list");
    let older = fs::read(build(&vm, "older-worker", b"an older build")).unwrap();
    let legacy = sign(&ours, &bytes);
    let line = legacy.lines().nth(1).unwrap().to_owned();
    let long = format!("{}\n{}", "x".repeat(20_000), sign(&ours, &bytes));
    for (signature, says) in [
        (
            sign(&other, &bytes),
            "by a key that the policy does not have",
        ),
        (sign(&ours, &older), "of another file, or altered"),
        (long, "more than 16384 bytes"),
        ("not a signature\n".to_owned(), "none of minisign's"),
        (
            legacy.replace(&line, &line.replacen("RU", "RW", 1)),
            "not of its hash",
        ),
    ] {
        fs::write(&beside, signature).unwrap();
        refused(vm.upgrade_to(&worker), says);
    }
    // Something that could be read for ever.
    fs::remove_file(&beside).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &beside).unwrap();
    refused(vm.upgrade_to(&worker), "no regular file");
    fs::remove_file(&beside).unwrap();

    fs::write(&beside, sign(&ours, &bytes)).unwrap();
    let mut altered = bytes.clone();
    *altered.last_mut().unwrap() ^= 1;
    fs::write(&worker, &altered).unwrap();
    refused(vm.upgrade_to(&worker), "of another file, or altered");
    assert_eq!(vm.status()["generation"], 1);

    fs::write(&worker, &bytes).unwrap();
    let before = vm.witness();
    let upgrade = vm.upgrade_to(&worker).upgrade();
    assert_eq!(upgrade.outcome, "committed", "{upgrade:?}");
    vm.assert_goes_on(&before);
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    let log = vm.audit_log();
    let begun = log.of("upgrade-begin").last().unwrap();
    let key = begun.record.pointer("/unmapped/signed_by").unwrap();
    assert_eq!(*key, ours.pk.to_base64());
}

#[test]
fn a_vm_starts_with_a_signed_worker_and_not_with_one_that_was_altered() {
    let ours = keys();
    // For its site and its binaries alone.
    let vm = Builder::release().start();
    let worker = build(&vm, "signed-worker", b"a build");
    let bytes = fs::read(&worker).unwrap();
    fs::write(signature_of(&worker), sign(&ours, &bytes)).unwrap();
    let site = &vm.site;
    site.write("signed.toml", policy(&ours));
    let text = fs::read_to_string(site.path("vm.toml")).unwrap();
    let text = text
        .replace(
            &format!("name = \"{}\"", site.name),
            &format!("name = \"{}-2\"", site.name),
        )
        .replace(
            "policy = \"default\"",
            "policy = \"signed.toml\"\nworker = \"signed-worker\"",
        )
        .replace("console.log", "console-2.log");
    site.write("signed-vm.toml", text);
    let foretold = |exit: i32| {
        let file = site.path("signed-vm.toml");
        let arguments = ["policy", "explain", "--vm", file.to_str().unwrap()];
        site.baton(arguments).expect(exit).json()["worker"].clone()
    };
    let says = foretold(0)["says"].to_string();
    assert!(says.contains("has signed it"), "{says}");
    site.run("signed-vm.toml").expect(0);
    let name = format!("{}-2", site.name);
    site.baton(["stop", "--force", &name]).expect(0);

    fs::write(&worker, [&bytes[..], b"more"].concat()).unwrap();
    assert_eq!(foretold(30)["allowed"], false);
    refused(site.run("signed-vm.toml"), "of another file, or altered");
}
