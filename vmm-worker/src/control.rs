//! The control thread: the broker's orders, the other worker's bytes, what vCPUs and devices want, the console.
//!
//! One thread, one poll(2), and nothing that waits past a deadline. What a worker may do depends on its [`Phase`]; an
//! order that does not fit is answered with `failed` and changes nothing, one that cannot be parsed ends the process.
//!
//! ```text
//! cold start:  Built ── start ──► Running ⇄ Paused (operator)
//!                                   │  ▲      (a paused guest parks and comes back likewise, as paused)
//! old worker:                 park  ▼  │ rollback, or the broker's death
//!                                 Parked ── ceded ──► Ceded (only rollback leads back)
//! new worker:  Receiving ── whole stream ──► Loaded ── commit ──► Running, or Paused
//! from a file: Restored ── commit ──► Running, or Paused; into one: Running, Paused ── save ──► Parked
//! anywhere:    the guest powers off or gets stuck ──► Off
//! ```

pub(crate) mod ballooning;
mod hotplug;
mod resizing;

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use baton_ipc::Channel;
use baton_ipc::ChannelError;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::SocketError;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::state_stream::Machine;
use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::Order;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use libc::c_int;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;

use crate::assembly::Machinery;
use crate::devices::virtio::vsock;
use crate::diagnostics::log;
use crate::platform::Wake;
use crate::reboot::Restored;
use crate::rehearsal::ResetState;
use crate::transfer::incoming::Incoming;
use crate::transfer::main_channel::MainChannel;
use crate::transfer::outgoing::Acceptance;
use crate::transfer::outgoing::Outgoing;
use crate::transfer::outgoing::Preview;
use crate::transfer::outgoing::Progress;

/// Reports kept for a broker that does not read; more are dropped, and said to be. Of each connection of a vsock there
/// may be two.
const MAX_UNSENT: usize = 64 + 2 * MAX_VSOCK_CONNECTIONS as usize;

/// The exit status of a worker that is no longer needed.
pub(crate) const EXIT_DONE: c_int = 0;
/// The exit status of a worker that could not do its work; its `failed` report says why.
pub(crate) const EXIT_FAILED: c_int = 1;

/// How far this worker is with its guest.
pub(crate) enum Phase {
    /// Built; the guest begins here.
    Built,
    /// Built; the guest runs in another worker, and its state will come.
    Receiving(Incoming),
    /// Built, with the guest's RAM, out of a file that had this state, too.
    Restored(Restored),
    /// The guest's state is here, and may not run.
    Loaded,
    /// The guest runs here.
    Running,
    /// The guest stands still at the operator's wish.
    Paused,
    /// The guest stands still, and its state went to another worker over this, which stays open until it is clear who
    /// runs on; or into a file.
    Parked(#[expect(dead_code, reason = "held, and closed with the phase")] Option<MainChannel>),
    /// Another worker may run the guest.
    Ceded,
    /// The guest has ended.
    Off,
}

impl Phase {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Receiving(_) => "waiting for the guest's state",
            Self::Restored(_) => "restored",
            Self::Loaded => "loaded",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Parked(_) => "parked",
            Self::Ceded => "ceded",
            Self::Off => "off",
        }
    }
}

/// The process is to end, with this status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) c_int);

/// A worker with its VM.
pub(crate) struct Worker {
    /// The broker; none when it has died.
    pub(crate) control: Option<Channel<Report, Order>>,
    pub(crate) unsent: VecDeque<Report>,
    pub(crate) vm: VmId,
    pub(crate) generation: u32,
    pub(crate) backing: RamBacking,
    pub(crate) boot: [u8; 16],
    pub(crate) machine: Machine,
    pub(crate) machinery: Machinery,
    pub(crate) reset: ResetState,
    wake: Arc<Wake>,
    /// Descriptors of the device that is to come.
    lent: Registry,
    pub(crate) phase: Phase,
    pub(crate) outgoing: Outgoing,
    /// The guest stood still at the operator's wish when it was parked, and does again should it not go.
    pub(crate) stood: bool,
    /// The vCPUs were released for the first time, and have not all begun.
    pub(crate) first_run_due: bool,
}

/// What [`Worker::wait`] found.
#[derive(Default)]
struct Ready {
    control: bool,
    main: bool,
    wake: bool,
    input: bool,
    output: bool,
}

