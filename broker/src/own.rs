//! The broker's own privilege: what it gives up before it does anything, and what an audit finds of the rest.

use std::fs;

use baton_ipc::control::AuditCheck;
use baton_ipc::control::Evidence;
use baton_policy::own::OwnPolicy;
use baton_policy::procfs::TaskStatus;

use crate::refusal::Doing;
use crate::refusal::Result;

/// Gives up everything that `broker.toml` does not name.
pub(crate) fn confine() -> Result<()> {
    let policy = OwnPolicy::builtin().doing("cannot read the broker's own policy")?;
    policy
        .enter(&status()?)
        .doing("cannot give up what the broker does not need")
}

/// Compares this process with `broker.toml`, for an audit: what was compared, and what is wrong in words.
pub(crate) fn compare() -> Result<(AuditCheck, Vec<String>)> {
    let policy = OwnPolicy::builtin().doing("cannot read the broker's own policy")?;
    let status = status()?;
    let wrong: Vec<String> = policy
        .compare(&status)
        .iter()
        .map(ToString::to_string)
        .collect();
    let (found, evidence) = if wrong.is_empty() {
        let found = format!(
            "no_new_privs; capabilities: {}, none of them handed on; no filter of its own, since that is what reads workers'",
            status.permitted
        );
        (found, Evidence::Kernel)
    } else {
        (wrong.join("; "), Evidence::Against)
    };
    let check = AuditCheck {
        what: "broker".to_owned(),
        found,
        evidence,
    };
    Ok((check, wrong))
}

fn status() -> Result<TaskStatus> {
    let text = fs::read_to_string("/proc/self/status").doing("cannot read the kernel's record")?;
    TaskStatus::parse(&text).doing("cannot read the kernel's record")
}
