//! `baton audit` proves a running worker's confinement from the kernel's records, in every generation.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that cannot do its work fails"
)]

use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Vm;

fn assert_proven(vm: &Vm, cpus: usize) {
    let audit = vm.ask("audit").expect(0).json();
    assert_eq!(audit["verdict"], "proven", "{audit}");
    assert_eq!(
        audit["findings"].as_array().map(Vec::len),
        Some(0),
        "{audit}"
    );
    assert_eq!(audit["worker_pid"], vm.worker());
    let threads = audit["threads"].as_array().unwrap();
    let of_role = |role: &str| {
        threads
            .iter()
            .filter(|thread| thread["role"] == role)
            .count()
    };
    assert_eq!((of_role("control"), of_role("vcpu")), (1, cpus), "{audit}");
    for thread in threads {
        assert!(!thread["proof"].as_str().unwrap().is_empty());
    }
    let descriptors = audit["descriptors"].as_array().unwrap();
    assert!(
        descriptors.iter().all(|fd| fd["grant"] != "unexplained"),
        "{audit}"
    );
    for grant in ["ram#0", "console#0"] {
        assert!(
            descriptors.iter().any(|fd| fd["grant"] == grant),
            "no {grant} in {audit}"
        );
    }
    // The kernel is asked, not the worker: the same numbers stand in /proc.
    let listed = std::fs::read_dir(format!("/proc/{}/fd", vm.worker()))
        .unwrap()
        .count();
    assert_eq!(descriptors.len(), listed);
}

#[test]
fn every_generation_is_proven() {
    let vm = Builder::release().cpus(2).start();
    assert_proven(&vm, 2);
    for _ in 0..2 {
        vm.assert_upgrades();
        assert_proven(&vm, 2);
    }
    assert_eq!(vm.audit_log().count("audit"), 3);
}

#[test]
fn a_worker_of_another_build_is_proven() {
    let other = Binaries::with_fail_points().worker();
    let vm = Builder::release().allow(&other).start();
    assert_eq!(vm.upgrade_to(&other).upgrade().outcome, "committed");
    assert_proven(&vm, 1);
}

#[test]
fn what_the_kernel_says_of_a_worker_is_what_was_promised() {
    let vm = Builder::release().start();
    vm.assert_upgrades();
    let worker = vm.worker();
    let tasks = std::fs::read_dir(format!("/proc/{worker}/task")).unwrap();
    for task in tasks.flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().nth(1))
                .unwrap_or_default()
                .to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        assert_eq!(field("Seccomp:"), "2", "{status}");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set} {status}");
        }
        assert_ne!(field("Uid:"), "0");
    }
    for namespace in ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup"] {
        let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&worker.to_string()), of("self"), "{namespace}");
    }
    let root = std::fs::read_dir(format!("/proc/{worker}/root/")).unwrap();
    assert_eq!(root.count(), 0, "its root is not empty");
    assert_eq!(
        std::fs::read(format!("/proc/{worker}/environ")).unwrap(),
        b""
    );
}

#[test]
fn the_memfds_of_a_vm_have_names_in_lsfd() {
    let vm = Builder::release().start();
    let (broker, worker) = (vm.broker.to_string(), vm.worker().to_string());
    // As docs/policy.md has it.
    let output = std::process::Command::new("lsfd")
        .args(["--noheadings", "--pid", &format!("{broker},{worker}")])
        .args([
            "--filter",
            "NAME =~ \".*memfd:.*\"",
            "--output",
            "PID,ASSOC,MODE,NAME",
        ])
        .output();
    let output = output.expect("lsfd: apt install util-linux-extra (Debian 12), util-linux (13)");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let has = |pid: &str, association: &str, mode: &str, name: &str| {
        lines.iter().any(|line| {
            let [of, how, access, path, ..] = line[..] else {
                return false;
            };
            let associated =
                how == association || association == "FD" && how.parse::<u32>().is_ok();
            of == pid && associated && access == mode && path.ends_with(name)
        })
    };
    // Guest memory in both, and what the worker executes.
    assert!(has(&broker, "FD", "rw-", "memfd:guest-ram"), "{text}");
    assert!(has(&worker, "FD", "rw-", "memfd:guest-ram"), "{text}");
    assert!(has(&worker, "exe", "---", "memfd:baton-worker"), "{text}");
}
