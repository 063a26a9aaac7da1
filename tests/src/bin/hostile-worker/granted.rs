//! A first worker that behaves until it has everything: its threads have their last filters, the broker has confirmed them.
//! Then it attacks, from inside or over its socket.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use baton_ipc::worker::WorkerStatus;
use baton_policy::Policy;
use baton_policy::Program;
use baton_policy::Role;
use baton_policy::bpf::Call;
use baton_tests::attack::Attempts;
use baton_tests::attack::Survey;

use crate::Broker;
use crate::hello;
use crate::report;
use crate::wait_for_the_end;

/// What a thread does once the broker has said `start`.
type Task = Box<dyn FnOnce() -> String + Send>;

/// Attempts everything as a thread of one role and says how it went. `ROLE`; `ROLE-NUMBER` for one call by the entry of
/// 32-bit programs, `ROLE+NUMBER` for one by the ordinary entry.
pub(crate) fn granted(what: &str, control: OwnedFd) {
    let (name, one) = match what.split_once(['-', '+']) {
        Some((name, number)) => (name, number.parse::<u32>().ok()),
        None => (what, None),
    };
    let entry_32 = what.contains('-');
    let role = Role::ALL.into_iter().find(|role| role.name() == name);
    let (Some(role), Ok(policy), Ok(attempts)) = (role, Policy::builtin(), Attempts::prepare())
    else {
        std::process::exit(4);
    };
    let attack = move || match one {
        Some(number) if entry_32 => format!("survived: {:?}", attempts.make_32(number)),
        Some(number) => {
            let answer = attempts.make(&Call::new(number, [u64::MAX; 6]));
            let error = std::io::Error::last_os_error();
            format!("survived: {answer:?}, {error}")
        }
        None => Survey::made(attempts, &policy, role).to_string(),
    };
    let mut granted = Granted::configured(control);
    let outcome = if role == Role::Build {
        attack()
    } else {
        let threads = granted.settle(role, Box::new(attack));
        granted.start();
        threads.outcome()
    };
    granted.say(&Report::Failed {
        step: "attack".into(),
        reason: outcome,
    });
    // Keeps everything open that is.
    wait_for_the_end();
}

/// Runs the guest, as far as the broker can tell, and then misbehaves.
pub(crate) fn running(what: &str, control: OwnedFd) {
    let mut granted = Granted::configured(control);
    let _threads = granted.settle(Role::Control, Box::new(String::new));
    granted.start();
    granted.say(&Report::Running);
    granted.say(&Report::FirstRun { last_run_ns: 1 });
    match what {
        // All that a running worker may say, without end: it never listens.
        "flood" => loop {
            for flood in [
                Report::Status(WorkerStatus::default()),
                Report::Guest(GuestEvent::Reset),
                Report::Guest(GuestEvent::TripleFault),
                Report::Paused,
                Report::Resumed,
            ] {
                // The queue is full more often than not.
                drop(granted.broker.send(&flood));
            }
        },
        // Takes part in an upgrade until its successor is there, then says the same again for the next.
        "replay" => {
            for expected in ["transfer", "rollback"] {
                granted.wait_for(expected);
                if expected == "transfer" {
                    granted.say(&Report::Agreed);
                } else {
                    granted.say(&Report::Resumed);
                }
            }
            granted.say(&Report::Agreed);
        }
        other => granted.say(&report(other)),
    }
    wait_for_the_end();
}

/// Takes as much memory as it can get, once it holds everything.
pub(crate) fn hoard(control: OwnedFd) {
    let granted = Granted::configured(control);
    // Far more than any policy of the tests permits.
    let all: Vec<_> = (0..4096)
        .map(|_| std::hint::black_box(vec![1_u8; 1 << 20]))
        .collect();
    granted.say(&Report::Failed {
        step: "stop".into(),
        reason: format!("got {} MiB", all.len()),
    });
    wait_for_the_end();
}

/// It holds what the broker hands to a worker.
struct Granted {
    broker: Broker,
    config: WorkerConfig,
    cpr: Option<FdSocket>,
    held: Registry,
    /// What came with orders.
    more: Vec<OwnedFd>,
}

