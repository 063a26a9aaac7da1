//! `baton run`: starts a broker, hears from it how the start went, and stays until its end unless told to detach.

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use baton_ipc::control::StartReport;
use baton_ipc::control::Started;
use baton_ipc::control::VmState;
use baton_ipc::control::Waiting;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::json;

use crate::arguments::Globals;
use crate::arguments::Run;
use crate::arguments::Starting;
use crate::broker_binary;
use crate::console::Console;
use crate::console::End;
use crate::failure::failure;
use crate::failure::unfit;
use crate::incoming::Incoming;
use crate::output::Output;
use crate::output::printable;
use crate::run_dir::RunDir;
use crate::signals::Signals;
use crate::units;

/// How long a refusal to stop may take.
const HEARD: Duration = Duration::from_millis(300);

/// A started broker, and this process's end of the socket that is its standard input.
#[derive(Debug)]
pub(crate) struct Broker {
    child: Child,
    /// Becomes readable when the broker has ended.
    pidfd: OwnedFd,
    channel: Channel<(), StartReport>,
}

/// How long a broker that has given up may take to be gone.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// How a broker has begun.
#[derive(Debug)]
enum Begun {
    Started(Started),
    Waiting(Waiting),
}

pub(crate) fn execute(globals: &Globals, run: &Run, output: &Output) -> Result<Exit, Refusal> {
    let stdio = !run.detach && console_is_stdio(&run.file);
    if stdio && output.json() {
        return Err(failure(
            Exit::Usage,
            "--json and a console of kind \"stdio\" both want standard output",
            "pass --detach, or give the console another kind",
        ));
    }
    let signals = Signals::take()?;
    let run_dir = RunDir::resolve(globals.run_dir.as_deref())?;
    let mut broker = Broker::spawn(run, &run_dir)?;
    let started = match broker.begun(&signals)? {
        Begun::Started(started) => started,
        Begun::Waiting(waiting) => {
            say_waiting(&waiting, run.detach, output)?;
            if run.detach {
                return Ok(Exit::Done);
            }
            broker.started(&signals)?
        }
    };
    for note in &started.notes {
        output.note(&printable(note));
    }
    let Started {
        name,
        broker_pid,
        worker_pid,
        generation,
        directory,
        start_us,
        notes: _,
    } = &started;
    let sentence = format!(
        "{name}: running; broker pid {broker_pid}, worker pid {worker_pid}, started in {}",
        units::microseconds(*start_us)
    );
    if output.json() {
        output.document(&json!({
            "name": name,
            "broker_pid": broker_pid,
            "worker_pid": worker_pid,
            "generation": generation,
            "qmp": format!("{directory}/{}", baton_ipc::control::QMP_SOCKET),
        }))?;
    } else if stdio {
        output.hint(&sentence);
    } else {
        output.text(&sentence)?;
    }
    if run.detach {
        return Ok(Exit::Done);
    }
    broker.attend(&run_dir, name, stdio, &signals, output)
}

/// Says that a broker waits for a guest. In the foreground the one document is that of the started VM.
fn say_waiting(waiting: &Waiting, detach: bool, output: &Output) -> Result<(), Refusal> {
    let Waiting {
        name,
        broker_pid,
        directory,
    } = waiting;
    let sentence = format!("{name}: waits for its guest; broker pid {broker_pid}");
    if !detach {
        output.hint(&sentence);
        return Ok(());
    }
    if output.json() {
        return output.document(&json!({
            "name": name,
            "broker_pid": broker_pid,
            "state": VmState::Incoming,
            "qmp": format!("{directory}/{}", baton_ipc::control::QMP_SOCKET),
        }));
    }
    output.text(&sentence)
}

impl Broker {
    /// Starts one.
    pub(crate) fn spawn(run: &Run, run_dir: &RunDir) -> Result<Self, Refusal> {
        Self::spawn_more(run, run_dir, Vec::new())
    }

    /// Starts one that writes to `lessons` what its workers call.
    pub(crate) fn spawn_learning(
        run: &Run,
        run_dir: &RunDir,
        lessons: &Path,
    ) -> Result<Self, Refusal> {
        Self::spawn_more(run, run_dir, vec!["--learn".into(), lessons.into()])
    }

