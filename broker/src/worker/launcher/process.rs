//! The launcher's own process.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;

use baton_ipc::Channel;
use baton_ipc::ChannelError;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::SocketError;
use baton_policy::procfs::TaskStatus;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::time::Timespec;

use super::Answer;
use super::Ask;
use super::inspection::Inspection;
use super::records;
use super::records::Records;
use super::tap::Taps;
use super::tcp::Permitted;
use crate::devices::taps::OpenTap;
use crate::worker::ids::HostIds;

/// A thread that did not stop in time is asked about again after so long, in nanoseconds.
const AGAIN: i64 = 1_000_000;

/// How much of a process's records goes into one message, in bytes.
const PART: usize = 32 << 10;

type Done = Result<Answer, String>;

struct Process {
    channel: Channel<Answer, Ask>,
    /// The broker.
    parent: u32,
    stages: BTreeMap<u32, (Child, HostIds)>,
    inspection: Inspection,
    learners: Vec<Child>,
    permitted: Permitted,
    taps: Taps,
}

/// Serves the broker on standard input, until that hangs up.
pub(crate) fn run() -> ExitCode {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let channel = Channel::new(FdSocket::from(socket));
    let Some(parent) = rustix::process::getppid() else {
        return ExitCode::FAILURE;
    };
    if let Err(refusal) = crate::own::confine_launcher() {
        // The broker's first request finds this as its answer.
        let _ = channel.send(&Answer::Failed(refusal.to_string()));
        return ExitCode::FAILURE;
    }
    // What a terminal signals is for the broker.
    let _ = rustix::process::setsid();
    // It would see the hang-up, too, but not while it waits for a thread to stop.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    let mut process = Process {
        channel,
        parent: parent.as_raw_nonzero().get().unsigned_abs(),
        stages: BTreeMap::new(),
        inspection: Inspection::default(),
        learners: Vec::new(),
        permitted: Permitted::default(),
        taps: Taps::default(),
    };
    while process.turn() {}
    ExitCode::SUCCESS
}

impl Process {
    /// Serves one request; no more when the broker is gone, or has said what none can mean.
    fn turn(&mut self) -> bool {
        let timeout = self.inspection.holds().then_some(Timespec {
            tv_sec: 0,
            tv_nsec: AGAIN,
        });
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        self.inspection.let_go();
        let (ask, descriptors) = match self.channel.receive() {
            Ok(Received::Message(ask, descriptors)) => (ask, descriptors),
            Ok(Received::Empty) => return true,
            Ok(Received::HungUp) | Err(_) => return false,
        };
        let made = match ask {
            Ask::Listen(address) => self.permitted.listen(address),
            Ask::Connect(address) => self.permitted.connect(address),
            Ask::Tap { id, tap, pairs } => return self.tap(id, tap, pairs),
            ask => {
                let answer = self.serve(ask, descriptors).unwrap_or_else(Answer::Failed);
                return self.say(&answer, &[]);
            }
        };
        match made {
            Ok(socket) => self.say(&Answer::Socket, &[socket]),
            Err(why) => self.say(&Answer::NoSocket(why), &[]),
        }
    }

    fn serve(&mut self, ask: Ask, descriptors: Vec<OwnedFd>) -> Done {
        match ask {
            Ask::Begin(ids) => self.begin(ids, descriptors),
            Ask::Map(stage1) => self.map(stage1),
            Ask::End(stage1) => {
                let (mut child, _) = self.stages.remove(&stage1).ok_or("no such stage")?;
                // It has nothing left to do, or nobody to do it for.
                let _ = child.kill();
                child
                    .wait()
                    .map_err(|e| format!("cannot reap a stage: {e}"))?;
                Ok(Answer::Done)
            }
            Ask::Filters { tid, count, within } => {
                self.may_inspect(tid)?;
                let (filters, stood) = self.inspection.filters(tid, count, within)?;
                for filter in filters {
                    self.say(&Answer::Filter(filter), &[]);
                }
                Ok(Answer::Read(stood))
            }
            Ask::Learn(pid) => {
                self.may_inspect(pid)?;
                self.learn(pid, descriptors)
            }
            Ask::Namespaces(pid) => {
                self.may_inspect(pid)?;
                let namespaces = records::namespaces(&pid.to_string());
                Ok(Answer::Namespaces(namespaces))
            }
            Ask::Records(pid) => {
                self.may_inspect(pid)?;
                let bytes = baton_ipc::encode(&Records::read(pid)).map_err(|e| e.to_string())?;
                if bytes.len() > records::MAX {
                    return Err(format!("its records take {} bytes", bytes.len()));
                }
                for part in bytes.chunks(PART) {
                    self.say(&Answer::Part(part.to_vec()), &[]);
                }
                Ok(Answer::Done)
            }
            Ask::Permit { addresses, taps } => {
                self.permitted.set(addresses)?;
                self.taps.set(&taps)?;
                Ok(Answer::Done)
            }
            // They have answers of their own.
            Ask::Listen(_) | Ask::Connect(_) | Ask::Tap { .. } => {
                Err("it is a descriptor that is asked for".to_owned())
            }
        }
    }

