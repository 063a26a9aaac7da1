//! What no policy may permit.
//!
//! A policy is an operator's to write, but some promises are the product's: a settled worker opens, connects and
//! executes nothing, no page is ever executable that was not in the binary, and nothing is done to a descriptor that
//! the running worker, which shares it, would feel. A rule that lets such a call through, with any arguments, does
//! not parse.

use std::fmt;

use crate::condition::{Comparison, Conjunction, cover, describe, text};
use crate::constants::{self, Family};
use crate::explain::Never;
use crate::policy::{Role, Rule};
use crate::syscalls::{Syscall, Width};

/// Calls that are out of bounds.
#[derive(Debug)]
pub(crate) struct Bound {
    roles: &'static [Role],
    calls: &'static [&'static str],
    /// The arguments that are; all, if there is nothing.
    when: Arguments,
    pub(crate) why: &'static str,
}

#[derive(Debug)]
enum Arguments {
    Any,
    /// A condition, as in a policy.
    These(&'static str),
    /// Requests of `ioctl` whose type, the second byte, is this, but for the ones named.
    IoctlType(u8, &'static [&'static str]),
}

/// A call that a bound is about, for messages.
#[derive(Debug)]
pub(crate) struct Crossed {
    call: Syscall,
    with: Conjunction,
    pub(crate) why: &'static str,
}

const BOUNDS: &[Bound] = &[
    Bound {
        roles: &Role::ALL,
        calls: &[
            "open",
            "openat",
            "openat2",
            "creat",
            "open_by_handle_at",
            "open_tree",
            "mount",
            "umount2",
            "move_mount",
            "fsopen",
            "fsmount",
            "fspick",
            "pivot_root",
            "chroot",
            "mknod",
            "mknodat",
        ],
        when: Arguments::Any,
        why: "the broker opens everything; a worker has no path",
    },
    Bound {
        roles: &Role::ALL,
        calls: &[
            "socket",
            "socketpair",
            "connect",
            "bind",
            "listen",
            "accept",
            "accept4",
        ],
        when: Arguments::Any,
        why: "the broker makes every socket",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["memfd_create", "memfd_secret"],
        when: Arguments::Any,
        why: "a missing descriptor is an error, never made in the worker; and a memfd can be executed",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["fork", "vfork", "clone3", "execve"],
        when: Arguments::Any,
        why: "a worker makes threads only, and what it executes is the copy that was checked",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["clone"],
        when: Arguments::These("flags lacks CLONE_THREAD"),
        why: "a worker makes threads, never processes",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["execveat"],
        when: Arguments::These("flags lacks AT_EMPTY_PATH"),
        why: "what is executed is an open descriptor, never a path",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["mmap", "mprotect"],
        when: Arguments::These("prot has PROT_EXEC"),
        why: "no page becomes executable that was not in the binary",
    },
    Bound {
        roles: &Role::ALL,
        calls: &[
            "pkey_mprotect",
            "shmat",
            "remap_file_pages",
            "personality",
            "modify_ldt",
            "uselib",
            "map_shadow_stack",
        ],
        when: Arguments::Any,
        why: "no page becomes executable that was not in the binary",
    },
    Bound {
        roles: &Role::ALL,
        calls: &[
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "process_madvise",
            "kcmp",
            "pidfd_getfd",
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "unshare",
            "setns",
            "keyctl",
            "add_key",
            "request_key",
            "kexec_load",
            "kexec_file_load",
            "init_module",
            "finit_module",
            "delete_module",
            "iopl",
            "ioperm",
        ],
        when: Arguments::Any,
        why: "these reach around the filters, into other processes, or deep into the kernel",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["fcntl"],
        // F_SETLK 6, F_SETLKW 7, F_OFD_SETLKW 38.
        when: Arguments::These("cmd in F_SETFL, 6, 7, F_OFD_SETLK, 38, F_ADD_SEALS"),
        why: "the running worker shares the open file, and would feel it",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["ioctl"],
        when: Arguments::IoctlType(b'T', &["TUNSETOFFLOAD", "TUNGETIFF"]),
        why: "FIONBIO, terminals and taps: the running worker shares the open file, and would feel it",
    },
    Bound {
        roles: &Role::ALL,
        calls: &["ioctl"],
        when: Arguments::IoctlType(
            b';',
            &[
                "VFIO_DEVICE_SET_IRQS",
                "VFIO_DEVICE_RESET",
                "VFIO_IOMMU_MAP_DMA",
                "VFIO_IOMMU_UNMAP_DMA",
            ],
        ),
        why: "the broker takes devices of the host from VFIO; a worker has those that it was handed",
    },
    Bound {
        roles: &Role::STEADY,
        calls: &[
            "execveat",
            "clone",
            "seccomp",
            "prctl",
            "arch_prctl",
            "landlock_create_ruleset",
            "landlock_add_rule",
            "landlock_restrict_self",
            "set_tid_address",
        ],
        when: Arguments::Any,
        why: "a settled thread makes no thread, executes nothing and changes nothing of itself",
    },
    Bound {
        roles: &Role::STEADY,
        calls: &["rt_sigaction"],
        when: Arguments::These("sig is SIGSYS"),
        why: "the handler that reports violations stays",
    },
    Bound {
        roles: &Role::STEADY,
        calls: &["ioctl"],
        when: Arguments::These(
            "request in KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2, KVM_CREATE_DEVICE, \
             KVM_CREATE_GUEST_MEMFD, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2, KVM_ENABLE_CAP",
        ),
        why: "the shape of the VM is final before the guest runs",
    },
];

