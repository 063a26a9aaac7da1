//! What people get wrong is refused with the exit status that scripts rely on, says what was found, and leaves nothing: no
//! process, no cgroup, no directory, no half-started VM.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use baton_tests::Answer;
use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Site;

const UNFIT: i32 = 3;
const REFUSED: i32 = 30;

/// A VM file that would start.
fn good(site: &Site) -> String {
    format!(
        "schema = 1\nname = \"{}\"\n[memory]\nsize = \"64M\"\n[boot]\nkernel = \"guest.elf\"\n",
        site.name
    )
}

/// Runs the good file with one thing in it changed; it has to be refused in these words.
fn refused(from: &str, to: &str, code: i32, words: &[&str]) -> (Site, Answer) {
    let site = Site::new(Binaries::release(), 10);
    let file = good(&site);
    assert!(file.contains(from), "nothing to change");
    site.write("vm.toml", file.replacen(from, to, 1));
    let answer = site.run("vm.toml").expect(code);
    for word in words {
        assert!(answer.stderr.contains(word), "no {word:?} in {answer:#?}");
    }
    let document = answer.json();
    assert_eq!(document["error"]["code"], code, "{document}");
    site.assert_nothing_left();
    (site, answer)
}

#[test]
fn a_file_without_faults_starts() {
    let site = Site::new(Binaries::release(), 10);
    site.write("vm.toml", good(&site));
    // Twice: with `stop` the name is free again.
    for _ in 0..2 {
        site.run("vm.toml").expect(0);
        site.baton(["stop", "--force", &site.name]).expect(0);
    }
    site.assert_nothing_left();
}

#[test]
fn an_unknown_field_is_named_with_its_line() {
    refused("size =", "siez =", UNFIT, &["vm.toml", "line 4", "siez"]);
    refused("[boot]", "[turbo]\non = true\n[boot]", UNFIT, &["turbo"]);
}

#[test]
fn a_size_that_is_no_size_or_out_of_bounds() {
    refused("\"64M\"", "\"64\"", UNFIT, &["line 4", "is no size"]);
    refused("\"64M\"", "\"1M\"", UNFIT, &["16M to 16G"]);
    refused("\"64M\"", "\"9999999G\"", UNFIT, &["16M to 16G"]);
}

#[test]
fn a_size_that_is_no_multiple_of_the_page_size() {
    refused("\"64M\"", "\"65537K\"", UNFIT, &["no multiple"]);
    refused(
        "\"64M\"",
        "\"63M\"\npages = \"2M\"",
        UNFIT,
        &["no multiple"],
    );
}

#[test]
fn a_kernel_that_is_not_there() {
    refused(
        "guest.elf",
        "nowhere.elf",
        UNFIT,
        &["nowhere.elf", "boot.kernel"],
    );
}

#[test]
fn a_kernel_that_is_no_kernel() {
    refused("guest.elf", "vm.toml", UNFIT, &["kernel"]);
}

#[test]
fn a_kernel_that_is_cut_short() {
    let site = Site::new(Binaries::release(), 10);
    for length in [16, 64, 200, baton_guest::ELF.len() / 2] {
        site.write("cut.elf", &baton_guest::ELF[..length]);
        site.write("vm.toml", good(&site).replace("guest.elf", "cut.elf"));
        site.run("vm.toml").expect(UNFIT);
        site.assert_nothing_left();
    }
}

#[test]
fn a_kernel_that_is_a_directory() {
    refused(
        "guest.elf",
        ".",
        UNFIT,
        &["expected Image", "found Directory"],
    );
}

#[test]
fn an_initrd_that_does_not_fit() {
    let site = Site::new(Binaries::release(), 10);
    let initrd = std::fs::File::create(site.path("initrd")).unwrap();
    initrd.set_len(65 << 20).unwrap();
    let file = good(&site).replace("\"guest.elf\"\n", "\"guest.elf\"\ninitrd = \"initrd\"\n");
    site.write("vm.toml", file);
    let answer = site.run("vm.toml").expect(UNFIT);
    assert!(answer.stderr.contains("initrd"), "{answer:?}");
    site.assert_nothing_left();
}

#[test]
fn a_name_that_leads_elsewhere() {
    let site = Site::new(Binaries::release(), 10);
    for name in ["../elsewhere", "", ".hidden", "a/b"] {
        site.write("vm.toml", good(&site).replace(&site.name, name));
        let answer = site.run("vm.toml").expect(UNFIT);
        assert!(answer.stderr.contains("a name has"), "{answer:?}");
        site.assert_nothing_left();
    }
}

#[test]
fn a_worker_that_policy_does_not_list() {
    let site = Site::new(Binaries::release(), 10);
    site.write("vm.toml", good(&site));
    let other = Binaries::with_fail_points().worker();
    let run = [
        "run",
        "--detach",
        "--worker",
        other.to_str().unwrap(),
        site.path("vm.toml").to_str().unwrap(),
    ]
    .map(str::to_owned);
    let answer = site.baton(run).expect(REFUSED);
    assert!(answer.stderr.contains("allow-list"), "{answer:?}");
    site.assert_nothing_left();
}

