//! What the kernel says of a thread, from the text of its files in `/proc`.
//!
//! Only parsing: the broker reads the files. A name in them is the worker's own choice and may hold anything, so
//! nothing here goes by names or by counting words before one has been passed.

use std::num::ParseIntError;

use crate::capabilities::Capabilities;
use crate::rlimits::{Limit, Resource};

/// `PF_EXITING` (`linux/sched.h`): the thread is on its way out.
pub const PF_EXITING: u32 = 0x0000_0004;
/// `PF_USER_WORKER`: the kernel's own thread in a user process, made by the first KVM_RUN. It runs no user code.
pub const PF_USER_WORKER: u32 = 0x0000_4000;
/// `PF_KTHREAD`: a kernel thread.
pub const PF_KTHREAD: u32 = 0x0020_0000;

/// `/proc/PID/task/TID/status` (`fs/proc/array.c`), as far as confinement goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskStatus {
    /// The thread's name, with the kernel's escapes. Never evidence.
    pub name: String,
    /// R, S, D, T, t, X, Z, P or I.
    pub state: char,
    /// The process, in the reader's pid namespace.
    pub tgid: u32,
    /// The thread, in the reader's pid namespace.
    pub pid: u32,
    /// The parent, in the reader's pid namespace; 0 when it is outside.
    pub ppid: u32,
    /// Who traces it; 0 for nobody.
    pub tracer: u32,
    /// Real, effective, saved and file-system user id, in the reader's user namespace.
    pub uids: [u32; 4],
    /// The same for groups.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The thread's number in each pid namespace, from the reader's inwards.
    pub ns_pids: Vec<u32>,
    /// How many threads the process has.
    pub threads: u32,
    /// Inheritable capabilities.
    pub inheritable: Capabilities,
    /// Permitted capabilities.
    pub permitted: Capabilities,
    /// Effective capabilities.
    pub effective: Capabilities,
    /// The bounding set.
    pub bounding: Capabilities,
    /// Ambient capabilities.
    pub ambient: Capabilities,
    /// Whether an exec can gain privileges.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// How many filters.
    pub seccomp_filters: u32,
}

/// `/proc/PID/task/TID/stat`, as far as confinement goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskStat {
    /// The thread, in the reader's pid namespace.
    pub pid: u32,
    /// The thread's name. Never evidence.
    pub name: String,
    /// As [`TaskStatus::state`].
    pub state: char,
    /// The parent, in the reader's pid namespace.
    pub ppid: u32,
    /// `PF_*`.
    pub flags: u32,
    /// How many threads the process has.
    pub threads: u32,
    /// When it started, in clock ticks since boot: with the number, its identity.
    pub start_time: u64,
}

/// Text that is not what the kernel writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProcError {
    /// A field is missing: another kernel than this was written for.
    #[error("no {0} in the kernel's record; it takes Linux 5.9 or newer")]
    Missing(&'static str),
    /// A field is there twice: a name was mistaken for one.
    #[error("{0} is in the kernel's record twice")]
    Twice(&'static str),
    /// A field is not what it should be.
    #[error("{field} is {text:?} in the kernel's record")]
    Malformed {
        /// The field.
        field: &'static str,
        /// What it is instead, at most its first 80 characters.
        text: String,
    },
}

impl TaskStatus {
    /// Parses the text of `/proc/PID/status` or `/proc/PID/task/TID/status`.
    ///
    /// # Errors
    ///
    /// When a field is missing, there twice, or malformed.
    pub fn parse(text: &str) -> Result<Self, ProcError> {
        let field = |name: &'static str| -> Result<&str, ProcError> {
            // The kernel escapes line feeds in the name, so a line is a field.
            let mut found = text
                .lines()
                .filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = found.next().ok_or(ProcError::Missing(name))?;
            match found.next() {
                None => Ok(value.trim()),
                Some(_) => Err(ProcError::Twice(name)),
            }
        };
        let number = |name: &'static str| -> Result<u32, ProcError> {
            let value = field(name)?;
            value
                .parse()
                .map_err(|_: ParseIntError| malformed(name, value))
        };
        let numbers = |name: &'static str| -> Result<Vec<u32>, ProcError> {
            let value = field(name)?;
            value
                .split_whitespace()
                .map(|word| {
                    word.parse()
                        .map_err(|_: ParseIntError| malformed(name, value))
                })
                .collect()
        };
        let four = |name: &'static str| -> Result<[u32; 4], ProcError> {
            numbers(name)?
                .try_into()
                .map_err(|_: Vec<u32>| malformed(name, field(name).unwrap_or("")))
        };
        let capabilities = |name: &'static str| -> Result<Capabilities, ProcError> {
            let value = field(name)?;
            let mask = u64::from_str_radix(value, 16).map_err(|_| malformed(name, value))?;
            Ok(Capabilities::from_mask(mask))
        };
        let no_new_privs = match number("NoNewPrivs")? {
            0 => false,
            1 => true,
            other => return Err(malformed("NoNewPrivs", &other.to_string())),
        };
        Ok(Self {
            name: field("Name")?.to_owned(),
            state: state(field("State")?)?,
            tgid: number("Tgid")?,
            pid: number("Pid")?,
            ppid: number("PPid")?,
            tracer: number("TracerPid")?,
            uids: four("Uid")?,
            gids: four("Gid")?,
            groups: numbers("Groups")?,
            ns_pids: numbers("NSpid")?,
            threads: number("Threads")?,
            inheritable: capabilities("CapInh")?,
            permitted: capabilities("CapPrm")?,
            effective: capabilities("CapEff")?,
            bounding: capabilities("CapBnd")?,
            ambient: capabilities("CapAmb")?,
            no_new_privs,
            seccomp: number("Seccomp")?,
            seccomp_filters: number("Seccomp_filters")?,
        })
    }
}

