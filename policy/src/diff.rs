//! What a worker under a new policy may do that it may not under the old one, and the other way round.
//!
//! The comparison is of what is permitted, not of text: other words, another order, or a rule split in two are no
//! difference. Everything that cannot be shown to be no more than before counts as more.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::condition::{Conjunction, cover, describe};
use crate::descriptors::{Access, Grant, PathPattern};
use crate::policy::{Policy, Role, Violation};
use crate::rlimits::{Limit, Resource};
use crate::syscalls::Syscall;

/// Every difference between two policies, by subject.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// In the order of the file's tables.
    pub changes: Vec<Change>,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// More or less.
    pub direction: Direction,
    /// What it is about: a role, or a table of the file.
    pub subject: String,
    /// What changed, in words.
    pub what: String,
    /// For system calls: whether another thread that runs at the same time had it before (or still has it). A worker's
    /// threads share their memory, so what one may do, code in another may have done by it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub elsewhere: Option<bool>,
    /// The reason that the policy gives for what was added.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub why: Option<String>,
}

/// More or less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The new policy permits more.
    Widens,
    /// The new policy permits less.
    Narrows,
    /// Neither, and yet a worker notices.
    Alters,
}

impl Difference {
    /// What `new` changes against `old`.
    #[must_use]
    pub fn between(old: &Policy, new: &Policy) -> Self {
        let mut changes = Changes::default();
        changes.workers(old, new);
        changes.process(old, new);
        changes.descriptors(old, new);
        changes.access(old, new);
        changes.roles(old, new);
        Self { changes: changes.0 }
    }

    /// Whether the new policy permits anything that the old one does not. A call that moves from one thread of a worker to
    /// another is nothing new: its privilege is the union over its threads, which share their memory.
    #[must_use]
    pub fn widens(&self) -> bool {
        self.changes.iter().any(Change::widens)
    }

    /// What a running worker of the new policy may do that one of the old may not. Which binaries may run is not among that:
    /// it is how a new build is permitted; nor is who may ask its broker for what.
    pub fn widens_a_worker(&self) -> impl Iterator<Item = &Change> {
        self.changes
            .iter()
            .filter(|change| change.widens() && !["workers", "access"].contains(&&*change.subject))
    }

    /// Whether the two permit the same.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl Change {
    /// Whether it adds to what the old policy permitted to any thread.
    #[must_use]
    pub fn widens(&self) -> bool {
        self.direction == Direction::Widens && self.elsewhere != Some(true)
    }
}

#[derive(Default)]
struct Changes(Vec<Change>);

impl Changes {
    fn add(&mut self, direction: Direction, subject: &str, what: String) {
        self.0.push(Change {
            direction,
            subject: subject.to_owned(),
            what,
            elsewhere: None,
            why: None,
        });
    }

    /// A change for the better or the worse, by which of the two is more.
    fn either(&mut self, more: bool, subject: &str, what: String) {
        self.add(
            if more {
                Direction::Widens
            } else {
                Direction::Narrows
            },
            subject,
            what,
        );
    }

    fn workers(&mut self, old: &Policy, new: &Policy) {
        let digests = |policy: &Policy| {
            policy
                .workers
                .digests
                .iter()
                .copied()
                .collect::<BTreeSet<_>>()
        };
        for digest in digests(new).difference(&digests(old)) {
            self.add(Direction::Widens, "workers", format!("{digest} may run"));
        }
        for digest in digests(old).difference(&digests(new)) {
            self.add(
                Direction::Narrows,
                "workers",
                format!("{digest} may no longer run"),
            );
        }
        let keys = |policy: &Policy| -> BTreeSet<String> {
            let keys = policy.workers.keys.iter();
            keys.map(ToString::to_string).collect()
        };
        let (before, after) = (keys(old), keys(new));
        for key in after.difference(&before) {
            let what = format!("what the key {key} has signed may run");
            self.add(Direction::Widens, "workers", what);
        }
        for key in before.difference(&after) {
            let what = format!("what the key {key} has signed may no longer run");
            self.add(Direction::Narrows, "workers", what);
        }
        let (before, after) = (&old.workers.directory, &new.workers.directory);
        if before != after {
            if let Some(path) = after {
                self.add(
                    Direction::Widens,
                    "workers",
                    format!("what {} lists may run", path.display()),
                );
            }
            if let Some(path) = before {
                self.add(
                    Direction::Narrows,
                    "workers",
                    format!("what {} lists may no longer run", path.display()),
                );
            }
        }
        for (direction, with, without, may) in [
            (Direction::Widens, new, old, "may"),
            (Direction::Narrows, old, new, "may no longer"),
        ] {
            for approval in &with.approvals {
                if without.approves(&approval.worker).is_none() {
                    let what = format!(
                        "an upgrade to {} {may} widen what a worker may do",
                        approval.worker
                    );
                    self.add(direction, "workers", what);
                }
            }
        }
        if old.workers.beside_broker != new.workers.beside_broker {
            let may = if new.workers.beside_broker {
                "may"
            } else {
                "may no longer"
            };
            self.either(
                new.workers.beside_broker,
                "workers",
                format!("the worker beside the broker {may} run"),
            );
        }
    }

