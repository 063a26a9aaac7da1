//! Two sides of a transfer to ask: the one that has the guest, and the one that waits for it.

use std::any::Any;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::is_alive;
use baton_tests::transfer::channel;
use baton_tests::until;
use rustix::process::Pid;
use rustix::process::Signal;
use serde_json::Value;
use serde_json::json;

use crate::cases::Here;
use crate::parse;
use crate::qemu::Machine;
use crate::qemu::Qemu;
use crate::qemu::SMALL;
use crate::render;

/// When a transfer that has not ended is taken for one that never will: QEMU's are. Ours end by their deadlines, which are far
/// shorter.
const SETTLED: Duration = Duration::from_secs(12);

/// When a process that is to end is taken for one that lives on.
const ENDED: Duration = Duration::from_secs(4);

/// How the side that waits is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum New {
    /// The main channel comes by `migrate-incoming`.
    Deferred,
    /// The same, and its guest is to stand still.
    Stands,
    /// The same, of a machine with two processors.
    TwoCpus,
    /// The same, of a machine with twice as much memory.
    MoreMemory,
}

/// One flow, in steps: `old` or `new`, and a message as in [`parse`]; or one of the words of [`Sides::step`].
pub(crate) struct Pair {
    pub(crate) name: &'static str,
    pub(crate) new: New,
    pub(crate) steps: &'static [&'static str],
    pub(crate) here: Option<Here>,
}

/// QEMU's, or ours.
pub(crate) struct Sides {
    old: Qmp,
    /// Connected when it is first asked: QEMU's does not listen before the CPR state is there.
    new: Option<Qmp>,
    new_socket: PathBuf,
    new_pid: i32,
    main: PathBuf,
    cpr: PathBuf,
    dir: PathBuf,
    /// What ends when this is dropped.
    _processes: Box<dyn Any>,
}

/// A VM of ours, and what may still wait for its guest.
struct Ours(Vm);

impl Drop for Ours {
    fn drop(&mut self) {
        let waiting = format!("{}.incoming", self.0.site.name);
        self.0.site.baton(["stop", "--force", &waiting]);
    }
}

/// Two of QEMU.
pub(crate) fn qemu(pair: &Pair) -> Sides {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let old = Qemu::start(dir.path(), "old", SMALL, &[]);
    let cpr = channel("cpr", &at("cpr")).to_string();
    let mut arguments = vec!["-incoming", "defer", "-incoming", &cpr];
    arguments.extend((pair.new == New::Stands).then_some("-S"));
    let machine = Machine {
        cpus: if pair.new == New::TwoCpus { 2 } else { 1 },
        mebibytes: if pair.new == New::MoreMemory { 32 } else { 16 },
    };
    let new = Qemu::start(dir.path(), "new", machine, &arguments);
    until("QEMU waits", || at("cpr").exists().then_some(()));
    let mut qmp = old.connect();
    qmp.done("qmp_capabilities", json!({}));
    Sides {
        old: qmp,
        new: None,
        new_socket: new.socket().to_owned(),
        new_pid: new.pid(),
        main: at("main"),
        cpr: at("cpr"),
        dir: dir.path().to_owned(),
        _processes: Box::new((old, new, dir)),
    }
}

/// Two of ours.
pub(crate) fn baton(pair: &Pair) -> Sides {
    let vm = Builder::release().start();
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let text = match pair.new {
        New::TwoCpus => text.replace("count = 1", "count = 2"),
        New::MoreMemory => text.replace("\"64M\"", "\"128M\""),
        New::Deferred | New::Stands => text,
    };
    vm.site.write("new.toml", text);
    let mut arguments = vec!["--incoming", "defer"];
    arguments.extend((pair.new == New::Stands).then_some("-S"));
    let waiting = vm.wait_from("new.toml", &arguments);
    let mut qmp = Qmp::greeted(&vm);
    qmp.done("qmp_capabilities", json!({}));
    let directory = format!("{}.incoming", vm.site.name);
    Sides {
        old: qmp,
        new: None,
        new_socket: vm.site.run_dir().join(directory).join("qmp.sock"),
        new_pid: waiting.broker,
        main: waiting.main,
        cpr: waiting.cpr,
        dir: vm.site.path(""),
        _processes: Box::new(Ours(vm)),
    }
}

