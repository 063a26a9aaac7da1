//! What an audit compares beyond threads and filters, on a live worker; that it finds what is wrong; and its page, looked at in
//! a browser: the pictures are put where cargo keeps what tests make.

use std::path::Path;
use std::process::Command;

use baton_tests::Builder;
use baton_tests::Vm;
use serde_json::Value;

fn audit(vm: &Vm, code: i32) -> Value {
    vm.ask("audit").expect(code).json()
}

#[test]
fn everything_that_has_a_record_is_compared() {
    let vm = Builder::release().start();
    let good = audit(&vm, 0);
    let compared: Vec<&str> = good["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["evidence"] == "kernel")
        .map(|check| check["what"].as_str().unwrap())
        .collect();
    for what in [
        "binary",
        "root",
        "mounts",
        "cgroup",
        "memory",
        "limits",
        "filters",
        "privileges",
        "namespaces",
    ] {
        assert!(compared.contains(&what), "{what} was not compared: {good}");
    }
}

#[test]
fn a_worker_that_left_its_cgroup_is_found() {
    let vm = Builder::release().start();
    let parent = vm.cgroup.parent().unwrap().join("cgroup.procs");
    std::fs::write(&parent, vm.worker().to_string()).unwrap();
    let found = audit(&vm, 1);
    let text = found["findings"][0]["found"].as_str().unwrap();
    assert!(text.contains("it is not in"), "{found}");
    std::fs::write(vm.cgroup.join("cgroup.procs"), vm.worker().to_string()).unwrap();
    audit(&vm, 0);
}

#[test]
fn each_descriptor_has_its_object_its_access_and_its_seals() {
    let vm = Builder::release().start();
    let report = audit(&vm, 0);
    let descriptors = report["descriptors"].as_array().unwrap();
    let ram = descriptors
        .iter()
        .find(|one| one["grant"] == "ram#0")
        .unwrap();
    let mut seals: Vec<&str> = ram["seals"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    seals.sort_unstable();
    assert_eq!(seals, ["exec", "grow", "seal", "shrink"], "{ram}");
    assert_eq!(ram["access"], "read-write");
    let kernel = descriptors.iter().find(|one| one["grant"] == "kernel#0");
    if let Some(kernel) = kernel {
        assert_eq!(kernel["access"], "read");
    }
    for one in descriptors {
        assert!(one["access"].is_string(), "{one}");
    }
    // How long a thread stood still for it is measured; how long that may be, no busy machine can promise.
    assert!(report["pause_us"].as_u64() > Some(0), "{report}");
}

/// Chromium's command, or what to do to have it.
fn browser() -> Command {
    let mut command = Command::new("chromium");
    let there = command.arg("--version").output();
    assert!(
        there.is_ok_and(|output| output.status.success()),
        "there is no chromium: apt-get install chromium fonts-dejavu-core"
    );
    Command::new("chromium")
}

#[test]
fn the_page_is_drawn_by_a_browser_light_and_dark_wide_and_narrow() {
    let vm = Builder::release().cpus(2).start();
    vm.assert_upgrades();
    let page = vm.site.path("page.html");
    vm.baton("audit", ["--html".as_ref(), page.as_os_str()])
        .expect(0);
    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR")).join("audit-page");
    std::fs::create_dir_all(&pictures).unwrap();
    let mut sizes = Vec::new();
    for (name, window, scheme) in [
        ("wide-light", "1200,3200", 1),
        ("wide-dark", "1200,3200", 0),
        ("narrow-light", "390,5200", 1),
        ("narrow-dark", "390,5200", 0),
    ] {
        let picture = pictures.join(format!("{name}.png"));
        let _ = std::fs::remove_file(&picture);
        let profile = vm.site.path(name);
        let drawn = browser()
            .args([
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(format!("--window-size={window}"))
            .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
            .arg(format!("--screenshot={}", picture.display()))
            .arg(format!("file://{}", page.display()))
            .output()
            .unwrap();
        assert!(drawn.status.success(), "{drawn:?}");
        let bytes = std::fs::read(&picture)
            .unwrap_or_else(|error| panic!("no picture: {error}: {drawn:?}"));
        assert!(bytes.starts_with(b"\x89PNG"));
        sizes.push(bytes.len());
    }
    // A page that was not drawn is one colour, some kilobytes.
    assert!(sizes.iter().all(|size| *size > 60_000), "{sizes:?}");
}