#[test]
fn a_policy_that_others_can_write() {
    let site = Site::new(Binaries::release(), 10);
    let policy = site.write_policy(&[]);
    let file = format!(
        "policy = {:?}\n{}",
        policy.display().to_string(),
        good(&site)
    );
    site.write("vm.toml", file);
    std::fs::set_permissions(&policy, PermissionsExt::from_mode(0o666)).unwrap();
    let answer = site.run("vm.toml").expect(UNFIT);
    assert!(
        answer.stderr.contains("must not be able to write"),
        "{answer:?}"
    );
    site.assert_nothing_left();
}

#[test]
fn a_run_directory_that_is_somebody_elses_or_open_to_others() {
    let site = Site::new(Binaries::release(), 10);
    site.write("vm.toml", good(&site));
    std::fs::create_dir(site.run_dir()).unwrap();
    let set_mode = |mode| {
        std::fs::set_permissions(site.run_dir(), PermissionsExt::from_mode(mode)).unwrap();
    };
    set_mode(0o777);
    let answer = site.run("vm.toml").expect(UNFIT);
    assert!(answer.stderr.contains("not safe"), "{answer:?}");
    set_mode(0o700);
    std::os::unix::fs::chown(site.run_dir(), Some(65_534), None).unwrap();
    let answer = site.run("vm.toml").expect(UNFIT);
    assert!(answer.stderr.contains("not safe"), "{answer:?}");
    site.assert_nothing_left();
}

#[test]
fn a_name_that_runs_already() {
    let vm = Builder::release().start();
    let before = vm.witness();
    let answer = vm.site.run("vm.toml").expect(UNFIT);
    assert!(answer.stderr.contains("running already"), "{answer:?}");
    vm.assert_goes_on(&before);
    assert_eq!(vm.state(), "running");
    assert_eq!(vm.site.brokers(), [vm.broker]);
}

#[test]
fn a_stale_socket_of_a_dead_broker_is_cleared() {
    let site = Site::new(Binaries::release(), 10);
    site.write("vm.toml", good(&site));
    let directory = site.run_dir().join(&site.name);
    std::fs::create_dir_all(&directory).unwrap();
    for path in [site.run_dir(), directory.clone()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)).unwrap();
    }
    drop(std::os::unix::net::UnixListener::bind(directory.join("control.sock")).unwrap());
    assert_eq!(site.baton(["status", &site.name]).code, Some(UNFIT));
    site.run("vm.toml").expect(0);
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}

#[test]
fn a_vm_that_does_not_exist() {
    let site = Site::new(Binaries::release(), 10);
    for command in [
        "status", "upgrade", "audit", "pause", "resume", "reset", "stop",
    ] {
        let answer = site.baton([command, "nobody"]).expect(UNFIT);
        assert!(answer.stderr.contains("nobody"), "{answer:?}");
    }
    assert_eq!(site.baton(["status", "../etc"]).code, Some(2));
    assert_eq!(site.baton(["upgrade"]).code, Some(2));
}

/// An upgrade to what is no worker: refused before anything happens, and the next one succeeds.
fn no_worker(name: &str, content: &[u8], allowed: bool, code: i32, words: &str) {
    let site = tempfile::tempdir().unwrap();
    let path = site.path().join(name);
    std::fs::write(&path, content).unwrap();
    let mut builder = Builder::release();
    if allowed {
        builder = builder.allow(&path);
    }
    let vm = builder.start();
    let (worker, before) = (vm.worker(), vm.witness());
    let answer = vm.upgrade_to(&path).expect(code);
    assert!(answer.stderr.contains(words), "{answer:?}");
    assert_eq!(vm.worker(), worker);
    vm.assert_only_runner(worker);
    vm.assert_goes_on(&before);
    assert_eq!(vm.audit_log().upgrades(), [""; 0]);
    assert_eq!(vm.audit_log().count("upgrade-refused"), 1);
    vm.assert_upgrades();
}

#[test]
fn an_upgrade_to_a_script() {
    no_worker("script", b"#!/bin/sh\nexit 0\n", true, UNFIT, "no worker");
}

#[test]
fn an_upgrade_to_a_dynamic_program() {
    let shell = std::fs::read("/bin/sh").unwrap();
    no_worker("sh", &shell, true, UNFIT, "no worker");
}

#[test]
fn an_upgrade_to_an_empty_file() {
    no_worker("empty", b"", true, UNFIT, "no worker");
}

#[test]
fn an_upgrade_to_a_worker_that_policy_does_not_list() {
    let other = std::fs::read(Binaries::with_fail_points().worker()).unwrap();
    no_worker("other", &other, false, REFUSED, "allow-list");
}

#[test]
fn an_upgrade_to_what_is_not_there_or_no_file() {
    let vm = Builder::release().start();
    for path in ["/nowhere/worker", "/", "/dev/null"] {
        vm.upgrade_to(Path::new(path)).expect(UNFIT);
    }
    assert_eq!(vm.audit_log().upgrades(), [""; 0]);
    vm.assert_upgrades();
}
