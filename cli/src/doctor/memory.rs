//! What guest RAM is made of, and the limits that it meets.

use rustix::process::Resource;

use crate::doctor::Check;
use crate::doctor::Host;
use crate::units;

/// Descriptors that a broker with a few disks and interfaces opens, with room.
const DESCRIPTORS: u64 = 1024;

pub(super) fn examine(host: &Host) -> Vec<Check> {
    vec![
        huge_pages(host),
        transparent_huge_pages(host),
        overcommit(host),
        open_files(),
        locked_memory(),
    ]
}

fn huge_pages(host: &Host) -> Check {
    const ID: &str = "huge-pages";
    const DIRECTORY: &str = "sys/kernel/mm/hugepages/hugepages-2048kB";
    let count = |file: &str| host.number(&format!("{DIRECTORY}/{file}"));
    match (count("free_hugepages"), count("nr_hugepages")) {
        (Some(free), Some(all)) if all > 0 => {
            Check::ok(ID, format!("{free} of {all} free, 2 MiB each"))
        }
        (Some(_), Some(_)) => Check::warn(
            ID,
            "none are set aside: memory.pages = \"2M\" cannot be used",
            "sysctl vm.nr_hugepages=N, one for each 2 MiB of guest RAM",
        ),
        _ => Check::warn(
            ID,
            "the kernel has no 2 MiB pages: memory.pages = \"2M\" cannot be used",
            "boot a kernel with CONFIG_HUGETLBFS",
        ),
    }
}

fn transparent_huge_pages(host: &Host) -> Check {
    const ID: &str = "transparent-huge-pages";
    const FILE: &str = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let modes = host.read(FILE).unwrap_or_default();
    let mode = modes
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match mode {
        Some(mode @ ("always" | "within_size" | "advise" | "force")) => {
            Check::ok(ID, format!("for shared memory: {mode}"))
        }
        Some(mode) => Check::warn(
            ID,
            format!("for shared memory: {mode}; memory.pages = \"thp\" gets 4 KiB pages"),
            format!("echo advise > /{FILE}"),
        ),
        None => Check::warn(
            ID,
            "the kernel has none for shared memory: memory.pages = \"thp\" gets 4 KiB pages",
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

fn overcommit(host: &Host) -> Check {
    const ID: &str = "overcommit";
    match host.number("proc/sys/vm/overcommit_memory") {
        Some(2) => Check::warn(
            ID,
            "vm.overcommit_memory=2: guest RAM counts in full from the start of a VM",
            "keep the sum of all guests' RAM below CommitLimit in /proc/meminfo, or: sysctl vm.overcommit_memory=0",
        ),
        _ => Check::ok(ID, "guest RAM counts as it is touched"),
    }
}

fn open_files() -> Check {
    const ID: &str = "open-files";
    match rustix::process::getrlimit(Resource::Nofile).current {
        Some(limit) if limit < DESCRIPTORS => Check::warn(
            ID,
            format!("at most {limit}: too few for a VM with many devices"),
            format!("ulimit -n {DESCRIPTORS}"),
        ),
        Some(limit) => Check::ok(ID, format!("at most {limit}")),
        None => Check::ok(ID, "no limit"),
    }
}

/// For information: RAM is shared memory and is not locked, unless a device of the host has it.
fn locked_memory() -> Check {
    let limit = rustix::process::getrlimit(Resource::Memlock).current;
    let limit = limit.map_or("no limit".to_owned(), units::bytes);
    Check::ok(
        "locked-memory",
        format!(
            "{limit}; a worker locks none, but all of guest RAM where the VM file has [[vfio]]"
        ),
    )
}

#[cfg(test)]
mod tests {
    use crate::doctor::Level;
    use crate::doctor::tests::host;

    use super::*;

    #[test]
    fn huge_pages_have_to_be_set_aside() {
        let files = |all: &'static str| {
            [
                ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", all),
                (
                    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
                    "3",
                ),
            ]
        };
        for (all, expected) in [("0", Level::Warn), ("8", Level::Ok)] {
            let (_directory, host) = host(&files(all));
            assert_eq!(huge_pages(&host).level, expected);
        }
    }

    #[test]
    fn the_chosen_mode_is_the_one_in_brackets() {
        for (modes, expected) in [
            ("always within_size advise [never] deny force", Level::Warn),
            ("always within_size [advise] never deny force", Level::Ok),
            ("", Level::Warn),
        ] {
            let (_directory, host) =
                host(&[("sys/kernel/mm/transparent_hugepage/shmem_enabled", modes)]);
            assert_eq!(transparent_huge_pages(&host).level, expected, "{modes}");
        }
    }

    #[test]
    fn strict_accounting_is_said() {
        let (_directory, host) = host(&[("proc/sys/vm/overcommit_memory", "2\n")]);
        assert_eq!(overcommit(&host).level, Level::Warn);
    }
}
