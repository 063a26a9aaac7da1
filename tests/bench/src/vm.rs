//! A VM under Baton: started by the built `baton`, upgraded over its control socket.

use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use baton_guest::CommandLine;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Outcome;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::SOCKET;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::Verdict;
use baton_ipc::control::VmStatus;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use serde_json::Value;

use crate::clock;
use crate::measure::Case;

/// The VM's name.
const NAME: &str = "bench";
/// No answer of a broker takes longer on a host that is any use.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running VM. Dropped, it is ended.
#[derive(Debug)]
pub(crate) struct Vm {
    baton: PathBuf,
    run_dir: PathBuf,
    pub(crate) broker: u32,
    /// When `baton run` was executed, on the monotonic clock in nanoseconds.
    pub(crate) executed_ns: i128,
    /// How long `baton run` took to return.
    pub(crate) returned: Duration,
    /// Of the broker's own report: its first instruction to "running", in microseconds.
    pub(crate) start_us: u64,
}

/// An upgrade as its client saw it.
#[derive(Debug)]
pub(crate) struct Upgraded {
    pub(crate) outcome: UpgradeOutcome,
    /// Request sent to outcome received.
    pub(crate) took: Duration,
}

impl Vm {
    /// Starts one in `directory`, with the embedded guest, that command line and those devices.
    pub(crate) fn start(
        binaries: &Path,
        directory: &Path,
        case: &Case,
        line: &CommandLine,
        devices: &str,
    ) -> Result<Self> {
        let kernel = directory.join("guest.elf");
        if !kernel.exists() {
            std::fs::write(&kernel, baton_guest::ELF)?;
        }
        let file = directory.join("bench.toml");
        let text = format!(
            "schema = 1\nname = \"{NAME}\"\n[cpus]\ncount = {}\n[memory]\nsize = \"{}\"\npages = \"{}\"\n\
             [boot]\nkernel = \"guest.elf\"\ncmdline = \"{line}\"\n{devices}",
            case.cpus, case.memory, case.pages,
        );
        std::fs::write(&file, text)?;
        let (baton, run_dir) = (binaries.join("baton"), directory.join("run"));
        let mut command = Command::new(&baton);
        command
            .args(["run", "--detach", "--json", "--run-dir"])
            .arg(&run_dir)
            .arg(&file);
        // A file: a detached broker may keep standard error, and a pipe would not end before it.
        let errors = directory.join("baton-run.err");
        command.stderr(File::create(&errors)?);
        let (executed_ns, began) = (clock::monotonic_ns(), Instant::now());
        let output = command
            .output()
            .with_context(|| format!("cannot run {}", baton.display()))?;
        let returned = began.elapsed();
        if !output.status.success() {
            let errors = std::fs::read_to_string(&errors).unwrap_or_default();
            bail!("baton run: {}: {}", output.status, errors.trim());
        }
        let started: Value = serde_json::from_slice(&output.stdout)?;
        let broker = started
            .get("broker_pid")
            .and_then(Value::as_u64)
            .and_then(|pid| u32::try_from(pid).ok())
            .context("baton run names no broker")?;
        let mut vm = Self {
            baton,
            run_dir,
            broker,
            executed_ns,
            returned,
            start_us: 0,
        };
        vm.start_us = vm.logged_start_us()?;
        Ok(vm)
    }

    fn logged_start_us(&self) -> Result<u64> {
        let log = self.run_dir.join(format!(".audit/{NAME}.jsonl"));
        let text = std::fs::read_to_string(&log)
            .with_context(|| format!("cannot read {}", log.display()))?;
        text.lines()
            .rev()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find_map(|record| record.pointer("/unmapped/start_us").and_then(Value::as_u64))
            .context("the audit log tells of no start")
    }

    /// How it is.
    pub(crate) fn status(&self) -> Result<VmStatus> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(*status),
            reply => bail!("the broker answered {reply:?}"),
        }
    }

    /// Replaces its worker; none if the upgrade was aborted, as on a host that is too busy for the deadlines.
    pub(crate) fn upgrade(&self) -> Result<Option<Upgraded>> {
        let began = Instant::now();
        let reply = self.ask(&Request::Upgrade { dry_run: false })?;
        let took = began.elapsed();
        match reply {
            Reply::Upgrade(outcome) if outcome.outcome == Outcome::Committed => {
                Ok(Some(Upgraded {
                    outcome: *outcome,
                    took,
                }))
            }
            Reply::Upgrade(outcome) if outcome.outcome == Outcome::Aborted => {
                eprintln!("baton-bench: aborted: {}", outcome.reason);
                Ok(None)
            }
            reply => bail!("the upgrade is not committed: {reply:?}"),
        }
    }

    /// Audits its worker: the longest that one of its threads stood still, in microseconds; none if one could not be stopped in
    /// time, as on a host that is too busy.
    pub(crate) fn audit(&self) -> Result<Option<u64>> {
        match self.ask(&Request::Audit)? {
            Reply::Audit(report) if report.verdict == Verdict::Proven => Ok(Some(report.pause_us)),
            Reply::Audit(report) => {
                eprintln!("baton-bench: the audit finds {:?}", report.findings);
                Ok(None)
            }
            reply => bail!("the broker answered {reply:?}"),
        }
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let address = SocketAddrUnix::new(self.run_dir.join(NAME).join(SOCKET))?;
        rustix::net::connect(&socket, &address).context("cannot reach the broker")?;
        let mut channel: Channel<Request, Reply> = Channel::new(FdSocket::from(socket));
        channel.send(request)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match channel.receive()? {
                Received::Message(Reply::Hello { .. } | Reply::Progress(_), _) => continue,
                Received::Message(reply, _) => return Ok(reply),
                Received::HungUp => bail!("the broker hung up"),
                Received::Empty => {}
            }
            if Instant::now() > deadline {
                bail!("the broker does not answer");
            }
            let mut ready = [PollFd::new(&channel, PollFlags::IN)];
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut ready, Some(&second))?;
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let ended = Command::new(&self.baton)
            .args(["stop", "--force", "--run-dir"])
            .arg(&self.run_dir)
            .arg(NAME)
            .output();
        match ended {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!(
                "baton-bench: baton stop: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            Err(error) => eprintln!("baton-bench: baton stop: {error}"),
        }
    }
}