    fn process(&mut self, old: &Policy, new: &Policy) {
        if old.learn.is_some() != new.learn.is_some() {
            let what = if new.learn.is_some() {
                "every call passes, and is reported"
            } else {
                "filters deny what no rule permits"
            };
            self.either(new.learn.is_some(), "learn", what.to_owned());
        }
        let range = |policy: &Policy| {
            let first = u64::from(policy.ids.first.get());
            (first, first + u64::from(policy.ids.count.get()) - 1)
        };
        let (before, after) = (range(old), range(new));
        if before != after {
            let more = after.0 < before.0 || after.1 > before.1;
            let what = format!(
                "{}..={} instead of {}..={}",
                after.0, after.1, before.0, before.1
            );
            self.either(more, "ids", what);
        }
        if old.ids.unprivileged_broker != new.ids.unprivileged_broker {
            let may = if new.ids.unprivileged_broker {
                "may"
            } else {
                "may no longer"
            };
            let what = format!("a broker without privilege {may} run workers under its own id");
            self.either(new.ids.unprivileged_broker, "ids", what);
        }
        for namespace in old.namespaces.difference(&new.namespaces) {
            self.add(
                Direction::Widens,
                "namespaces",
                format!("{namespace} may be the broker's"),
            );
        }
        for namespace in new.namespaces.difference(&old.namespaces) {
            self.add(
                Direction::Narrows,
                "namespaces",
                format!("{namespace} is the worker's own"),
            );
        }
        let (before, after) = (old.threads.headroom, new.threads.headroom);
        if before != after {
            self.either(
                after > before,
                "threads",
                format!("{after} beyond the vCPUs instead of {before}"),
            );
        }
        for resource in Resource::ALL {
            let limit = |policy: &Policy| policy.rlimits.get(resource);
            self.limit("rlimits", resource, limit(old), limit(new));
        }
        let (before, after) = (old.cgroup, new.cgroup);
        for (what, before, after) in [
            (
                "memory_headroom",
                before.memory_headroom,
                after.memory_headroom,
            ),
            ("cpu_headroom", before.cpu_headroom, after.cpu_headroom),
        ] {
            self.limit("cgroup", what, Some(before), Some(after));
        }
        for ((what, before), (_, after)) in old.io.limits().into_iter().zip(new.io.limits()) {
            self.limit("io", what, Some(before), Some(after));
        }
        let (before, after) = (old.capabilities, new.capabilities);
        if !after.without(before).is_empty() {
            self.add(
                Direction::Widens,
                "capabilities",
                format!("{} kept", after.without(before)),
            );
        }
        if !before.without(after).is_empty() {
            self.add(
                Direction::Narrows,
                "capabilities",
                format!("{} shed", before.without(after)),
            );
        }
        let (before, after) = (old.landlock.floor_abi, new.landlock.floor_abi);
        if before != after {
            self.either(
                after < before,
                "landlock",
                format!("ABI {after} suffices instead of {before}"),
            );
        }
    }

