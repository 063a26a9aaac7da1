//! What the demo tells: a person in plain words, a script in one object.

use std::collections::BTreeMap;

use baton_ipc::control::AuditDescriptor;
use baton_ipc::control::AuditReport;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::UpgradeOutcome;
use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::Syscall;
use serde_json::Value;
use serde_json::json;

use crate::demo::Replacement;
use crate::demo::Run;
use crate::outcome;
use crate::output::Output;
use crate::output::Style;
use crate::output::bar;
use crate::output::printable;
use crate::report;
use crate::units;

/// What people ask about first: what it would take to reach beyond the guest.
const TELLING: [(&str, &[&str]); 7] = [
    ("open a file", &["open", "openat", "openat2", "creat"]),
    ("make or connect a socket", &["socket", "connect", "bind"]),
    ("start a program", &["execve", "execveat", "fork", "vfork"]),
    ("make new shared memory", &["memfd_create", "memfd_secret"]),
    (
        "look into another process",
        &["ptrace", "process_vm_readv", "pidfd_getfd"],
    ),
    ("use io_uring", &["io_uring_setup", "io_uring_enter"]),
    ("load BPF", &["bpf"]),
];

/// One object.
pub(crate) fn document(run: &Run) -> Result<Value, Refusal> {
    let health = &run.health;
    let upgrades = run.upgrades.iter().map(|replacement| {
        let mut document = outcome::document(&replacement.outcome);
        if let Some(object) = document.as_object_mut() {
            object.insert("guest_gap_us".to_owned(), replacement.guest_gap_us.into());
        }
        document
    });
    Ok(json!({
        "upgrades": upgrades.collect::<Vec<_>>(),
        "aborts": run.aborts.iter().map(outcome::document).collect::<Vec<_>>(),
        "blackout_us": run.blackouts(),
        "guest_gap_us": run.guest_gap_us(),
        "quiet_gap_us": run.quiet_gap_us,
        "start_us": run.start_us,
        "nonce": format!("{:016x}", health.nonce),
        "guest": {
            "lines": health.lines,
            "sequence": health.sequence,
            "sweeps": health.sweeps,
            "errors": health.errors,
            "backwards": health.backwards,
        },
        "audit": report::document(&run.audit)?,
    }))
}

/// One upgrade, with its blackout drawn so that `scale` microseconds fill the bar.
pub(crate) fn replacement(replacement: &Replacement, scale: u64) -> String {
    let outcome = &replacement.outcome;
    format!(
        "  generation {:>3}  {:>10}  {:<24}  the guest missed {:>10}",
        outcome.generation,
        units::microseconds(outcome.blackout_us),
        bar(outcome.blackout_us, scale, 24),
        units::microseconds(replacement.guest_gap_us),
    )
}

/// An upgrade that was given up.
pub(crate) fn abort(outcome: &UpgradeOutcome) -> String {
    format!(
        "  generation {:>3}  runs on: the upgrade was aborted{}",
        outcome.generation,
        outcome::why(outcome)
    )
}

/// What happened.
pub(crate) fn person(run: &Run, output: &Output) -> String {
    let mut lines = vec![String::new()];
    if !run.upgrades.is_empty() {
        lines.push(format!(
            "The worker was replaced {}. Each time the guest stood still: {} (median), {} (longest).",
            output.paint(Style::Strong, &times(run.upgrades.len())),
            output.paint(Style::Strong, &units::microseconds(median(run.blackouts()))),
            units::microseconds(run.blackouts().into_iter().max().unwrap_or(0)),
        ));
    }
    if !run.aborts.is_empty() {
        lines.push(format!(
            "{} it was not: the attempt was given up before it was final, the old worker ran on, and it was tried again.",
            match times(run.aborts.len()).as_str() {
                "once" => "Once".to_owned(),
                "twice" => "Twice".to_owned(),
                times => times.to_owned(),
            }
        ));
    }
    let health = &run.health;
    lines.push(format!(
        "The guest was {} rebooted. It counted to {} without a break, went through its {} of memory {}\n\
         and found {} wrong; its clock never went backwards.",
        output.paint(Style::Good, "never"),
        health.sequence,
        units::bytes(run.ram_bytes),
        times(usize::try_from(health.sweeps).unwrap_or(usize::MAX)),
        output.paint(Style::Good, "nothing"),
    ));
    lines.push(format!(
        "By its own clock it missed at most {} around an upgrade, and {} without one: that is other work on this host.",
        output.paint(Style::Strong, &units::microseconds(run.guest_gap_us())),
        units::microseconds(run.quiet_gap_us),
    ));
    lines.push(String::new());
    lines.extend(confinement(&run.audit, output));
    lines.push(String::new());
    lines.push(output.paint(Style::Strong, "Go on:"));
    lines.push(
        "  baton run VM.toml --detach     start a VM of your own\n  \
           baton upgrade VM               replace its worker\n  \
           baton audit VM                 prove its confinement\n  \
           baton doctor                   what this host could do better"
            .to_owned(),
    );
    lines.join("\n")
}

