//! Flows: what is asked of the side that has the guest, and of the one that waits for it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use baton_tests::Qmp;
use baton_tests::continue_process;
use baton_tests::is_alive;
use baton_tests::stop_process;
use baton_tests::until;
use baton_tests::with_children;
use rustix::process::Pid;
use rustix::process::Signal;
use serde_json::Value;
use serde_json::json;

use crate::cases::Here;
use crate::impostor;
use crate::listener::Listener;
use crate::parse;
use crate::party::New;
use crate::party::Party;
use crate::party::Waiting;
use crate::render;

/// When a transfer of QEMU's that has not ended is taken for one that never will.
const SETTLED: Duration = Duration::from_secs(12);

/// The same of ours, which end by their deadlines.
const EXPIRED: Duration = Duration::from_secs(40);

/// When a process that is to end is taken for one that lives on.
const ENDED: Duration = Duration::from_secs(4);

/// When a question that was not answered is taken for one that never will be.
const ANSWERED: Duration = Duration::from_secs(15);

/// When a side that does not serve QMP is taken for one that does not before it is sent something.
const SERVED: Duration = Duration::from_secs(2);

/// One flow, in steps: `old` or `new`, and a message as in [`parse`]; or one of the words of [`Sides::step`].
pub(crate) struct Pair {
    pub(crate) name: &'static str,
    pub(crate) new: New,
    pub(crate) steps: &'static [&'static str],
    pub(crate) here: Option<Here>,
}

pub(crate) const fn same(name: &'static str, new: New, steps: &'static [&'static str]) -> Pair {
    Pair {
        name,
        new,
        steps,
        here: None,
    }
}

pub(crate) const fn differs(
    name: &'static str,
    new: New,
    steps: &'static [&'static str],
    says: &'static str,
    why: &'static str,
) -> Pair {
    Pair {
        name,
        new,
        steps,
        here: Some(Here { says, why }),
    }
}

/// QEMU's, or ours.
struct Sides {
    kind: New,
    old: Qmp,
    /// Connected when it is first asked: QEMU's does not listen before the CPR state is there.
    new: Option<Qmp>,
    waiting: Option<Waiting>,
    /// How many have waited.
    number: usize,
    /// Where `$cpr` leads to: the waiting side's own socket, or somebody's in between.
    cpr: PathBuf,
    /// What keeps that one as it is.
    kept: Vec<OwnedFd>,
    /// Who listens to the guest's serial port.
    listener: Option<Listener>,
    /// Dropped last: ours ends when its clients have gone.
    party: Party,
}

impl Sides {
    fn new((party, old): (Party, Qmp), kind: New) -> Self {
        let mut sides = Self {
            cpr: party.dir().join("cpr"),
            party,
            kind,
            old,
            new: None,
            waiting: None,
            number: 0,
            kept: Vec::new(),
            listener: None,
        };
        if kind != New::Nobody {
            sides.another_waits();
        }
        sides
    }

    fn another_waits(&mut self) {
        self.number += 1;
        let waiting = self.party.wait(self.kind, self.number);
        self.new = None;
        self.cpr = waiting.cpr.clone();
        self.waiting = Some(waiting);
        if let Party::Ours { .. } = self.party {
            // Its socket is elsewhere once it has the guest.
            self.monitor();
        }
    }

    fn waiting(&self) -> &Waiting {
        self.waiting.as_ref().unwrap()
    }

    /// The waiting side's monitor; none when it has ended instead.
    fn monitor(&mut self) -> Option<&mut Qmp> {
        if self.new.is_none() {
            let Waiting { pid, qmp, .. } = self.waiting().clone();
            self.new = until(
                "the waiting side serves QMP, or ends",
                || match Qmp::try_at(&qmp) {
                    Some(mut qmp) => {
                        qmp.ask("qmp_capabilities", json!({}));
                        Some(Some(qmp))
                    }
                    None => (!is_alive(pid)).then_some(None),
                },
            );
        }
        self.new.as_mut()
    }

