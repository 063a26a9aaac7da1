//! The connection between the control thread and one vCPU's thread: a command one way, a reply the other.
//!
//! Each side waits on its own condition variable. There is never more than one command under way, so each direction is
//! one slot. A reply that nobody may be waiting for (a vCPU that stopped by itself) wakes the control thread's event loop
//! too.

use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::thread::Command;
use super::thread::Reply;
use crate::devices::Trigger;

/// What all vCPU threads of a VM share with the control thread.
pub(crate) struct Rendezvous {
    /// Replies that nobody has taken yet.
    replies: Mutex<usize>,
    replied: Condvar,
    /// vCPUs that have been told to run and have not begun.
    beginning: AtomicUsize,
    wake: Arc<dyn Trigger>,
}

impl Rendezvous {
    pub(crate) fn new(wake: Arc<dyn Trigger>) -> Arc<Self> {
        Arc::new(Self {
            replies: Mutex::new(0),
            replied: Condvar::new(),
            beginning: AtomicUsize::new(0),
            wake,
        })
    }

    /// Waits until at least `count` replies are there, or for `timeout`. Says whether they are.
    pub(crate) fn wait(&self, count: usize, timeout: Duration) -> bool {
        let replies = lock(&self.replies);
        let (replies, _) = self
            .replied
            .wait_timeout_while(replies, timeout, |replies| *replies < count)
            .unwrap_or_else(PoisonError::into_inner);
        *replies >= count
    }

    /// Says how many vCPUs are about to run.
    pub(crate) fn expect_beginnings(&self, count: usize) {
        self.beginning.store(count, Ordering::SeqCst);
    }

    /// Whether all vCPUs that were about to run have begun.
    pub(crate) fn all_begun(&self) -> bool {
        self.beginning.load(Ordering::SeqCst) == 0
    }
}

/// One vCPU's.
pub(crate) struct Link {
    command: Mutex<Option<Command>>,
    commanded: Condvar,
    reply: Mutex<Option<Reply>>,
    rendezvous: Arc<Rendezvous>,
    /// When the vCPU last began to run, in CLOCK_MONOTONIC nanoseconds.
    began_ns: AtomicU64,
    exits: AtomicU64,
}

impl Link {
    pub(crate) fn new(rendezvous: Arc<Rendezvous>) -> Arc<Self> {
        Arc::new(Self {
            command: Mutex::new(None),
            commanded: Condvar::new(),
            reply: Mutex::new(None),
            rendezvous,
            began_ns: AtomicU64::new(0),
            exits: AtomicU64::new(0),
        })
    }

    /// Gives the thread its next command; it has answered the one before.
    pub(crate) fn command(&self, command: Command) {
        *lock(&self.command) = Some(command);
        self.commanded.notify_one();
    }

    /// Takes the reply, if it is there.
    pub(crate) fn take_reply(&self) -> Option<Reply> {
        let mut slot = lock(&self.reply);
        let reply = slot.take();
        if reply.is_some() {
            let mut replies = lock(&self.rendezvous.replies);
            *replies = replies.saturating_sub(1);
        }
        reply
    }

    /// When the vCPU last began to run.
    pub(crate) fn began_ns(&self) -> u64 {
        self.began_ns.load(Ordering::SeqCst)
    }

    /// How many times KVM_RUN has come back with something to do.
    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// The thread's side: waits for a command.
    pub(super) fn next_command(&self) -> Command {
        let mut slot = lock(&self.command);
        loop {
            match slot.take() {
                Some(command) => return command,
                None => {
                    slot = self
                        .commanded
                        .wait(slot)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }

    /// The thread's side: answers the command.
    pub(super) fn reply(&self, reply: Reply) {
        let by_itself = matches!(reply, Reply::Stopped(_));
        // Counted before the slot is unlocked: nobody takes a reply that is not yet counted.
        let mut slot = lock(&self.reply);
        *slot = Some(reply);
        *lock(&self.rendezvous.replies) += 1;
        drop(slot);
        self.rendezvous.replied.notify_one();
        if by_itself {
            self.rendezvous.wake.trigger();
        }
    }

    /// The thread's side: the next thing is KVM_RUN.
    pub(super) fn begin_run(&self, now_ns: u64) {
        self.began_ns.store(now_ns, Ordering::SeqCst);
        if self.rendezvous.beginning.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.rendezvous.wake.trigger();
        }
    }

    /// The thread's side: KVM_RUN has come back.
    pub(super) fn count_exit(&self) {
        self.exits.fetch_add(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
