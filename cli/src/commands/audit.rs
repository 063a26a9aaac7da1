//! `baton audit`: whether a running VM is confined as its policy says, from the kernel's own records.

use baton_ipc::control::AuditReport;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::Verdict;
use serde::Serialize;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Globals;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::printable;
use crate::run_dir::RunDir;

pub(crate) fn execute(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    let report = RunDir::resolve(globals.run_dir.as_deref())?
        .vm(vm)?
        .broker()?
        .audit()?;
    if output.json() {
        output.document(&document(&report)?)?;
    } else {
        output.text(&person(vm, &report, output))?;
    }
    Ok(exit(&report))
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
        "threads": value(serde_json::to_value(threads))?,
        "descriptors": value(serde_json::to_value(descriptors))?,
        "findings": value(serde_json::to_value(findings))?,
        "weaker": weaker,
    }))
}

/// What a unit variant is called in JSON; `-` for none.
fn word(value: &impl Serialize) -> String {
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
    let mut sections = vec![threads.draw(output), descriptors.draw(output)];
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
