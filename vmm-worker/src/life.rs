//! A worker's life from its first instruction to its event loop.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::Channel;
use baton_ipc::ChannelError;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::cpr::CprError;
use baton_ipc::cpr::CprHeader;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::state_stream::Decoder;
use baton_ipc::worker::Order;
use baton_ipc::worker::PROTOCOL;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use libc::c_int;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use thiserror::Error;

use crate::assembly;
use crate::assembly::BuildError;
use crate::clock;
use crate::control::EXIT_FAILED;
use crate::control::Phase;
use crate::control::Worker;
use crate::devices::Trigger;
use crate::diagnostics::log;
use crate::gap::Gap;
use crate::platform;
use crate::platform::PlatformError;
use crate::platform::Wake;
use crate::reboot;
use crate::reboot::RestoreError;
use crate::rehearsal;
use crate::rehearsal::RehearsalError;
use crate::sections;
use crate::signals;
use crate::transfer::entries::EntryError;
use crate::transfer::incoming;
use crate::transfer::incoming::Incoming;
use crate::transfer::incoming::IncomingError;
use crate::transfer::main_channel::MainChannel;
use crate::transfer::outgoing::Preview;

/// This build, for people.
pub const BUILD: &str = concat!("baton-worker ", env!("CARGO_PKG_VERSION"));