impl TaskStat {
    /// Parses the text of `/proc/PID/stat` or `/proc/PID/task/TID/stat` (`proc_pid_stat(5)`).
    ///
    /// # Errors
    ///
    /// When it is not of that form.
    pub fn parse(text: &str) -> Result<Self, ProcError> {
        let whole = || malformed("stat", text);
        let (pid, rest) = text.split_once(" (").ok_or_else(whole)?;
        // The name may hold parentheses, spaces and line feeds; what follows holds no parenthesis.
        let (name, rest) = rest.rsplit_once(") ").ok_or_else(whole)?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Field 3 of the manual page, the state, is the first here.
        let field = |number: usize, name: &'static str| {
            fields
                .get(number - 3)
                .copied()
                .ok_or(ProcError::Missing(name))
        };
        let number = |at: usize, name: &'static str| -> Result<u32, ProcError> {
            let text = field(at, name)?;
            text.parse()
                .map_err(|_: ParseIntError| malformed(name, text))
        };
        let start_time = field(22, "starttime")?;
        Ok(Self {
            pid: pid
                .parse()
                .map_err(|_: ParseIntError| malformed("pid", pid))?,
            name: name.to_owned(),
            state: state(field(3, "state")?)?,
            ppid: number(4, "ppid")?,
            flags: number(9, "flags")?,
            threads: number(20, "num_threads")?,
            start_time: start_time
                .parse()
                .map_err(|_: ParseIntError| malformed("starttime", start_time))?,
        })
    }

    /// Whether it is the kernel's own thread in a user process.
    #[must_use]
    pub const fn is_user_worker(&self) -> bool {
        self.flags & PF_USER_WORKER != 0
    }

    /// Whether it is on its way out and runs no more user code.
    #[must_use]
    pub const fn is_exiting(&self) -> bool {
        self.flags & PF_EXITING != 0
    }
}

/// The soft and the hard limit of `resource`, from the text of `/proc/PID/limits` (`fs/proc/base.c`).
#[must_use]
pub fn limit(text: &str, resource: Resource) -> Option<(Limit, Limit)> {
    // The table's columns are 25, 20 and 20 wide, and the names have spaces.
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(resource.proc_name())?.strip_prefix(' '))?;
    let mut words = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(Limit::Unlimited),
        number => number.parse().ok().map(Limit::At),
    });
    Some((words.next()??, words.next()??))
}

/// The flags that a descriptor was opened with, from the text of `/proc/PID/fdinfo/FD` (proc_pid_fdinfo(5)): octal.
#[must_use]
pub fn descriptor_flags(text: &str) -> Option<u32> {
    let word = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(word.trim(), 8).ok()
}

fn state(text: &str) -> Result<char, ProcError> {
    text.chars()
        .next()
        .filter(char::is_ascii_alphabetic)
        .ok_or_else(|| malformed("State", text))
}