    fn spawn_more(
        run: &Run,
        run_dir: &RunDir,
        mut arguments: Vec<OsString>,
    ) -> Result<Self, Refusal> {
        let Starting {
            worker,
            log,
            slow_host,
        } = &run.starting;
        if let Some(worker) = worker {
            arguments.extend(["--worker".into(), worker.into()]);
        }
        if *log {
            arguments.push("--log".into());
        }
        if let Some(factor) = slow_host {
            arguments.extend(["--slow-host".into(), factor.to_string().into()]);
        }
        match Incoming::parse(&run.incoming)? {
            Some(Incoming::Broker { cpr, main }) => {
                arguments.extend(["--incoming-cpr".into(), cpr.to_string().into()]);
                if let Some(main) = main {
                    arguments.extend(["--incoming-main".into(), main.to_string().into()]);
                }
            }
            Some(Incoming::File(Some(file))) => {
                arguments.extend(["--restore".into(), file.to_string().into()]);
            }
            Some(Incoming::File(None)) => arguments.push("--restore-deferred".into()),
            None => {}
        }
        if run.paused {
            arguments.push("--incoming-paused".into());
        }
        if run.detach {
            // It makes a session of its own, which the leader of a group could not.
            arguments.push("--detach".into());
        }
        arguments.push((&run.file).into());
        Self::spawn_with(&broker_binary::find()?, run_dir, &arguments, run.detach)
    }

    /// Starts this binary, with these arguments.
    pub(crate) fn spawn_with(
        binary: &Path,
        run_dir: &RunDir,
        arguments: &[OsString],
        detach: bool,
    ) -> Result<Self, Refusal> {
        let (ours, theirs) = FdSocket::pair()
            .map_err(|error| unfit(format!("cannot make a socket pair: {error}"), ""))?;
        let mut command = Command::new(binary);
        if !detach {
            // A group of its own: Ctrl-C reaches this process alone, which then asks the broker to stop the guest.
            command.process_group(0);
        }
        let child = command
            .arg("serve")
            .arg("--run-dir")
            .arg(run_dir.path())
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .map_err(|error| crate::failure::file("start the broker", binary, &error))?;
        // Closes this process's copy of the broker's end.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid
            .ok_or(Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| unfit(format!("cannot watch the broker: {error}"), ""))?;
        Ok(Self {
            child,
            pidfd,
            channel: Channel::new(ours),
        })
    }

    /// Waits until it says that it waits for another's guest.
    pub(crate) fn waits(&mut self, signals: &Signals) -> Result<(), Refusal> {
        match self.begun(signals)? {
            Begun::Waiting(_) => Ok(()),
            Begun::Started(_) => Err(unfit("the broker did not wait for its guest", "")),
        }
    }

    /// Waits until it says that the VM runs, or why not. How long that may take is the broker's to bound.
    pub(crate) fn started(&mut self, signals: &Signals) -> Result<Started, Refusal> {
        match self.begun(signals)? {
            Begun::Started(started) => Ok(started),
            Begun::Waiting(_) => Err(unfit("the broker waits twice", "")),
        }
    }

