//! A QMP client: a unix socket and lines of JSON, nothing of Baton's.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;

use crate::Vm;
use crate::until;

/// How long one answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// What was said when it was made.
    pub greeting: Value,
    /// Every event so far.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects, and goes no further than the greeting.
    ///
    /// # Panics
    ///
    /// When nobody greets.
    #[must_use]
    pub fn greeted(vm: &Vm) -> Self {
        Self::at(&vm.site.run_dir().join(&vm.site.name).join("qmp.sock"))
    }

    /// Connects to whoever serves this socket, and goes no further than the greeting.
    ///
    /// # Panics
    ///
    /// When nobody greets.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self::try_at(path).expect("a greeting")
    }

    /// The same; none when nobody listens, or whoever does hangs up.
    #[must_use]
    pub fn try_at(path: &Path) -> Option<Self> {
        let stream = UnixStream::connect(path).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        let reader = BufReader::new(stream.try_clone().ok()?);
        let mut qmp = Self {
            stream,
            reader,
            greeting: Value::Null,
            events: Vec::new(),
        };
        qmp.greeting = qmp.receive()?;
        Some(qmp)
    }

    /// Connects, ready for commands, with MIGRATION events and our own switched on.
    ///
    /// # Panics
    ///
    /// When that is refused.
    #[must_use]
    pub fn connect(vm: &Vm) -> Self {
        Self::connect_to(vm, &vm.site.name)
    }

    /// The same to the broker whose directory is called this.
    ///
    /// # Panics
    ///
    /// When that is refused.
    #[must_use]
    pub fn connect_to(vm: &Vm, directory: &str) -> Self {
        let mut qmp = Self::at(&vm.site.run_dir().join(directory).join("qmp.sock"));
        qmp.done("qmp_capabilities", json!({"enable": ["oob"]}));
        let events = json!([{"capability": "events", "state": true}]);
        qmp.done("migrate-set-capabilities", json!({"capabilities": events}));
        qmp.done("__org.baton_events", json!({"enable": true}));
        qmp
    }

    /// Sends bytes.
    ///
    /// # Panics
    ///
    /// When they are not taken.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("it reads");
    }

    /// Sends bytes, as many as it takes.
    pub fn flood(&mut self, bytes: &[u8]) -> usize {
        self.stream.write(bytes).unwrap_or(0)
    }

    /// The next message; none when it has hung up.
    ///
    /// # Panics
    ///
    /// When nothing comes, or no JSON.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("no answer: {error}"),
            Ok(_) => {}
        }
        let message: Value = serde_json::from_str(&line).expect("JSON");
        Some(message)
    }

    /// The next message; none when nothing has come within `patience`, or it has hung up.
    ///
    /// # Panics
    ///
    /// When what comes is no JSON.
    pub fn receive_within(&mut self, patience: Duration) -> Option<Value> {
        let of = |stream: &UnixStream, patience| stream.set_read_timeout(Some(patience));
        of(&self.stream, patience).ok()?;
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        of(&self.stream, PATIENCE).ok()?;
        let _ = read.ok().filter(|count| *count > 0)?;
        Some(serde_json::from_str(&line).expect("JSON"))
    }

    /// The next answer; events are kept.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.receive().expect("an answer, not a hang-up");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// A command's whole answer.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(format!(
            "{}\n",
            json!({"execute": command, "arguments": arguments})
        ));
        self.answer()
    }

    /// What a command returns.
    ///
    /// # Panics
    ///
    /// When it is refused.
    pub fn returns(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        let value = answer.get("return");
        value
            .unwrap_or_else(|| panic!("{command}: {answer}"))
            .clone()
    }

    /// A command that has nothing to say.
    ///
    /// # Panics
    ///
    /// When it is refused.
    pub fn done(&mut self, command: &str, arguments: Value) {
        assert_eq!(self.returns(command, arguments), json!({}), "{command}");
    }

    /// Why a command is refused.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.ask(command, arguments);
        let text = answer.pointer("/error/desc").and_then(Value::as_str);
        text.unwrap_or_else(|| panic!("{command}: {answer}"))
            .to_owned()
    }

    /// The run state.
    pub fn status(&mut self) -> String {
        let status = self.returns("query-status", json!({}));
        let status = status.get("status").and_then(Value::as_str);
        status.unwrap_or_default().to_owned()
    }

    /// Begins an upgrade.
    pub fn migrate(&mut self) {
        self.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        self.done("migrate", json!({}));
    }

    /// Waits until a side that waits for a guest has its CPR state, and only `migrate-incoming` is missing.
    pub fn wait_for_cpr_state(&mut self) {
        until("the CPR state", || {
            let info = self.returns("query-migrate", json!({}));
            (info.get("__org.baton_awaits") == Some(&json!("`migrate-incoming`"))).then_some(())
        });
    }

    /// Waits until the upgrade that is under way has ended; what `query-migrate` says then.
    pub fn migrated(&mut self) -> Value {
        until("the migration ends", || {
            let info = self.returns("query-migrate", json!({}));
            let status = info
                .get("status")
                .and_then(Value::as_str)
                .unwrap_or_default();
            matches!(status, "completed" | "failed" | "cancelled").then_some(info)
        })
    }

    /// The same, after everything that has come by now.
    pub fn event_names_now(&mut self) -> Vec<String> {
        self.returns("query-version", json!({}));
        self.event_names()
    }

    /// The events so far, by name; MIGRATION's with their status.
    #[must_use]
    pub fn event_names(&self) -> Vec<String> {
        let name = |event: &Value| {
            let name = event
                .get("event")
                .and_then(Value::as_str)
                .unwrap_or_default();
            match event.pointer("/data/status").and_then(Value::as_str) {
                Some(status) => format!("{name} {status}"),
                None => name.to_owned(),
            }
        };
        self.events.iter().map(name).collect()
    }
}