/// The first bound that a rule crosses, and for which role.
pub(crate) fn crossed(rule: &Rule) -> Option<(Role, Crossed)> {
    for bound in BOUNDS
        .iter()
        .filter(|bound| bound.calls.contains(&rule.call.name()))
    {
        let Some(role) = bound.roles.iter().find(|role| rule.roles.contains(role)) else {
            continue;
        };
        let any = [Vec::new()];
        let permitted = if rule.alternatives.is_empty() {
            &any[..]
        } else {
            &rule.alternatives
        };
        let forbidden = bound.forbidden(rule.call);
        let with = forbidden
            .into_iter()
            .find(|never| permitted.iter().any(|one| cover::intersect(one, never)));
        if let Some(with) = with {
            return Some((
                *role,
                Crossed {
                    call: rule.call,
                    with,
                    why: bound.why,
                },
            ));
        }
    }
    None
}

/// What no policy may permit of one call.
pub(crate) fn of(call: Syscall) -> Vec<Never> {
    let bounds = BOUNDS
        .iter()
        .filter(|bound| bound.calls.contains(&call.name()));
    let never = |bound: &Bound| {
        let what = match bound.when {
            Arguments::Any => "it".to_owned(),
            Arguments::These(condition) => format!("it when {condition}"),
            Arguments::IoctlType(kind, but) => {
                format!(
                    "it with a request of type {:?} but {}",
                    char::from(kind),
                    but.join(", ")
                )
            }
        };
        Never {
            roles: bound.roles.to_vec(),
            what,
            why: bound.why,
        }
    };
    bounds.map(never).collect()
}

impl Bound {
    /// The arguments that are out of bounds. A bound that cannot be worked out forbids the call altogether.
    fn forbidden(&self, call: Syscall) -> Vec<Conjunction> {
        match self.when {
            Arguments::Any => vec![Vec::new()],
            Arguments::These(condition) => {
                text::parse(call, condition).unwrap_or_else(|_| vec![Vec::new()])
            }
            Arguments::IoctlType(kind, but) => {
                let request = |mask, value| {
                    vec![Comparison {
                        index: 1,
                        width: Width::Dword,
                        mask,
                        value,
                    }]
                };
                let but: Vec<Conjunction> = but
                    .iter()
                    .filter_map(|name| constants::value(Family::Ioctl, name))
                    .map(|value| request(u64::from(u32::MAX), value))
                    .collect();
                let all = request(0xff00, u64::from(kind) << 8);
                cover::difference(&all, &but).unwrap_or_else(|| vec![all])
            }
        }
    }
}

impl fmt::Display for Crossed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.with.is_empty() {
            return self.call.fmt(f);
        }
        write!(f, "{} when {}", self.call, describe(self.call, &self.with))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_names_real_calls_and_its_condition_parses() {
        for bound in BOUNDS {
            for name in bound.calls {
                let call = Syscall::from_name(name).unwrap_or_else(|| panic!("{name}"));
                if let Arguments::These(condition) = bound.when {
                    text::parse(call, condition).unwrap();
                }
                if let Arguments::IoctlType(_, but) = bound.when {
                    assert!(
                        but.iter()
                            .all(|name| constants::value(Family::Ioctl, name).is_some())
                    );
                }
            }
        }
    }

    fn crosses(role: Role, call: &str, when: Option<&str>) -> bool {
        let call = Syscall::from_name(call).unwrap();
        let alternatives = when.map_or_else(Vec::new, |when| text::parse(call, when).unwrap());
        let rule = Rule {
            topic: String::new(),
            roles: [role].into(),
            call,
            when: when.map(str::to_owned),
            alternatives,
            why: String::new(),
            line: 1,
        };
        crossed(&rule).is_some()
    }

    #[test]
    fn a_rule_may_come_close_but_not_cross() {
        let build = [
            ("openat", None, true),
            ("mmap", None, true),
            ("mmap", Some("flags has MAP_ANONYMOUS"), true),
            ("mmap", Some("prot lacks PROT_EXEC"), false),
            ("mmap", Some("prot is 7"), true),
            ("mprotect", Some("prot in PROT_READ, PROT_NONE"), false),
            ("clone", Some("flags has CLONE_VM"), true),
            ("clone", Some("flags has CLONE_THREAD"), false),
            ("execveat", Some("flags is AT_EMPTY_PATH"), false),
            ("execveat", None, true),
            ("fcntl", Some("cmd is F_GETFL"), false),
            ("fcntl", Some("cmd in F_GETFL, F_SETFL"), true),
            ("ioctl", None, true),
            ("ioctl", Some("request is FIONBIO"), true),
            ("ioctl", Some("request is TUNSETIFF"), true),
            ("ioctl", Some("request is TUNSETOFFLOAD"), false),
            ("ioctl", Some("request is 0x5412"), true),
            ("ioctl", Some("request has 0x5400"), true),
            ("ioctl", Some("request is KVM_CREATE_VM"), false),
        ];
        for (call, when, expected) in build {
            assert_eq!(
                crosses(Role::Build, call, when),
                expected,
                "{call} {when:?}"
            );
        }
        let steady = [
            ("clone", Some("flags has CLONE_THREAD")),
            ("execveat", Some("flags is AT_EMPTY_PATH")),
            ("prctl", Some("option is PR_SET_NAME")),
            ("rt_sigaction", None),
            ("ioctl", Some("request is KVM_CREATE_VM")),
        ];
        for (call, when) in steady {
            for role in Role::STEADY {
                assert!(crosses(role, call, when), "{role} {call} {when:?}");
            }
        }
    }
}