    /// The same, or until it says that it waits for another's guest.
    fn begun(&mut self, signals: &Signals) -> Result<Begun, Refusal> {
        let mut patience = true;
        loop {
            match self.channel.receive() {
                Ok(Received::Message(StartReport::Started(started), _)) => {
                    return Ok(Begun::Started(started));
                }
                Ok(Received::Message(StartReport::Waiting(waiting), _)) => {
                    return Ok(Begun::Waiting(waiting));
                }
                Ok(Received::Message(StartReport::Failed(refusal), _)) => {
                    // With it goes the VM's name, which the next try needs.
                    let _ = ends_within(&self.pidfd, LAST_STEPS);
                    return Err(refusal);
                }
                Ok(Received::Empty) => {}
                Ok(Received::HungUp) => {
                    let status = self.wait()?;
                    return Err(unfit(
                        format!("the broker ended before the VM ran ({status})"),
                        "its own messages are above; more with --log",
                    ));
                }
                Err(error) => {
                    return Err(unfit(
                        format!("the broker's start report cannot be read: {error}"),
                        "use the baton-broker that came with this program",
                    ));
                }
            }
            let mut sources = [
                PollFd::new(&self.channel, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            poll(&mut sources)?;
            if signals.came() {
                let signal = if patience { Signal::TERM } else { Signal::KILL };
                patience = false;
                // It may have ended meanwhile, which the next receive tells.
                let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
            }
        }
    }

    /// Stays until the broker ends: with the guest's console on standard input and output, when `stdio`.
    fn attend(
        &mut self,
        run_dir: &RunDir,
        vm: &str,
        stdio: bool,
        signals: &Signals,
        output: &Output,
    ) -> Result<Exit, Refusal> {
        let mut console = None;
        if stdio {
            output.hint("Ctrl-] presses the guest's power button; twice ends the VM");
            console = Some(Console::attach(run_dir.vm(vm)?.broker()?.console()?)?);
        } else {
            output.hint("Ctrl-C presses the guest's power button; twice ends the VM");
        }
        let mut asked = false;
        let mut waiting = Vec::new();
        loop {
            let end = match &mut console {
                Some(attached) => attached.copy(signals, Some(self.pidfd.as_fd()))?,
                None => {
                    let mut sources = [
                        PollFd::new(&self.pidfd, PollFlags::IN),
                        PollFd::new(signals, PollFlags::IN),
                    ];
                    poll(&mut sources)?;
                    if signals.came() {
                        End::Signal
                    } else if sources.iter().take(1).any(|fd| !fd.revents().is_empty()) {
                        End::Other
                    } else {
                        continue;
                    }
                }
            };
            match end {
                End::Other => break,
                End::HungUp => console = None,
                End::Escape | End::Signal => {
                    let stopping = run_dir
                        .vm(vm)
                        .and_then(|directory| directory.broker())
                        .and_then(|mut client| {
                            client.begin_stop(asked)?;
                            // Long enough to hear that it is refused.
                            client.ended(HEARD, None)?;
                            Ok(client)
                        });
                    match stopping {
                        Ok(client) => {
                            output.hint(match asked {
                                true => "ending the VM",
                                false => "asked the guest to power off; once more ends the VM",
                            });
                            // It is answered at the end of the VM; until then the broker wants somebody there.
                            waiting.push(client);
                        }
                        Err(refusal) => output.note(&refusal.to_string()),
                    }
                    asked = true;
                }
            }
        }
        // The terminal is the shell's again before anything is said.
        drop(console);
        let status = self.wait()?;
        self.exit(vm, status)
    }

    fn exit(&self, vm: &str, status: ExitStatus) -> Result<Exit, Refusal> {
        let known = [
            Exit::Done,
            Exit::Findings,
            Exit::Usage,
            Exit::Unfit,
            Exit::Aborted,
            Exit::Lost,
            Exit::Refused,
            Exit::Busy,
        ];
        let exit = status.code().and_then(|code| {
            known
                .into_iter()
                .find(|exit| i32::from(exit.code()) == code)
        });
        match exit {
            Some(exit) => Ok(exit),
            None if status.signal().is_some() => Err(unfit(
                format!("the broker of {vm} was killed ({status})"),
                format!("its worker may run on: baton status {vm}"),
            )),
            None => Err(unfit(format!("the broker of {vm} failed ({status})"), "")),
        }
    }

    /// Hangs up on it, and waits a while for its end: one that has a guest goes on.
    pub(crate) fn abandon(self, patience: Duration) -> Result<(), Refusal> {
        let Self {
            mut child,
            pidfd,
            channel,
        } = self;
        drop(channel);
        if ends_within(&pidfd, patience)? {
            let _ = child.wait();
        }
        Ok(())
    }

    /// Waits for it to end, and kills it if it has not within `patience`. Its worker, if it has one, is orphaned by that.
    pub(crate) fn end(&mut self, patience: Duration) -> Result<(), Refusal> {
        if !ends_within(&self.pidfd, patience)? {
            self.child
                .kill()
                .map_err(|error| unfit(format!("cannot end the broker: {error}"), ""))?;
        }
        self.wait().map(drop)
    }

    /// Waits for it to end.
    fn wait(&mut self) -> Result<ExitStatus, Refusal> {
        self.child
            .wait()
            .map_err(|error| unfit(format!("cannot wait for the broker: {error}"), ""))
    }
}

/// Whether a process ends within `patience`.
fn ends_within(pidfd: &OwnedFd, patience: Duration) -> Result<bool, Refusal> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|error| unfit(format!("poll: {error}"), ""))?;
        let mut ends = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut ends, Some(&left)) {
            Err(Errno::INTR) => {}
            Ok(ended) => return Ok(ended > 0),
            Err(error) => return Err(unfit(format!("poll: {error}"), "")),
        }
    }
}

fn poll(sources: &mut [PollFd<'_>]) -> Result<(), Refusal> {
    match rustix::event::poll(sources, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(unfit(format!("poll: {error}"), "")),
    }
}

/// Whether the VM's description puts the console on standard input and output. The broker judges the description; one
/// that cannot be read here is as good as any other.
fn console_is_stdio(file: &Path) -> bool {
    #[derive(Deserialize)]
    struct Description {
        console: Option<Console>,
    }
    #[derive(Deserialize)]
    struct Console {
        kind: String,
    }
    let text = fs::read_to_string(file).unwrap_or_default();
    toml::from_str::<Description>(&text)
        .ok()
        .and_then(|description| description.console)
        .is_some_and(|console| console.kind == "stdio")
}
