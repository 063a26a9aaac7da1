//! The vCPUs of a VM, as the control thread sees them: threads that it commands, releases and stops.
//!
//! Stopping loses no kick. The invariants:
//!
//! 1. `immediate_exit` of a vCPU is cleared only while no `Run` command is under way: by the control thread just before
//!    it gives one, and by the vCPU's own thread at the end of `Touch`. It is set by the control thread
//!    ([`Vcpus::stop`]), or by the vCPU's own thread to stop itself.
//! 2. It is set before the signal is sent. A thread that is outside KVM_RUN when the signal comes therefore finds the
//!    flag when it enters; one that is inside, or between KVM's look at the flag and the guest, is brought out by the
//!    pending signal.
//! 3. A running thread stops only on EINTR with the flag set, and answers `Run` exactly once. So after [`Vcpus::stop`]
//!    has seen every answer, no thread is in KVM_RUN, and none enters it without a new command.
//! 4. A signal that could not be queued, or was taken by an earlier interruption, is sent again every millisecond until
//!    the answer is there.

pub(crate) mod ioctls;
mod link;
mod run_page;
mod saved;
mod state;
mod thread;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::signal::Killable as _;

pub(crate) use saved::VERSION;
pub(crate) use state::Inventory;
pub(crate) use state::Purpose;
pub(crate) use state::VcpuState;
pub(crate) use state::VcpuStateError;

pub(crate) use link::Rendezvous;
pub(crate) use thread::Command;
pub(crate) use thread::Exits;
pub(crate) use thread::Reply;
pub(crate) use thread::Stopped;

use crate::signals;
use link::Link;
use run_page::RunPage;
use thread::VcpuThread;

/// The stack of a vCPU's thread, in bytes: an exit's handling needs little, decoding nothing.
const STACK: usize = 256 << 10;
/// How long a command may take. The kernel answers each without waiting, so this is about hosts that do not run the thread;
/// what an upgrade can wait for is the broker's to say.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a kick is repeated.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Why the vCPUs did not do as they were told.
#[derive(Debug, Error)]
pub(crate) enum VcpuError {
    /// A thread could not be made.
    #[error("the thread of vCPU {index}: {source}")]
    Thread {
        /// Which vCPU.
        index: usize,
        /// Why not.
        source: io::Error,
    },
    /// A vCPU refused.
    #[error("vCPU {index}: {reason}")]
    Refused {
        /// Which vCPU.
        index: usize,
        /// What it says.
        reason: String,
    },
    /// A vCPU's thread did not answer in time.
    #[error("vCPU {index} did not answer within {timeout:?}")]
    Silent {
        /// Which vCPU.
        index: usize,
        /// How long it was waited for.
        timeout: Duration,
    },
}

/// What a stop found.
#[derive(Debug)]
pub(crate) struct AllStopped {
    /// When the first vCPU left the guest, in CLOCK_MONOTONIC nanoseconds.
    pub(crate) first_exit_ns: u64,
    /// The first vCPU that cannot go on, and why.
    pub(crate) stuck: Option<String>,
}

struct Handle {
    link: Arc<Link>,
    page: Arc<RunPage>,
    thread: JoinHandle<()>,
    /// A `Run` command is unanswered.
    running: bool,
    /// Why the vCPU cannot go on.
    stuck: Option<String>,
}

/// All vCPUs.
pub(crate) struct Vcpus {
    handles: Vec<Handle>,
    rendezvous: Arc<Rendezvous>,
}