    fn limit(
        &mut self,
        subject: &str,
        name: impl fmt::Display,
        before: Option<Limit>,
        after: Option<Limit>,
    ) {
        let amount = |limit: Option<Limit>| match limit {
            Some(Limit::At(amount)) => amount,
            // Not lowered at all.
            Some(Limit::Unlimited) | None => u64::MAX,
        };
        if amount(before) != amount(after) {
            let word = |limit: Option<Limit>| {
                limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string())
            };
            let what = format!("{name} {} instead of {}", word(after), word(before));
            self.either(amount(after) > amount(before), subject, what);
        }
    }

    fn access(&mut self, old: &Policy, new: &Policy) {
        let (before, after) = (old.access.sentences(), new.access.sentences());
        for sentence in after.difference(&before) {
            self.add(Direction::Widens, "access", sentence.clone());
        }
        for sentence in before.difference(&after) {
            self.add(
                Direction::Narrows,
                "access",
                format!("no longer: {sentence}"),
            );
        }
    }

    fn descriptors(&mut self, old: &Policy, new: &Policy) {
        for grant in &old.descriptors {
            match new.grant(&grant.name) {
                Some(after) => self.grant(grant, after),
                None => self.add(
                    Direction::Narrows,
                    "descriptors",
                    format!("{} is no longer handed out", grant.name),
                ),
            }
        }
        for grant in new
            .descriptors
            .iter()
            .filter(|grant| old.grant(&grant.name).is_none())
        {
            self.add(
                Direction::Widens,
                "descriptors",
                format!("{} is handed out", grant.name),
            );
            if let Some(change) = self.0.last_mut() {
                change.why = Some(grant.why.clone());
            }
        }
    }

    fn grant(&mut self, old: &Grant, new: &Grant) {
        let name = &new.name;
        let subject = "descriptors";
        for kind in new.kinds.difference(&old.kinds) {
            self.add(
                Direction::Widens,
                subject,
                format!("{name} may be a {kind}"),
            );
        }
        for kind in old.kinds.difference(&new.kinds) {
            self.add(
                Direction::Narrows,
                subject,
                format!("{name} may no longer be a {kind}"),
            );
        }
        if old.access != new.access {
            let what = format!("{name} for {} instead of {}", new.access, old.access);
            // From reading to writing takes something away, and gives something.
            self.either(
                !old.access.covers(new.access) || new.access == Access::ReadWrite,
                subject,
                what,
            );
        }
        for seal in old.seals.difference(&new.seals) {
            self.add(
                Direction::Widens,
                subject,
                format!("{name} without the seal {seal}"),
            );
        }
        for seal in new.seals.difference(&old.seals) {
            self.add(
                Direction::Narrows,
                subject,
                format!("{name} with the seal {seal}"),
            );
        }
        if old.count != new.count {
            let what = format!("{} called {name} instead of {}", new.count, old.count);
            self.either(new.count > old.count, subject, what);
        }
        for path in paths_beyond(&new.paths, &old.paths) {
            self.add(Direction::Widens, subject, format!("{name} from {path}"));
        }
        for address in new.addresses.difference(&old.addresses) {
            let what = format!("{name} over TCP at {address}");
            self.add(Direction::Widens, subject, what);
        }
        for address in old.addresses.difference(&new.addresses) {
            let what = format!("{name} no longer over TCP at {address}");
            self.add(Direction::Narrows, subject, what);
        }
        for path in paths_beyond(&old.paths, &new.paths) {
            self.add(
                Direction::Narrows,
                subject,
                format!("{name} no longer from {path}"),
            );
        }
    }

    fn roles(&mut self, old: &Policy, new: &Policy) {
        let calls: BTreeSet<Syscall> = old
            .rules
            .iter()
            .chain(&new.rules)
            .map(|rule| rule.call)
            .collect();
        for role in Role::ALL {
            let violation = |policy: &Policy| {
                policy
                    .roles
                    .get(&role)
                    .map_or(Violation::Kill, |role| role.violation)
            };
            let (before, after) = (violation(old), violation(new));
            if before != after {
                // A process that survives a violation can attempt the next.
                let more = after == Violation::Trap;
                self.either(
                    more,
                    role.name(),
                    format!("a violation is answered by {after} instead of {before}"),
                );
            }
            for call in &calls {
                self.call(old, new, role, *call);
            }
        }
        for refusal in &new.refusals {
            let before = old
                .refusals
                .iter()
                .find(|one| one.call == refusal.call)
                .map(|one| one.errno);
            if before != Some(refusal.errno) {
                let what = format!("{} is answered with {}", refusal.call, refusal.errno_name);
                self.add(Direction::Alters, Role::Build.name(), what);
            }
        }
        for refusal in old
            .refusals
            .iter()
            .filter(|one| new.refusals.iter().all(|other| other.call != one.call))
        {
            let what = format!(
                "{} is no longer answered with {}",
                refusal.call, refusal.errno_name
            );
            self.add(Direction::Alters, Role::Build.name(), what);
        }
    }

    fn call(&mut self, old: &Policy, new: &Policy, role: Role, call: Syscall) {
        // Threads that run at the same time share their memory. What only the build phase may is out of their reach.
        let together: &[Role] = match role {
            Role::Build => &[Role::Build],
            _ => &Role::STEADY,
        };
        let (before, after) = (old.permitted(role, call), new.permitted(role, call));
        let sides = [
            (Direction::Widens, new, &after, old, &before),
            (Direction::Narrows, old, &before, new, &after),
        ];
        for (direction, with, these, without, those) in sides {
            // By rule, so that each difference has its reason; of rules that overlap, each says its own.
            for rule in with.rules_of(role).filter(|rule| rule.call == call) {
                let beyond = beyond(&rule.alternatives, these, those);
                if beyond.is_empty() {
                    continue;
                }
                // Somewhere else in the worker, under the policy that lacks it here.
                let elsewhere: Vec<Conjunction> = together
                    .iter()
                    .flat_map(|other| without.permitted(*other, call))
                    .collect();
                let elsewhere = beyond.iter().all(|piece| cover::covered(piece, &elsewhere));
                self.0.push(Change {
                    direction,
                    subject: role.name().to_owned(),
                    what: words(call, &beyond),
                    elsewhere: Some(elsewhere),
                    why: (direction == Direction::Widens).then(|| rule.why.clone()),
                });
            }
        }
    }
}