    fn tap(&self, id: String, tap: String, pairs: u8) -> bool {
        match self.taps.open(id, tap, pairs) {
            Ok(OpenTap { queues, mtu, claim }) => {
                self.say(&Answer::Tap { mtu }, &[claim]) && self.say(&Answer::Queues, &queues)
            }
            Err(refusal) => self.say(&Answer::NoTap(refusal), &[]),
        }
    }

    fn begin(&mut self, ids: HostIds, descriptors: Vec<OwnedFd>) -> Done {
        if ids.uid == 0 || ids.gid == 0 {
            return Err("no worker runs as root".to_owned());
        }
        let [input, output] = <[OwnedFd; 2]>::try_from(descriptors)
            .map_err(|got| format!("{} descriptors for a stage", got.len()))?;
        let failed = |e: std::io::Error| format!("cannot start the first stage of a launch: {e}");
        let errors = output.try_clone().map_err(failed)?;
        // This process's own file, whatever lies at its path by now.
        let child = Command::new("/proc/self/exe")
            .arg("launch")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors))
            .spawn()
            .map_err(failed)?;
        let pid = child.id();
        self.stages.insert(pid, (child, ids));
        Ok(Answer::Begun(pid))
    }

    /// Starts what listens to a learning worker. It outlives this process, as the worker does.
    fn learn(&mut self, pid: u32, descriptors: Vec<OwnedFd>) -> Done {
        let [output] = <[OwnedFd; 1]>::try_from(descriptors)
            .map_err(|got| format!("{} descriptors for a learner", got.len()))?;
        self.learners
            .retain_mut(|learner| matches!(learner.try_wait(), Ok(None)));
        let learner = Command::new("/proc/self/exe")
            .args(["learner", &pid.to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::from(output))
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot listen to a worker: {e}"))?;
        self.learners.push(learner);
        Ok(Answer::Done)
    }

    /// Maps id 0 of the namespace, and no other, to the VM's ids (user_namespaces(7)).
    fn map(&self, stage1: u32) -> Done {
        let (_, ids) = self.stages.get(&stage1).ok_or("no such stage")?;
        let write = |file: &str, text: String| {
            // Not reaped, so the number is its own.
            let path = PathBuf::from(format!("/proc/{stage1}/{file}"));
            fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
        };
        if ids.is_own() {
            // Without privilege a group may be mapped only once setgroups is denied.
            write("setgroups", "deny".to_owned())?;
        }
        write("uid_map", format!("0 {} 1", ids.uid))?;
        write("gid_map", format!("0 {} 1", ids.gid))?;
        Ok(Answer::Done)
    }

    /// The broker has the filters of its own children read, and its own.
    fn may_inspect(&self, tid: u32) -> Result<(), String> {
        let failed = |e: &dyn std::fmt::Display| format!("cannot read the record of it: {e}");
        let record = fs::read(format!("/proc/{tid}/status")).map_err(|e| failed(&e))?;
        let status =
            TaskStatus::parse(&String::from_utf8_lossy(&record)).map_err(|e| failed(&e))?;
        if [status.tgid, status.ppid].contains(&self.parent) {
            Ok(())
        } else {
            Err("it is none of the broker's".to_owned())
        }
    }

    /// Whether the broker is there to hear it. It reads answers as they come.
    fn say(&self, answer: &Answer, descriptors: &[OwnedFd]) -> bool {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        loop {
            match self.channel.send_with(answer, &descriptors) {
                Ok(()) => return true,
                Err(ChannelError::Socket(SocketError::Full)) => {
                    let mut fds = [PollFd::new(&self.channel, PollFlags::OUT)];
                    let _ = rustix::event::poll(&mut fds, None);
                }
                Err(_) => return false,
            }
        }
    }
}
