//! A QMP client that says anything, to the whole front: framing, parsing, the check of arguments, dispatch and answers. The
//! broker behind it answers whatever it is asked.
//!
//! What is promised: no panic, every answer is one JSON object in a line, and what is kept for the client is bounded. Input: the
//! bytes; the last one says in which pieces they come.
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
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

use crate::session::Session;
use crate::shared::Shared;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, bytes)) = data.split_last() else {
        return;
    };
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
                    let _ = broker.send(&answer(&request));
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

/// A broker's answer: of the shape that the request has, or a refusal.
fn answer(request: &Request) -> Reply {
    match request {
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
