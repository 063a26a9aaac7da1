//! What the kernel's records say of a worker's process as a whole, for its confirmation and for audits.

use std::fs;

use baton_ipc::control::AuditCheck;
use baton_ipc::control::Evidence;
use baton_policy::Digest;
use baton_policy::Rlimits;
use baton_policy::proof;
use baton_policy::proof::FileIdentity;
use baton_policy::proof::Finding;
use baton_policy::proof::Verdict;

use crate::broker::Rules;
use crate::worker::binary::WorkerBinary;
use crate::worker::cgroup::Cgroup;
use crate::worker::launcher::Records;
use crate::worker::proof::other;

/// What was compared, and what was found to be otherwise.
type Compared = (Vec<AuditCheck>, Vec<Finding>);

/// The checked copy that a process has to execute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Executable {
    /// Device and inode of the sealed memfd.
    pub(crate) identity: Option<(u64, u64)>,
    /// SHA-256 of its bytes.
    pub(crate) digest: Digest,
}

impl From<&WorkerBinary> for Executable {
    fn from(binary: &WorkerBinary) -> Self {
        Self {
            identity: binary.identity(),
            digest: binary.digest,
        }
    }
}

/// Notes one comparison: what it found, or what is wrong.
fn note(compared: &mut Compared, what: &str, found: Result<String, Vec<Finding>>) {
    let (found, evidence) = match found {
        Ok(found) => (found, Evidence::Kernel),
        Err(findings) => {
            let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
            compared.1.extend(findings);
            (baton_audit::quoted(&words.join("; ")), Evidence::Against)
        }
    };
    compared.0.push(AuditCheck {
        what: what.to_owned(),
        found,
        evidence,
    });
}

fn wrong(what: impl std::fmt::Display) -> Vec<Finding> {
    vec![other(None, what.to_string())]
}

/// Compares a worker's process, apart from its threads and descriptors: the checked binary, in an empty root, in the VM's
/// cgroup, within its limits, with no memory that is writable and executable.
pub(crate) fn process(
    pid: i32,
    records: &Records,
    executable: &Executable,
    cgroup: Option<&Cgroup>,
    limits: Option<&Rlimits>,
) -> Compared {
    let proc = format!("/proc/{pid}");
    let mut compared = Compared::default();
    note(&mut compared, "binary", binary(executable, records));
    note(&mut compared, "root", root(records));
    note(&mut compared, "mounts", mounts(&proc));
    if let Some(cgroup) = cgroup {
        let found = cgroup
            .confines(pid)
            .map_err(|all| all.into_iter().flat_map(wrong).collect());
        note(&mut compared, "cgroup", found);
    }
    note(&mut compared, "memory", memory(executable, records));
    if let Some(limits) = limits {
        note(&mut compared, "limits", resource_limits(limits, &proc));
    }
    compared
}

fn binary(executable: &Executable, records: &Records) -> Result<String, Vec<Finding>> {
    let exe = records.executable;
    if exe.is_some() && exe == executable.identity {
        return Ok(format!("the sealed copy of {}", executable.digest));
    }
    Err(wrong(format_args!(
        "it executes {exe:?}, not the checked copy {:?}",
        executable.identity
    )))
}

fn root(records: &Records) -> Result<String, Vec<Finding>> {
    let names = records.root.as_ref();
    let held: Vec<Finding> = names
        .map_err(|e| wrong(format_args!("its root cannot be listed: {e}")))?
        .iter()
        .flat_map(|name| wrong(format_args!("its root holds {name:?}")))
        .collect();
    if held.is_empty() {
        Ok("an empty directory".to_owned())
    } else {
        Err(held)
    }
}

fn mounts(proc: &str) -> Result<String, Vec<Finding>> {
    match fs::read_to_string(format!("{proc}/mountinfo")) {
        Ok(mounts) if mounts.lines().count() == 1 && mounts.contains(" - tmpfs ") => {
            Ok("the one empty root".to_owned())
        }
        Ok(mounts) => Err(wrong(format_args!(
            "it has {} mounts, not the one empty root",
            mounts.lines().count()
        ))),
        Err(e) => Err(wrong(format_args!("its mounts cannot be read: {e}"))),
    }
}

fn memory(executable: &Executable, records: &Records) -> Result<String, Vec<Finding>> {
    let (device, inode) = executable.identity.unwrap_or_default();
    let binary = FileIdentity {
        major: rustix::fs::major(device),
        minor: rustix::fs::minor(device),
        inode,
    };
    let maps = records.maps.as_ref();
    let text = maps.map_err(|e| wrong(format_args!("its memory maps cannot be read: {e}")))?;
    let memory = proof::memory(binary, text);
    if memory.findings.is_empty() {
        Ok(format!(
            "{} mappings, {} executable (its binary and the kernel's vDSO), none of those writable",
            memory.mappings, memory.executable
        ))
    } else {
        Err(memory.findings)
    }
}

fn resource_limits(limits: &Rlimits, proc: &str) -> Result<String, Vec<Finding>> {
    let text = fs::read_to_string(format!("{proc}/limits"))
        .map_err(|e| wrong(format_args!("its limits cannot be read: {e}")))?;
    let findings = proof::limits(limits, &text);
    if findings.is_empty() {
        let count = limits.iter().count();
        Ok(format!("{count} limits, none above the policy's"))
    } else {
        Err(findings)
    }
}

/// What the comparison of all threads has shown, in words, and what no record of the kernel's shows.
pub(crate) fn threads(rules: &Rules, verdict: &Verdict) -> Vec<AuditCheck> {
    let found = |what: &str, rule: &[&str], good: String| {
        let against: Vec<String> = verdict
            .findings
            .iter()
            .filter(|finding| rule.contains(&finding.what.rule().0))
            .map(ToString::to_string)
            .collect();
        let evidence = if against.is_empty() {
            Evidence::Kernel
        } else {
            Evidence::Against
        };
        let found = if against.is_empty() {
            good
        } else {
            baton_audit::quoted(&against.join("; "))
        };
        AuditCheck {
            what: what.to_owned(),
            found,
            evidence,
        }
    };
    let policy = &rules.policy;
    let namespaces: Vec<String> = policy.namespaces.iter().map(ToString::to_string).collect();
    let filters = match verdict.evidence {
        proof::Evidence::Bytes => "every filter of every thread, byte for byte".to_owned(),
        proof::Evidence::Counted => "mode and number of the filters of every thread".to_owned(),
    };
    let by_construction = |what: &str, found: &str| AuditCheck {
        what: what.to_owned(),
        found: found.to_owned(),
        evidence: Evidence::ByConstruction,
    };
    vec![
        found(
            "filters",
            &["seccomp-mode", "seccomp-filter", "roles"],
            filters,
        ),
        found(
            "privileges",
            &["no-new-privs", "capabilities", "ids", "groups", "tracer"],
            format!(
                "no_new_privs; in all five sets of all threads {}",
                if policy.capabilities.is_empty() {
                    "no capability".to_owned()
                } else {
                    policy.capabilities.to_string()
                }
            ),
        ),
        found(
            "namespaces",
            &["namespaces", "threads", "alive"],
            format!("its own {}", namespaces.join(", ")),
        ),
        by_construction(
            "landlock",
            "entered before the first instruction; listing a directory and binding a port were attempted in it, and denied",
        ),
        by_construction(
            "securebits",
            "set and locked before the first instruction (the launcher reads them back); the bounding set is empty",
        ),
    ]
}
