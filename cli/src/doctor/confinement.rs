//! What confines a worker: Landlock, seccomp, namespaces, a bound on its tasks, executable memfds; and what proves it.

use crate::doctor::Check;
use crate::doctor::Host;

/// The least Landlock ABI of the built-in policy: scoped signals and abstract sockets (Linux 6.12).
const LANDLOCK_FLOOR: u32 = 6;

/// What filters do with what they refuse (seccomp(2)).
const ACTIONS: [&str; 4] = ["kill_process", "trap", "errno", "allow"];

pub(super) fn examine(host: &Host) -> Vec<Check> {
    vec![
        landlock(),
        seccomp(host),
        namespaces(host),
        tasks(host),
        executable_memfds(host),
        filter_reading(host),
        privilege(host),
    ]
}

/// Enters a domain that denies everything, as a launcher does, on a thread that ends with it.
fn landlock() -> Check {
    const ID: &str = "landlock";
    let tried = std::thread::spawn(|| {
        baton_policy::landlock::restrict_nothing_allowed(LANDLOCK_FLOOR)
            .map(|status| status.abi)
            .map_err(|error| error.to_string())
    })
    .join();
    match tried {
        Ok(Ok(abi)) => Check::ok(ID, format!("ABI {abi}")),
        Ok(Err(error)) => Check::missing(
            ID,
            error,
            "boot Linux 6.12 or newer with \"landlock\" in its lsm= list",
        ),
        Err(_) => Check::missing(ID, "it could not be tried", "report this as a bug"),
    }
}

fn seccomp(host: &Host) -> Check {
    const ID: &str = "seccomp";
    let known = host
        .read("proc/sys/kernel/seccomp/actions_avail")
        .unwrap_or_default();
    let known: Vec<&str> = known.split_ascii_whitespace().collect();
    let lacking: Vec<&str> = ACTIONS
        .into_iter()
        .filter(|action| !known.contains(action))
        .collect();
    if lacking.is_empty() {
        Check::ok(ID, "filters, with every action that is used")
    } else {
        Check::missing(
            ID,
            format!("the kernel's filters cannot {}", lacking.join(", ")),
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        )
    }
}

fn namespaces(host: &Host) -> Check {
    const ID: &str = "user-namespaces";
    if host
        .number("proc/sys/user/max_user_namespaces")
        .unwrap_or(0)
        == 0
    {
        return Check::missing(
            ID,
            "no user namespace may be made",
            "boot a kernel with CONFIG_USER_NS, and: sysctl user.max_user_namespaces=10000",
        );
    }
    if host.privileged {
        return Check::ok(ID, "they may be made");
    }
    // Both are distributions' own (Debian's, Ubuntu's), and spare root.
    if host.number("proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return Check::missing(
            ID,
            "an ordinary user may make none",
            "run as root, or: sysctl kernel.unprivileged_userns_clone=1",
        );
    }
    if host.number("proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return Check::missing(
            ID,
            "AppArmor takes away what an ordinary user's namespace needs",
            "run as root, or give baton-broker an AppArmor profile that allows `userns`",
        );
    }
    Check::ok(ID, "they may be made by this user")
}

fn tasks(host: &Host) -> Check {
    const ID: &str = "cgroup-controllers";
    const NEEDED: [&str; 3] = ["pids", "memory", "cpu"];
    let controllers = host
        .read("sys/fs/cgroup/cgroup.controllers")
        .unwrap_or_default();
    let version_2 = |one: &str| controllers.split_ascii_whitespace().any(|word| word == one);
    let version_1 = |one: &str| host.exists(&format!("sys/fs/cgroup/{one}/cgroup.procs"));
    if NEEDED.into_iter().all(version_2) {
        Check::ok(ID, "pids, memory and cpu in cgroup version 2")
    } else if NEEDED.into_iter().all(version_1) {
        Check::ok(ID, "pids, memory and cpu in cgroup version 1")
    } else if host.privileged {
        Check::missing(
            ID,
            "no version of cgroups has all of pids, memory and cpu",
            "mount cgroup2 at /sys/fs/cgroup, or version 1's hierarchies below it, each under its name; or let \
             policy's table cgroup limit neither memory nor cpu",
        )
    } else {
        Check::warn(
            ID,
            "no version of cgroups has pids, memory and cpu; an ordinary user's broker has no cgroup anyway",
            "mount cgroup2 at /sys/fs/cgroup",
        )
    }
}

