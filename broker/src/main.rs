//! `baton-broker`: the privileged process of one VM. It opens what the VM file names, spawns and verifies workers, hands them
//! descriptors, arbitrates upgrades and keeps the audit log. It maps no guest RAM and parses no device state.
#![forbid(unsafe_code)]

mod audit;
mod broker;
mod client_path;
mod clients;
mod devices;
mod fail_point;
mod guest_machine;
mod notify;
mod own;
mod reboot;
mod refusal;
mod rules;
mod run_dir;
mod serve;
mod signals;
mod transfer;
mod upgrade;
mod vm_file;
mod worker;

use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use baton_ipc::Address;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::FileAddress;
use baton_ipc::control::StartReport;
use clap::Parser;
use clap::Subcommand;
use rustix::net::SocketType;

use crate::broker::Broker;
use crate::broker::Options;
use crate::reboot::restoring::Restore;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::transfer::incoming::Channels;
use crate::worker::launch;
use crate::worker::launcher;
use crate::worker::launcher::Launcher;
use crate::worker::learner;

/// What clients are told this is.
pub(crate) const BUILD: &str = concat!("baton-broker ", env!("CARGO_PKG_VERSION"));

/// The privileged process of one VM. `baton run` starts it; people seldom do.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  baton-broker serve --run-dir /run/baton /srv/vm/web1.toml"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a VM, and serve its control socket until it ends.
    Serve {
        /// The VM file.
        vm: PathBuf,
        /// Where VMs have their directories.
        #[arg(long, default_value = "/run/baton")]
        run_dir: PathBuf,
        /// Another worker than the VM file's.
        #[arg(long)]
        worker: Option<PathBuf>,
        /// Go on without whoever started it.
        #[arg(long)]
        detach: bool,
        /// Wait for this VM's guest, and until it has come end with whoever started this.
        #[arg(long, value_name = "NAME", requires = "incoming_cpr")]
        successor_of: Option<String>,
        /// Repeat every audit record on standard error.
        #[arg(long)]
        log: bool,
        /// Multiply every deadline, for hosts that are emulated.
        #[arg(long, default_value_t = 1, value_name = "N")]
        slow_host: u32,
        /// Write down here what its workers call, under a policy that learns.
        #[arg(long, value_name = "FILE")]
        learn: Option<PathBuf>,
        /// Wait for another broker's guest, whose CPR state comes in here: unix:PATH or fd:NUMBER.
        #[arg(long, value_name = "ADDRESS")]
        incoming_cpr: Option<Address>,
        /// Where its main channel comes in; without this, `migrate-incoming` says where.
        #[arg(long, value_name = "ADDRESS", requires = "incoming_cpr")]
        incoming_main: Option<Address>,
        /// Let the guest that came stand still.
        #[arg(long)]
        incoming_paused: bool,
        /// Take the guest out of this state file: PATH or PATH,offset=BYTES.
        #[arg(long, value_name = "FILE", conflicts_with = "incoming_cpr")]
        restore: Option<FileAddress>,
        /// Wait for `migrate-incoming` to say which state file the guest is in.
        #[arg(long, conflicts_with_all = ["incoming_cpr", "restore"])]
        restore_deferred: bool,
    },
    /// What starts workers and reads filters for a broker.
    #[command(hide = true)]
    Launcher,
    /// What listens to a learning worker.
    #[command(hide = true)]
    Learner {
        /// The worker's process.
        pid: i32,
    },
    /// What a VM file comes to, as JSON.
    #[command(hide = true)]
    Plan {
        /// The VM file.
        vm: PathBuf,
    },
    /// A stage of a worker's launch.
    #[command(hide = true)]
    Launch {
        /// The second stage.
        #[arg(long)]
        confine: bool,
    },
}

fn main() -> ExitCode {
    let began = Instant::now();
    match Arguments::parse().command {
        Command::Launcher => launcher::run(),
        Command::Learner { pid } => learner::run(pid),
        Command::Plan { vm } => plan(&vm),
        Command::Launch { confine: false } => launch::unshare(),
        Command::Launch { confine: true } => launch::confine(),
        Command::Serve {
            vm,
            run_dir,
            worker,
            detach,
            successor_of,
            log,
            slow_host,
            learn,
            incoming_cpr,
            incoming_main,
            incoming_paused,
            restore,
            restore_deferred,
        } => {
            let incoming = incoming_cpr.map(|cpr| Channels {
                cpr,
                main: incoming_main,
                paused: incoming_paused,
            });
            let restore = (restore.is_some() || restore_deferred).then_some(Restore {
                file: restore,
                paused: incoming_paused,
            });
            let options = Options {
                vm_file: std::path::absolute(&vm).unwrap_or(vm),
                run_dir,
                worker,
                detach,
                successor_of,
                log,
                slowness: slow_host,
                learn,
                incoming,
                restore,
            };
            serve(options, began)
        }
    }
}

/// Tells `baton policy explain` what a VM file comes to: the plan, or the refusal.
fn plan(vm: &Path) -> ExitCode {
    let plan = devices::planned::of_file(vm);
    match serde_json::to_writer(std::io::stdout().lock(), &plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(options: Options, began: Instant) -> ExitCode {
    #[cfg(feature = "fail-points")]
    if let Err(error) = fail_point::arm() {
        eprintln!("baton-broker: {}: {error}", fail_point::VARIABLE);
        return ExitCode::from(2);
    }
    let starter = starter();
    if options.detach {
        if let Err(refusal) = leave_terminal() {
            broker::report_failure(starter.as_ref(), &refusal);
            return ExitCode::from(refusal.exit.code());
        }
    }
    let started =
        begin(options.slowness).and_then(|launcher| Broker::start(options, launcher, began));
    match started {
        Ok(broker) => ExitCode::from(broker.run(starter).code()),
        Err(refusal) => {
            broker::report_failure(starter.as_ref(), &refusal);
            ExitCode::from(refusal.exit.code())
        }
    }
}

/// Starts the launcher, which keeps what this process then gives up.
fn begin(slowness: u32) -> Result<Rc<Launcher>> {
    // Ignored by whoever started this, children would be gone before anybody could ask how they ended (wait(2)).
    baton_policy::kernel::default_sigchld().doing("cannot take SIGCHLD back")?;
    nix::sys::prctl::set_child_subreaper(true).doing("cannot adopt workers")?;
    let launcher = Launcher::start(slowness)?;
    own::confine()?;
    Ok(launcher)
}

/// Standard input, when it is the socket that `baton run` makes.
fn starter() -> Option<Channel<StartReport, ()>> {
    let stdin = std::io::stdin();
    let kind = rustix::net::sockopt::socket_type(&stdin).ok()?;
    let socket = stdin.as_fd().try_clone_to_owned().ok()?;
    (kind == SocketType::SEQPACKET).then(|| Channel::new(FdSocket::from(socket)))
}

/// Leaves the session and the standard streams of whoever started this.
fn leave_terminal() -> Result<()> {
    // Whoever leads a process group cannot; a shell's background job stays in the shell's session.
    let _ = rustix::process::setsid();
    let null = null()?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .doing("cannot leave the terminal")
}

/// Lets go of the standard error of whoever started this.
pub(crate) fn leave_standard_error() -> Result<()> {
    rustix::stdio::dup2_stderr(&null()?).doing("cannot leave the terminal")
}

fn null() -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .doing("cannot open /dev/null")
}
