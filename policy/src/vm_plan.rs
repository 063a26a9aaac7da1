//! What one VM would be granted, before it runs: the descriptors that its VM file comes to, each beside the policy's answer and
//! reason.
//!
//! The broker says what a VM file comes to ([`VmPlan`]), since it alone reads VM files; nothing is opened for it, so a file may
//! be another one when the VM starts, and the broker asks the policy again then, about what it has opened.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::descriptors::{Access, Candidate, Grant, Kind, Seal};
use crate::explain::Explanation;
use crate::policy::Policy;

/// What a VM file comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPlan {
    /// The VM's name.
    pub name: String,
    /// Its policy's file, or `default`.
    pub policy: PathBuf,
    /// The worker's binary that the first worker would be.
    pub worker: PathBuf,
    /// Whether that is the one that lies beside the broker.
    pub worker_is_beside: bool,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Guest RAM, in bytes.
    pub ram: u64,
    /// How much of it a worker has pinned for devices of the host, in bytes.
    pub pinned: u64,
    /// Every descriptor that a start opens or makes.
    pub descriptors: Vec<Planned>,
    /// The names under which a worker may get more while its guest runs.
    pub later: Vec<String>,
}

/// Descriptors of one name that come from one line of a VM file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Planned {
    /// The name in the policy.
    pub name: String,
    /// The first and the last of their numbers under that name.
    pub ids: (u32, u32),
    /// What they are.
    pub kind: Kind,
    /// How they would be open.
    pub access: Access,
    /// Where they come from, without symbolic links; none: the broker makes them.
    pub path: Option<PathBuf>,
    /// What in the VM file they are for.
    pub purpose: String,
    /// Who would hold them.
    pub holder: Holder,
    /// Why they could not be opened as things are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<String>,
}

/// Who would hold a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// Every worker, and the broker.
    Worker,
    /// The broker alone: policy says where it may be, and no worker has it.
    Broker,
}

/// What one VM would be granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmExplanation {
    /// The VM's name.
    pub vm: String,
    /// What surrounds its workers, with this VM's numbers, one sentence each.
    pub process: Vec<String>,
    /// What a start would hand out.
    pub descriptors: Vec<Foreseen>,
    /// What could come to a worker later, one sentence each.
    pub later: Vec<String>,
    /// The policy itself.
    pub explanation: Explanation,
}

/// Descriptors with the policy's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Foreseen {
    /// Which.
    #[serde(flatten)]
    pub planned: Planned,
    /// What the policy says.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// What the policy says of a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// It would be handed out.
    Granted {
        /// The policy's reason.
        why: String,
        /// The line of the policy.
        line: usize,
    },
    /// It would not, and the VM would not start.
    Refused {
        /// What the policy does not cover.
        because: String,
    },
    /// It is not there, so policy was not asked.
    Unfit,
}

impl Planned {
    /// What the policy answers for all of them.
    fn verdict(&self, policy: &Policy) -> Verdict {
        if self.obstacle.is_some() {
            return Verdict::Unfit;
        }
        let Some(grant) = policy.grant(&self.name) else {
            return Verdict::Refused {
                because: format!("the policy grants no descriptor called {:?}", self.name),
            };
        };
        // The broker seals guest RAM with all of these, or fails.
        let seals = BTreeSet::from([Seal::Shrink, Seal::Grow, Seal::Seal]);
        let denied = |index| {
            let candidate = Candidate {
                name: &self.name,
                index,
                kind: self.kind,
                access: self.access,
                seals: &seals,
                path: self.path.as_deref(),
            };
            grant.permits(&candidate).err()
        };
        let refused = match (self.holder, &self.path) {
            (Holder::Worker, _) => {
                let (first, last) = self.ids;
                let first = (first..=last).find_map(denied);
                first.map(|error| error.to_string())
            }
            (Holder::Broker, Some(path)) if !grant.permits_path(path) => Some(format!(
                "{}: the policy grants no {} under that name",
                self.name,
                path.display()
            )),
            (Holder::Broker, _) => None,
        };
        match refused {
            Some(because) => Verdict::Refused { because },
            None => Verdict::Granted {
                why: grant.why.clone(),
                line: grant.line,
            },
        }
    }
}

impl Policy {
    /// What a VM of this plan would be granted under this policy.
    #[must_use]
    pub fn explain_vm(&self, plan: &VmPlan) -> VmExplanation {
        let descriptors = plan.descriptors.iter().map(|planned| Foreseen {
            planned: planned.clone(),
            verdict: planned.verdict(self),
        });
        VmExplanation {
            vm: plan.name.clone(),
            process: self.vm_sentences(plan),
            descriptors: descriptors.collect(),
            later: self.later_sentences(plan),
            explanation: self.explain(),
        }
    }

    fn vm_sentences(&self, plan: &VmPlan) -> Vec<String> {
        let VmPlan {
            vcpus, ram, pinned, ..
        } = *plan;
        // Two workers are in it during an upgrade.
        let limits = self.cgroup_limits(2, vcpus, ram);
        let rlimits: Vec<String> = self
            .rlimits(vcpus, pinned)
            .iter()
            .map(|(resource, limit)| format!("{resource} {limit}"))
            .collect();
        vec![
            format!(
                "{}: {vcpus} vCPUs, {ram} bytes of RAM; a worker of it has at most {} tasks.",
                plan.name,
                self.task_limit(vcpus)
            ),
            format!(
                "Its cgroup, for the two workers of an upgrade: {} tasks; {} bytes of memory; {} processors.",
                limits.tasks, limits.memory, limits.processors
            ),
            format!("The limits of each worker: {}.", rlimits.join(", ")),
        ]
    }

