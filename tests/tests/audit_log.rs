//! The audit log: it says who asked for what, shows what was done to it afterwards, and a disk that is full stops new grants
//! and upgrades and never a guest.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use std::fs;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use baton_tests::Answer;
use baton_tests::Builder;
use baton_tests::Vm;
use serde_json::Value;

fn file(vm: &Vm) -> PathBuf {
    vm.site
        .run_dir()
        .join(format!(".audit/{}.jsonl", vm.site.name))
}

fn log(vm: &Vm, command: &str, arguments: &[&str]) -> Answer {
    let mut all = vec!["log", command, vm.site.name.as_str()];
    all.extend(arguments);
    vm.site.baton(all)
}

/// `baton log verify` on these lines in place of the VM's log: the first thing that it says.
fn verdict_on(vm: &Vm, lines: &[String]) -> Option<Value> {
    let copy = vm.site.write("copy.jsonl", lines.concat());
    let answer = log(vm, "verify", &["--file", copy.to_str().unwrap()]);
    let document = answer.json();
    let findings = document["findings"].as_array().unwrap();
    assert_eq!(answer.code, Some(i32::from(!findings.is_empty())));
    findings.first().map(|finding| finding["what"].clone())
}

#[test]
fn what_was_done_to_a_log_is_found_and_named() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    let intact = log(&vm, "verify", &[]).expect(0).json();
    assert_eq!(intact["intact"], true, "{intact}");
    let checkpoint = log(&vm, "checkpoint", &[]).expect(0).json();
    assert!(checkpoint["count"].as_u64() >= intact["head"]["count"].as_u64());

    let text = fs::read_to_string(file(&vm)).unwrap();
    let lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
    assert!(lines.len() > 12, "{} records", lines.len());
    assert_eq!(verdict_on(&vm, &lines), None);
    let mut edited = lines.clone();
    edited[5] = edited[5].replace("\"time\":", "\"time\":1");
    assert_eq!(verdict_on(&vm, &edited).unwrap()["edited"]["sequence"], 5);
    let mut removed = lines.clone();
    removed.remove(7);
    assert_eq!(verdict_on(&vm, &removed).unwrap()["removed"]["from"], 7);
    let mut swapped = lines.clone();
    swapped.swap(3, 4);
    assert_eq!(
        verdict_on(&vm, &swapped).unwrap()["reordered"]["sequence"],
        3
    );
    let mut cut = lines.clone();
    cut.last_mut().unwrap().truncate(20);
    assert_eq!(verdict_on(&vm, &cut).unwrap()["cut-short"]["bytes"], 20);

    // Whole records gone at the end: the chain does not show it, the running broker does.
    fs::write(file(&vm), lines[..8].concat()).unwrap();
    let shortened = log(&vm, "verify", &[]).expect(1).json();
    let what = &shortened["findings"][0]["what"]["end-removed"];
    assert_eq!(what["found"], 8, "{shortened}");
    fs::write(file(&vm), text).unwrap();
}

#[test]
fn a_checkpoint_outlives_the_vm() {
    let vm = Builder::release().start();
    let name = vm.site.name.clone();
    let said = vm
        .site
        .command()
        .args(["log", "checkpoint", &name])
        .output()
        .unwrap();
    let head: Value = serde_json::from_slice(&said.stdout).unwrap();
    let kept = format!(
        "baton audit checkpoint 1\n{name}\n{}\n{}\n",
        head["count"],
        head["head"].as_str().unwrap()
    );
    let kept = vm.site.write("kept", kept);
    vm.end().expect(0);
    let with = ["--checkpoint", kept.to_str().unwrap()];
    log(&vm, "verify", &with).expect(0);
    let text = fs::read_to_string(file(&vm)).unwrap();
    assert!(text.lines().last().unwrap().contains("\"vm-end\""));
    let shorter: String = text.split_inclusive('\n').take(4).collect();
    fs::write(file(&vm), shorter).unwrap();
    log(&vm, "verify", &[]).expect(0);
    let found = log(&vm, "verify", &with).expect(1).json();
    assert!(
        found["findings"][0]["what"].get("end-removed").is_some(),
        "{found}"
    );
}

/// A cgroup that is named as systemd names those of its units; removed when dropped.
struct Unit(PathBuf);