impl Sides {
    /// The side that waits; none when it has ended instead.
    fn waiting(&mut self) -> Option<&mut Qmp> {
        if self.new.is_none() {
            self.new = until(
                "the waiting side serves QMP, or ends",
                || match Qmp::try_at(&self.new_socket) {
                    Some(mut qmp) => {
                        qmp.ask("qmp_capabilities", json!({}));
                        Some(Some(qmp))
                    }
                    None => (!is_alive(self.new_pid)).then_some(None),
                },
            );
        }
        self.new.as_mut()
    }

    /// One step; what it says, if that counts.
    fn step(&mut self, step: &str) -> Option<String> {
        match step {
            // Until the transfer has ended, as the old side has it.
            "old settles" => Some(self.settles()),
            // Until it waits before its pause.
            "old is held" => {
                until("the old side is held", || {
                    let info = self.old.returns("query-migrate", json!({}));
                    (info.get("status") == Some(&json!("pre-switchover"))).then_some(())
                });
                None
            }
            // Until the guest runs there, or stands still there.
            "new has it" => {
                let new = self.waiting().unwrap();
                let status = until("the new side has the guest", || {
                    let status = new.status();
                    (status != "inmigrate").then_some(status)
                });
                Some(format!("new {status}"))
            }
            "new is told to end" => {
                let pid = Pid::from_raw(self.new_pid).unwrap();
                rustix::process::kill_process(pid, Signal::TERM).unwrap();
                None
            }
            // A process that has nothing to do with it connects to the cpr socket, and goes.
            "a probe comes" => {
                drop(UnixStream::connect(&self.cpr).unwrap());
                None
            }
            "noise comes" => {
                let mut stream = UnixStream::connect(&self.cpr).unwrap();
                stream.write_all(b"HELLOHELLO").unwrap();
                None
            }
            // Whether the side that waits lives, once it has had the time to end.
            "new lives" => {
                let deadline = Instant::now() + ENDED;
                while is_alive(self.new_pid) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let lives = is_alive(self.new_pid);
                Some(format!("new {}", if lives { "lives" } else { "has ended" }))
            }
            message => Some(self.message(message)),
        }
    }

    /// How the transfer ends; what it still is, if it does not.
    fn settles(&mut self) -> String {
        let deadline = Instant::now() + SETTLED;
        loop {
            let info = self.old.returns("query-migrate", json!({}));
            let status = info.get("status").and_then(Value::as_str);
            let goes_on = !matches!(status, Some("completed" | "failed" | "cancelled") | None);
            if !goes_on || Instant::now() > deadline {
                return format!("old {}", status.unwrap_or("has begun nothing"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn message(&mut self, step: &str) -> String {
        let (side, message) = step.split_once(' ').unwrap();
        let (line, shown) = parse(message, &self.dir, &self.main, &self.cpr);
        let qmp = match side {
            "old" => &mut self.old,
            _ => match self.waiting() {
                Some(new) => new,
                None => return "nobody".to_owned(),
            },
        };
        qmp.flood(line.as_bytes());
        let answer = loop {
            match qmp.receive() {
                Some(message) if message.get("event").is_some() => {}
                other => break other,
            }
        };
        let said = render(answer, &shown, &self.dir);
        let paths = [(&self.main, "MAIN"), (&self.cpr, "CPR")];
        paths.iter().fold(said, |said, (path, name)| {
            said.replace(&path.display().to_string(), name)
        })
    }
}

/// What two sides say to a flow.
pub(crate) fn ask(mut sides: Sides, pair: &Pair) -> String {
    let said = pair.steps.iter().filter_map(|step| sides.step(step));
    said.collect::<Vec<_>>().join("; ")
}
