//! A VM's cgroup limits tasks, memory and processor time as its policy says: a worker that takes more memory is
//! ended, and a limit that somebody has raised is a finding.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use baton_policy::BUILTIN;
use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Site;
use baton_tests::hostility;

const MIB: u64 = 1 << 20;

/// A file of a VM's cgroup: version 2's, or version 1's in its controller's hierarchy.
fn file(cgroup: &Path, controller: &str, v2: &str, v1: &str) -> PathBuf {
    match cgroup.strip_prefix("/sys/fs/cgroup/pids") {
        Ok(name) => Path::new("/sys/fs/cgroup")
            .join(controller)
            .join(name)
            .join(v1),
        Err(_) => cgroup.join(v2),
    }
}

fn number(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn has_the_policys_limits_through_an_upgrade_and_a_raised_one_is_found() {
    let policy = BUILTIN.replace("cpu_headroom = \"unlimited\"", "cpu_headroom = 6");
    let vm = Builder::release().cpus(2).policy(&policy).start();
    let memory = file(&vm.cgroup, "memory", "memory.max", "memory.limit_in_bytes");
    let cpu = file(&vm.cgroup, "cpu", "cpu.max", "cpu.cfs_quota_us");
    let tasks = vm.cgroup.join("pids.max");
    // 512 MiB beyond RAM, 6 processors beyond vCPUs, and threads for two workers.
    assert_eq!(number(&memory), (64 + 512) * MIB);
    assert_eq!(number(&cpu), (2 + 6) * 100_000);
    assert_eq!(number(&tasks), 2 * (2 + 16));
    vm.assert_upgrades();
    vm.ask("audit").expect(0);
    for (file, raised) in [(&memory, "4294967296"), (&cpu, "1000000"), (&tasks, "1000")] {
        let before = fs::read_to_string(file).unwrap();
        fs::write(file, raised).unwrap();
        let audit = vm.ask("audit").expect(1);
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(audit.stdout.contains(name), "{name}: {audit:?}");
        fs::write(file, before.trim()).unwrap();
        vm.ask("audit").expect(0);
    }
}

#[test]
fn is_limited_by_the_policy_of_each_upgrade() {
    let policy = BUILTIN.replace("cpu_headroom = \"unlimited\"", "cpu_headroom = 6");
    let vm = Builder::release().policy(&policy).start();
    let memory = file(&vm.cgroup, "memory", "memory.max", "memory.limit_in_bytes");
    let cpu = file(&vm.cgroup, "cpu", "cpu.max", "cpu.cfs_quota_us");
    let read = || (number(&memory), number(&cpu));
    assert_eq!(read(), ((64 + 512) * MIB, 7 * 100_000));

    let path = vm.site.path("policy.toml");
    let other = policy
        .replace(
            "memory_headroom = 536_870_912",
            "memory_headroom = 402_653_184",
        )
        .replace("cpu_headroom = 6", "cpu_headroom = 3");
    fs::write(&path, &other).unwrap();
    // Not by reading it: an audit is about the policy that the worker is under.
    vm.ask("audit").expect(0);
    vm.assert_upgrades();
    assert_eq!(read(), ((64 + 384) * MIB, 4 * 100_000));
    vm.ask("audit").expect(0);

    // No worker gets what somebody has raised.
    fs::write(&cpu, "1000000").unwrap();
    let refused = vm.upgrade();
    assert!(refused.reason.contains("policy 400000"), "{refused:?}");
    fs::write(&cpu, "400000").unwrap();
}

#[test]
fn is_not_limited_in_what_it_was_not_made_for() {
    let vm = Builder::release().policy(BUILTIN).start();
    let narrower = BUILTIN.replace("cpu_headroom = \"unlimited\"", "cpu_headroom = 6");
    fs::write(vm.site.path("policy.toml"), narrower).unwrap();
    let refused = vm.ask("upgrade").expect(3);
    let said = "cgroup limits pids and memory, the policy now pids and memory and cpu";
    assert!(refused.stdout.contains(said), "{refused:?}");
    assert_eq!(vm.generation(), 1);
}

#[test]
fn ends_a_worker_that_takes_more_memory_than_policy_gives_it() {
    let site = Site::new(Binaries::release(), 10);
    let hostile = Path::new(env!("CARGO_BIN_EXE_hostile-worker"));
    let worker = hostility::binary(hostile, "hoard.memory", &site.path(""));
    let policy = site.write_policy(&[&worker]);
    let text = fs::read_to_string(&policy).unwrap();
    let text = text.replace(
        "memory_headroom = 536_870_912",
        "memory_headroom = 67_108_864",
    );
    site.write("policy.toml", text);
    site.write("vm.toml", vm_file(&site.name, &worker, &policy));
    let outcome = site.run("vm.toml").expect(3);
    // Its channel may be seen to close before its control socket is.
    let said = ["the worker died", "(signal 9)"];
    let died = said.iter().any(|said| outcome.stdout.contains(said));
    assert!(died, "{outcome:?}");
    site.assert_nothing_left();
}

fn vm_file(name: &str, worker: &Path, policy: &Path) -> String {
    format!(
        "schema = 1\nname = \"{name}\"\nworker = {worker:?}\npolicy = {policy:?}\n[cpus]\ncount = 1\n[memory]\n\
         size = \"16M\"\n[boot]\nkernel = \"guest.elf\"\n[console]\nkind = \"file\"\npath = \"console.log\"\n"
    )
}