    /// What may be handed out while the guest runs, under names that a start does not use up.
    fn later_sentences(&self, plan: &VmPlan) -> Vec<String> {
        let used = |grant: &Grant| -> u64 {
            let planned = plan.descriptors.iter();
            planned
                .filter(|one| one.name == grant.name && one.holder == Holder::Worker)
                .map(|one| u64::from(one.ids.1.saturating_sub(one.ids.0)) + 1)
                .sum()
        };
        let left = |grant: &&Grant| {
            plan.later.contains(&grant.name) && u64::from(grant.count) > used(grant)
        };
        self.descriptors
            .iter()
            .filter(left)
            .map(|grant| {
                let more = u64::from(grant.count) - used(grant);
                format!("{}, {more} more: {}", grant.name, grant.sentence())
            })
            .collect()
    }
}

impl VmExplanation {
    /// Whether the policy refuses something of it.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        let mut all = self.descriptors.iter();
        all.any(|one| matches!(one.verdict, Verdict::Refused { .. }))
    }

    /// Whether something is not there.
    #[must_use]
    pub fn is_unfit(&self) -> bool {
        let mut all = self.descriptors.iter();
        all.any(|one| one.verdict == Verdict::Unfit)
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = self.ids;
        match first == last {
            true => f.pad(&format!("{}#{first}", self.name)),
            false => f.pad(&format!("{}#{first}-{last}", self.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BUILTIN;

    fn planned(name: &str, kind: Kind, path: Option<&str>) -> Planned {
        Planned {
            name: name.to_owned(),
            ids: (0, 0),
            kind,
            access: Access::ReadWrite,
            path: path.map(PathBuf::from),
            purpose: "a test".to_owned(),
            holder: Holder::Worker,
            obstacle: None,
        }
    }

    fn plan(descriptors: Vec<Planned>) -> VmPlan {
        VmPlan {
            name: "web1".to_owned(),
            policy: "default".into(),
            worker: "/w".into(),
            worker_is_beside: true,
            vcpus: 2,
            ram: 1 << 29,
            pinned: 0,
            descriptors,
            later: Vec::new(),
        }
    }

    fn answers(policy: &str, descriptors: Vec<Planned>) -> Vec<Verdict> {
        let explanation = Policy::parse(policy, "test")
            .unwrap()
            .explain_vm(&plan(descriptors));
        explanation
            .descriptors
            .into_iter()
            .map(|one| one.verdict)
            .collect()
    }

    #[test]
    fn a_plan_is_answered_as_the_open_descriptor_will_be() {
        let narrow = BUILTIN.replace(
            "name = \"disk\"\nkinds = [\"file\", \"block\"]\naccess = \"read-write\"\ncount = 64\npaths = [\"/**\"]",
            "name = \"disk\"\nkinds = [\"file\"]\naccess = \"read\"\ncount = 2\npaths = [\"/srv/**\"]",
        );
        assert_ne!(narrow, BUILTIN);
        let disk = Planned {
            access: Access::Read,
            ..planned("disk", Kind::File, Some("/srv/a.img"))
        };
        let wrong = [
            planned("disk", Kind::File, Some("/srv/a.img")),
            Planned {
                kind: Kind::Block,
                ..disk.clone()
            },
            Planned {
                ids: (1, 2),
                ..disk.clone()
            },
            Planned {
                path: Some("/home/a.img".into()),
                ..disk.clone()
            },
            planned("no-such-name", Kind::Eventfd, None),
        ];
        for verdict in answers(&narrow, wrong.into()) {
            assert!(matches!(verdict, Verdict::Refused { .. }), "{verdict:?}");
        }
        let away = Planned {
            obstacle: Some("no such file".into()),
            ..disk.clone()
        };
        assert_eq!(answers(&narrow, vec![away]), [Verdict::Unfit]);
        let last = Planned {
            ids: (0, 1),
            ..disk
        };
        let memory = planned("ram", Kind::Memfd, None);
        for verdict in answers(&narrow, vec![last, memory]) {
            assert!(matches!(verdict, Verdict::Granted { .. }), "{verdict:?}");
        }
    }

    #[test]
    fn what_only_the_broker_holds_is_asked_for_by_its_place() {
        let listener = |path| Planned {
            holder: Holder::Broker,
            ..planned("vsock", Kind::File, Some(path))
        };
        let narrow = BUILTIN.replace(
            "count = 64\n# Where the broker listens for the guest, and SOCKET_PORT for each port of the host that the guest may reach.\npaths = [\"/**\"]",
            "count = 64\npaths = [\"/run/guests/*\"]",
        );
        assert_ne!(narrow, BUILTIN);
        let verdicts = answers(&narrow, vec![listener("/run/guests/a"), listener("/tmp/a")]);
        assert!(matches!(verdicts[0], Verdict::Granted { .. }));
        assert!(matches!(verdicts[1], Verdict::Refused { .. }));
    }

    #[test]
    fn what_a_start_leaves_over_could_come_later() {
        let plan = VmPlan {
            later: vec!["disk".to_owned(), "state".to_owned()],
            ..plan(vec![planned("disk", Kind::File, Some("/srv/a.img"))])
        };
        let explanation = Policy::builtin().unwrap().explain_vm(&plan);
        let later = |start: &str| explanation.later.iter().any(|one| one.starts_with(start));
        assert!(later("disk, 63 more: "), "{:?}", explanation.later);
        assert!(later("state, 1 more: "));
        assert!(!later("vsock"));
        let sentence = &explanation.process[1];
        assert!(
            sentence.contains("1073741824 bytes of memory"),
            "{sentence}"
        );
    }
}
