//! What a vCPU's thread does: one command after another, and between `Run` and its end, the guest.
//!
//! The thread owns its vCPU: after the build no other thread makes an ioctl on it. It never waits for anything but its
//! next command, and an exit is answered by exactly one device without blocking, so a kick is followed by a stop within
//! one exit's handling.

use std::sync::Arc;

use baton_policy::Program;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;

use super::link::Link;
use super::run_page::RunPage;
use super::state::Inventory;
use super::state::Purpose;
use super::state::VcpuState;
use crate::boot;
use crate::clock;
use crate::devices::Bus;
use crate::devices::power::PowerEvent;
use crate::devices::power::PowerLatch;

/// What a vCPU's thread is told. Each command but `Run` is answered at once, `Run` when the vCPU has stopped.
#[derive(Debug)]
pub(crate) enum Command {
    /// Take this filter, the last one.
    Confine(Program),
    /// Save the state.
    Save,
    /// Load a state.
    Load(Box<VcpuState>, Purpose),
    /// Set the registers for a kernel's entry.
    Enter(boot::Entry),
    /// KVM_RUN that runs nothing of the guest.
    Touch,
    /// Run the guest until kicked. `paused`: it has stood still, and its clock's watchdog is to know.
    Run {
        /// Whether KVM_KVMCLOCK_CTRL comes first.
        paused: bool,
    },
}

/// What a vCPU's thread answers.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Done.
    Done,
    /// The state.
    Saved(Box<VcpuState>),
    /// Not done, and why.
    Failed(String),
    /// The vCPU has stopped, with no I/O pending.
    Stopped(Stopped),
}

/// How a vCPU stopped.
#[derive(Clone, Debug)]
pub(crate) struct Stopped {
    /// When it left the guest, in CLOCK_MONOTONIC nanoseconds.
    pub(crate) left_ns: u64,
    /// Why it cannot go on, if it cannot.
    pub(crate) stuck: Option<String>,
}

/// Where exits go.
#[derive(Clone)]
pub(crate) struct Exits {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) power: Arc<PowerLatch>,
}

pub(crate) struct VcpuThread {
    pub(super) vcpu: VcpuFd,
    pub(super) page: Arc<RunPage>,
    pub(super) link: Arc<Link>,
    pub(super) inventory: Arc<Inventory>,
    pub(super) exits: Exits,
}

impl VcpuThread {
    /// Serves commands for as long as the process lives.
    pub(super) fn serve(mut self) -> ! {
        loop {
            let reply = match self.link.next_command() {
                Command::Confine(program) => done(program.install()),
                Command::Save => match VcpuState::save(&self.vcpu, &self.inventory) {
                    Ok(state) => Reply::Saved(Box::new(state)),
                    Err(error) => Reply::Failed(error.to_string()),
                },
                Command::Load(state, purpose) => done(state.load(&self.vcpu, purpose)),
                Command::Enter(entry) => done(self.enter(&entry)),
                Command::Touch => self.touch(),
                Command::Run { paused } => Reply::Stopped(self.run(paused)),
            };
            self.link.reply(reply);
        }
    }

    fn enter(&self, entry: &boot::Entry) -> Result<(), vmm_sys_util::errno::Error> {
        let base: kvm_sregs = self.vcpu.get_sregs()?;
        let (regs, sregs): (kvm_regs, kvm_sregs) = boot::registers(entry, base);
        self.vcpu.set_sregs(&sregs)?;
        self.vcpu.set_regs(&regs)
    }

    /// Makes everything that the kernel makes at a first KVM_RUN, and executes nothing.
    fn touch(&mut self) -> Reply {
        self.page.set_immediate_exit(true);
        let outcome = loop {
            match self.vcpu.run().map_err(|e| e.errno()) {
                Err(libc::EINTR) => break Reply::Done,
                Err(libc::EAGAIN) => {}
                Err(errno) => {
                    break Reply::Failed(format!(
                        "KVM_RUN: {}",
                        std::io::Error::from_raw_os_error(errno)
                    ));
                }
                Ok(exit) => {
                    break Reply::Failed(format!(
                        "KVM_RUN with immediate_exit ended with {exit:?}"
                    ));
                }
            }
        };
        self.page.set_immediate_exit(false);
        outcome
    }

    /// Runs the guest until it is kicked or cannot go on.
    ///
    /// The only way out that leaves a guest that can go on is EINTR with `immediate_exit` set: KVM has then completed
    /// whatever I/O the last exit asked for, however many further exits that took.
    fn run(&mut self, paused: bool) -> Stopped {
        if paused {
            // EINVAL from a guest that does not use kvmclock.
            let _ = self.vcpu.kvmclock_ctrl();
        }
        self.link.begin_run(clock::monotonic_ns());
        let mut left_ns = None;
        let stuck = loop {
            let exit = self.vcpu.run();
            if self.page.immediate_exit() && left_ns.is_none() {
                left_ns = Some(clock::monotonic_ns());
            }
            let stuck = match exit {
                Ok(exit) => {
                    self.link.count_exit();
                    dispatch(exit, &self.page, &self.exits)
                }
                Err(error) => match error.errno() {
                    libc::EINTR if self.page.immediate_exit() => break None,
                    // Another signal, or a vCPU that waited for its start-up interrupt.
                    libc::EINTR | libc::EAGAIN => continue,
                    _ => Some(format!("KVM_RUN: {error}")),
                },
            };
            if stuck.is_some() {
                break stuck;
            }
            if self.exits.power.pending().is_some() {
                // The guest has asked for its end: it gets no instruction further.
                self.page.set_immediate_exit(true);
            }
        };
        Stopped {
            left_ns: left_ns.unwrap_or_else(clock::monotonic_ns),
            stuck,
        }
    }
}

fn done<E: std::fmt::Display>(outcome: Result<(), E>) -> Reply {
    match outcome {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed(error.to_string()),
    }
}

/// Answers one exit. Why the vCPU cannot go on, if it cannot.
fn dispatch(exit: VcpuExit<'_>, page: &RunPage, exits: &Exits) -> Option<String> {
    match exit {
        VcpuExit::IoOut(port, data) => {
            exits
                .ports
                .write_string(u64::from(port), page.port_access_size(), data)
        }
        VcpuExit::IoIn(port, data) => {
            exits
                .ports
                .read_string(u64::from(port), page.port_access_size(), data)
        }
        VcpuExit::MmioRead(address, data) => exits.mmio.read(address, data),
        VcpuExit::MmioWrite(address, data) => {
            exits.mmio.write(address, data);
        }
        // A triple fault. The vCPU stops at once (see the caller), and is reset with all others.
        VcpuExit::Shutdown => exits.power.raise(PowerEvent::TripleFault),
        VcpuExit::Intr => {}
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(format!(
                "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
            ));
        }
        VcpuExit::InternalError => {
            return Some("KVM cannot emulate an instruction (KVM_EXIT_INTERNAL_ERROR)".to_owned());
        }
        other => return Some(format!("unexpected exit {other:?}")),
    }
    None
}