impl Worker {
    pub(crate) fn new(
        control: Channel<Report, Order>,
        config: &WorkerConfig,
        machine: Machine,
        machinery: Machinery,
        reset: ResetState,
        wake: Arc<Wake>,
        phase: Phase,
    ) -> Self {
        Self {
            control: Some(control),
            unsent: VecDeque::new(),
            vm: config.vm,
            generation: config.generation,
            backing: config.backing,
            boot: config.boot,
            machine,
            machinery,
            reset,
            wake,
            lent: Registry::default(),
            phase,
            outgoing: Outgoing::Idle,
            stood: false,
            first_run_due: false,
        }
    }

    /// Serves until the process is to end.
    pub(crate) fn run(mut self) -> c_int {
        loop {
            self.flush();
            let Exit(status) = match self.turn() {
                Ok(()) => continue,
                Err(exit) => exit,
            };
            self.flush();
            return status;
        }
    }

    fn turn(&mut self) -> Result<(), Exit> {
        let ready = self.wait()?;
        if ready.wake {
            self.wake.clear();
            self.look_after_guest();
        }
        self.look_after_balloon();
        if ready.main {
            self.serve_main()?;
        }
        if ready.control {
            self.serve_control()?;
        }
        if ready.input {
            self.machinery.console.feed();
        }
        if ready.output {
            self.machinery.console.drain();
        }
        Ok(())
    }