fn executable_memfds(host: &Host) -> Check {
    const ID: &str = "executable-memfds";
    match host.number("proc/sys/vm/memfd_noexec") {
        Some(2) => Check::missing(
            ID,
            "vm.memfd_noexec=2 forbids them, and a worker is executed from one",
            "sysctl vm.memfd_noexec=1, which still asks for them to be wanted explicitly",
        ),
        _ => Check::ok(ID, "they may be made"),
    }
}

/// PTRACE_SECCOMP_GET_FILTER exists with CONFIG_CHECKPOINT_RESTORE, as does this file (kernel/pid_namespace.c).
fn filter_reading(host: &Host) -> Check {
    const ID: &str = "filter-reading";
    if host.exists("proc/sys/kernel/ns_last_pid") {
        Check::ok(ID, "the kernel gives a thread's filters back")
    } else {
        Check::warn(
            ID,
            "the kernel does not give a thread's filters back: an audit knows their number, not their text",
            "boot a kernel with CONFIG_CHECKPOINT_RESTORE",
        )
    }
}

fn privilege(host: &Host) -> Check {
    const ID: &str = "privilege";
    if host.privileged {
        Check::ok(ID, "root: every worker gets a user id of its own")
    } else {
        Check::warn(
            ID,
            "an ordinary user: workers share this user's id, and filters cannot be read back",
            "run as root for the strongest confinement; `baton audit` says what is weaker",
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::doctor::Level;
    use crate::doctor::tests::host;
    use crate::doctor::tests::level;

    use super::*;

    const GOOD: [(&str, &str); 4] = [
        (
            "proc/sys/kernel/seccomp/actions_avail",
            "kill_process kill_thread trap errno user_notif trace log allow\n",
        ),
        ("proc/sys/user/max_user_namespaces", "100\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n"),
        ("proc/sys/kernel/ns_last_pid", "7\n"),
    ];

    #[test]
    fn a_good_host_is_good() {
        let (_directory, host) = host(&GOOD);
        for check in examine(&host).iter().filter(|check| check.id != "landlock") {
            assert_eq!(check.level, Level::Ok, "{check:?}");
        }
    }

    #[test]
    fn each_lack_is_found() {
        for (file, text, id, expected) in [
            (GOOD[0].0, "errno trap allow", "seccomp", Level::Missing),
            (GOOD[1].0, "0", "user-namespaces", Level::Missing),
            (
                GOOD[2].0,
                "cpu memory",
                "cgroup-controllers",
                Level::Missing,
            ),
            (
                "proc/sys/vm/memfd_noexec",
                "2\n",
                "executable-memfds",
                Level::Missing,
            ),
        ] {
            let mut files = GOOD.to_vec();
            files.retain(|(path, _)| *path != file);
            files.push((file, text));
            let (_directory, host) = host(&files);
            assert_eq!(level(&examine(&host), id), expected, "{id}");
        }
        let (_directory, host) = host(&GOOD[..3]);
        assert_eq!(level(&examine(&host), "filter-reading"), Level::Warn);
    }

    #[test]
    fn distributions_restrict_ordinary_users_only() {
        for file in [
            ("proc/sys/kernel/unprivileged_userns_clone", "0"),
            ("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
        ] {
            let (_directory, mut host) = host(&[GOOD[1], file]);
            assert_eq!(namespaces(&host).level, Level::Ok);
            host.privileged = false;
            assert_eq!(namespaces(&host).level, Level::Missing);
            assert_eq!(privilege(&host).level, Level::Warn);
        }
    }
}