/// What of `alternatives` is not in `those`. With a difference too ragged to work out: all of it.
fn beyond(
    alternatives: &[Conjunction],
    these: &[Conjunction],
    those: &[Conjunction],
) -> Vec<Conjunction> {
    let all = if alternatives.is_empty() {
        these
    } else {
        alternatives
    };
    all.iter()
        .flat_map(|one| cover::difference(one, those).unwrap_or_else(|| vec![one.clone()]))
        .collect()
}

fn words(call: Syscall, sets: &[Conjunction]) -> String {
    const SHOWN: usize = 12;
    if sets.iter().any(Vec::is_empty) {
        return format!("{call} with any arguments");
    }
    let mut words: Vec<String> = sets
        .iter()
        .take(SHOWN)
        .map(|one| describe(call, one))
        .collect();
    if sets.len() > SHOWN {
        words.push(format!("{} more", sets.len() - SHOWN));
    }
    format!("{call} when {}", words.join(", or "))
}

/// Those of `paths` that `others` do not obviously cover: not equal to one of them, and none of them is everything.
fn paths_beyond<'a>(
    paths: &'a [PathPattern],
    others: &'a [PathPattern],
) -> impl Iterator<Item = &'a PathPattern> {
    let everything = others.iter().any(|pattern| pattern.as_str() == "/**");
    paths
        .iter()
        .filter(move |path| !everything && !others.contains(path))
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Widens => "widens",
            Self::Narrows => "narrows",
            Self::Alters => "alters",
        })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.direction, self.subject, self.what)?;
        if let Some(why) = &self.why {
            write!(f, " ({why})")?;
        }
        match (self.direction, self.elsewhere) {
            (Direction::Widens, Some(true)) => f.write_str("; another thread had it before"),
            (Direction::Narrows, Some(true)) => f.write_str("; another thread has it still"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Difference {
    /// One change a line; nothing for none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.changes
            .iter()
            .try_for_each(|change| writeln!(f, "{change}"))
    }
}
