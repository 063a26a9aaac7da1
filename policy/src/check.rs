//! Is a policy fit for use? That it parses, compiles, and what an operator may want to think about.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::compile::CompileError;
use crate::descriptors::Kind;
use crate::parse::PolicyError;
use crate::policy::{Policy, Role, Violation};

/// A policy that is fit for use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fitness {
    /// Its name.
    pub policy: String,
    /// The digest of its text.
    pub digest: String,
    /// The digest of its filters: equal for policies whose filters are.
    pub filters_digest: String,
    /// How many instructions the filters of a thread have together, by role.
    pub instructions: BTreeMap<Role, usize>,
    /// What an operator may want to think about. Not errors.
    pub advice: Vec<Advice>,
}

/// A thing that is permitted, and might not be needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// The table that it is about.
    pub subject: String,
    /// What is the matter.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// A policy that is not fit for use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// It does not parse. Its text has the line and a caret.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// It does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

/// Checks the policy in a file.
///
/// # Errors
///
/// When it is not to be trusted, does not parse, or does not compile.
pub fn file(path: &Path) -> Result<Fitness, CheckError> {
    Ok(policy(&Policy::load(path)?)?)
}

/// Checks a policy that parsed.
///
/// # Errors
///
/// When it does not compile.
pub fn policy(policy: &Policy) -> Result<Fitness, CompileError> {
    let compiled = policy.compile()?;
    let total = |role: Role| {
        compiled
            .stack(role)
            .iter()
            .map(|program| program.len())
            .sum()
    };
    Ok(Fitness {
        policy: policy.name.clone(),
        digest: policy.digest.to_string(),
        filters_digest: compiled.digest().to_string(),
        instructions: Role::ALL
            .into_iter()
            .map(|role| (role, total(role)))
            .collect(),
        advice: advice(policy),
    })
}

/// The first and the last PCI address of a host's first domain: 8 bits of bus, 5 of device, 3 of function (PCI Local Bus 3.0, 3.2.2.3.2).
const PCI_ENDS: [&str; 2] = [
    "/sys/bus/pci/devices/0000:00:00.0",
    "/sys/bus/pci/devices/0000:ff:1f.7",
];

fn advice(policy: &Policy) -> Vec<Advice> {
    let mut all = Vec::new();
    let mut add = |subject: &str, what: String, remedy: &str| {
        all.push(Advice {
            subject: subject.to_owned(),
            what,
            remedy: remedy.to_owned(),
        });
    };
    if policy.learn.is_some() {
        let what = "filters report every call and deny none".to_owned();
        add(
            "learn",
            what,
            "take the table [learn] out for any other use",
        );
    }
    if policy.workers.beside_broker {
        let what = "whatever lies beside the broker may run".to_owned();
        add(
            "workers",
            what,
            "list digests, and set beside_broker = false",
        );
    }
    if policy.ids.unprivileged_broker {
        let what = "a broker without privilege runs workers under its own user".to_owned();
        add(
            "ids",
            what,
            "set unprivileged_broker = false where every broker is root's",
        );
    }
    for namespace in crate::Namespace::ALL {
        if !policy.namespaces.contains(&namespace) {
            let what = format!("a worker may share the broker's {namespace} namespace");
            add("namespaces", what, "require it");
        }
    }
    if !policy.capabilities.is_empty() {
        add(
            "capabilities",
            format!("a worker keeps {}", policy.capabilities),
            "keep none: a worker needs none",
        );
    }
    for grant in &policy.descriptors {
        if grant.kinds.contains(&Kind::VfioDevice)
            && PCI_ENDS
                .iter()
                .all(|place| grant.permits_path(Path::new(place)))
        {
            let what = "a guest may have every PCI device of the host that is bound to vfio-pci";
            add(
                "descriptor",
                what.to_owned(),
                "name its devices: /sys/bus/pci/devices/DOMAIN:BUS:DEVICE.FUNCTION",
            );
        } else if grant.paths.iter().any(|path| path.as_str() == "/**") {
            let what = format!("{} may be opened from anywhere", grant.name);
            add(
                "descriptor",
                what,
                "name the directories that guests' files are in",
            );
        }
    }
    for (role, about) in &policy.roles {
        if about.violation == Violation::Kill {
            let what =
                format!("{role}: a violation ends the worker without a report of who called what");
            add(
                "roles",
                what,
                "\"trap\" tells the broker; the call is not executed either way",
            );
        }
    }
    all
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.subject, self.what, self.remedy)
    }
}