    fn wait(&self) -> Result<Ready, Exit> {
        let main = match &self.phase {
            Phase::Receiving(incoming) => Some(incoming.channel()),
            _ => self.outgoing.awaited(),
        };
        let mut fds = Vec::with_capacity(4);
        let mut slots = Vec::with_capacity(4);
        let mut add = |slot: Slot, fd| {
            fds.push(fd);
            slots.push(slot);
        };
        add(Slot::Wake, PollFd::new(&self.wake, PollFlags::IN));
        if let Some(control) = &self.control {
            let flags = if self.unsent.is_empty() {
                PollFlags::IN
            } else {
                PollFlags::IN | PollFlags::OUT
            };
            add(
                Slot::Control,
                PollFd::from_borrowed_fd(control.as_fd(), flags),
            );
        }
        if let Some(main) = main {
            add(
                Slot::Main,
                PollFd::from_borrowed_fd(main.as_fd(), PollFlags::IN),
            );
        }
        if self.serves_console() {
            let interest = self.machinery.console.interest();
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, interest.input);
            flags.set(PollFlags::OUT, interest.output);
            // Without an interest it is left out: poll(2) reports a hang-up whether asked or not.
            if !flags.is_empty() {
                add(
                    Slot::Console,
                    PollFd::from_borrowed_fd(self.machinery.console.as_fd(), flags),
                );
            }
        }
        let timeout = self.balloon_due().map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => {
                log!("poll: {error}");
                return Err(Exit(EXIT_FAILED));
            }
        }
        let mut ready = Ready::default();
        for (slot, fd) in slots.iter().zip(&fds) {
            let events = fd.revents();
            let broken = events.intersects(PollFlags::HUP | PollFlags::ERR);
            match slot {
                Slot::Wake => ready.wake = !events.is_empty(),
                Slot::Control => ready.control = events.contains(PollFlags::IN) || broken,
                Slot::Main => ready.main = !events.is_empty(),
                Slot::Console => {
                    ready.input = events.contains(PollFlags::IN) || broken;
                    ready.output = events.contains(PollFlags::OUT) || broken;
                }
            }
        }
        Ok(ready)
    }

    /// Whether the console's socket is this worker's to use: not before a commit, not while parked.
    fn serves_console(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Off)
    }

    /// Looks after everything that `wake` may mean.
    fn look_after_guest(&mut self) {
        if self.first_run_due {
            if let Some(last_run_ns) = self.machinery.vcpus.last_run_ns() {
                self.first_run_due = false;
                self.report(Report::FirstRun { last_run_ns });
            }
        }
        if let Phase::Running = self.phase {
            if let Some(reason) = self.machinery.vcpus.notice() {
                self.stuck(reason);
            }
        }
        // Before what a guest that panics does next: a reset waits until its operator lets it go on.
        self.look_after_panic();
        if let Phase::Running = self.phase {
            if let Some(event) = self.machinery.platform.power.take() {
                self.power_event(event);
            }
        }
        if let Phase::Running = self.phase {
            self.machinery.platform.pci.settle();
        }
        if self.serves_console() {
            self.machinery.console.drain();
        }
        if matches!(self.phase, Phase::Running | Phase::Paused) {
            self.look_after_vsock(false);
        }
        self.look_after_hotplug();
    }

    /// Does what the vsock leaves to this thread, and tells the broker of it.
    pub(crate) fn look_after_vsock(&mut self, parked: bool) {
        let reports = self.machinery.vsock.as_ref().map(|link| {
            if parked {
                link.settle();
            }
            link.deeds(parked)
        });
        for report in reports.into_iter().flatten() {
            self.report(Report::Vsock(report));
        }
    }

    fn serve_main(&mut self) -> Result<(), Exit> {
        if let Phase::Receiving(incoming) = &mut self.phase {
            return match incoming.advance() {
                Ok(None) => Ok(()),
                Ok(Some(stream)) => {
                    // Whatever the broker handed over before the old worker parked is here by now, and named in there.
                    self.serve_control()?;
                    self.load(stream)
                }
                Err(error) => self.give_up("load", &error),
            };
        }
        let machinery = &self.machinery;
        let acceptance = |elsewhere: bool| {
            let vsock = machinery.vsock.as_ref().filter(|_| elsewhere);
            Acceptance {
                preview: Preview {
                    cpuid: machinery.cpuid.clone(),
                    pci: machinery.platform.pci.preview(),
                },
                entries: machinery
                    .entries
                    .with(vsock.map(vsock::Link::entries).unwrap_or_default()),
            }
        };
        match self.outgoing.advance(&self.machine, acceptance) {
            Progress::Waiting => {}
            Progress::Agreed => self.report(Report::Agreed),
            Progress::Ended(reason) => self.fail("agree", reason),
        }
        Ok(())
    }

    fn serve_control(&mut self) -> Result<(), Exit> {
        while let Some(control) = &mut self.control {
            match control.receive() {
                Ok(Received::Message(order, descriptors)) => self.obey(order, descriptors)?,
                Ok(Received::Empty) => break,
                Ok(Received::HungUp) => return self.orphaned(),
                Err(error) => {
                    log!("the broker's order: {error}");
                    return Err(Exit(EXIT_FAILED));
                }
            }
        }
        Ok(())
    }

    /// Says that an order could not be carried out; this worker goes on.
    pub(crate) fn fail(&mut self, step: &str, reason: String) {
        log!("{step}: {reason}");
        self.report(Report::Failed {
            step: step.to_owned(),
            reason,
        });
    }

    /// Says why this worker cannot take a guest over, and ends.
    pub(crate) fn give_up<T>(
        &mut self,
        step: &str,
        reason: &dyn std::fmt::Display,
    ) -> Result<T, Exit> {
        self.machinery
            .platform
            .devices
            .failed(StartMode::CprTransfer);
        self.fail(step, reason.to_string());
        Err(Exit(EXIT_FAILED))
    }

    /// Says something to the broker: now, or when it has read what was said before.
    pub(crate) fn report(&mut self, report: Report) {
        if self.control.is_none() {
            return;
        }
        if self.unsent.len() >= MAX_UNSENT {
            log!("the broker does not read; dropped: {report:?}");
            return;
        }
        self.unsent.push_back(report);
        self.flush();
    }

    fn flush(&mut self) {
        while let (Some(report), Some(control)) = (self.unsent.front(), &self.control) {
            match control.send(report) {
                Ok(()) => {
                    self.unsent.pop_front();
                }
                // Not now; or never, which receiving will show once everything queued was received.
                Err(ChannelError::Socket(SocketError::Full | SocketError::HungUp)) => return,
                Err(error) => {
                    log!("a report could not be sent: {error}");
                    self.unsent.pop_front();
                }
            }
        }
    }

    /// Says "running". Unless it is [`Said::No`], the vCPUs may be released; after a start, only if it was heard.
    pub(crate) fn say_running(&mut self) -> Said {
        self.flush();
        let sent = match &self.control {
            Some(control) if self.unsent.is_empty() => control.send(&Report::Running),
            _ => return Said::No,
        };
        match sent {
            Ok(()) => Said::Heard,
            Err(ChannelError::Socket(SocketError::HungUp)) => Said::BrokerGone,
            Err(_) => Said::No,
        }
    }
}

/// What became of "running".
pub(crate) enum Said {
    /// It is in the broker's queue.
    Heard,
    /// The broker has closed its end of the socket. To a process that can still execute, that is the broker's death: in
    /// its life it closes the socket of a worker only after SIGKILL to that worker.
    BrokerGone,
    /// It is not in the queue, and never will be.
    No,
}

/// What a descriptor that is waited for is.
#[derive(Clone, Copy)]
enum Slot {
    Wake,
    Control,
    Main,
    Console,
}
