//! How the VM is, in QMP's shapes. All of it follows from the broker's one status.

use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use serde_json::Value;
use serde_json::json;

/// QEMU's `RunState` of a VM.
pub(crate) fn run_state(status: &VmStatus) -> &'static str {
    match status.state {
        VmState::Starting => "prelaunch",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Upgrading if status.paused => "paused",
        VmState::Upgrading => "running",
        VmState::Stopped => "shutdown",
        VmState::Incoming => "inmigrate",
        VmState::Postmigrate => "postmigrate",
        VmState::GuestPanicked => "guest-panicked",
        VmState::Lost | VmState::Orphaned => "internal-error",
    }
}

/// `query-status`.
pub(crate) fn status(status: &VmStatus) -> Value {
    let state = run_state(status);
    json!({"running": state == "running", "status": state})
}

/// `query-cpus-fast`.
pub(crate) fn cpus(status: &VmStatus) -> Value {
    let cpu = |index: usize, thread: &u32| {
        json!({
            "cpu-index": index,
            "thread-id": thread,
            "qom-path": format!("/machine/cpu[{index}]"),
            "target": "x86_64",
            "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
        })
    };
    let threads = status.vcpu_threads.iter().enumerate();
    threads.map(|(index, thread)| cpu(index, thread)).collect()
}

/// `query-block`.
pub(crate) fn block(status: &VmStatus) -> Value {
    let disks = status.disks.iter().map(|disk| {
        let mut block = json!({
            "device": if disk.added.is_some() { "" } else { &*disk.id },
            "type": "unknown",
            "removable": false,
            "locked": false,
            "inserted": {
                "file": disk.path,
                "drv": "raw",
                "ro": disk.readonly,
                "encrypted": false,
                "backing_file_depth": 0,
                "detect_zeroes": "off",
                "cache": {"writeback": true, "direct": disk.direct, "no-flush": false},
                "node-name": disk.id,
                "image": {"filename": disk.path, "format": "raw", "virtual-size": disk.bytes},
            },
        });
        if let (Some(members), Some(id)) = (block.as_object_mut(), &disk.added) {
            members.insert("qdev".to_owned(), json!(id));
        }
        block
    });
    disks.collect()
}

/// `query-memory-size-summary`.
pub(crate) fn memory(status: &VmStatus) -> Value {
    json!({"base-memory": status.ram_bytes, "plugged-memory": 0})
}

/// `query-name`.
pub(crate) fn name(status: &VmStatus) -> Value {
    json!({"name": status.name})
}

/// `query-uuid`: the VM's identity, in a UUID's form (RFC 9562, section 4).
pub(crate) fn uuid(status: &VmStatus) -> Value {
    let id = &status.id;
    let part = |from, to| id.get(from..to).unwrap_or_default();
    let uuid = [
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32),
    ]
    .join("-");
    json!({"UUID": uuid})
}

/// The version of QMP that is spoken, by the number of the QEMU release that has it, and who speaks it.
pub(crate) fn version() -> Value {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": concat!("baton ", env!("CARGO_PKG_VERSION")),
    })
}