/// How long the CPR state may take once it is due.
const CPR_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a worker's life ended before its event loop.
#[derive(Debug, Error)]
enum LifeError {
    /// Not started by a broker.
    #[error("descriptor 0 is no control socket: a worker is started by baton-broker, not by hand")]
    NotABroker,
    /// The broker has closed.
    #[error("the broker has closed the control socket")]
    HungUp,
    /// The control socket.
    #[error("control socket: {0}")]
    Control(#[from] ChannelError),
    /// Something other than `configure` came first.
    #[error("the first order must be configure, with {expected} descriptors; {found} came")]
    FirstOrder { expected: usize, found: String },
    /// Waiting failed.
    #[error("poll: {0}")]
    Poll(Errno),
    /// Signal handlers.
    #[error("signal handlers: {0}")]
    Signals(io::Error),
    /// The CPR state is malformed.
    #[error(transparent)]
    Cpr(#[from] CprError),
    /// The CPR state is for another worker.
    #[error("the CPR state is for {found:?}, the configuration for {expected:?}")]
    Header {
        expected: CprHeader,
        found: CprHeader,
    },
    /// The CPR state does not come.
    #[error("the CPR state has not come within {CPR_TIMEOUT:?}")]
    CprSilent,
    /// Somebody has put another descriptor in a descriptor's place.
    #[error(transparent)]
    Entries(EntryError),
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    #[error("{0}, and the upgrade is refused")]
    Processor(String),
    #[error(transparent)]
    Platform(#[from] PlatformError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Rehearsal(#[from] RehearsalError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Where the guest comes from.
enum Source {
    Kernel,
    Main(MainChannel),
    File(Box<reboot::Opened>),
}

impl LifeError {
    /// In doing what.
    fn step(&self) -> &'static str {
        match self {
            Self::NotABroker
            | Self::HungUp
            | Self::Control(_)
            | Self::Poll(_)
            | Self::Signals(_) => "hello",
            Self::FirstOrder { .. } => "configure",
            Self::Cpr(_) | Self::Header { .. } | Self::CprSilent | Self::Entries(_) => "hand-over",
            Self::Incoming(_) | Self::Processor(_) => "agree",
            Self::Restore(_) => "restore",
            Self::Platform(_) | Self::Build(_) => "build",
            Self::Rehearsal(_) => "rehearse",
        }
    }
}

/// Lives. The process's exit status, when there is nothing left to do.
#[must_use]
pub fn live() -> c_int {
    let origin_ns = clock::monotonic_ns();
    let Some(control) = signals::take_control() else {
        return EXIT_FAILED;
    };
    match be_born(control, origin_ns) {
        Ok(worker) => worker.run(),
        Err((control, error)) => {
            log!("{}: {error}", error.step());
            if let Some(control) = control {
                let report = Report::Failed {
                    step: error.step().to_owned(),
                    reason: error.to_string(),
                };
                if let Err(error) = control.send(&report) {
                    log!("and the broker could not be told: {error}");
                }
            }
            EXIT_FAILED
        }
    }
}

type Control = Channel<Report, Order>;

fn be_born(control: OwnedFd, origin_ns: u64) -> Result<Worker, (Option<Control>, LifeError)> {
    if !rustix::fs::fstat(&control).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket
    }) {
        return Err((None, LifeError::NotABroker));
    }
    let mut control = Control::new(FdSocket::from(control));
    match grow_up(&mut control, origin_ns) {
        Ok(worker) => Ok(worker(control)),
        Err(error) => Err((Some(control), error)),
    }
}

/// Everything up to `ready` and the hang-up that follows it. What is returned makes the worker of its control socket.
fn grow_up(
    control: &mut Control,
    origin_ns: u64,
) -> Result<impl FnOnce(Control) -> Worker + use<>, LifeError> {
    signals::install().map_err(LifeError::Signals)?;
    control.send(&Report::Hello {
        protocol: PROTOCOL,
        build: BUILD.to_owned(),
    })?;
    let (config, cpr, main) = configuration(control)?;
    let filters = assembly::check(&config)?;

    let machine = sections::machine(&config, &platform::device_ids(&config));
    let mut source = match main {
        Some(file) if config.mode == StartMode::CprReboot => {
            Source::File(Box::new(reboot::open(file.into(), &config, &machine)?))
        }
        Some(main) => Source::Main(MainChannel::new(main)),
        None => Source::Kernel,
    };
    let (preview, entries) = match &mut source {
        Source::Main(main) => {
            let offer = sections::offer(machine.clone(), BUILD);
            let (preview, entries) = incoming::agree(main, &offer, control.as_fd())?;
            (Some(preview), Some(entries))
        }
        Source::File(file) => (Some(reboot::preview(file)?), None),
        Source::Kernel => (None, None),
    };
    let registry = descriptors(&cpr, control, &config)?;
    entries
        .map_or(Ok(()), |entries| entries.compare(&registry))
        .map_err(LifeError::Entries)?;
    let wake = Arc::new(Wake::new()?);
    let trigger: Arc<dyn Trigger> = Arc::clone(&wake) as Arc<dyn Trigger>;
    let gap = match &source {
        Source::File(file) => file.gap,
        Source::Main(_) | Source::Kernel => Gap::Pause,
    };
    let (cpuid, pci) = match preview {
        Some(Preview { cpuid, pci }) => (Some(cpuid), pci),
        None => (None, Vec::new()),
    };
    let (mut machinery, mut times) = assembly::build(&config, registry, &trigger, origin_ns, &pci)?;
    if let Some(difference) = cpuid.and_then(|cpuid| machinery.cpuid.first_difference(&cpuid, gap))
    {
        return Err(LifeError::Processor(difference.to_string()));
    }
    let phase = match source {
        Source::File(file) => Phase::Restored(reboot::load(*file, machinery.memory, &config)?),
        Source::Main(main) => Phase::Receiving(Incoming::new(
            main,
            Decoder::new(config.vm, config.generation),
        )),
        Source::Kernel => Phase::Built,
    };
    rehearsal::confine(&mut machinery, &filters)?;
    let reset = rehearsal::rehearse(&mut machinery, config.mode, config.vm, wake.as_fd())?;
    times.rehearsed_us = clock::monotonic_ns().saturating_sub(origin_ns) / 1000;
    control.send(&Report::Ready(times))?;
    // "Ready" is queued: this hang-up means that it is true.
    drop(cpr);

    Ok(move |control| Worker::new(control, &config, machine, machinery, reset, wake, phase))
}

/// Waits for the first order, for as long as the broker takes.
fn configuration(
    control: &mut Control,
) -> Result<(WorkerConfig, FdSocket, Option<OwnedFd>), LifeError> {
    loop {
        wait(control, None)?;
        let (order, descriptors) = match control.receive()? {
            Received::Message(order, descriptors) => (order, descriptors),
            Received::Empty => continue,
            Received::HungUp => return Err(LifeError::HungUp),
        };
        let config = match order {
            Order::Configure(config) => *config,
            #[cfg(feature = "fail-points")]
            Order::Fail(fault) => {
                crate::fail_point::arm(fault);
                continue;
            }
            other => {
                return Err(LifeError::FirstOrder {
                    expected: 1,
                    found: format!("{other:?}"),
                });
            }
        };
        let expected = if config.mode.preserves_guest() { 2 } else { 1 };
        let found = descriptors.len();
        let mut descriptors = descriptors.into_iter();
        return match (descriptors.next(), descriptors.next()) {
            (Some(cpr), main) if found == expected => Ok((config, FdSocket::from(cpr), main)),
            _ => Err(LifeError::FirstOrder {
                expected,
                found: format!("configure with {found}"),
            }),
        };
    }
}

/// Receives the CPR state and checks that it is for this worker.
fn descriptors(
    cpr: &FdSocket,
    control: &Control,
    config: &WorkerConfig,
) -> Result<Registry, LifeError> {
    let begun = Instant::now();
    let mut receiver = CprReceiver::default();
    loop {
        if let Some((found, registry)) = receiver.receive(cpr)? {
            let expected = CprHeader {
                mode: config.mode,
                vm: config.vm,
                generation: config.generation,
            };
            return if found == expected {
                Ok(registry)
            } else {
                Err(LifeError::Header { expected, found })
            };
        }
        let left = CPR_TIMEOUT
            .checked_sub(begun.elapsed())
            .ok_or(LifeError::CprSilent)?;
        wait(control, Some((cpr, left)))?;
    }
}

/// Waits for the control socket, or for the other one; a control socket that moves while another is waited for has
/// nothing to say that belongs there, unless it has closed.
fn wait(control: &Control, other: Option<(&FdSocket, Duration)>) -> Result<(), LifeError> {
    let mut fds = vec![PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN)];
    let mut timeout = None;
    if let Some((other, left)) = other {
        fds.push(PollFd::from_borrowed_fd(other.as_fd(), PollFlags::IN));
        timeout = Some(Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
    }
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(LifeError::Poll(error)),
    }
    let hung_up = fds
        .first()
        .is_some_and(|fd| fd.revents().contains(PollFlags::HUP));
    if hung_up && other.is_some() {
        Err(LifeError::HungUp)
    } else {
        Ok(())
    }
}