/// Threads that have their last filters.
struct Threads {
    begin: BTreeMap<Role, mpsc::Sender<()>>,
    said: mpsc::Receiver<String>,
    /// The control thread's task, which is this thread's.
    own: Option<Task>,
    role: Role,
}

impl Granted {
    /// Behaves until every descriptor is there.
    fn configured(control: OwnedFd) -> Self {
        let mut broker = Broker::new(FdSocket::from(control));
        drop(broker.send(&hello()));
        let (config, cpr) = loop {
            match broker.receive() {
                Ok(Received::Message(Order::Configure(config), descriptors)) => {
                    match descriptors.into_iter().next() {
                        Some(cpr) => break (*config, FdSocket::from(cpr)),
                        None => std::process::exit(5),
                    }
                }
                Ok(Received::Empty) => pause(),
                _ => std::process::exit(5),
            }
        };
        let mut receiver = CprReceiver::default();
        let held = loop {
            match receiver.receive(&cpr) {
                Ok(Some((_, registry))) => break registry,
                Ok(None) => pause(),
                Err(_) => std::process::exit(6),
            }
        };
        Self {
            broker,
            config,
            cpr: Some(cpr),
            held,
            more: Vec::new(),
        }
    }

    /// Makes the threads that a worker has, each with its last filter; the first of `role` has a task.
    fn settle(&mut self, role: Role, task: Task) -> Threads {
        let (say, said) = mpsc::channel();
        let (settled, settles) = mpsc::channel();
        let (mut task, mut begin) = (Some(task), BTreeMap::new());
        let mut count = 0;
        let filters = &self.config.filters;
        for (of, many, filter) in [
            (Role::Vcpu, self.config.cpus, &filters.vcpu),
            (Role::Io, self.config.io_threads, &filters.io),
        ] {
            for _ in 0..many {
                let task = task.take_if(|_| of == role);
                let (filter, say, settled) = (program(filter), say.clone(), settled.clone());
                let (go, wait) = mpsc::channel();
                // Threads without a task wait for their sender to be dropped, which never happens.
                if task.is_some() {
                    begin.insert(of, go);
                } else {
                    std::mem::forget(go);
                }
                std::thread::spawn(move || {
                    let _ = settled.send(filter.install().is_ok());
                    let _ = wait.recv();
                    if let Some(task) = task {
                        drop(say.send(task()));
                    }
                    wait_for_the_end();
                });
                count += 1;
            }
        }
        let all = (0..count).all(|_| settles.recv() == Ok(true));
        if !all || program(&filters.control).install().is_err() {
            std::process::exit(7);
        }
        Threads {
            begin,
            said,
            own: task,
            role,
        }
    }

    /// Says `ready`, lets the broker confirm that, and waits for the order to run the guest.
    fn start(&mut self) {
        self.say(&Report::Ready(BuildTimes::default()));
        self.cpr = None;
        self.wait_for("start");
    }

    /// Waits for an order.
    fn wait_for(&mut self, name: &str) {
        loop {
            match self.broker.receive() {
                Ok(Received::Message(order, descriptors)) => {
                    self.more.extend(descriptors);
                    let found = match order {
                        Order::Start => "start",
                        Order::Transfer { .. } => "transfer",
                        Order::Rollback => "rollback",
                        _ => "another",
                    };
                    if found == name {
                        return;
                    }
                }
                Ok(Received::Empty) => pause(),
                _ => std::process::exit(8),
            }
        }
    }

    fn say(&self, report: &Report) {
        debug_assert!(self.held.len() + self.more.len() > 0);
        drop(self.broker.send(report));
    }
}

impl Threads {
    /// Lets the task begin, and waits for what it says.
    fn outcome(self) -> String {
        match (self.begin.get(&self.role), self.own) {
            (_, Some(own)) => own(),
            (Some(begin), None) => {
                let _ = begin.send(());
                self.said.recv().unwrap_or_default()
            }
            (None, None) => "nobody has the task".to_owned(),
        }
    }
}

fn program(bytes: &[u8]) -> Program {
    Program::from_bytes(bytes).unwrap_or_else(|_| std::process::exit(9))
}

fn pause() {
    std::thread::sleep(Duration::from_millis(1));
}
