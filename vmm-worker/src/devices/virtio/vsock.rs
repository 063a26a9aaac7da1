//! The socket device (5.10): stream connections between programs of the guest and unix sockets of the host.
//!
//! ```text
//! program of the host ◄─ unix socket ─► I/O thread: table of connections ◄─ rings ─► driver ─ program of the guest
//!                           │                │ ▲
//!        the broker makes it, by policy      │ │ orders: a connection, a refusal
//!        and holds a copy                    ▼ │
//!                                        control thread ◄──► broker
//! ```
//!
//! A worker can neither connect nor listen: the broker does, and hands connected sockets over. What needs the broker, and
//! what closes a socket for others too (the broker's copy keeps it open), is left to the control thread ([`Link`]).
//!
//! Connections survive an upgrade: they are saved with what is under way in them, and the next worker has the sockets, by
//! their ids, before it is told of them. Until its commit it does not touch them.

mod connection;
mod packet;
mod saved;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::descriptor;
use baton_ipc::worker::VsockConfig;
use baton_ipc::worker::VsockOrder;
use baton_ipc::worker::VsockReport;
use rustix::net::Shutdown;

use super::Backend;
use super::Identity;
use super::Next;
use super::VirtioDevice;
use super::Wait;
use super::queue::Broken;
use super::queue::Chain;
use super::queue::Virtqueue;
use super::seat::Seat;
use super::seat::Stop;
use crate::devices::DeviceKind;
use crate::devices::Trigger;
use crate::devices::state;
use crate::devices::state::StateError;
use connection::Socket;
use connection::Stage;
use saved::SavedVsock;
use table::Deed;
use table::Table;

/// Of PCI's class communication, other.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::VSOCK,
    virtio_type: 19,
    pci_class: 0x07_8000,
};
/// Descriptors of the queues to receive, to transmit, and of events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Stream sockets (5.10.3).
const F_STREAM: u64 = 1 << 0;
/// Packets of one direction that are served before others of the same thread get their turn.
const BATCH: usize = 64;

/// What the threads share.
struct Shared {
    table: Mutex<Table>,
    /// Orders that the table has not seen.
    inbox: Mutex<Vec<(VsockOrder, Option<OwnedFd>)>>,
    /// Sockets that were handed over and that no state has named yet.
    held: Mutex<BTreeMap<u32, Arc<OwnedFd>>>,
    deeds: Mutex<Vec<Deed>>,
    /// Nobody answers any more.
    orphaned: AtomicBool,
    seats: OnceLock<Vec<Weak<Seat>>>,
    /// Tells the control thread of deeds.
    wake: Arc<dyn Trigger>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The table, with all orders obeyed.
    fn table(&self) -> MutexGuard<'_, Table> {
        let mut table = lock(&self.table);
        let orders = std::mem::take(&mut *lock(&self.inbox));
        for (order, fd) in orders {
            table.obey(order, fd);
        }
        table
    }

    /// Leaves the table's deeds to the control thread.
    fn leave(&self, mut table: MutexGuard<'_, Table>) {
        let new = std::mem::take(&mut table.deeds);
        drop(table);
        let mut deeds = lock(&self.deeds);
        deeds.extend(new);
        if !deeds.is_empty() {
            self.wake.trigger();
        }
    }

    fn order(&self, order: VsockOrder, fd: Option<OwnedFd>) {
        lock(&self.inbox).push((order, fd));
        self.nudge();
    }

    fn nudge(&self) {
        for seat in self.seats.get().into_iter().flatten() {
            if let Some(seat) = seat.upgrade() {
                seat.nudge();
            }
        }
    }
}

/// The control thread's side.
pub struct Link(Arc<Shared>);

impl Link {
    /// Passes on what the broker says.
    pub fn order(&self, order: VsockOrder, fd: Option<OwnedFd>) {
        match (order, fd) {
            (VsockOrder::Held { id }, Some(fd)) => {
                lock(&self.0.held).insert(id, Arc::new(fd));
            }
            (order, fd) => self.0.order(order, fd),
        }
    }

    /// Does what is left to the control thread; what the broker is to be told of it. While the device serves, a
    /// connection is told to be closed when no thread of this worker has it any more.
    pub fn deeds(&self, parked: bool) -> Vec<VsockReport> {
        let mut reports = Vec::new();
        // The lock is let go: a deed may be put back.
        let deeds = std::mem::take(&mut *lock(&self.0.deeds));
        for deed in deeds {
            match deed {
                Deed::Connect { ticket, .. } if self.0.orphaned.load(Ordering::SeqCst) => {
                    self.0.order(VsockOrder::Refused { ticket }, None);
                }
                Deed::Connect { ticket, port } => {
                    reports.push(VsockReport::Connect { ticket, port });
                }
                Deed::End(fd) => {
                    // It may have ended by itself.
                    let _ = rustix::net::shutdown(&*fd, Shutdown::Write);
                }
                Deed::Close(Socket { id, fd }) => {
                    let _ = rustix::net::shutdown(&*fd, Shutdown::Both);
                    match Arc::try_unwrap(fd) {
                        // The I/O thread has it among what it waits for, and looks again.
                        Err(fd) if !parked => {
                            lock(&self.0.deeds).push(Deed::Close(Socket { id, fd }));
                            self.0.nudge();
                        }
                        closed => {
                            drop(closed);
                            reports.push(VsockReport::Closed { id });
                        }
                    }
                }
            }
        }
        reports
    }