    /// One step; what it says, if that counts.
    fn step(&mut self, step: &str) -> Option<String> {
        match step {
            // Until the transfer has ended, as the old side has it.
            "old settles" => return Some(self.settles()),
            // Whether the guest runs there, or stands still.
            "new has it" => {
                let new = self.monitor().unwrap();
                let status = until("the new side has the guest", || {
                    let status = new.status();
                    (status != "inmigrate").then_some(status)
                });
                return Some(format!("new {status}"));
            }
            // The events that it was told of, but for QEMU's of its passes over memory.
            "old heard" => return Some(heard(&mut self.old)),
            "new heard" => return Some(self.monitor().map_or("nobody".to_owned(), heard)),
            // Whether the side that waits lives, once it has had the time to end.
            "new lives" => {
                let pid = self.waiting().pid;
                let lives = !comes(ENDED, || !is_alive(pid));
                return Some(format!("new {}", if lives { "lives" } else { "has ended" }));
            }
            "new serves QMP" => {
                let socket = self.waiting().qmp.clone();
                let serves = comes(SERVED, || Qmp::try_at(&socket).is_some());
                return Some(format!(
                    "new {}",
                    if serves { "serves" } else { "does not serve" }
                ));
            }
            "somebody else asks old" => {
                let socket = self.party.socket();
                let greeted = comes(SERVED, || {
                    // QEMU's kernel takes the connection, and nobody greets.
                    let stream = UnixStream::connect(&socket).unwrap();
                    stream.set_read_timeout(Some(SERVED)).unwrap();
                    rustix::net::recv(&stream, &mut [0; 1], rustix::net::RecvFlags::PEEK).is_ok()
                });
                return Some(format!(
                    "old {}",
                    if greeted {
                        "answers"
                    } else {
                        "does not answer"
                    }
                ));
            }
            // QEMU's serves nobody before.
            "new has the CPR state" => {
                let ours = matches!(self.party, Party::Ours { .. });
                let new = self.monitor().unwrap();
                if ours {
                    new.wait_for_cpr_state();
                }
            }
            "old is held" => self.until_old_is(&["pre-switchover"]),
            // A side that is refused before is never held.
            "old is held, or has failed" => self.until_old_is(&["pre-switchover", "failed"]),
            "old has ended" => {
                let pid = self.party.pid();
                until("the old side ends", || (!is_alive(pid)).then_some(()));
            }
            "the old side's memory" => {
                let maps = with_children(self.party.pid())
                    .into_iter()
                    .any(maps_guest_memory);
                let maps = if maps {
                    "maps the guest's memory"
                } else {
                    "has nothing of it"
                };
                return Some(format!("old {maps}"));
            }
            "the socket of both" => {
                let there = self.party.one_socket().exists();
                return Some(format!("it is {}", if there { "there" } else { "gone" }));
            }
            "somebody listens to the serial port" => self.listener = Some(self.party.listen()),
            "the listener" => {
                let ended = self.listener.as_mut().unwrap().is_hung_up_on();
                let ended = if ended { "is hung up on" } else { "stays" };
                return Some(format!("the listener {ended}"));
            }
            "old gets a device" => {
                for step in self.party.addition() {
                    let said = self.message(&step);
                    assert_eq!(said, "done", "{step}");
                }
            }
            "new is told to end" => {
                let pid = Pid::from_raw(self.waiting().pid).unwrap();
                rustix::process::kill_process(pid, Signal::TERM).unwrap();
            }
            "new is killed" => {
                let waiting = self.waiting().clone();
                self.party.kill(&waiting);
            }
            "new is frozen" => with_children(self.waiting().pid)
                .into_iter()
                .for_each(stop_process),
            "new is thawed" => with_children(self.waiting().pid)
                .into_iter()
                .for_each(continue_process),
            "another waits" => self.another_waits(),
            "new is old now" => {
                self.old = self.new.take().unwrap();
            }
            // A process that has nothing to do with it connects to the cpr socket.
            "a probe comes" => impostor::say(&self.cpr, b""),
            "noise comes" => impostor::say(&self.cpr, b"HELLOHELLO"),
            "a QEMU of another version comes" => impostor::say(&self.cpr, &impostor::header(2)),
            "half of a QEMU's state comes" => impostor::say(&self.cpr, &impostor::header(1)),
            "a QEMU's state without its descriptor comes" => {
                impostor::say(&self.cpr, &impostor::without_descriptor());
            }
            "nobody accepts at the cpr socket" => self.deaf("deaf", false),
            "nobody can connect to the cpr socket" => self.deaf("full", true),
            "the cpr socket is the waiting side's" => self.cpr = self.waiting().cpr.clone(),
            "somebody in between swaps guest memory" => self.between(),
            message => {
                // A side that is about to end may answer, or not.
                if let Some(message) = message.strip_prefix("perhaps ") {
                    self.message(message);
                } else {
                    return Some(self.message(message));
                }
            }
        }
        None
    }