impl Unit {
    fn new(name: &str) -> Self {
        let parents = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"];
        let parent = parents
            .iter()
            .map(Path::new)
            .find(|parent| parent.join("cgroup.procs").exists());
        let path = parent.unwrap().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn an_upgrade_says_who_asked_for_it() {
    let vm = Builder::release().start();
    let name = format!("baton-e2e-{}.service", std::process::id());
    let unit = Unit::new(&name);
    let command = vm.site.command();
    let upgrade = Command::new("sh")
        .args(["-c", "echo $$ > \"$0\"/cgroup.procs; exec \"$@\""])
        .arg(&unit.0)
        .arg(command.get_program())
        .args(command.get_args())
        .args(["upgrade", &vm.site.name])
        .envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(upgrade.status.success(), "{upgrade:?}");
    let records = vm.audit_log();
    for event in ["request", "upgrade-begin"] {
        let by = records.of(event).last().unwrap().record["actor"].clone();
        assert_eq!(by["user"]["uid"], "0", "{by}");
        assert_eq!(by["app_name"], name.as_str(), "{by}");
        assert!(by["process"]["pid"].as_u64() > Some(1), "{by}");
    }
    let shown = log(&vm, "show", &["--event", "upgrade-begin"])
        .expect(0)
        .json();
    assert_eq!(shown.as_array().unwrap().len(), 1, "{shown}");
}

/// A file system with little room, mounted here until this is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=3m,mode=0700", "small"])
            .arg(path)
            .status()
            .unwrap();
        assert!(mounted.success(), "cannot mount a tmpfs at {path:?}");
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_stops_upgrades_and_never_the_guest() {
    let mut disk = None;
    let vm = Builder::release()
        .start_in(|site| disk = Some(SmallDisk::new(&site.run_dir().join(".audit"))));
    let disk = disk.unwrap();
    vm.assert_upgrades();
    let before = vm.witness();
    let ballast = disk.0.join("ballast");
    let written = fs::write(&ballast, vec![1; 4 << 20]);
    assert!(written.is_err(), "the disk is not full");

    let refused = vm.ask("upgrade").expect(3);
    assert!(
        refused.stderr.contains("No space left") && refused.stderr.contains("free space"),
        "{refused:?}"
    );
    let name = vm.site.name.as_str();
    // Nothing is granted either: another VM of this run directory does not start.
    let text = fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    vm.site
        .write("other.toml", text.replace(name, &format!("{name}-2")));
    let other = vm.site.run("other.toml").expect(3);
    assert!(other.stderr.contains("No space left"), "{other:?}");
    // The guest has noticed nothing, and its operator is served.
    for _ in 0..50 {
        vm.ask("status").expect(0);
    }
    vm.ask("pause").expect(0);
    vm.ask("resume").expect(0);
    vm.assert_goes_on(&before);

    fs::remove_file(ballast).unwrap();
    vm.assert_upgrades();
    log(&vm, "verify", &[]).expect(0);
    assert_eq!(vm.audit_log().upgrades(), ["committed", "committed"]);
    // Before the disk goes: the broker writes its last record there.
    vm.end().expect(0);
}

#[test]
fn a_standard_error_that_nobody_reads_stops_nobody() {
    let vm = Builder::release().start();
    let text = fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let name = format!("{}-loud", vm.site.name);
    let file = vm.site.write(
        "loud.toml",
        text.replace(vm.site.name.as_str(), &name)
            .replace("console.log", "loud.log"),
    );
    let mut loud = vm
        .site
        .command()
        .args(["run", "--log"])
        .arg(file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ask = |command: &str| vm.site.baton([command, name.as_str()]);
    baton_tests::until("it runs", || {
        let status = ask("status");
        (status.code == Some(0) && status.json()["state"] == "running").then_some(())
    });
    // Far more records than a pipe of 64 KiB takes.
    for _ in 0..60 {
        ask("pause").expect(0);
        ask("resume").expect(0);
    }
    vm.site.baton(["stop", "--force", &name]);
    let mut said = Vec::new();
    loud.stderr.take().unwrap().read_to_end(&mut said).unwrap();
    let _ = loud.wait();
    let said = String::from_utf8_lossy(&said);
    assert!(
        said.contains("broker    grant                ram#0 mode=none to worker 1"),
        "{said}"
    );
    assert!(
        said.contains("worker 1  build                mode=none "),
        "{said}"
    );
}
