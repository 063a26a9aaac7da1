//! `baton policy`: exit statuses and documents.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::canned::*;

/// A copy of the built-in policy with `from` replaced.
fn policy(dir: &Path, name: &str, from: &str, to: &str) -> String {
    let text = baton_policy::BUILTIN.replacen(from, to, 1);
    assert!(
        from == to || text != baton_policy::BUILTIN,
        "{from:?} is not there"
    );
    let path = write(dir, name, text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_wider_policy_is_a_finding_and_a_narrower_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let wider = policy(dir.path(), "wider.toml", "headroom = 16", "headroom = 32");
    let output = run(dir.path(), &["policy", "diff", "default", &wider, "--json"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert_eq!(document(&output)["widens"], true);
    assert_eq!(document(&output)["changes"][0]["direction"], "widens");
    let output = run(dir.path(), &["policy", "diff", &wider, "default"]);
    assert_eq!(code(&output), 0);
    assert!(
        stdout(&output).starts_with("narrows"),
        "{}",
        stdout(&output)
    );
    let output = run(dir.path(), &["policy", "diff", "default", "default"]);
    assert_eq!((code(&output), stdout(&output)), (0, String::new()));
}

#[test]
fn a_policy_that_is_not_fit_says_where_and_why() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(code(&run(dir.path(), &["policy", "check"])), 0);
    let bad = policy(dir.path(), "bad.toml", "floor_abi = 6", "floor_abi = 5");
    let output = run(dir.path(), &["policy", "check", &bad]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("bad.toml"), "{}", stderr(&output));
    assert!(stderr(&output).contains("floor_abi"), "{}", stderr(&output));
}

#[test]
fn what_could_be_left_out_is_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(code(&run(dir.path(), &["policy", "lint"])), 0);
    let paths = [
        "paths = [\"/dev/kvm\"]",
        "paths = [\"/dev/kvm\", \"/dev/*\"]",
    ];
    let twice = policy(dir.path(), "twice.toml", paths[0], paths[1]);
    let output = run(dir.path(), &["policy", "lint", &twice]);
    assert_eq!(code(&output), 1);
    assert!(stdout(&output).contains("/dev/kvm"), "{}", stdout(&output));
    let output = run(dir.path(), &["policy", "lint", &twice, "--json"]);
    let lints = document(&output)["lints"].as_array().unwrap().len();
    assert_eq!((code(&output), lints), (1, 1));
    // A rule that no test of Baton's exercises, nor this workload.
    let rule = "{ call = \"brk\", why = \"the allocator\" },";
    let more = format!("{rule}\n{{ call = \"uname\", why = \"a test\" }},");
    let unexercised = policy(dir.path(), "unexercised.toml", rule, &more);
    let output = run(dir.path(), &["policy", "lint", &unexercised]);
    assert_eq!((code(&output), stdout(&output).lines().count()), (1, 4));
    assert!(
        stdout(&output).contains("uname, in io: no test exercises it"),
        "{}",
        stdout(&output)
    );
    let recording = write(
        dir.path(),
        "web1.jsonl",
        "{\"role\":\"io\",\"call\":63,\"arguments\":[0,0,0,0,0,0]}\n",
    );
    let recording = recording.to_str().unwrap();
    let arguments = ["policy", "lint", &unexercised, "--exercised", recording];
    let found = stdout(&run(dir.path(), &arguments));
    assert!(
        found.contains("uname, in vcpu") && !found.contains("uname, in io"),
        "{found}"
    );
    let kept = stdout(&run(dir.path(), &["policy", "lint", "--kept"]));
    assert!(
        kept.contains("restart_syscall, in io: no test exercises it; it stays because"),
        "{kept}"
    );
    let output = run(dir.path(), &["policy", "lint", "--exercised", &unexercised]);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
}

#[test]
fn one_call_is_explained_and_an_unknown_one_is_a_wrong_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["policy", "explain", "--syscall", "openat", "--json"];
    assert_eq!(document(&run(dir.path(), &arguments))["call"], "openat");
    for (call, says) in [
        (
            "openat",
            "openat (257): nobody may; refused by an error in build and by the filter of control, vcpu, io.",
        ),
        (
            "socket",
            "socket (41): nobody may; refused by the filter of build, control, vcpu, io.",
        ),
        (
            "preadv",
            "preadv (295): build, control, io may; refused by the filter of vcpu.",
        ),
        ("read", "read (0): every thread may."),
    ] {
        // Both names of the option.
        for option in ["--syscall", "--call"] {
            let output = run(dir.path(), &["policy", "explain", option, call]);
            assert_eq!(stdout(&output).lines().next(), Some(says));
        }
    }
    let output = run(dir.path(), &["policy", "explain", "--syscall", "opena"]);
    assert_eq!(code(&output), 2);
    let output = run(dir.path(), &["policy", "explain", "--json"]);
    assert_eq!(document(&output)["policy"], "default");
}

#[test]
fn a_dumped_filter_is_what_the_policy_compiles_to() {
    let dir = tempfile::tempdir().unwrap();
    let compiled = baton_policy::Policy::builtin().unwrap().compile().unwrap();
    for filter in compiled.filters() {
        let (role, index) = (filter.role.to_string(), filter.index.to_string());
        let arguments = [
            "policy", "dump", "--format", "bpf", "--role", &role, "--index", &index,
        ];
        let output = run(dir.path(), &arguments);
        assert_eq!(output.stdout, filter.program.as_bytes(), "{role} {index}");
    }
    for wrong in [
        &["--role", "nobody"][..],
        &[],
        &["--role", "vcpu", "--index", "7"],
    ] {
        let output = run(
            dir.path(),
            &[&["policy", "dump", "--format", "bpf"], wrong].concat(),
        );
        assert_eq!(code(&output), 2);
        assert!(
            stderr(&output).contains("--role vcpu --index 0"),
            "{}",
            stderr(&output)
        );
    }
    let output = run(dir.path(), &["policy", "dump", "--format", "json"]);
    assert_eq!(
        document(&output)["filters_digest"],
        compiled.digest().to_string()
    );
    assert!(stdout(&run(dir.path(), &["policy", "dump"])).contains("; vcpu, filter 0"));
    let listing = stdout(&run(dir.path(), &["policy", "dump", "--format", "disasm"]));
    assert!(listing.contains("vcpu, filter 0\n line  CODE  JT   JF      K\n"));
    assert!(listing.contains("return KILL_PROCESS"));
}
