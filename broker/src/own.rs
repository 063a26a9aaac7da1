//! The privilege of the broker itself and of its launcher: what they give up and when, and what an audit finds of the rest.

use std::fs;
use std::time::Duration;

use baton_audit::quoted;
use baton_ipc::control::AuditCheck;
use baton_ipc::control::Evidence;
use baton_policy::Program;
use baton_policy::own::Holder;
use baton_policy::own::OwnPolicy;
use baton_policy::procfs::TaskStatus;

use crate::broker::Broker;
use crate::refusal::Doing;
use crate::refusal::Result;

/// How long the reading of the broker's own filter may take.
const READING: Duration = Duration::from_secs(1);

/// What the broker is held to from its start on.
#[derive(Debug)]
pub(crate) struct Own {
    policy: OwnPolicy,
    filter: Program,
}

/// Gives up, before anything else is done, what neither the start nor what comes later needs.
pub(crate) fn confine() -> Result<()> {
    enter(&builtin()?, Holder::Start)
}

/// The same for the launcher.
pub(crate) fn confine_launcher() -> Result<()> {
    enter(&builtin()?, Holder::Launcher)
}

impl Own {
    /// Gives up what only the start has needed, and puts the filter on this process, which has one thread.
    pub(crate) fn settle() -> Result<Self> {
        let policy = builtin()?;
        let filter = policy
            .filter()
            .doing("cannot read the broker's own policy")?;
        enter(&policy, Holder::Broker)?;
        filter
            .install()
            .doing("cannot install the broker's own filter")?;
        Ok(Self { policy, filter })
    }
}

impl Broker {
    /// Compares this process and its launcher with `broker.toml`, for an audit: what was compared, and what is wrong in words.
    pub(crate) fn compare_own(&self) -> (Vec<AuditCheck>, Vec<String>) {
        let mut findings = Vec::new();
        let mut check = |what: &str, holder: Holder, pid: u32| {
            let (found, evidence) = match self.compare_one(holder, pid) {
                Ok((found, wrong)) if wrong.is_empty() => (found, Evidence::Kernel),
                Ok((_, wrong)) => {
                    let found = quoted(&wrong.join("; "));
                    findings.extend(wrong);
                    (found, Evidence::Against)
                }
                Err(refusal) => {
                    findings.push(format!("{holder}: {}", refusal.reason));
                    (quoted(&refusal.reason), Evidence::Against)
                }
            };
            AuditCheck {
                what: what.to_owned(),
                found,
                evidence,
            }
        };
        let checks = vec![
            check("broker", Holder::Broker, std::process::id()),
            check("launcher", Holder::Launcher, self.launcher.pid()),
        ];
        (checks, findings)
    }

    fn compare_one(&self, holder: Holder, pid: u32) -> Result<(String, Vec<String>)> {
        let status = status(pid)?;
        let discrepancies = self.own.policy.compare(holder, &status);
        let mut wrong: Vec<String> = discrepancies.iter().map(ToString::to_string).collect();
        let filters = match holder {
            Holder::Launcher => self.unfiltered(&status, &mut wrong),
            Holder::Start | Holder::Broker => self.filtered(&status, &mut wrong),
        };
        let capabilities = status.permitted;
        let found = format!(
            "no_new_privs; capabilities: {capabilities}, none of them handed on; {filters}"
        );
        Ok((found, wrong))
    }

    /// The broker's filters: those that it was started with, and its own on top.
    fn filtered(&self, status: &TaskStatus, wrong: &mut Vec<String>) -> String {
        let (found, expected) = (status.seccomp_filters, self.prover.inherited_filters + 1);
        if found != expected {
            wrong.push(format!("the broker has {found} filters, not {expected}"));
        }
        if self.prover.unreadable.is_some() {
            return "its own filter, which was counted and not compared".to_owned();
        }
        match self.launcher.filters(status.pid, found, READING) {
            Ok(reading) if reading.filters.last() == Some(&self.own.filter) => {}
            Ok(_) => wrong.push("the broker's filter is not that of its policy".to_owned()),
            Err(refusal) => wrong.push(format!("the broker's filter: {}", refusal.reason)),
        }
        let calls = self.own.policy.calls();
        format!("its own filter, byte for byte, which knows {calls} system calls")
    }

    /// The launcher has no filter of its own.
    fn unfiltered(&self, status: &TaskStatus, wrong: &mut Vec<String>) -> String {
        if status.seccomp_filters != self.prover.inherited_filters {
            wrong.push(format!(
                "the launcher has {} filters",
                status.seccomp_filters
            ));
        }
        if status.ppid != std::process::id() {
            wrong.push("the launcher is another's child".to_owned());
        }
        "no filter of its own, since it reads those of others".to_owned()
    }
}

fn builtin() -> Result<OwnPolicy> {
    OwnPolicy::builtin().doing("cannot read the broker's own policy")
}

fn enter(policy: &OwnPolicy, holder: Holder) -> Result<()> {
    policy
        .enter(holder, &status(std::process::id())?)
        .doing(format_args!("cannot give up what {holder} does not need"))
}

fn status(pid: u32) -> Result<TaskStatus> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .doing("cannot read the kernel's record")?;
    TaskStatus::parse(&text).doing("cannot read the kernel's record")
}
