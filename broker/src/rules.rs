//! What policy says, read anew for each worker, so that a new build or a new policy needs no restart of the broker.

use std::fs::File;
use std::io::Seek;
use std::path::PathBuf;

use baton_audit::Actor;
use baton_ipc::control::MAX_APPROVAL;
use baton_policy::Digest;
use baton_policy::Policy;
use baton_policy::WorkerAllowList;
use baton_policy::diff::Difference;
use baton_policy::signature::signer;

use serde_json::Value;
use serde_json::json;

use crate::broker::Options;
use crate::broker::Rules;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::vm_file::VmFile;
use crate::worker::binary::LISTING;
use crate::worker::binary::Permitted;
use crate::worker::binary::Unchecked;
use crate::worker::binary::WorkerBinary;

/// Reads and compiles the VM's policy. A file has to belong to root or this user, and nobody else may write it.
///
/// One that learns is for a broker that learns, and the other way round: no worker is without its filters by accident.
pub(crate) fn load(vm: &VmFile, learns: bool) -> Result<Rules> {
    let remedy = "`baton policy check` explains what is wrong";
    let policy = if vm.policy.as_os_str() == "default" {
        Policy::builtin()
    } else {
        Policy::load(&vm.policy)
    }
    .map_err(|e| unfit(&e, crate::own::remedy(&e, remedy)))?;
    match (&policy.learn, learns) {
        (Some(_), false) => {
            return Err(refused(
                format_args!(
                    "the policy {} learns: its workers' filters deny nothing",
                    policy.name
                ),
                "take the table [learn] out of it; a VM runs under such a policy only as long as `baton policy learn` runs it",
            ));
        }
        (None, true) => {
            return Err(refused(
                format_args!("the policy {} does not learn", policy.name),
                "give the VM a policy with [learn] and why = \"...\", on a host where nobody else's guests run",
            ));
        }
        _ => {}
    }
    let compiled = policy.compile().map_err(|e| unfit(e, remedy))?;
    Ok(Rules {
        policy,
        compiled,
        declared: None,
    })
}

/// Opens, checks and seals the worker that is to run: the one given, else the one that the VM names, else the one beside the
/// broker. With it comes what it declares that it needs.
pub(crate) fn worker_binary(
    vm: &VmFile,
    options: &Options,
    policy: &Policy,
    given: Option<Unchecked>,
) -> Result<(WorkerBinary, Policy)> {
    let beside = beside_broker("baton-worker")?;
    let named = options
        .worker
        .as_ref()
        .or(vm.worker.as_ref())
        .unwrap_or(&beside);
    let is_beside = given.is_none() && *named == beside;
    let Unchecked { binary, signature } = given.map_or_else(|| WorkerBinary::open(named), Ok)?;
    let binary = WorkerBinary::admit(binary, |digest, copy| {
        // The one beside the broker is read only once, when it is the one to run.
        let beside = if is_beside {
            Some(*digest)
        } else {
            File::open(&beside)
                .ok()
                .and_then(|mut file| Digest::of_reader(&mut file).ok())
        };
        let allowed = WorkerAllowList::load(policy, beside).map_err(|e| {
            let what = format!("cannot read the allow-list of workers: {e}");
            unfit(what, crate::own::remedy(&e, ""))
        })?;
        match signature {
            _ if allowed.permits(digest) => Ok(Some(Permitted::Listed)),
            Some(signature) => signed(policy, digest, signature, copy),
            None => Ok(None),
        }
    })?;
    let declaration = binary.declaration()?;
    Ok((binary, declaration.policy))
}

/// Whether one of the policy's keys has signed the sealed copy of a binary, which is what runs.
fn signed(
    policy: &Policy,
    digest: &Digest,
    signature: File,
    copy: &mut File,
) -> Result<Option<Permitted>> {
    let keys = &policy.workers.keys;
    if keys.is_empty() {
        return Ok(None);
    }
    let refused = |why: &dyn std::fmt::Display| {
        refused(
            format_args!("the worker {digest} is not on the policy's allow-list, and {why}"),
            LISTING,
        )
    };
    // Whatever else lies there could be waited for without end.
    if !signature.metadata().is_ok_and(|one| one.is_file()) {
        return Err(refused(&"its signature is no regular file"));
    }
    copy.rewind().doing("cannot read the worker's binary")?;
    signer(keys, signature, copy)
        .map(|key| Some(Permitted::SignedBy(key.to_string())))
        .map_err(|error| refused(&error))
}

/// What an upgrade adds to what a worker may do, or declares that it needs.
#[derive(Debug, Default)]
pub(crate) struct Widening {
    /// In words; empty for most.
    pub(crate) changes: Vec<String>,
    /// That it is approved of.
    pub(crate) approved: Option<Approved>,
}

/// Who has approved of a widening, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Approved {
    pub(crate) why: String,
    /// As the log has it: the policy, by its place and digest; or who asked, as an `actor`.
    pub(crate) by: Value,
}

impl Approved {
    /// By who asked for the upgrade, whose right to it was looked up.
    pub(crate) fn by_client(why: &str, who: &Actor) -> Self {
        Self {
            why: baton_audit::quoted(why)
                .chars()
                .take(MAX_APPROVAL)
                .collect(),
            by: who.document(),
        }
    }

