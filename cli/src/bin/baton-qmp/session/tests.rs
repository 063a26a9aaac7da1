use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;

use baton_ipc::FdSocket;
use baton_ipc::control::DiskStatus;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;

use super::*;

/// A client, and a broker that answers as it is told to.
struct Pair {
    session: Session,
    client: UnixStream,
    broker: [Channel<Reply, Request>; 2],
    shared: Shared,
}

impl Pair {
    fn new() -> Self {
        let (client, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        client.set_nonblocking(true).unwrap();
        let (ask, ask_end) = FdSocket::pair().unwrap();
        let (oob, oob_end) = FdSocket::pair().unwrap();
        Self {
            session: Session::new(stream.into(), ask_end.into(), oob_end.into()),
            client,
            broker: [Channel::new(ask), Channel::new(oob)],
            shared: Shared::default(),
        }
    }

    fn negotiated() -> Self {
        let mut pair = Self::new();
        pair.say(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
        assert_eq!(pair.heard().len(), 2, "greeting and answer");
        pair
    }

    fn say(&mut self, text: &str) {
        self.client.write_all(text.as_bytes()).unwrap();
        self.turn();
    }

    fn turn(&mut self) {
        self.session.take_replies();
        self.session.heed_replies(&mut self.shared);
        while self.session.wants_input() {
            let before = self.session.input.len();
            self.session.read();
            if self.session.input.len() == before {
                break;
            }
            self.session.advance(&mut self.shared);
        }
        self.session.advance(&mut self.shared);
        self.session.flush();
    }

    fn heard(&mut self) -> Vec<Value> {
        let mut text = Vec::new();
        let _ = self.client.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn error(&mut self, text: &str) -> (String, String) {
        self.say(text);
        let heard = self.heard();
        let [answer] = heard.as_slice() else {
            panic!("{heard:?}");
        };
        let error = &answer["error"];
        let member = |name: &str| error[name].as_str().unwrap().to_owned();
        (member("class"), member("desc"))
    }

    fn asked(&mut self, lane: usize) -> Option<Request> {
        match self.broker[lane].receive().unwrap() {
            Received::Message(request, _) => Some(request),
            _ => None,
        }
    }
}

fn status() -> VmStatus {
    VmStatus {
        name: "web1".into(),
        id: "0123456789abcdef0123456789abcdef".into(),
        state: VmState::Running,
        broker_pid: 1,
        worker_pid: 2,
        worker_answers: true,
        generation: 1,
        worker_digest: String::new(),
        worker_build: String::new(),
        uptime_s: 1,
        ram_bytes: 64 << 20,
        cpus: 1,
        paused: false,
        disks: vec![DiskStatus {
            id: "root".into(),
            path: "/root.img".into(),
            readonly: true,
            direct: false,
            bytes: 4096,
            added: None,
        }],
        vcpu_threads: vec![3],
        tsc_khz: 1,
        console_dropped: 0,
        last_upgrade: None,
        last_cancelled: false,
        vm_file: "/srv/vm/web1.toml".into(),
        balloon: Some(64 << 20),
        vhost_user: Vec::new(),
        vfio: Vec::new(),
        awaits: None,
        netdevs: Vec::new(),
        blocks_transfer: Vec::new(),
        blocks_save: Vec::new(),
    }
}

#[test]
fn commands_that_came_in_one_piece_are_all_executed_when_the_answers_are_taken() {
    let mut pair = Pair::negotiated();
    let commands = r#"{"execute": "x"}"#.repeat(1000);
    assert!(commands.len() <= READ);
    pair.say(&commands);
    assert_eq!(pair.heard().len(), 1000);
}

#[test]
fn nothing_works_before_negotiation_and_it_happens_once() {
    let mut pair = Pair::new();
    assert!(pair.heard().is_empty());
    pair.session.flush();
    let greeting = pair.heard();
    assert_eq!(greeting[0]["QMP"]["capabilities"], json!(["oob"]));
    let not_found = "CommandNotFound".to_owned();
    for command in ["query-status", "no-such-command"] {
        let (class, text) = pair.error(&format!("{{\"execute\": \"{command}\"}}"));
        assert_eq!(class, not_found);
        assert!(
            text.contains("Expecting capabilities negotiation"),
            "{text}"
        );
    }
    pair.say(r#"{"execute": "qmp_capabilities", "id": {"a": [1]}}"#);
    assert_eq!(pair.heard(), [json!({"return": {}, "id": {"a": [1]}})]);
    let (class, text) = pair.error(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(class, not_found);
    assert!(text.contains("already complete"), "{text}");
    let (_, text) = pair.error(r#"{"exec-oob": "query-yank"}"#);
    assert_eq!(text, "QMP input member 'exec-oob' is unexpected");
}

#[test]
fn bad_input_is_refused_in_qemus_words() {
    let mut pair = Pair::negotiated();
    for (input, expected) in [
        ("17 ", "QMP input must be a JSON object"),
        ("[]", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (
            r#"{"execute": 1}"#,
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"execute": "stop", "x": 1}"#,
            "QMP input member 'x' is unexpected",
        ),
        (
            r#"{"execute": "stop", "arguments": []}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute": "stop", "arguments": {"x": 1}}"#,
            "Parameter 'x' is unexpected",
        ),
        (
            r#"{"execute": "stop", "exec-oob": "stop"}"#,
            "QMP input member 'exec-oob' clashes with 'execute'",
        ),
        (
            r#"{"exec-oob": "stop"}"#,
            "The command stop does not support OOB",
        ),
        (
            r#"{"execute": "nope"}"#,
            "The command nope has not been found",
        ),
        (
            r#"{"execute": "migrate-set-parameters", "arguments": {"mode": "bogus"}}"#,
            "Parameter 'mode' does not accept value 'bogus'",
        ),
    ] {
        assert_eq!(pair.error(input).1, expected, "{input}");
    }
    for input in [
        "{\"execute\": \"\u{1}\"}\n",
        "{]",
        "{\"a\" 1}",
        "nul ",
        "{\"execute\": 1e999}",
    ] {
        let (_, text) = pair.error(input);
        assert!(text.starts_with("JSON parse error, "), "{input}: {text}");
    }
}

#[test]
fn commands_wait_for_each_other_and_out_of_band_ones_for_nobody() {
    let mut pair = Pair::negotiated();
    pair.say(r#"{"execute": "query-status", "id": 1} {"execute": "query-commands", "id": 2}"#);
    pair.say(r#"{"exec-oob": "query-yank", "id": 3}"#);
    assert_eq!(pair.heard(), [json!({"return": [], "id": 3})]);
    assert_eq!(pair.asked(0), Some(Request::Status));
    pair.broker[0]
        .send(&Reply::Status(Box::new(status())))
        .unwrap();
    pair.turn();
    let heard = pair.heard();
    assert_eq!(
        heard[0],
        json!({"return": {"running": true, "status": "running"}, "id": 1})
    );
    assert_eq!(heard[1]["id"], 2);
    assert_eq!(heard[1]["return"].as_array().unwrap().len(), COMMANDS.len());
}

#[test]
fn every_answer_is_as_the_schema_says() {
    let mut pair = Pair::negotiated();
    for command in COMMANDS.iter().filter(|one| one.name.starts_with("query-")) {
        pair.say(&format!("{{\"execute\": \"{}\"}}", command.name));
        if pair.asked(0) == Some(Request::Status) {
            pair.broker[0]
                .send(&Reply::Status(Box::new(status())))
                .unwrap();
            pair.turn();
        }
        let heard = pair.heard();
        assert!(
            heard[0].get("return").is_some(),
            "{}: {heard:?}",
            command.name
        );
    }
}

#[test]
fn disks_are_listed_as_the_vm_file_says() {
    let mut pair = Pair::negotiated();
    pair.say(r#"{"execute": "query-block"}"#);
    assert_eq!(pair.asked(0), Some(Request::Status));
    pair.broker[0]
        .send(&Reply::Status(Box::new(status())))
        .unwrap();
    pair.turn();
    let disk = &pair.heard()[0]["return"][0];
    assert_eq!(disk["device"], "root");
    assert_eq!(disk["inserted"]["file"], "/root.img");
    assert_eq!(disk["inserted"]["ro"], true);
    assert_eq!(disk["inserted"]["cache"]["direct"], false);
}

#[test]
fn a_client_that_floods_or_never_reads_holds_a_bounded_amount() {
    let mut pair = Pair::negotiated();
    let flood = r#"{"execute": "query-qmp-schema"}"#.repeat(64);
    let mut said = 0;
    for _ in 0..10_000 {
        match pair.client.write(flood.as_bytes()) {
            Ok(count) => said += count,
            Err(_) => break,
        }
        pair.turn();
    }
    assert!(said > 0);
    // Commands stop being taken; what is taken is bounded.
    assert!(pair.session.output.len() < 2 * HIGH_WATER + 256 * 1024);
    assert!(pair.session.input.len() <= READ);
    assert!(pair.session.waiting.len() <= MAX_WAITING);
    assert!(!pair.session.is_dead());
    // Events cannot be held back: from the bound on the client is hung up on.
    let event = json!({"event": "STOP", "padding": "x".repeat(4096)});
    for _ in 0..2 * MAX_UNSENT / 4096 {
        pair.session.tell(&event);
    }
    assert!(pair.session.is_dead());
    assert!(pair.session.output.len() <= MAX_UNSENT);
}

#[test]
fn who_ends_its_side_still_gets_its_answers() {
    let mut pair = Pair::negotiated();
    pair.say(r#"{"execute": "query-version"}"#);
    pair.client.shutdown(std::net::Shutdown::Write).unwrap();
    pair.turn();
    pair.session.read();
    assert!(pair.session.is_dead());
    assert_eq!(pair.heard().len(), 1);
}