fn malformed(field: &'static str, text: &str) -> ProcError {
    ProcError::Malformed {
        field,
        text: text.chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tvcpu\\n0\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t100\nNgid:\t0\nPid:\t101\nPPid:\t1\n\
        TracerPid:\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t10 20 \nNStgid:\t100\t1\nNSpid:\t101\t2\n\
        Threads:\t3\nSigQ:\t0/4096\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000001\nCapEff:\t0000000000000002\n\
        CapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000004\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\n\
        Speculation_Store_Bypass:\tvulnerable\n";

    #[test]
    fn a_status_is_read_field_by_field() {
        let status = TaskStatus::parse(STATUS).unwrap();
        assert_eq!(status.name, "vcpu\\n0");
        assert_eq!(
            (
                status.state,
                status.tgid,
                status.pid,
                status.ppid,
                status.tracer
            ),
            ('S', 100, 101, 1, 0)
        );
        assert_eq!((status.uids, status.gids), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!(
            (status.groups, status.ns_pids, status.threads),
            (vec![10, 20], vec![101, 2], 3)
        );
        assert_eq!(status.inheritable, Capabilities::NONE);
        assert_eq!(
            (
                status.permitted.mask(),
                status.effective.mask(),
                status.ambient.mask()
            ),
            (1, 2, 4)
        );
        assert_eq!(status.bounding.mask(), 0x1ff_ffff_ffff);
        assert_eq!(
            (status.no_new_privs, status.seccomp, status.seccomp_filters),
            (true, 2, 3)
        );
    }

    #[test]
    fn a_field_that_is_missing_doubled_or_malformed_is_an_error() {
        for line in STATUS.lines() {
            let (name, _) = line.split_once(':').unwrap();
            if [
                "Umask",
                "Ngid",
                "FDSize",
                "NStgid",
                "SigQ",
                "Speculation_Store_Bypass",
            ]
            .contains(&name)
            {
                continue;
            }
            let missing = STATUS.replace(&format!("{line}\n"), "");
            assert!(
                matches!(TaskStatus::parse(&missing), Err(ProcError::Missing(field)) if field == name),
                "{name}"
            );
            let doubled = format!("{STATUS}{line}\n");
            assert!(
                matches!(TaskStatus::parse(&doubled), Err(ProcError::Twice(field)) if field == name),
                "{name}"
            );
            if !["Name", "State"].contains(&name) {
                let malformed = STATUS.replace(line, &format!("{name}:\tx"));
                assert!(TaskStatus::parse(&malformed).is_err(), "{name}");
            }
        }
    }

    #[test]
    fn a_hostile_name_does_not_move_the_fields_of_stat() {
        let text = |name: &str| {
            format!(
                "77 ({name}) S 1 77 77 0 -1 16448 1 2 3 4 5 6 7 8 20 0 9 0 12345 0 0 18446744073709551615 0"
            )
        };
        for name in ["worker", "a) S 1 1 1 1 1 0", ") R (", "a\nb", ""] {
            let stat = TaskStat::parse(&text(name)).unwrap();
            assert_eq!(
                (stat.pid, stat.name.as_str(), stat.state, stat.ppid),
                (77, name, 'S', 1)
            );
            assert_eq!(
                (stat.flags, stat.threads, stat.start_time),
                (16448, 9, 12345)
            );
            assert!(stat.is_user_worker() && !stat.is_exiting());
        }
        assert!(TaskStat::parse("77 worker S 1").is_err());
        assert!(TaskStat::parse("77 (worker) S 1 77").is_err());
    }

    #[test]
    fn this_kernels_limits_are_those_of_getrlimit() {
        let text = std::fs::read_to_string("/proc/self/limits").unwrap();
        for resource in Resource::ALL {
            assert!(limit(&text, resource).is_some(), "{resource}");
        }
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let known = |limit: Option<u64>| limit.map_or(Limit::Unlimited, Limit::At);
        assert_eq!(
            limit(&text, Resource::Nofile),
            Some((known(files.current), known(files.maximum)))
        );
        assert_eq!(
            limit(
                "Max open files            many      4 files",
                Resource::Nofile
            ),
            None
        );
        assert_eq!(limit("", Resource::Nofile), None);
    }

    #[test]
    fn a_descriptors_flags_are_octal() {
        assert_eq!(
            descriptor_flags("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"),
            Some(0o100_002)
        );
        assert_eq!(descriptor_flags("pos:\t0\n"), None);
        assert_eq!(descriptor_flags("flags:\t9\n"), None);
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&null);
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        assert_eq!(descriptor_flags(&text).map(|flags| flags & 3), Some(0));
    }

    #[test]
    fn this_kernels_records_parse() {
        let status =
            TaskStatus::parse(&std::fs::read_to_string("/proc/thread-self/status").unwrap())
                .unwrap();
        let stat =
            TaskStat::parse(&std::fs::read_to_string("/proc/thread-self/stat").unwrap()).unwrap();
        assert_eq!(status.pid, stat.pid);
        assert_eq!(status.tgid, std::process::id());
        assert!(!stat.is_user_worker() && !stat.is_exiting());
    }
}
