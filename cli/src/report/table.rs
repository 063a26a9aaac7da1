//! An audit for a person at a terminal.

use baton_ipc::control::AuditReport;
use baton_ipc::control::Evidence;
use baton_ipc::control::Exit;

use crate::output::Output;
use crate::output::Style;
use crate::output::Table;
use crate::output::printable;
use crate::report::exit;
use crate::report::word;

/// One VM's audit in tables.
pub(crate) fn table(vm: &str, report: &AuditReport, output: &Output) -> String {
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
