//! Who listens to a learning worker: hears of each of its calls, writes down each kind once, and has it executed.
//!
//! A process of its own for each worker, started by the launcher, which lives as long as that worker: a report that nobody answers
//! would hold the worker for ever. It has no privilege of the broker's: whose user made a user namespace may take a descriptor from
//! what is in it (`pidfd_getfd(2)`, user_namespaces(7)).

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use baton_policy::Role;
use baton_policy::Syscall;
use baton_policy::kernel;
use baton_policy::learn::Observation;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::PidfdGetfdFlags;

/// How long a process may take until it has a listener, from its launch.
const BOUND: Duration = Duration::from_secs(30);

/// Below which number a launch's listener is: it has three descriptors, a binary's and its own socket's.
const NUMBERS: i32 = 16;

/// The most kinds of calls that are written down for one worker. A whole life of one has some 300.
const MAX_KINDS: usize = 8192;

/// What /proc calls a listener (kernel/seccomp.c).
const LISTENER: &str = "anon_inode:seccomp notify";

/// Listens to process `pid` until its end, and writes to standard output.
pub(crate) fn run(pid: i32) -> ExitCode {
    let Ok(output) = std::io::stdout().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let Some(listener) = listener_of(pid) else {
        return ExitCode::FAILURE;
    };
    let mut learner = Learner {
        main: pid.unsigned_abs(),
        output: File::from(output),
        roles: BTreeMap::new(),
        seen: BTreeSet::new(),
    };
    loop {
        let mut fds = [PollFd::new(&listener, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, None);
        let events = fds.first().map_or(PollFlags::HUP, PollFd::revents);
        if !events.contains(PollFlags::IN) {
            if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                // Nobody is left who has the filter.
                return ExitCode::SUCCESS;
            }
            continue;
        }
        // A thread that died before its report was taken leaves none.
        if let Ok(report) = kernel::seccomp_next(listener.as_fd()) {
            learner.hear(&report);
            let _ = kernel::seccomp_go_on(listener.as_fd(), &report);
        }
    }
}

struct Learner {
    main: u32,
    output: File,
    /// Of the threads that have taken their last filter.
    roles: BTreeMap<u32, Role>,
    seen: BTreeSet<Observation>,
}

impl Learner {
    fn hear(&mut self, report: &kernel::Report) {
        let (tid, call) = (report.tid, Syscall::from_number(report.number));
        let role = self.roles.get(&tid).copied().unwrap_or(Role::Build);
        let observation = Observation::of(role, report.number, &report.arguments);
        if self.seen.len() < MAX_KINDS && self.seen.insert(observation) {
            if let Ok(mut line) = serde_json::to_vec(&observation) {
                line.push(b'\n');
                let _ = self.output.write_all(&line);
            }
        }
        match call.map(Syscall::name) {
            Some("seccomp") => drop(self.roles.insert(tid, self.role_of(tid))),
            // Another thread may get the number.
            Some("exit") => drop(self.roles.remove(&tid)),
            _ => {}
        }
    }

    /// What a thread is to be, by the name that it has given itself: nobody hostile is listened to.
    fn role_of(&self, tid: u32) -> Role {
        let path = format!("/proc/{}/task/{tid}/comm", self.main);
        match fs::read_to_string(path).unwrap_or_default() {
            name if name.starts_with("vcpu") => Role::Vcpu,
            name if name.starts_with("io") => Role::Io,
            _ => Role::Control,
        }
    }
}

/// A copy of the process's listener, once it has one.
fn listener_of(pid: i32) -> Option<OwnedFd> {
    let process = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let by = Instant::now() + BOUND;
    while Instant::now() < by {
        for number in 0..NUMBERS {
            let flags = PidfdGetfdFlags::empty();
            let Ok(copy) = rustix::process::pidfd_getfd(&process, number, flags) else {
                continue;
            };
            let link = format!("/proc/self/fd/{}", copy.as_raw_fd());
            if fs::read_link(link).is_ok_and(|target| target.as_os_str() == LISTENER) {
                return Some(copy);
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    None
}
