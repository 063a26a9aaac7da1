//! Where a client may have the sockets of a transfer: policy says, and no symbolic link leads elsewhere.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::transfer::channel;
use serde_json::json;

const GRANTED: &str = r#"paths = ["/run/**", "/tmp/**", "/var/lib/baton/**"]"#;

#[test]
fn a_path_outside_policys_patterns_is_refused_on_both_sides_and_one_more_pattern_grants_it() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let outside = tempfile::tempdir_in("/var/tmp").unwrap();
    let there = outside.path().join("main");
    // Somebody who would take anything.
    let listener = UnixListener::bind(outside.path().join("listens")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let name = format!("{}.incoming", vm.site.name);
    let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
    let (mut old, mut new) = (Qmp::connect(&vm), Qmp::connect_to(&vm, &name));
    old.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let dots = vm.site.path(&format!("..{}", there.display()));
    for path in [&there, &outside.path().join("listens"), &dots] {
        let words = format!("grants no main channel at {}", path.display());
        let uri = json!({"uri": format!("unix:{}", path.display())});
        let refused = new.refused("migrate-incoming", uri);
        assert!(refused.contains(&words), "{refused}");
        let channels = [channel("main", path), channel("cpr", &waiting.cpr)];
        let refused = old.refused("migrate", json!({"channels": channels}));
        assert!(refused.contains(&words), "{refused}");
        let channels = [channel("main", &waiting.main), channel("cpr", path)];
        let refused = old.refused("migrate", json!({"channels": channels}));
        assert!(refused.contains("grants no cpr channel at"), "{refused}");
    }
    new.done("quit", json!({}));
    drop(new);
    vm.assert_nobody_waits(&waiting);
    let place = format!("unix:{}", there.display());
    let (refused, _) = vm.try_to_wait("vm.toml", &["--incoming", &place]);
    let refused = refused.expect(30);
    assert!(
        refused.stderr.contains("grants no main channel"),
        "{refused:?}"
    );
    assert!(!there.exists());
    assert!(listener.accept().is_err(), "nobody has connected");
    assert_eq!(old.status(), "running");
    drop(old);
    vm.assert_goes_on(&before);

    // One more pattern, on the side that listens.
    let policy = vm.site.write_policy(&[&vm.site.binaries().worker()]);
    let text = std::fs::read_to_string(&policy).unwrap();
    assert_eq!(text.matches(GRANTED).count(), 2);
    let more = format!("paths = [\"{}/*\", \"/tmp/**\"]", outside.path().display());
    std::fs::write(&policy, text.replace(GRANTED, &more)).unwrap();
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let named = format!("{:?}", policy.display().to_string());
    vm.site
        .write("other.toml", file.replacen("\"default\"", &named, 1));
    let waiting = vm.wait_from("other.toml", &["--incoming", &place]);
    // Nobody else could connect there at any moment.
    let mode = std::fs::metadata(&there).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    vm.site.baton(["stop", "--force", &name]).expect(0);
    vm.assert_nobody_waits(&waiting);
    assert!(!there.exists(), "it is removed by whoever has made it");
    vm.assert_transfers();
}

#[test]
fn a_symbolic_link_in_the_path_leads_nowhere() {
    let mut vm = Builder::release().start();
    let outside = tempfile::tempdir_in("/var/tmp").unwrap();
    symlink(outside.path(), vm.site.path("elsewhere")).unwrap();
    symlink(outside.path().join("target"), vm.site.path("dangling")).unwrap();
    let name = format!("{}.incoming", vm.site.name);
    let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
    let mut new = Qmp::connect_to(&vm, &name);
    for (path, words) in [
        ("elsewhere/main", "a symbolic link lies in the path"),
        // bind(2) follows none at the end of its path.
        ("dangling", "Address already in use"),
    ] {
        let uri = format!("unix:{}", vm.site.path(path).display());
        let refused = new.refused("migrate-incoming", json!({"uri": uri}));
        assert!(refused.contains(words), "{path}: {refused}");
    }
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    let mut old = Qmp::connect(&vm);
    old.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let through = vm.site.path("elsewhere/cpr");
    let _listener = UnixListener::bind(outside.path().join("cpr")).unwrap();
    let channels = [channel("main", &waiting.main), channel("cpr", &through)];
    let refused = old.refused("migrate", json!({"channels": channels}));
    assert!(
        refused.contains("a symbolic link lies in the path"),
        "{refused}"
    );
    new.done("quit", json!({}));
    drop((old, new));
    vm.assert_nobody_waits(&waiting);
    vm.assert_transfers();
}

#[test]
fn a_relative_path_is_in_the_vms_own_directory() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let name = format!("{}.incoming", vm.site.name);
    let waiting = vm.wait_from("vm.toml", &["--incoming", "defer"]);
    let mut new = Qmp::connect_to(&vm, &name);
    new.done("migrate-incoming", json!({"uri": "unix:main"}));
    let main = vm.site.run_dir().join(&name).join("main");
    assert!(main.exists());
    let mut old = Qmp::connect(&vm);
    old.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let channels = [channel("main", &main), channel("cpr", &waiting.cpr)];
    old.done("migrate", json!({"channels": channels}));
    assert_eq!(old.migrated()["status"], "completed");
    drop((old, new));
    vm.assert_taken_over(&waiting);
    vm.assert_goes_on(&before);
    assert!(!vm.site.run_dir().join(&vm.site.name).join("main").exists());
}
