//! `baton status`: how one VM is.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use serde_json::Value;
use serde_json::json;

use crate::arguments::Globals;
use crate::outcome;
use crate::output::Output;
use crate::output::Style;
use crate::output::printable;
use crate::run_dir::Found;
use crate::run_dir::Orphan;
use crate::run_dir::RunDir;
use crate::units;

pub(crate) fn execute(globals: &Globals, vm: &str, output: &Output) -> Result<Exit, Refusal> {
    let directory = RunDir::resolve(globals.run_dir.as_deref())?.vm(vm)?;
    match directory.look()? {
        Found::Broker(mut client) => {
            let status = client.status()?;
            if output.json() {
                output.document(&document(&status))?;
            } else {
                output.text(&person(&status, output))?;
            }
        }
        Found::Orphan(orphan) => {
            if output.json() {
                output.document(&orphan.document())?;
            } else {
                output.text(&orphan_lines(&orphan, output))?;
            }
        }
        Found::Stale => return Err(directory.stale()),
        Found::Absent => return Err(directory.absent()),
    }
    Ok(Exit::Done)
}

/// A status as JSON.
pub(crate) fn document(status: &VmStatus) -> Value {
    let VmStatus {
        name,
        id,
        state,
        broker_pid,
        worker_pid,
        worker_answers,
        generation,
        worker_digest,
        worker_build,
        uptime_s,
        ram_bytes,
        cpus,
        paused,
        // For the QMP front.
        last_cancelled: _,
        disks,
        vcpu_threads,
        tsc_khz,
        console_dropped,
        last_upgrade,
        vm_file,
        balloon,
        vhost_user,
        vfio,
        awaits,
        netdevs,
        blocks_transfer,
        blocks_save,
    } = status;
    json!({
        "name": name,
        "id": id,
        "state": state,
        "broker_pid": broker_pid,
        "worker_pid": worker_pid,
        "worker_answers": worker_answers,
        "generation": generation,
        "worker_digest": worker_digest,
        "worker_build": worker_build,
        "uptime_s": uptime_s,
        "ram_bytes": ram_bytes,
        "cpus": cpus,
        "paused": paused,
        "disks": disks,
        "vcpu_threads": vcpu_threads,
        "tsc_khz": tsc_khz,
        "console_dropped": console_dropped,
        "last_upgrade": last_upgrade.as_ref().map(outcome::document),
        "vm_file": vm_file,
        "balloon": balloon,
        "vhost_user": vhost_user,
        "netdevs": netdevs,
        "vfio": vfio,
        "blocks_transfer": blocks_transfer,
        "blocks_save": blocks_save,
        "awaits": awaits.as_ref().map(|awaited| &awaited.what),
    })
}

/// A state's name, as in JSON, and how good it is.
pub(crate) fn state_name(state: VmState) -> (Style, &'static str) {
    match state {
        VmState::Starting => (Style::Warning, "starting"),
        VmState::Running => (Style::Good, "running"),
        VmState::Paused => (Style::Warning, "paused"),
        VmState::Upgrading => (Style::Good, "upgrading"),
        VmState::Stopped => (Style::Dim, "stopped"),
        VmState::Lost => (Style::Bad, "lost"),
        VmState::Orphaned => (Style::Bad, "orphaned"),
        VmState::Incoming => (Style::Warning, "incoming"),
        VmState::Postmigrate => (Style::Dim, "postmigrate"),
        VmState::GuestPanicked => (Style::Bad, "guest-panicked"),
    }
}

/// How it is, and how good that is.
pub(crate) fn state(status: &VmStatus) -> (Style, String) {
    let (style, name) = state_name(status.state);
    if status.worker_answers {
        (style, name.to_owned())
    } else {
        (
            Style::Bad,
            format!("{name}, and its worker does not answer"),
        )
    }
}

fn person(status: &VmStatus, output: &Output) -> String {
    let (style, state) = state(status);
    let mut lines = vec![
        field(output, "name", &status.name),
        format!("{}{}", label(output, "state"), output.paint(style, &state)),
        field(output, "uptime", &units::seconds(status.uptime_s)),
        field(output, "generation", &status.generation.to_string()),
        field(
            output,
            "worker",
            &format!("pid {}, {}", status.worker_pid, status.worker_build),
        ),
        field(output, "digest", &status.worker_digest),
        field(output, "broker", &format!("pid {}", status.broker_pid)),
        field(output, "memory", &units::bytes(status.ram_bytes)),
        field(output, "vCPUs", &status.cpus.to_string()),
        field(output, "TSC", &format!("{} kHz", status.tsc_khz)),
    ];
    if let Some(left) = status.balloon.filter(|left| *left < status.ram_bytes) {
        let left = format!("leaves {} to the guest", units::bytes(left));
        lines.push(field(output, "balloon", &left));
    }
    if status.console_dropped > 0 {
        lines.push(field(
            output,
            "console",
            &format!("{} bytes dropped: nobody read them", status.console_dropped),
        ));
    }
    if let Some(last) = &status.last_upgrade {
        lines.push(format!(
            "{}{}",
            label(output, "last upgrade"),
            outcome::sentence(last, output)
        ));
    }
    lines.join("\n")
}

fn orphan_lines(orphan: &Orphan, output: &Output) -> String {
    let refusal = orphan.refusal();
    let lines = [
        format!(
            "{}{}",
            label(output, "state"),
            output.paint(Style::Bad, "orphaned")
        ),
        field(output, "generation", &orphan.generation().to_string()),
        field(output, "worker", &format!("pid {}", orphan.worker_pid())),
        field(output, "memory", &units::bytes(orphan.ram_bytes())),
        refusal.reason,
        refusal.remedy,
    ];
    lines.join("\n")
}

fn field(output: &Output, name: &str, value: &str) -> String {
    format!("{}{}", label(output, name), printable(value))
}

fn label(output: &Output, name: &str) -> String {
    if output.terminal() {
        output.paint(Style::Dim, &format!("{name:<13}"))
    } else {
        format!("{name}: ")
    }
}