fn confinement(report: &AuditReport, output: &Output) -> Vec<String> {
    let mut lines = vec![match report::exit(report) {
        Exit::Done => format!(
            "The last worker is audited from the kernel's own records: {}. {} threads, {} descriptors, all as declared.",
            output.paint(Style::Good, "proven"),
            report.threads.len(),
            report.descriptors.len()
        ),
        _ => format!(
            "The audit of the last worker has {} {}:",
            report.findings.len(),
            output.paint(Style::Bad, "findings")
        ),
    }];
    lines.extend(report.findings.iter().map(|finding| {
        format!(
            "  {}: {}: declared {}, found {}",
            printable(&finding.rule),
            printable(&finding.subject),
            printable(&finding.declared),
            printable(&finding.found)
        )
    }));
    let (granted, own): (Vec<_>, Vec<_>) = report
        .descriptors
        .iter()
        .partition(|descriptor| descriptor.kind.is_some());
    let names = |descriptors: &[&AuditDescriptor]| {
        let mut counts = BTreeMap::new();
        for descriptor in descriptors {
            let name = printable(&descriptor.grant);
            let name = name.strip_prefix("made by the worker: ").unwrap_or(&name);
            *counts.entry(name.to_owned()).or_insert(0_u32) += 1;
        }
        let names = counts.into_iter().map(|(name, count)| match count {
            1 => name,
            count => format!("{name} (x{count})"),
        });
        names.collect::<Vec<_>>().join(", ")
    };
    if !report.descriptors.is_empty() {
        lines.push(format!("  It was given:  {}", names(&granted)));
        lines.push(format!("  It has beside: {}", names(&own)));
    }
    if let Ok(policy) = Policy::builtin() {
        let widest = Role::STEADY
            .into_iter()
            .map(|role| policy.allowed(role))
            .max_by_key(BTreeMap::len)
            .unwrap_or_default();
        let bound = widest.values().filter(|rules| !rules.is_empty()).count();
        lines.push(format!(
            "  It may make:   {} system calls in its widest thread, {bound} of them only with given arguments",
            widest.len()
        ));
        lines.push(format!("  It may not:    {}", denied(&policy).join(", ")));
    }
    lines.extend(report.weaker.iter().map(|line| {
        format!(
            "  {} {}",
            output.paint(Style::Warning, "Weaker here:"),
            printable(line)
        )
    }));
    lines
}

/// What no thread of a running worker may do, by the policy itself.
fn denied(policy: &Policy) -> Vec<&'static str> {
    let allowed = |name: &str| {
        Syscall::from_name(name).is_some_and(|call| {
            Role::STEADY
                .into_iter()
                .any(|role| policy.allowed(role).contains_key(&call))
        })
    };
    TELLING
        .into_iter()
        .filter(|(_, calls)| !calls.iter().any(|call| allowed(call)))
        .map(|(what, _)| what)
        .collect()
}

fn times(count: usize) -> String {
    match count {
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        count => format!("{count} times"),
    }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_telling_call_is_one_and_the_policy_denies_them_all() {
        for (what, calls) in TELLING {
            for call in calls {
                assert!(Syscall::from_name(call).is_some(), "{what}: {call}");
            }
        }
        let policy = Policy::builtin().unwrap();
        assert_eq!(denied(&policy).len(), TELLING.len());
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![]), 0);
        assert_eq!(median(vec![9, 1, 5]), 5);
    }
}
