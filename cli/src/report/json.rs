//! An audit as JSON.

use baton_ipc::control::AuditReport;
use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

use crate::failure::unfit;

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
