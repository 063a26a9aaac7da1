//! Figures for people, and for scripts.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;
use serde_json::json;

use crate::footprint::Footprint;
use crate::measure::Figures;
use crate::summary::Summary;

/// One document of all.
pub(crate) fn document(measured: &[Figures]) -> Result<Value> {
    Ok(json!({ "host": host(), "cases": serde_json::to_value(measured)? }))
}

fn host() -> Value {
    let uname = rustix::system::uname();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!({
        "kernel": uname.release().to_string_lossy(),
        "processors": processors,
        "load": load.split(' ').next().unwrap_or_default(),
    })
}

/// A table of one case.
pub(crate) fn of(figures: &Figures) -> String {
    let mut text = format!(
        "{}, {} pages, {} vCPU{}\n{:<28} {:>5} {:>11} {:>11} {:>11}\n",
        figures.case.memory,
        figures.case.pages,
        figures.case.cpus,
        if figures.case.cpus == 1 { "" } else { "s" },
        "",
        "n",
        "p50",
        "p99",
        "max"
    );
    if figures.aborted > 0 {
        let _ = writeln!(text, "{:<28} {:>5}", "aborted", figures.aborted);
    }
    let mut time = |name: &str, summary: &Option<Summary>| {
        if let Some(s) = summary {
            let _ = writeln!(
                text,
                "{name:<28} {:>5} {:>8.2} ms {:>8.2} ms {:>8.2} ms",
                s.count,
                s.p50 / 1e3,
                s.p99 / 1e3,
                s.max / 1e3
            );
        }
    };
    time("blackout", &figures.blackout_us);
    time("the broker's pause", &figures.pause_us);
    time("the guest's gap", &figures.guest_gap_us);
    time("  while nothing is done", &figures.quiet_gap_us);
    time("request to commit", &figures.request_to_commit_us);
    for (step, summary) in &figures.steps_us {
        let name = step.split_once(' ').map_or(step.as_str(), |(_, name)| name);
        time(&format!("  {name}"), &Some(*summary));
    }
    time("audit: a thread's stop", &figures.audit_us);
    time("audit: the guest's gap", &figures.audit_gap_us);
    time("first sweep afterwards", &figures.first_sweep_us);
    time("warm sweep", &figures.warm_sweep_us);
    time("start: to first instruction", &figures.start_to_guest_us);
    time("start: broker to running", &figures.start_to_running_us);
    time("start: baton run returns", &figures.start_to_return_us);
    if let Some(qemu) = &figures.qemu {
        let name = |what: &str| format!("QEMU {}: {what}", qemu.version);
        time(&name("STOP-RESUME"), &qemu.stop_to_resume_us);
        time(&name("downtime"), &qemu.downtime_us);
        time(&name("request"), &qemu.request_to_resume_us);
    }
    if let Some(traffic) = &figures.traffic {
        let rate = |count: u64| count as f64 / figures.seconds.max(f64::MIN_POSITIVE);
        let _ = writeln!(
            text,
            "{:<28} {:.0} disk requests, {:.0} frames out, {:.0} in, {:.1} MiB of vsock echoed; none lost, none twice",
            "each second",
            rate(traffic.disk_requests),
            rate(traffic.frames_sent),
            rate(traffic.frames_received),
            rate(traffic.vsock_bytes) / f64::from(1 << 20)
        );
    }
    let mut memory = |name: &str, footprint: &Footprint| {
        let _ = writeln!(
            text,
            "{name:<28} {:>8.2} MiB resident, {:.2} proportional, {:.2} private",
            footprint.rss_kib as f64 / 1024.0,
            footprint.pss_kib as f64 / 1024.0,
            footprint.private_kib as f64 / 1024.0
        );
    };
    memory("broker", &figures.broker);
    memory("worker, without guest RAM", &figures.worker);
    if let Some(qemu) = &figures.qemu {
        memory("QEMU, without guest RAM", &qemu.footprint);
    }
    text
}

/// How much longer the blackout of the largest guest is than that of the smallest, of those that differ in size only.
pub(crate) fn scaling(measured: &[Figures]) -> Option<String> {
    let (first, last) = (measured.first()?, measured.last()?);
    let alike = first.case.cpus == last.case.cpus && first.case.pages == last.case.pages;
    if !alike || first.case.memory == last.case.memory {
        return None;
    }
    let ratio = last.blackout_us?.p50 / first.blackout_us?.p50;
    Some(format!(
        "blackout, {} : {} = {ratio:.2}",
        last.case.memory, first.case.memory
    ))
}