    fn until_old_is(&mut self, states: &[&str]) {
        until("the old side is as it is to be", || {
            let info = self.old.returns("query-migrate", json!({}));
            let status = info.get("status").and_then(Value::as_str);
            status
                .is_some_and(|status| states.contains(&status))
                .then_some(())
        });
    }

    fn deaf(&mut self, name: &str, full: bool) {
        self.cpr = self.party.dir().join(name);
        self.kept = impostor::deaf(&self.cpr, full);
    }

    fn between(&mut self) {
        let ours = matches!(self.party, Party::Ours { .. });
        self.cpr = self.party.dir().join("between");
        impostor::between(&self.cpr, &self.waiting().cpr, ours);
    }

    /// How the transfer ends; what it still is, if it does not.
    fn settles(&mut self) -> String {
        let mut status = String::new();
        let patience = match self.party {
            Party::Qemu { .. } => SETTLED,
            Party::Ours { .. } => EXPIRED,
        };
        comes(patience, || {
            let info = self.old.returns("query-migrate", json!({}));
            let said = info.get("status").and_then(Value::as_str);
            said.unwrap_or("has begun nothing").clone_into(&mut status);
            matches!(said, Some("completed" | "failed" | "cancelled") | None)
        });
        format!("old {status}")
    }

    fn message(&mut self, step: &str) -> String {
        let (side, message) = step.split_once(' ').unwrap();
        let main = self.waiting.as_ref().map(|waiting| waiting.main.clone());
        let main = main.unwrap_or_else(|| self.party.dir().join("main"));
        let (dir, cpr) = (self.party.dir(), self.cpr.clone());
        let (line, shown) = parse(message, &dir, &main, &cpr);
        let qmp = match side {
            "old" => &mut self.old,
            "new" => match self.monitor() {
                Some(new) => new,
                None => return "nobody".to_owned(),
            },
            _ => panic!("{step}: of whom?"),
        };
        qmp.flood(line.as_bytes());
        let answer = loop {
            match qmp.receive_within(ANSWERED) {
                Some(event) if event.get("event").is_some() => qmp.events.push(event),
                other => break other,
            }
        };
        let said = render(answer, &shown, &dir);
        let paths = [(main, "MAIN"), (cpr, "CPR")];
        paths.iter().fold(said, |said, (path, name)| {
            let name = format!("DIR/{name}");
            said.replace(
                &path
                    .display()
                    .to_string()
                    .replace(&dir.display().to_string(), "DIR"),
                &name,
            )
        })
    }
}

/// Whether a process has guest memory in its address space (proc_pid_maps(5)): of a memfd, by the name that QEMU's backend has, or ours.
fn maps_guest_memory(pid: i32) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    ["/memfd:memory-backend-memfd", "/memfd:guest-ram"]
        .iter()
        .any(|name| maps.contains(name))
}

/// Whether something comes about within this time.
fn comes(within: Duration, mut it: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    loop {
        if it() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn heard(qmp: &mut Qmp) -> String {
    let names = qmp.event_names_now();
    let counted = names.iter().filter(|name| *name != "MIGRATION_PASS");
    let names: Vec<_> = counted.map(|name| name.replace("MIGRATION ", "")).collect();
    names.join(" ")
}

/// What two sides, QEMU's or ours, say to a flow.
pub(crate) fn ask(party: (Party, Qmp), pair: &Pair) -> String {
    let mut sides = Sides::new(party, pair.new);
    let said = pair.steps.iter().filter_map(|step| sides.step(step));
    said.collect::<Vec<_>>().join("; ")
}
