//! A QMP client that says anything, to the whole front: framing, parsing, the check of arguments, dispatch and answers. The
//! broker behind it answers whatever it is asked.
//!
//! What is promised: no panic, every answer is one JSON object in a line, and what is kept for the client is bounded. Input: the
//! bytes; the last one says in which pieces they come, and how the VM is.
#![no_main]
#![allow(dead_code, reason = "the front's modules are taken as they are, without its `main`")]

#[path = "../../../cli/src/bin/baton-qmp/capability.rs"]
mod capability;
#[path = "../../../cli/src/bin/baton-qmp/channels.rs"]
mod channels;
#[path = "../../../cli/src/bin/baton-qmp/commands.rs"]
mod commands;
#[path = "../../../cli/src/bin/baton-qmp/devices.rs"]
mod devices;
#[path = "../../../cli/src/bin/baton-qmp/failure.rs"]
mod failure;
#[path = "../../../cli/src/bin/baton-qmp/hmp.rs"]
mod hmp;
#[path = "../../../cli/src/bin/baton-qmp/introspect.rs"]
mod introspect;
#[path = "../../../cli/src/bin/baton-qmp/json.rs"]
mod json;
#[path = "../../../cli/src/bin/baton-qmp/machine.rs"]
mod machine;
#[path = "../../../cli/src/bin/baton-qmp/migration.rs"]
mod migration;
#[path = "../../../cli/src/bin/baton-qmp/schema.rs"]
mod schema;
#[path = "../../../cli/src/bin/baton-qmp/session.rs"]
mod session;
#[path = "../../../cli/src/bin/baton-qmp/shared.rs"]
mod shared;
#[path = "../../../cli/src/bin/baton-qmp/table.rs"]
mod table;
#[path = "../../../cli/src/bin/baton-qmp/types.rs"]
mod types;

use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

use crate::session::Session;
use crate::shared::Shared;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, bytes)) = data.split_last() else {
        return;
    };
    let states = [
        VmState::Running,
        VmState::Paused,
        VmState::Incoming,
        VmState::Postmigrate,
    ];
    let state = states[usize::from(piece >> 6)];
    let piece = piece & 63;
    let (mut client, stream) = UnixStream::pair().unwrap();
    stream.set_nonblocking(true).unwrap();
    client.set_nonblocking(true).unwrap();
    let (ask, ask_end) = FdSocket::pair().unwrap();
    let (oob, oob_end) = FdSocket::pair().unwrap();
    let mut brokers: [Channel<Reply, Request>; 2] = [Channel::new(ask), Channel::new(oob)];
    let mut shared = Shared::default();
    let mut session = Session::new(stream.into(), ask_end.into(), oob_end.into());
    let mut said = Vec::new();
    for bytes in bytes.chunks(usize::from(piece) * 16 + 1) {
        client.write_all(bytes).unwrap();
        // Each turn of the loop takes a command at most from each lane.
        for _ in 0..64 {
            if session.wants_input() {
                session.read();
            }
            session.advance(&mut shared);
            let mut asked = false;
            for broker in &mut brokers {
                while let Ok(Received::Message(request, _)) = broker.receive() {
                    asked = true;
                    let _ = broker.send(&answer(&request, state));
                }
            }
            session.take_replies();
            session.heed_replies(&mut shared);
            for event in shared.take_events() {
                session.tell(&event);
            }
            session.flush();
            let before = said.len();
            let _ = client.read_to_end(&mut said);
            if !asked && said.len() == before && !session.wants_output() {
                break;
            }
        }
    }
    let said = String::from_utf8(said).expect("answers are UTF-8");
    for line in said.lines() {
        let answer: Value = serde_json::from_str(line).expect("an answer is JSON");
        assert!(answer.is_object(), "{answer}");
    }
});

/// A VM in some state: commands go on by that.
fn status(state: VmState) -> VmStatus {
    VmStatus {
        name: "vm".into(),
        id: "0123456789abcdef0123456789abcdef".into(),
        state,
        broker_pid: 1,
        worker_pid: 2,
        worker_answers: true,
        generation: 1,
        worker_digest: String::new(),
        worker_build: String::new(),
        uptime_s: 1,
        ram_bytes: 64 << 20,
        cpus: 1,
        paused: state == VmState::Paused,
        disks: Vec::new(),
        vcpu_threads: vec![3],
        tsc_khz: 1,
        console_dropped: 0,
        last_upgrade: None,
        last_cancelled: false,
        vm_file: "/vm.toml".into(),
        balloon: Some(64 << 20),
        vhost_user: Vec::new(),
        vfio: Vec::new(),
        awaits: None,
        netdevs: Vec::new(),
        blocks_transfer: vec!["a reason".into()],
        blocks_save: vec!["another".into()],
    }
}

/// A broker's answer: of the shape that the request has, or a refusal.
fn answer(request: &Request, state: VmState) -> Reply {
    match request {
        Request::Status => Reply::Status(Box::new(status(state))),
        Request::Pause | Request::Resume | Request::Cancel | Request::BeginUpgrade { .. } => {
            Reply::Done
        }
        _ => Reply::Refused(Refusal {
            exit: Exit::Unfit,
            reason: "not in this test".to_owned(),
            remedy: String::new(),
        }),
    }
}