    fn by_policy(policy: &Policy, build: &Digest) -> Option<Self> {
        let why = policy.approves(build)?;
        Some(Self {
            why: why.to_owned(),
            by: json!({"policy": policy.origin, "policy_digest": policy.digest.to_string()}),
        })
    }
}

/// How many changes are told.
const TOLD: usize = 12;

impl Widening {
    /// The first changes and how many more there are, bounded: a build's own words are among them.
    pub(crate) fn words(&self) -> Option<String> {
        let mut told: Vec<String> = self
            .changes
            .iter()
            .take(TOLD)
            .map(|change| baton_audit::quoted(change))
            .collect();
        if let Some(more @ 1..) = self.changes.len().checked_sub(TOLD) {
            told.push(format!("and {more} more"));
        }
        (!told.is_empty()).then(|| told.join("; "))
    }
}

/// Refuses a worker that may do more than the one before it could, or whose build declares more needs, unless the new policy
/// approves of that build by its digest, or whoever asks does.
pub(crate) fn refuse_widening(
    old: &Rules,
    new: &Rules,
    build: &Digest,
    given: Option<Approved>,
) -> Result<Widening> {
    let mut changes: Vec<String> = Difference::between(&old.policy, &new.policy)
        .widens_a_worker()
        .map(|change| format!("the policy {change}"))
        .collect();
    if let (Some(old), Some(new)) = (&old.declared, &new.declared) {
        let difference = Difference::between(old, new);
        let needs = difference.widens_a_worker();
        changes.extend(needs.map(|change| format!("the build's needs: {change}")));
    }
    let mut widening = Widening {
        changes,
        approved: None,
    };
    if !widening.changes.is_empty() {
        widening.approved = Approved::by_policy(&new.policy, build).or(given);
    }
    let words = match widening.words() {
        Some(words) if widening.approved.is_none() => words,
        _ => return Ok(widening),
    };
    Err(refused(
        format_args!("the new worker may do more than the running one, or needs more: {words}"),
        format_args!(
            "`baton policy diff` shows all of it, of policies and of builds; approve of it in the policy ([[approve]] with \
             worker = \"sha256:{build}\") or by `baton upgrade --approve WHY`, or stop and start the VM"
        ),
    ))
}

/// The path of a program that is installed with the broker.
pub(crate) fn beside_broker(program: &str) -> Result<PathBuf> {
    let mut path = std::env::current_exe().doing("cannot find the broker's own place")?;
    path.set_file_name(program);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(policy: &str, declared: &str) -> Rules {
        let parse = |text: &str| Policy::parse(text, "test").unwrap();
        Rules {
            compiled: parse(policy).compile().unwrap(),
            policy: parse(policy),
            declared: Some(parse(declared)),
        }
    }

    #[test]
    fn a_wider_policy_or_a_needier_build_is_refused_and_a_new_build_is_not() {
        use baton_policy::BUILTIN;
        let build = Digest::of(b"another build");
        let old = rules(BUILTIN, BUILTIN);
        let new_build = BUILTIN.replace("digests = []", &format!("digests = [\"sha256:{build}\"]"));
        let widening = refuse_widening(&old, &rules(&new_build, BUILTIN), &build, None).unwrap();
        assert!(widening.changes.is_empty());
        let wider = BUILTIN.replace("nofile = 1024", "nofile = 4096");
        for (policy, declared, says) in [
            (wider.as_str(), BUILTIN, "the policy widens"),
            (BUILTIN, wider.as_str(), "the build's needs: widens"),
        ] {
            let new = rules(policy, declared);
            let refusal = refuse_widening(&old, &new, &build, None).unwrap_err();
            assert_eq!(refusal.exit, baton_ipc::control::Exit::Refused);
            assert!(refusal.reason.contains(says), "{refusal}");
            assert!(refusal.reason.contains("nofile"), "{refusal}");
            refuse_widening(&new, &old, &build, None).unwrap();

            let approval =
                format!("{policy}\n[[approve]]\nworker = \"{build}\"\nwhy = \"a test\"\n");
            let approved = rules(&approval, declared);
            let widening = refuse_widening(&old, &approved, &build, None).unwrap();
            let by_policy = widening.approved.unwrap();
            assert_eq!(by_policy.why, "a test");
            assert_eq!(
                by_policy.by["policy_digest"],
                approved.policy.digest.to_string()
            );
            assert!(!widening.changes.is_empty());
            let who = Actor {
                uid: 7,
                pid: 8,
                unit: None,
            };
            let given = Approved::by_client("seen\u{1b}[2J", &who);
            assert!(!given.why.contains('\u{1b}'));
            let widening = refuse_widening(&old, &new, &build, Some(given.clone())).unwrap();
            assert_eq!(widening.approved, Some(given.clone()));
            // What widens nothing takes no approval.
            let nothing = refuse_widening(&new, &old, &build, Some(given)).unwrap();
            assert_eq!(nothing.approved, None);
            let other = Digest::of(b"a third build");
            refuse_widening(&old, &approved, &other, None).unwrap_err();
        }
    }
}
