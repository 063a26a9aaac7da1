//! One QMP client: its bytes in, its answers and events out, and the command that it waits for.
//!
//! In-band commands are executed one after another, out-of-band commands at once, each on a control connection of its own.
//! Everything that a client can make this program hold is bounded; one that does not read is hung up on.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use baton_ipc::Channel;
use baton_ipc::Received;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::failure::Class;
use crate::failure::Failure;
use crate::json;
use crate::json::Framer;
use crate::machine;
use crate::schema::Command;
use crate::schema::Object;
use crate::shared::Answer;
use crate::shared::Shared;
use crate::shared::Then;
use crate::table::COMMANDS;
use crate::table::OWN;

/// How much may wait to be read by a client, in bytes.
pub(crate) const MAX_UNSENT: usize = 1024 * 1024;
/// From here on a client's commands are not executed until it has read, in bytes.
const HIGH_WATER: usize = 64 * 1024;
/// How many commands of a client wait; as many as in QEMU (QMP_REQ_QUEUE_LEN_MAX, `monitor/monitor-internal.h`).
const MAX_WAITING: usize = 8;
/// How much is read at a time, in bytes.
const READ: usize = 16 * 1024;

/// A connection to the broker, in a client's name.
pub(crate) type Control = Channel<Request, Reply>;

/// A client.
pub(crate) struct Session {
    stream: OwnedFd,
    in_band: Lane,
    out_of_band: Lane,
    framer: Framer,
    input: VecDeque<u8>,
    waiting: VecDeque<Result<Vec<u8>, Failure>>,
    output: VecDeque<u8>,
    negotiated: bool,
    oob: bool,
    /// It has asked for events that QEMU does not have. Clients with a closed list of events break on others.
    own_events: bool,
    /// It will say no more.
    ended: bool,
    /// It is to be forgotten.
    dead: bool,
}

/// A control connection, and what it is waited for.
struct Lane {
    control: Control,
    pending: Option<Pending>,
    /// The answer to that.
    reply: Option<Result<Reply, Refusal>>,
    /// It was told something whose answer nobody waits for; nothing can be asked after that.
    told: bool,
}

struct Pending {
    id: Option<Value>,
    command: &'static Command,
    then: Then,
}

/// What a client wants.
struct Wanted {
    id: Option<Value>,
    name: String,
    arguments: Object,
    oob: bool,
}

impl Lane {
    fn new(control: Control) -> Self {
        Self {
            control,
            pending: None,
            reply: None,
            told: false,
        }
    }

    fn is_free(&self) -> bool {
        self.pending.is_none() && !self.told
    }
}

impl Session {
    /// Greets a client.
    pub(crate) fn new(stream: OwnedFd, in_band: OwnedFd, out_of_band: OwnedFd) -> Self {
        let mut session = Self {
            stream,
            in_band: Lane::new(Control::new(in_band.into())),
            out_of_band: Lane::new(Control::new(out_of_band.into())),
            framer: Framer::default(),
            input: VecDeque::new(),
            waiting: VecDeque::new(),
            output: VecDeque::new(),
            negotiated: false,
            oob: false,
            own_events: false,
            ended: false,
            dead: false,
        };
        session.say(&json!({"QMP": {"version": machine::version(), "capabilities": ["oob"]}}));
        session
    }

    pub(crate) fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Where the broker's answers come.
    pub(crate) fn controls(&self) -> [BorrowedFd<'_>; 2] {
        [
            self.in_band.control.as_fd(),
            self.out_of_band.control.as_fd(),
        ]
    }

    /// Whether it may say more now.
    pub(crate) fn wants_input(&self) -> bool {
        !self.ended && self.input.is_empty() && self.has_room()
    }

    /// Whether it has something to read.
    pub(crate) fn wants_output(&self) -> bool {
        !self.output.is_empty()
    }

    pub(crate) fn is_dead(&self) -> bool {
        let idle = self.waiting.is_empty()
            && self.input.is_empty()
            && self.in_band.is_free()
            && self.out_of_band.is_free();
        self.dead || (self.ended && idle && self.output.is_empty())
    }

    /// It is gone for both directions.
    pub(crate) fn hang_up(&mut self) {
        self.dead = true;
    }

    fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
            && self.output.len() < HIGH_WATER
            && self.out_of_band.is_free()
    }

    /// Reads a piece of what it says.
    pub(crate) fn read(&mut self) {
        let mut buffer = [0; READ];
        match rustix::io::read(&self.stream, &mut buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => self
                .input
                .extend(buffer.get(..count).into_iter().flatten().copied()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.dead = true,
        }
    }

    /// Takes the broker's answers.
    pub(crate) fn take_replies(&mut self) {
        for oob in [false, true] {
            let lane = self.lane(oob);
            while lane.reply.is_none() {
                lane.reply = match lane.control.receive() {
                    Ok(Received::Empty) => break,
                    Ok(Received::Message(Reply::Hello { .. } | Reply::Progress(_), _)) => None,
                    Ok(Received::Message(Reply::Refused(refusal), _)) => Some(Err(refusal)),
                    Ok(Received::Message(reply, _)) => Some(Ok(reply)),
                    Ok(Received::HungUp) | Err(_) => {
                        self.ended = true;
                        self.dead |= self.output.is_empty();
                        break;
                    }
                };
            }
        }
    }

    /// Goes on with what waited for them.
    pub(crate) fn heed_replies(&mut self, shared: &mut Shared) {
        for oob in [false, true] {
            let lane = self.lane(oob);
            let Some(reply) = lane.reply.take() else {
                continue;
            };
            if let Some(Pending { id, command, then }) = lane.pending.take() {
                let answer = then(shared, reply);
                self.settle(oob, id, command, answer);
            }
        }
    }

    /// Goes on with what it has said, for as long as it takes the answers: nothing wakes this program for commands that are here already.
    pub(crate) fn advance(&mut self, shared: &mut Shared) {
        loop {
            self.work(shared);
            let full = self.output.len() >= HIGH_WATER;
            self.flush();
            let drained = full && self.output.len() < HIGH_WATER;
            if !drained || self.dead {
                return;
            }
        }
    }

    fn work(&mut self, shared: &mut Shared) {
        loop {
            while self.has_room() {
                let Some(byte) = self.input.pop_front() else {
                    break;
                };
                if let Some(frame) = self.framer.feed(byte) {
                    self.hear(frame, shared);
                }
            }
            if !self.in_band.is_free() || self.output.len() >= HIGH_WATER || self.dead {
                return;
            }
            match self.waiting.pop_front() {
                Some(Ok(text)) => match json::parse(&text) {
                    Ok(value) => self.execute(value, shared),
                    Err(failure) => self.refuse(None, &failure),
                },
                Some(Err(failure)) => self.refuse(None, &failure),
                None => return,
            }
        }
    }

    fn hear(&mut self, frame: Result<Vec<u8>, Failure>, shared: &mut Shared) {
        if let (true, Ok(text)) = (self.oob, &frame) {
            if let Ok(value) = json::parse(text) {
                if value.get("exec-oob").is_some() {
                    return self.execute(value, shared);
                }
            }
        }
        self.waiting.push_back(frame);
    }

    fn execute(&mut self, value: Value, shared: &mut Shared) {
        let wanted = match self.wanted(value) {
            Ok(wanted) => wanted,
            Err((id, failure)) => return self.refuse(id, &failure),
        };
        let Wanted {
            id,
            name,
            arguments,
            oob,
        } = wanted;
        let command = match find(&name, oob) {
            Ok(command) if self.negotiated || name == "qmp_capabilities" => command,
            Err(failure) if self.negotiated => return self.refuse(id, &failure),
            _ => {
                let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return self.refuse(id, &Failure::of(Class::CommandNotFound, text));
            }
        };
        if let Err(failure) = command.arguments.check(&arguments, "") {
            return self.refuse(id, &failure);
        }
        if !self.negotiated {
            self.oob = arguments
                .get("enable")
                .and_then(Value::as_array)
                .is_some_and(|enable| enable.iter().any(|capability| capability == "oob"));
            self.negotiated = true;
            return self.settle(oob, id, command, Answer::done());
        }
        let answer = (command.run)(shared, &arguments);
        self.settle(oob, id, command, answer);
    }

    /// What a value asks for, in QEMU's words when it asks for nothing (`qapi/qmp-dispatch.c`).
    fn wanted(&self, value: Value) -> Result<Wanted, (Option<Value>, Failure)> {
        let Value::Object(mut members) = value else {
            let text = "QMP input must be a JSON object";
            return Err((None, Failure::generic(text)));
        };
        let id = members.remove("id");
        let refuse = |text: String| (id.clone(), Failure::generic(text));
        let known = |name: &str| {
            name == "execute" || name == "arguments" || (name == "exec-oob" && self.oob)
        };
        if let Some(name) = members.keys().find(|name| !known(name)) {
            return Err(refuse(format!("QMP input member '{name}' is unexpected")));
        }
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                let text = "QMP input member 'arguments' must be an object";
                return Err(refuse(text.to_owned()));
            }
        };
        let (key, name, oob) = match (members.remove("execute"), members.remove("exec-oob")) {
            (Some(_), Some(_)) => {
                let text = "QMP input member 'exec-oob' clashes with 'execute'";
                return Err(refuse(text.to_owned()));
            }
            (None, None) => {
                return Err(refuse("QMP input lacks member 'execute'".to_owned()));
            }
            (Some(name), None) => ("execute", name, false),
            (None, Some(name)) => ("exec-oob", name, true),
        };
        let Value::String(name) = name else {
            return Err(refuse(format!("QMP input member '{key}' must be a string")));
        };
        Ok(Wanted {
            id,
            name,
            arguments,
            oob,
        })
    }

    fn lane(&mut self, oob: bool) -> &mut Lane {
        if oob {
            &mut self.out_of_band
        } else {
            &mut self.in_band
        }
    }

    fn settle(&mut self, oob: bool, id: Option<Value>, command: &'static Command, answer: Answer) {
        let lane = self.lane(oob);
        let result = match answer {
            Answer::Now(result) => result,
            Answer::OwnEvents(enabled) => {
                self.own_events = enabled;
                Ok(json!({}))
            }
            Answer::Ask(request, then) => match lane.control.send(&request) {
                Ok(()) => {
                    lane.pending = Some(Pending { id, command, then });
                    return;
                }
                Err(error) => Err(Failure::generic(format_args!("the broker: {error}"))),
            },
            Answer::Tell(request) => {
                lane.told = true;
                match lane.control.send(&request) {
                    Ok(()) => Ok(json!({})),
                    Err(error) => Err(Failure::generic(format_args!("the broker: {error}"))),
                }
            }
        };
        let result = result.and_then(|value| {
            command.returns.check(&value, "return")?;
            Ok(value)
        });
        match result {
            Ok(value) => self.answer("return", value, id),
            Err(failure) => self.refuse(id, &failure),
        }
    }

    fn refuse(&mut self, id: Option<Value>, failure: &Failure) {
        self.answer("error", failure.to_json(), id);
    }

    fn answer(&mut self, member: &str, value: Value, id: Option<Value>) {
        let mut answer = Map::new();
        answer.insert(member.to_owned(), value);
        answer.extend(id.map(|id| ("id".to_owned(), id)));
        self.say(&Value::Object(answer));
    }

    /// Tells it of an event.
    pub(crate) fn tell(&mut self, event: &Value) {
        let name = event.get("event").and_then(Value::as_str);
        let ours = name.is_some_and(|name| name.starts_with(OWN));
        if self.negotiated && (self.own_events || !ours) {
            self.say(event);
        }
    }

    fn say(&mut self, value: &Value) {
        let text = value.to_string();
        if self.output.len() + text.len() > MAX_UNSENT {
            eprintln!("a client does not read: {} bytes wait", self.output.len());
            self.dead = true;
            return;
        }
        self.output.extend(text.as_bytes());
        self.output.extend(b"\r\n");
    }

    /// Sends what it takes.
    pub(crate) fn flush(&mut self) {
        while !self.output.is_empty() {
            let (first, _) = self.output.as_slices();
            match rustix::net::send(
                &self.stream,
                first,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => drop(self.output.drain(..count.min(first.len()))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.dead = true;
                    return;
                }
            }
        }
        if self.output.capacity() > HIGH_WATER {
            self.output = VecDeque::new();
        }
    }
}

fn find(name: &str, oob: bool) -> Result<&'static Command, Failure> {
    let command = COMMANDS.iter().find(|command| command.name == name);
    let command = command.ok_or_else(|| {
        Failure::of(
            Class::CommandNotFound,
            format_args!("The command {name} has not been found"),
        )
    })?;
    if oob && !command.oob {
        return Err(Failure::generic(format_args!(
            "The command {name} does not support OOB"
        )));
    }
    Ok(command)
}

#[cfg(test)]
mod tests;
