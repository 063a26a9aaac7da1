//! The privilege of the broker itself and of its launcher: what they give up and when, and what an audit finds of the rest.

mod places;

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

use baton_audit::quoted;
use baton_ipc::control::AuditCheck;
use baton_ipc::control::Evidence;
use baton_policy::Program;
use baton_policy::own::Domain;
use baton_policy::own::Holder;
use baton_policy::own::OwnPolicy;
use baton_policy::own::Places;
use baton_policy::procfs::TaskStatus;

pub(crate) use self::places::of as places;

use crate::broker::Broker;
use crate::refusal::Doing;
use crate::refusal::Result;

/// How long the reading of the broker's own filter may take.
const READING: Duration = Duration::from_secs(1);

/// The same for an error that says no more.
pub(crate) const OUT_OF_REACH: &str = "let the broker's user have access; if it has, the broker is out of reach of it: a broker keeps to the \
     directories that its VM file and policy named, and that were there, when it started (docs/threat-model.md); \
     `baton upgrade --broker` puts another in its place";

/// What the broker is held to from its start on.
#[derive(Debug)]
pub(crate) struct Own {
    policy: OwnPolicy,
    filter: Program,
    domain: Domain,
}

/// What to do about an error: where this user may do what was denied, it is the broker's domain that denied it.
pub(crate) fn remedy<'a>(error: &(dyn Error + 'static), otherwise: &'a str) -> &'a str {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let denied = error
            .downcast_ref()
            .is_some_and(|error: &std::io::Error| error.kind() == ErrorKind::PermissionDenied);
        if denied {
            return OUT_OF_REACH;
        }
        cause = error.source();
    }
    otherwise
}

/// Gives up, before anything else is done, what neither the start nor what comes later needs.
pub(crate) fn confine() -> Result<()> {
    begin(Holder::Start)
}

/// The same for the launcher.
pub(crate) fn confine_launcher() -> Result<()> {
    begin(Holder::Launcher)
}

impl Own {
    /// Gives up what only the start has needed, and puts this process, which has one thread, into the domain of these places
    /// and under its filter. `launcher` is not in that domain.
    pub(crate) fn settle(places: &Places, launcher: u32) -> Result<Self> {
        let policy = builtin()?;
        let filter = policy
            .filter()
            .doing("cannot read the broker's own policy")?;
        enter(&policy, Holder::Broker)?;
        let domain = policy
            .restrict(places, launcher)
            .doing("cannot confine the broker")?;
        filter
            .install()
            .doing("cannot install the broker's own filter")?;
        Ok(Self {
            policy,
            filter,
            domain,
        })
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
            Holder::Start | Holder::Broker => {
                let filter = self.filtered(&status, &mut wrong);
                format!("{filter}; {}", self.restricted(&mut wrong))
            }
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

    /// The broker's Landlock domain, of which the kernel has no record: what it denies is attempted.
    fn restricted(&self, wrong: &mut Vec<String>) -> String {
        let domain = &self.own.domain;
        if let Err(error) = domain.attempt() {
            wrong.push(format!("the broker: {error}"));
        }
        let (abi, places) = (domain.status.abi, domain.places());
        format!(
            "files below {places} paths only (Landlock, ABI {abi}; what it denies was attempted just now)"
        )
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

fn begin(holder: Holder) -> Result<()> {
    // A guest waits for both. Where it is forbidden, that guest waits longer on a busy host, and is none the less safe.
    let _ = baton_policy::kernel::shorten_slice();
    enter(&builtin()?, holder)
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
