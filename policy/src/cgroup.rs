//! The VM's cgroup: what its tasks, memory and processor time are limited to, and how each version of cgroups says so.
//!
//! All generations of a VM's worker are in one cgroup, since guest RAM stays charged to it. Limits are what a policy
//! grants on top of what the VM file asks for. This module works out values and judges what the kernel shows; the broker
//! writes them.

use serde::Serialize;

use crate::policy::Policy;
use crate::rlimits::Limit;

/// What a policy says of the cgroup. The number of tasks follows from its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupPolicy {
    /// Bytes beyond guest RAM.
    pub memory_headroom: Limit,
    /// Processors beyond one per vCPU.
    pub cpu_headroom: Limit,
}

/// The limits of one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CgroupLimits {
    /// Tasks.
    pub tasks: u64,
    /// Bytes of memory, page cache and what the kernel keeps for it included.
    pub memory: Limit,
    /// Processors' worth of time.
    pub processors: Limit,
}

/// Which interface a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// A hierarchy for each controller (Documentation/admin-guide/cgroup-v1).
    V1,
    /// One for all (Documentation/admin-guide/cgroup-v2.rst).
    V2,
}

/// One limit as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupSetting {
    /// The controller that it belongs to.
    pub controller: &'static str,
    /// The file in the cgroup's directory.
    pub file: &'static str,
    /// What is written to it.
    pub value: String,
}

/// The period over which processor time is counted, in microseconds; the kernel's default in both versions
/// (Documentation/scheduler/sched-bwc.rst).
const PERIOD_US: u64 = 100_000;

/// Bytes of a page; memory is limited to whole ones.
const PAGE: u64 = 4096;

impl Default for CgroupPolicy {
    fn default() -> Self {
        Self {
            memory_headroom: Limit::Unlimited,
            cpu_headroom: Limit::Unlimited,
        }
    }
}

impl Policy {
    /// The limits of the cgroup of a VM with this many vCPUs and bytes of RAM, in which `workers` may be at a time.
    #[must_use]
    pub fn cgroup_limits(&self, workers: u64, vcpus: u32, ram: u64) -> CgroupLimits {
        let beyond = |headroom: Limit, own: u64| match headroom {
            Limit::At(headroom) => Limit::At(own.saturating_add(headroom)),
            Limit::Unlimited => Limit::Unlimited,
        };
        CgroupLimits {
            tasks: self.task_limit(vcpus).saturating_mul(workers),
            memory: beyond(self.cgroup.memory_headroom, ram),
            processors: beyond(self.cgroup.cpu_headroom, vcpus.into()),
        }
    }
}

impl CgroupLimits {
    /// What to write, tasks first; nothing for what is not limited.
    #[must_use]
    pub fn settings(&self, version: CgroupVersion) -> Vec<CgroupSetting> {
        let mut settings = vec![CgroupSetting {
            controller: "pids",
            file: "pids.max",
            value: self.tasks.to_string(),
        }];
        if let Limit::At(bytes) = self.memory {
            let file = match version {
                CgroupVersion::V1 => "memory.limit_in_bytes",
                CgroupVersion::V2 => "memory.max",
            };
            settings.push(CgroupSetting {
                controller: "memory",
                file,
                value: (bytes / PAGE * PAGE).to_string(),
            });
        }
        if let Limit::At(processors) = self.processors {
            let quota = processors.saturating_mul(PERIOD_US);
            let (file, value) = match version {
                CgroupVersion::V1 => ("cpu.cfs_quota_us", quota.to_string()),
                CgroupVersion::V2 => ("cpu.max", format!("{quota} {PERIOD_US}")),
            };
            settings.push(CgroupSetting {
                controller: "cpu",
                file,
                value,
            });
        }
        settings
    }
}

impl CgroupSetting {
    /// Whether what the file says is no more than this. What is no number (`max`), or is counted otherwise, is more.
    #[must_use]
    pub fn covers(&self, found: &str) -> bool {
        let parse = |text: &str| {
            let mut words = text.split_whitespace();
            let amount = words.next()?.parse::<u64>().ok()?;
            Some((amount, words.next().map(str::to_owned)))
        };
        match (parse(found), parse(&self.value)) {
            (Some((found, found_period)), Some((amount, period))) => {
                found <= amount && found_period == period
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(limits: CgroupLimits, version: CgroupVersion) -> Vec<(&'static str, String)> {
        let settings = limits.settings(version);
        settings
            .into_iter()
            .map(|one| (one.file, one.value))
            .collect()
    }

    #[test]
    fn limits_are_what_the_vm_asks_for_and_the_headroom() {
        let text = crate::BUILTIN
            .replace("memory_headroom = 536_870_912", "memory_headroom = 10_000")
            .replace("cpu_headroom = \"unlimited\"", "cpu_headroom = 3");
        let policy = Policy::parse(&text, "test").unwrap();
        let limits = policy.cgroup_limits(2, 4, 1 << 30);
        let memory = (((1 << 30) + 10_000) / 4096 * 4096).to_string();
        let quota = ((4 + 3) * 100_000).to_string();
        assert_eq!(
            values(limits, CgroupVersion::V1),
            [
                ("pids.max", "40".to_owned()),
                ("memory.limit_in_bytes", memory.clone()),
                ("cpu.cfs_quota_us", quota.clone())
            ]
        );
        assert_eq!(
            values(limits, CgroupVersion::V2),
            [
                ("pids.max", "40".to_owned()),
                ("memory.max", memory),
                ("cpu.max", format!("{quota} 100000"))
            ]
        );
    }

    #[test]
    fn what_is_not_limited_is_not_written() {
        let limits = CgroupLimits {
            tasks: 3,
            memory: Limit::Unlimited,
            processors: Limit::Unlimited,
        };
        assert_eq!(
            values(limits, CgroupVersion::V2),
            [("pids.max", "3".to_owned())]
        );
    }

    #[test]
    fn a_raised_limit_is_told_from_a_lower_one() {
        let limits = CgroupLimits {
            tasks: 7,
            memory: Limit::At(1 << 20),
            processors: Limit::At(2),
        };
        let v2 = limits.settings(CgroupVersion::V2);
        for (setting, same, more) in [
            (0, "7\n", "8\n"),
            (1, "1048576\n", "max\n"),
            (2, "200000 100000\n", "max 100000\n"),
            (2, "100000 100000\n", "200000 50000\n"),
        ] {
            let setting = v2.get(setting).unwrap();
            assert!(setting.covers(same), "{setting:?} {same}");
            assert!(!setting.covers(more), "{setting:?} {more}");
        }
        let v1 = limits.settings(CgroupVersion::V1);
        // -1 is no limit there.
        assert!(!v1.last().unwrap().covers("-1\n"));
    }
}