impl Vcpus {
    /// Makes a thread for each vCPU, the first one first.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Thread`].
    pub(crate) fn spawn(
        vcpus: Vec<VcpuFd>,
        inventory: &Arc<Inventory>,
        exits: &Exits,
        rendezvous: Arc<Rendezvous>,
    ) -> Result<Self, VcpuError> {
        let mut handles = Vec::with_capacity(vcpus.len());
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let page = Arc::new(RunPage::of(&mut vcpu));
            let link = Link::new(Arc::clone(&rendezvous));
            let thread = VcpuThread {
                vcpu,
                page: Arc::clone(&page),
                link: Arc::clone(&link),
                inventory: Arc::clone(inventory),
                exits: exits.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || thread.serve())
                .map_err(|source| VcpuError::Thread { index, source })?;
            handles.push(Handle {
                link,
                page,
                thread,
                running: false,
                stuck: None,
            });
        }
        Ok(Self {
            handles,
            rendezvous,
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.handles.len()
    }

    /// Exits of all vCPUs.
    pub(crate) fn exits(&self) -> u64 {
        self.handles.iter().map(|handle| handle.link.exits()).sum()
    }

    /// Gives every vCPU a command (by its index), lets them work side by side, and waits until all are done.
    ///
    /// # Errors
    ///
    /// [`VcpuError`]: the first refusal, after all have answered.
    pub(crate) fn command_all(
        &mut self,
        command: impl Fn(usize) -> Command,
    ) -> Result<(), VcpuError> {
        self.post_all(command);
        self.collect().map(drop)
    }

    fn post_all(&mut self, command: impl Fn(usize) -> Command) {
        for (index, handle) in self.handles.iter().enumerate() {
            handle.link.command(command(index));
        }
    }

    /// Takes the answers when every vCPU has a command.
    fn collect(&mut self) -> Result<Vec<Reply>, VcpuError> {
        self.rendezvous.wait(self.handles.len(), COMMAND_TIMEOUT);
        let mut replies = Vec::with_capacity(self.handles.len());
        let mut refused = None;
        for (index, handle) in self.handles.iter().enumerate() {
            match handle.link.take_reply() {
                None => {
                    return Err(VcpuError::Silent {
                        index,
                        timeout: COMMAND_TIMEOUT,
                    });
                }
                Some(Reply::Failed(reason)) => {
                    refused.get_or_insert(VcpuError::Refused { index, reason });
                }
                Some(reply) => replies.push(reply),
            }
        }
        refused.map_or(Ok(replies), Err)
    }

    /// Gives one vCPU a command and waits for its answer; all are stopped.
    ///
    /// # Errors
    ///
    /// [`VcpuError`].
    pub(crate) fn command_one(
        &mut self,
        index: usize,
        command: Command,
    ) -> Result<Reply, VcpuError> {
        let silent = VcpuError::Silent {
            index,
            timeout: COMMAND_TIMEOUT,
        };
        let Some(handle) = self.handles.get(index) else {
            return Err(silent);
        };
        handle.link.command(command);
        self.rendezvous.wait(1, COMMAND_TIMEOUT);
        match handle.link.take_reply() {
            None => Err(silent),
            Some(Reply::Failed(reason)) => Err(VcpuError::Refused { index, reason }),
            Some(reply) => Ok(reply),
        }
    }

    /// Saves all vCPUs, side by side; all are stopped.
    ///
    /// # Errors
    ///
    /// [`VcpuError`].
    pub(crate) fn save(&mut self) -> Result<Vec<VcpuState>, VcpuError> {
        self.begin_save();
        self.finish_save()
    }

    /// Lets all vCPUs save themselves; [`Vcpus::finish_save`] takes their states.
    pub(crate) fn begin_save(&mut self) {
        self.post_all(|_| Command::Save);
    }

    /// Takes the states after [`Vcpus::begin_save`].
    ///
    /// # Errors
    ///
    /// [`VcpuError`].
    pub(crate) fn finish_save(&mut self) -> Result<Vec<VcpuState>, VcpuError> {
        let mut states = Vec::with_capacity(self.handles.len());
        for (index, reply) in self.collect()?.into_iter().enumerate() {
            match reply {
                Reply::Saved(state) => states.push(*state),
                other => {
                    return Err(VcpuError::Refused {
                        index,
                        reason: format!("unexpected answer {other:?}"),
                    });
                }
            }
        }
        Ok(states)
    }

    /// Loads one state into each vCPU, side by side; all are stopped.
    ///
    /// # Errors
    ///
    /// [`VcpuError`]; the vCPUs then have parts of their states.
    pub(crate) fn load(
        &mut self,
        states: Vec<VcpuState>,
        purpose: Purpose,
    ) -> Result<(), VcpuError> {
        let (index, count) = (states.len(), self.handles.len());
        if index != count {
            return Err(VcpuError::Refused {
                index,
                reason: format!("{index} states for {count} vCPUs"),
            });
        }
        for (handle, state) in self.handles.iter().zip(states) {
            handle.link.command(Command::Load(Box::new(state), purpose));
        }
        self.collect().map(drop)
    }

    /// Lets all vCPUs run. `paused`: they stood still while the guest's clocks ran.
    pub(crate) fn release(&mut self, paused: bool) {
        self.rendezvous.expect_beginnings(self.handles.len());
        for handle in &mut self.handles {
            handle.page.set_immediate_exit(false);
            handle.running = true;
            handle.link.command(Command::Run { paused });
        }
    }

    /// When the last vCPU began to run, in CLOCK_MONOTONIC nanoseconds, once all have.
    pub(crate) fn last_run_ns(&self) -> Option<u64> {
        if !self.rendezvous.all_begun() {
            return None;
        }
        self.handles
            .iter()
            .map(|handle| handle.link.began_ns())
            .max()
    }

    /// Signals a thread that is not running, so that the path of a kick is known to be open.
    pub(crate) fn rehearse_kick(&self) {
        for handle in &self.handles {
            let _ = handle.thread.kill(signals::kick());
        }
    }

    /// Takes note of vCPUs that have stopped by themselves. Why one cannot go on, if one cannot.
    pub(crate) fn notice(&mut self) -> Option<String> {
        self.take_stopped();
        self.stuck()
    }

    fn stuck(&self) -> Option<String> {
        self.handles.iter().find_map(|handle| handle.stuck.clone())
    }

    /// When the first of those that have stopped left the guest.
    fn take_stopped(&mut self) -> Option<u64> {
        let mut first_exit_ns = None;
        for (index, handle) in self
            .handles
            .iter_mut()
            .enumerate()
            .filter(|(_, handle)| handle.running)
        {
            // `Run` has no other answer.
            if let Some(Reply::Stopped(Stopped { left_ns, stuck })) = handle.link.take_reply() {
                handle.running = false;
                first_exit_ns =
                    Some(first_exit_ns.map_or(left_ns, |first: u64| first.min(left_ns)));
                handle.stuck = stuck.map(|reason| format!("vCPU {index}: {reason}"));
            }
        }
        first_exit_ns
    }

    /// Takes every vCPU out of the guest: all are signalled first, then waited for.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Silent`] after `timeout`. The vCPUs that have not answered stay kicked; a further `stop` waits for
    /// them again.
    pub(crate) fn stop(&mut self, timeout: Duration) -> Result<AllStopped, VcpuError> {
        let begun = Instant::now();
        let mut first_exit_ns = u64::MAX;
        self.handles
            .iter()
            .filter(|handle| handle.running)
            .for_each(|handle| handle.page.set_immediate_exit(true));
        loop {
            for handle in self.handles.iter().filter(|handle| handle.running) {
                // The thread lives as long as the process, so there is somebody to signal; see invariant 4.
                let _ = handle.thread.kill(signals::kick());
            }
            let running = self.handles.iter().filter(|handle| handle.running).count();
            self.rendezvous.wait(running, KICK_INTERVAL);
            first_exit_ns = first_exit_ns.min(self.take_stopped().unwrap_or(u64::MAX));
            match self.handles.iter().position(|handle| handle.running) {
                None => break,
                Some(index) if begun.elapsed() > timeout => {
                    return Err(VcpuError::Silent { index, timeout });
                }
                Some(_) => {}
            }
        }
        Ok(AllStopped {
            first_exit_ns,
            stuck: self.stuck(),
        })
    }

    /// Forgets why vCPUs could not go on: they have been reset.
    pub(crate) fn unstick(&mut self) {
        self.handles
            .iter_mut()
            .for_each(|handle| handle.stuck = None);
    }
}

#[cfg(test)]
mod tests;
