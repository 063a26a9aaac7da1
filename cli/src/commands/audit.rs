//! `baton audit`: whether a running VM is confined as its policy says, from the kernel's own records.

use baton_ipc::control::AuditReport;
use baton_ipc::control::Evidence;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::Verdict;
use serde::Serialize;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Audit;
use crate::arguments::Globals;
use crate::failure::severity;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::printable;
use crate::report;
use crate::report::Audited;
use crate::run_dir::Found;
use crate::run_dir::RunDir;
use crate::run_dir::VmDirectory;

pub(crate) fn execute(globals: &Globals, asked: &Audit, output: &Output) -> Result<Exit, Refusal> {
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    let audits = match &asked.vm {
        Some(vm) => vec![audited(&run_dir, &run_dir.vm(vm)?)?],
        None => return execute_all(&run_dir, asked, output),
    };
    files(asked, &audits)?;
    for audited in &audits {
        let report = &audited.report;
        if output.json() {
            output.document(&document(report)?)?;
        } else {
            output.text(&person(&audited.vm, report, output))?;
        }
    }
    Ok(worst(&audits))
}

/// Every VM here. One that cannot be audited hides none of the others, and is no success.
fn execute_all(run_dir: &RunDir, asked: &Audit, output: &Output) -> Result<Exit, Refusal> {
    let mut audits = Vec::new();
    let mut documents = Vec::new();
    let mut exit = Exit::Done;
    for directory in run_dir.all()? {
        if matches!(directory.look(), Ok(Found::Stale | Found::Absent)) {
            continue;
        }
        match audited(run_dir, &directory) {
            Ok(audited) => {
                let mut document = document(&audited.report)?;
                if let Some(document) = document.as_object_mut() {
                    document.insert("name".to_owned(), json!(audited.vm));
                }
                documents.push(document);
                audits.push(audited);
            }
            Err(refusal) => {
                output.complain(&refusal);
                documents.push(
                    json!({"name": directory.name(), "error": crate::output::error(&refusal)}),
                );
                exit = refusal.exit;
            }
        }
    }
    files(asked, &audits)?;
    if output.json() {
        output.document(&Value::Array(documents))?;
    } else if audits.is_empty() {
        output.hint(&format!("no VM runs in {}", run_dir.path().display()));
    } else {
        let sections = audits
            .iter()
            .map(|audited| person(&audited.vm, &audited.report, output));
        let between = if output.terminal() { "\n\n" } else { "\n" };
        output.text(&sections.collect::<Vec<_>>().join(between))?;
    }
    let found = worst(&audits);
    Ok(if severity(found) > severity(exit) {
        found
    } else {
        exit
    })
}

fn audited(run_dir: &RunDir, directory: &VmDirectory) -> Result<Audited, Refusal> {
    let report = directory.broker()?.audit()?;
    Ok(Audited::new(run_dir, directory.name(), report))
}

fn worst(audits: &[Audited]) -> Exit {
    if audits.iter().all(Audited::is_proven) {
        Exit::Done
    } else {
        Exit::Findings
    }
}

fn files(asked: &Audit, audits: &[Audited]) -> Result<(), Refusal> {
    if let Some(path) = &asked.sarif {
        report::write(path, &format!("{:#}\n", report::log(audits)))?;
    }
    if let Some(path) = &asked.html {
        report::write(path, &report::page(audits))?;
    }
    Ok(())
}

/// Proven only if the broker says so and names nothing against it.
pub(crate) fn exit(report: &AuditReport) -> Exit {
    match report.verdict {
        Verdict::Proven if report.findings.is_empty() => Exit::Done,
        _ => Exit::Findings,
    }
}

/// A report as JSON.
pub(crate) fn document(report: &AuditReport) -> Result<Value, Refusal> {
    let AuditReport {
        verdict,
        worker_pid,
        generation,
        worker_digest,
        policy,
        policy_digest,
        pause_us,
        checks,
        threads,
        descriptors,
        findings,
        weaker,
    } = report;
    let value = |result: serde_json::Result<Value>| {
        result.map_err(|error| unfit(format!("cannot print the report: {error}"), ""))
    };
    Ok(json!({
        "verdict": verdict,
        "worker_pid": worker_pid,
        "generation": generation,
        "worker_digest": worker_digest,
        "policy": policy,
        "policy_digest": policy_digest,
        "pause_us": pause_us,
        "checks": value(serde_json::to_value(checks))?,
        "threads": value(serde_json::to_value(threads))?,
        "descriptors": value(serde_json::to_value(descriptors))?,
        "findings": value(serde_json::to_value(findings))?,
        "weaker": weaker,
    }))
}

/// What a unit variant is called in JSON; `-` for none.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "-".to_owned(),
    }
}

fn person(vm: &str, report: &AuditReport, output: &Output) -> String {
    let plain = |text: String| (None, text);
    let mut threads = Table::new(&["THREAD", "ROLE", "FILTERS", "PROOF"]);
    for thread in &report.threads {
        threads.row(vec![
            plain(thread.tid.to_string()),
            plain(thread.role.clone()),
            plain(thread.filters.to_string()),
            plain(thread.proof.clone()),
        ]);
    }
    let mut checks = Table::new(&["COMPARED", "FOUND", "EVIDENCE"]);
    for check in &report.checks {
        let style = match check.evidence {
            Evidence::Kernel => Style::Good,
            Evidence::ByConstruction => Style::Dim,
            Evidence::Against => Style::Bad,
        };
        checks.row(vec![
            plain(check.what.clone()),
            plain(check.found.clone()),
            (Some(style), word(&check.evidence)),
        ]);
    }
    let mut descriptors = Table::new(&["FD", "GRANT", "KIND", "ACCESS", "TARGET"]);
    for descriptor in &report.descriptors {
        descriptors.row(vec![
            plain(descriptor.fd.to_string()),
            plain(descriptor.grant.clone()),
            plain(word(&descriptor.kind)),
            plain(word(&descriptor.access)),
            plain(descriptor.target.clone()),
        ]);
    }
    let mut sections = vec![
        threads.draw(output),
        descriptors.draw(output),
        checks.draw(output),
    ];
    if !report.weaker.is_empty() {
        let lines = report.weaker.iter().map(|line| {
            format!(
                "{} {}",
                output.paint(Style::Warning, "weaker:"),
                printable(line)
            )
        });
        sections.push(lines.collect::<Vec<_>>().join("\n"));
    }
    if !report.findings.is_empty() {
        let lines = report.findings.iter().map(|finding| {
            format!(
                "{} {}: {}: declared {}, found {}",
                output.paint(Style::Bad, "finding:"),
                printable(&finding.rule),
                printable(&finding.subject),
                printable(&finding.declared),
                printable(&finding.found)
            )
        });
        sections.push(lines.collect::<Vec<_>>().join("\n"));
    }
    sections.push(match exit(report) {
        Exit::Done => format!(
            "{vm}: {}: everything that was compared agrees with the policy",
            output.paint(Style::Good, "proven")
        ),
        _ => format!(
            "{vm}: {} {}",
            report.findings.len(),
            output.paint(Style::Bad, "findings")
        ),
    });
    sections.retain(|section| !section.is_empty());
    sections.join(if output.terminal() { "\n\n" } else { "\n" })
}