    /// Has the parked device take in all that was ordered, so that its state has it.
    pub fn settle(&self) {
        let table = self.0.table();
        self.0.leave(table);
    }

    /// The sockets of the connections that there are, as the broker names them, and what they are.
    #[must_use]
    pub fn entries(&self) -> Vec<(DescriptorKey, Description)> {
        let table = self.0.table();
        let sockets = table.connections.values().filter_map(|one| {
            let Socket { id, fd } = one.socket.as_ref()?;
            let key = DescriptorKey::new(descriptor::VSOCK, *id).ok()?;
            Some((
                key,
                Description::of(DescriptorKind::Stream, fd.as_fd()).ok()?,
            ))
        });
        let entries = sockets.collect();
        self.0.leave(table);
        entries
    }

    /// The guest is this worker's: sockets that its state did not name have no connection any more.
    pub fn release(&self) {
        lock(&self.0.held).clear();
    }

    /// The broker is gone: nothing that the guest asks for will come.
    pub fn orphan(&self) {
        self.0.orphaned.store(true, Ordering::SeqCst);
        let table = self.0.table();
        let stages = table.connections.values().map(|one| one.stage.clone());
        let tickets: Vec<u32> = stages
            .filter_map(|stage| match stage {
                Stage::Asked(ticket) | Stage::Abandoned(ticket) => Some(ticket),
                Stage::Offered | Stage::Open => None,
            })
            .collect();
        self.0.leave(table);
        for ticket in tickets {
            self.0.order(VsockOrder::Refused { ticket }, None);
        }
    }
}

/// The half that the driver configures.
pub struct Vsock {
    shared: Arc<Shared>,
    cid: u32,
}

impl Vsock {
    /// A device with the sockets of the connections that there are, and the control thread's side of it.
    #[must_use]
    pub fn new(
        config: &VsockConfig,
        held: BTreeMap<u32, OwnedFd>,
        wake: Arc<dyn Trigger>,
    ) -> (Self, Link) {
        let held = held.into_iter().map(|(id, fd)| (id, Arc::new(fd)));
        let shared = Arc::new(Shared {
            table: Mutex::new(Table::new(config.cid)),
            inbox: Mutex::new(Vec::new()),
            held: Mutex::new(held.collect()),
            deeds: Mutex::new(Vec::new()),
            orphaned: AtomicBool::new(false),
            seats: OnceLock::new(),
            wake,
        });
        let link = Link(Arc::clone(&shared));
        let cid = config.cid;
        (Self { shared, cid }, link)
    }
}

/// The half that works.
struct Relay(Arc<Shared>);

impl Relay {
    /// What the driver sends.
    fn transmit(table: &mut Table, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        queue.ignore()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            if stop.requested() || !table.listens() || !queue.take(&mut chain)? {
                next = Next::Wait;
                break;
            }
            table.packet(queue.index(), &chain.readable)?;
            queue.complete(chain.head, 0)?;
        }
        queue.interrupt()?;
        Ok(next)
    }

    /// What the driver is sent.
    fn receive(table: &mut Table, queue: &mut Virtqueue, stop: &Stop) -> Result<Next, Broken> {
        let mut chain = Chain::default();
        queue.ignore()?;
        let mut next = Next::Again;
        for _ in 0..BATCH {
            if stop.requested() || !table.has_packets() {
                next = Next::Wait;
                break;
            }
            if !queue.take(&mut chain)? {
                table.starved = true;
                next = Next::Wait;
                break;
            }
            let Some(length) = table.fill(queue.index(), &chain.writable)? else {
                queue.put_back();
                next = Next::Wait;
                break;
            };
            queue.complete(chain.head, length)?;
        }
        queue.interrupt()?;
        Ok(next)
    }

    fn serve(table: &mut Table, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        table.look();
        let mut next = Next::Wait;
        // Queues that the driver does not use are not among them.
        if let Some(queue) = queues.iter_mut().find(|queue| queue.index() == 1) {
            next = next.sooner(Self::transmit(table, queue, stop)?);
        }
        let deaf = !table.listens();
        if let Some(queue) = queues.iter_mut().find(|queue| queue.index() == 0) {
            next = next.sooner(Self::receive(table, queue, stop)?);
        }
        // There is room for refusals again.
        if deaf && table.listens() && !stop.requested() {
            next = Next::Again;
        }
        Ok(next)
    }
}

impl Backend for Relay {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        let mut table = self.0.table();
        let outcome = Self::serve(&mut table, queues, stop);
        self.0.leave(table);
        outcome
    }

    fn waits(&self) -> Vec<Wait> {
        lock(&self.0.table).waits()
    }
}

impl VirtioDevice for Vsock {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let relay = Relay(Arc::clone(&self.shared));
        vec![(vec![0, 1, 2], Box::new(relay))]
    }

    fn seated(&mut self, seats: Vec<Weak<Seat>>) {
        // Once in a device's life.
        let _ = self.shared.seats.set(seats);
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        let mut table = self.shared.table();
        table.clear();
        self.shared.leave(table);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let table = lock(&self.shared.table);
        postcard::to_stdvec(&SavedVsock::of(&table)).map_err(StateError::Malformed)
    }

    fn load(&mut self, state: &[u8], _features: Option<u64>) -> Result<(), StateError> {
        let saved: SavedVsock = state::parse(state)?;
        let table = saved.restore(self.cid, &lock(&self.shared.held))?;
        *lock(&self.shared.table) = table;
        Ok(())
    }
}
