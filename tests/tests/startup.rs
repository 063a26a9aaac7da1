//! What a broker finds when it starts, or while it runs, does not keep it from its work: signals that its starter ignored,
//! what an earlier broker left, descriptors that run out.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::process::Stdio;

use baton_tests::Builder;
use baton_tests::until;

/// A value of /proc/PID/status, in hex.
fn mask(pid: i32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
}

#[test]
fn a_starter_that_ignores_its_children_does_not_hide_the_brokers_from_it() {
    let vm = Builder::release().start();
    let name = format!("{}-deaf", vm.site.name);
    let text = fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let text = text
        .replace(vm.site.name.as_str(), &name)
        .replace("console.log", "deaf.log");
    let file = vm.site.write("deaf.toml", text);
    let command = vm.site.command();
    let started = Command::new("env")
        .arg("--ignore-signal=CHLD")
        .arg(command.get_program())
        .args(command.get_args())
        .args(["run", "--detach", "--slow-host", "10"])
        .arg(file)
        .envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        // Not through the shell script that sets deadlines: a shell takes SIGCHLD back for itself.
        .env("BATON_BROKER", vm.site.binaries().broker())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(started.status.success(), "{started:?}");
    let started: serde_json::Value = serde_json::from_slice(&started.stdout).unwrap();
    let broker = i32::try_from(started["broker_pid"].as_i64().unwrap()).unwrap();
    let worker = i32::try_from(started["worker_pid"].as_i64().unwrap()).unwrap();
    // SIGCHLD is 17 (signal(7)).
    assert_eq!(mask(broker, "SigIgn:") & (1 << 16), 0);
    // Its launchers were waited for, or it had not come so far; so is a worker that dies.
    vm.site.baton(["upgrade", &name]).expect(0);
    until("the retired worker is waited for", || {
        (!Path::new(&format!("/proc/{worker}")).exists()).then_some(())
    });
    vm.site.baton(["stop", "--force", &name]).expect(0);
}

#[test]
fn an_empty_cgroup_of_a_dead_broker_is_removed_at_the_next_start() {
    let vm = Builder::release().start();
    let parent = vm.cgroup.parent().unwrap();
    // 4194304 is PID_MAX_LIMIT (linux/threads.h): no process has it.
    let left = parent.join(format!("{}-late-4194304", vm.site.name));
    let others = parent.join(format!("{}-later-4194304", vm.site.name));
    fs::create_dir(&left).unwrap();
    fs::create_dir(&others).unwrap();
    let name = format!("{}-late", vm.site.name);
    let text = fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let text = text
        .replace(vm.site.name.as_str(), &name)
        .replace("console.log", "late.log");
    vm.site.write("late.toml", text);
    vm.site.run("late.toml").expect(0);
    let (swept, spared) = (!left.exists(), others.exists());
    let _ = fs::remove_dir(&left);
    let _ = fs::remove_dir(&others);
    assert!(swept, "what a dead broker of this VM left is still there");
    assert!(spared, "another VM's cgroup is gone");
    vm.site.baton(["stop", "--force", &name]).expect(0);
}

/// Processor time of a process so far, in clock ticks (proc_pid_stat(5), fields 14 and 15).
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let field =
        |number: usize| -> u64 { rest.split(' ').nth(number - 3).unwrap().parse().unwrap() };
    field(14) + field(15)
}

#[test]
fn a_broker_without_a_free_descriptor_waits_for_one_and_does_not_spin() {
    let vm = Builder::release().start();
    let spent_in_a_second = || {
        let before = ticks(vm.broker);
        std::thread::sleep(std::time::Duration::from_secs(1));
        ticks(vm.broker) - before
    };
    // Its guest's console keeps it busy a little.
    let ordinary = spent_in_a_second();
    let is_free = |fd: &usize| !Path::new(&format!("/proc/{}/fd/{fd}", vm.broker)).exists();
    let lowest_free = (0..).find(is_free).unwrap();
    let limit = |most: &str| {
        let limited = Command::new("prlimit")
            .arg(format!("--pid={}", vm.broker))
            .arg(format!("--nofile={most}:"))
            .status()
            .unwrap();
        assert!(limited.success());
    };
    // No number is left for the next accept(2): it fails with EMFILE, and the connection stays at the door.
    limit(&lowest_free.to_string());
    let mut waiting = vm
        .site
        .command()
        .args(["status", &vm.site.name])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let spent = spent_in_a_second();
    limit("1024");
    assert!(
        spent < ordinary + 15,
        "{spent} of 100 ticks were spent waiting, {ordinary} otherwise"
    );
    assert!(waiting.wait().unwrap().success(), "it is served later");
    vm.assert_upgrades();
}
