//! Those who talk to the broker over its control socket, and the one table of what they may ask and when.

pub(crate) mod events;
pub(crate) mod front;
pub(crate) mod socket_file;

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Event;
use baton_ipc::control::Exit;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::Refusal;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::VmState;
use baton_policy::Policy;
use baton_policy::access::Right;
use baton_policy::procfs::TaskStatus;
use nix::sys::socket::sockopt::PeerPidfd;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::UCred;
use rustix::time::Timespec;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;

/// The most clients at once; one more is turned away.
const MAX_CLIENTS: usize = 32;
/// How many of them may be neither root's nor the broker's own user's: those two always find room.
const MAX_OTHERS: usize = 24;
/// How many may be one user's that is neither.
const MAX_OF_ONE: usize = 8;
/// How many of those who wait at the door are looked at before everybody else is looked after again.
const ARRIVALS: usize = 16;
/// The control connections of one QMP client: for what it asks, and for what it asks out of band.
const QMP_CONNECTIONS: usize = 2;

/// How long nobody is let in after accept(2) has failed for want of descriptors or memory.
const REST: Duration = Duration::from_millis(100);

use Right::Devices;
use Right::Power;
use Right::Transfer;
use Right::Upgrade;
use Right::View;
use VmState::Incoming;
use VmState::Lost;
use VmState::Paused;
use VmState::Postmigrate;
use VmState::Running;
use VmState::Starting;
use VmState::Stopped;
use VmState::Upgrading;

/// A request's name, how it is recognised, the states in which it is permitted, and the rights of which it takes one.
type Row = (
    &'static str,
    fn(&Request) -> bool,
    &'static [VmState],
    &'static [Right],
);

/// What is under way may be either.
const EITHER: &[Right] = &[Upgrade, Transfer];

const ANY: &[VmState] = &[
    Starting,
    Running,
    Paused,
    Upgrading,
    Stopped,
    Lost,
    Incoming,
    Postmigrate,
];

#[rustfmt::skip]
const REQUESTS: &[Row] = &[
    ("status",  |r| matches!(r, Request::Status),         ANY,                  &[View]),
    ("audit",   |r| matches!(r, Request::Audit),          &[Running, Paused],   &[View]),
    ("log-head", |r| matches!(r, Request::LogHead),       ANY,                  &[View]),
    ("console", |r| matches!(r, Request::Console),        ANY,                  &[Power]),
    ("virtio-console", |r| matches!(r, Request::VirtioConsole), ANY,            &[Power]),
    ("pause",   |r| matches!(r, Request::Pause),          &[Running, Incoming], &[Power]),
    ("resume",  |r| matches!(r, Request::Resume),         &[Paused, Incoming],  &[Power]),
    ("reset",   |r| matches!(r, Request::Reset),          &[Running, Paused, Upgrading], &[Power]),
    ("stop",    |r| matches!(r, Request::Stop { .. }),    ANY,                  &[Power]),
    ("upgrade", |r| matches!(r, Request::Upgrade { .. }), &[Running, Paused],   &[Upgrade]),
    ("approved-upgrade", |r| matches!(r, Request::ApprovedUpgrade { .. }), &[Running, Paused], &[Upgrade]),
    ("cancel",  |r| matches!(r, Request::Cancel),         &[Upgrading, Incoming], EITHER),
    ("begin-upgrade", |r| matches!(r, Request::BeginUpgrade { .. }), &[Running, Paused], &[Upgrade]),
    ("continue",      |r| matches!(r, Request::Continue),     &[Upgrading],     EITHER),
    ("power-button",  |r| matches!(r, Request::PowerButton),  &[Running, Paused, Upgrading], &[Power]),
    ("transfer",      |r| matches!(r, Request::Transfer { .. }), &[Running, Paused],    &[Transfer]),
    ("incoming",      |r| matches!(r, Request::Incoming { .. }), &[Incoming, Running, Paused, Upgrading, Postmigrate], &[Transfer]),
    ("balloon",       |r| matches!(r, Request::Balloon { .. }), &[Running],     &[Power]),
    ("save",          |r| matches!(r, Request::Save { .. }),    &[Running, Paused],      &[Transfer]),
    ("restore",       |r| matches!(r, Request::Restore { .. }), &[Incoming, Running, Paused, Upgrading, Postmigrate], &[Transfer]),
    ("blockdev-add",  |r| matches!(r, Request::AddNode(_)),         &[Running, Paused],  &[Devices]),
    ("blockdev-del",  |r| matches!(r, Request::DeleteNode { .. }),  &[Running, Paused],  &[Devices]),
    ("device-add",    |r| matches!(r, Request::AddDevice(_)),       &[Running, Paused],  &[Devices]),
    ("device-del",    |r| matches!(r, Request::DeleteDevice { .. }), &[Running, Paused], &[Devices]),
    ("netdev-add",    |r| matches!(r, Request::AddNetdev(_)),       &[Running, Paused],  &[Devices]),
    ("netdev-del",    |r| matches!(r, Request::DeleteNetdev { .. }), &[Running, Paused], &[Devices]),
    ("interface-add", |r| matches!(r, Request::AddInterface(_)),    &[Running, Paused],  &[Devices]),
    ("resize",        |r| matches!(r, Request::Resize { .. }),  &[Running, Paused],      &[Devices]),
    ("subscribe",     |r| matches!(r, Request::Subscribe),    ANY,              &[View]),
];

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaiting {
    /// Nothing.
    Nothing,
    /// The worker's answer to a query.
    Status,
    /// The worker's word that the guest stands still.
    Paused,
    /// The worker's word that the guest runs.
    Resumed,
    /// The worker's word that a device is another.
    Devices,
    /// The end of the VM.
    End,
    /// The end of the upgrade.
    Upgrade,
}

/// A client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: u64,
    /// Who it is, as the kernel says.
    pub(crate) actor: Actor,
    /// The groups that it was in when it connected.
    groups: Vec<u32>,
    pub(crate) awaiting: Awaiting,
    pub(crate) since: Instant,
    /// It is told of events.
    pub(crate) subscribed: bool,
    /// The QMP front speaks for it.
    qmp: bool,
    /// A message of its was taken since [`Clients::begin_turn`].
    heard: bool,
    channel: Channel<Reply, Request>,
}

/// A request that is permitted now.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) client: u64,
    pub(crate) name: &'static str,
    pub(crate) request: Request,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// All clients, and the socket where they come from.
#[derive(Debug)]
pub(crate) struct Clients {
    listener: OwnedFd,
    clients: Vec<Client>,
    /// Came while the guest stood still, and are looked at when it runs.
    lobby: Vec<(OwnedFd, UCred)>,
    next: u64,
    /// Nobody can be let in before this: descriptors had run out.
    rest_until: Option<Instant>,
    /// Who asked for what policy does not let them ask for, for the log.
    pub(crate) denied: Vec<(Actor, &'static str)>,
}

impl Clients {
    /// Listens in the VM's directory. When policy lets others ask for something, everybody may connect; who it is, is what
    /// the kernel says.
    pub(crate) fn listen(path: &Path, policy: &Policy) -> Result<Self> {
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .doing("cannot make the control socket")?;
        let address = SocketAddrUnix::new(path).map_err(|_| {
            unfit(
                format_args!("the control socket's path {} is too long", path.display()),
                "choose a shorter --run-dir or name",
            )
        })?;
        let mode = if policy.access.is_open() {
            0o666
        } else {
            0o600
        };
        rustix::net::bind(&listener, &address)
            .and_then(|()| rustix::fs::chmod(path, Mode::from_raw_mode(mode)))
            .and_then(|()| rustix::net::listen(&listener, 16))
            .doing(format_args!("cannot listen on {}", path.display()))?;
        Ok(Self {
            listener,
            clients: Vec::new(),
            lobby: Vec::new(),
            next: 0,
            rest_until: None,
            denied: Vec::new(),
        })
    }

    /// What to poll for reading.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let clients = self.clients.iter().map(|client| client.channel.as_fd());
        // Who waits at the door would wake the loop without end while nobody can be let in.
        let listener = self.rest_until.is_none().then(|| self.listener.as_fd());
        listener.into_iter().chain(clients)
    }

    /// When the door is looked at again, if it is left alone now.
    pub(crate) fn resting(&self) -> Option<Instant> {
        self.rest_until
    }

    /// Begins a turn of the loop: each client is heard once in it, so that none keeps the broker from what else it has to do.
    pub(crate) fn begin_turn(&mut self) {
        for client in &mut self.clients {
            client.heard = false;
        }
    }

    /// Takes those who wait at the door, up to a bound: the others have a turn of their own.
    pub(crate) fn accept(&mut self, policy: &Policy) {
        for (socket, peer) in std::mem::take(&mut self.lobby) {
            self.admit(socket, &peer, policy);
        }
        if self.rest_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.rest_until = None;
        for _ in 0..ARRIVALS {
            let Some((socket, peer)) = self.arrival() else {
                return;
            };
            self.admit(socket, &peer, policy);
        }
    }

    /// The next one who waits at the door.
    fn arrival(&mut self) -> Option<(OwnedFd, UCred)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        for _ in 0..ARRIVALS {
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => {
                    if let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) {
                        return Some((socket, peer));
                    }
                }
                // One that had left again, or a signal: the next one.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(_) => {
                    self.rest_until = Some(Instant::now() + REST);
                    return None;
                }
            }
        }
        None
    }

    fn admit(&mut self, socket: OwnedFd, peer: &UCred, policy: &Policy) {
        let (user, groups) = (peer.uid.as_raw(), groups(&socket, peer));
        let rights = [View, Power, Upgrade, Transfer, Devices];
        let known = rights
            .into_iter()
            .any(|right| may(policy, right, user, &groups));
        if known && self.has_room_for(user) {
            let actor = actor(&socket, peer);
            self.greet(FdSocket::from(socket), actor, groups, false);
        }
    }

    /// Whether one more connection of this user's is taken.
    fn has_room_for(&self, user: u32) -> bool {
        let direct = || self.clients.iter().filter(|client| !client.qmp);
        let others = || direct().filter(|client| !is_owner(client.actor.uid));
        let of_user = || others().filter(|client| client.actor.uid == user);
        direct().count() < MAX_CLIENTS
            && (is_owner(user) || (others().count() < MAX_OTHERS && of_user().count() < MAX_OF_ONE))
    }

    /// Takes the connections that the QMP front has for one of its clients.
    pub(crate) fn adopt(&mut self, sockets: [FdSocket; QMP_CONNECTIONS], actor: &Actor) {
        for socket in sockets {
            self.greet(socket, actor.clone(), Vec::new(), true);
        }
    }

    fn greet(&mut self, socket: FdSocket, actor: Actor, groups: Vec<u32>, qmp: bool) {
        let channel = Channel::new(socket);
        let hello = Reply::Hello {
            protocol: PROTOCOL,
            build: crate::BUILD.to_owned(),
        };
        if channel.send(&hello).is_ok() {
            self.next += 1;
            self.clients.push(Client {
                id: self.next,
                actor,
                groups,
                awaiting: Awaiting::Nothing,
                since: Instant::now(),
                subscribed: false,
                qmp,
                heard: false,
                channel,
            });
        }
    }

    /// How many clients the QMP front has.
    pub(crate) fn qmp_count(&self) -> usize {
        let connections = self.clients.iter().filter(|client| client.qmp).count();
        connections.div_ceil(QMP_CONNECTIONS)
    }

    /// Whether nobody is there.
    pub(crate) fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// The QMP front is gone, and its clients with it.
    pub(crate) fn forget_qmp(&mut self) {
        self.clients.retain(|client| !client.qmp);
    }

    /// Tells those who have asked for events. One that does not read is hung up on.
    pub(crate) fn publish(&mut self, event: &Event) {
        if self.clients.iter().any(|client| client.subscribed) {
            let reply = Reply::Event(Box::new(event.clone()));
            self.clients
                .retain(|client| !client.subscribed || client.channel.send(&reply).is_ok());
        }
    }

    /// The next request that is permitted in this state, and all others answered or turned away: one message of each client in
    /// a turn.
    pub(crate) fn hear(&mut self, state: VmState, policy: &Policy) -> Option<Asked> {
        let mut index = 0;
        while let Some(client) = self.clients.get_mut(index) {
            if std::mem::replace(&mut client.heard, true) {
                index += 1;
                continue;
            }
            match client.channel.receive() {
                Ok(Received::Empty) => index += 1,
                // One request at a time: who asks again before the answer is sent away, but may cancel.
                Ok(Received::Message(request, _))
                    if client.awaiting != Awaiting::Nothing && request != Request::Cancel =>
                {
                    self.clients.swap_remove(index);
                }
                Ok(Received::Message(request, descriptors)) => {
                    let Some(row) = REQUESTS.iter().find(|row| row.1(&request)) else {
                        self.clients.swap_remove(index);
                        continue;
                    };
                    let (user, groups) = (client.actor.uid, &client.groups);
                    let lacking = lacking(row, &request, |right| may(policy, right, user, groups));
                    if let Some(right) = lacking {
                        let id = client.id;
                        self.denied.push((client.actor.clone(), row.0));
                        self.reply(id, &Reply::Refused(denied(policy, row, right, user)));
                        continue;
                    }
                    match admit(row, &request, state, descriptors.len()) {
                        Ok(()) => {
                            return Some(Asked {
                                client: client.id,
                                name: row.0,
                                request,
                                descriptors,
                            });
                        }
                        Err(refusal) => {
                            let id = client.id;
                            self.reply(id, &Reply::Refused(refusal));
                        }
                    }
                }
                Ok(Received::HungUp) | Err(_) => drop(self.clients.swap_remove(index)),
            }
        }
        None
    }

    /// Who asks for the upgrade to be cancelled and may: a look between the steps of a pause, when nothing else is heard. Root and
    /// the broker's own user are let in; what others may is looked at afterwards, so that no number of them lengthens it.
    pub(crate) fn cancels(&mut self, policy: &Policy) -> Option<u64> {
        for _ in 0..ARRIVALS {
            match self.arrival() {
                Some((socket, peer)) if is_owner(peer.uid.as_raw()) => {
                    self.admit(socket, &peer, policy);
                    break;
                }
                Some(other) if self.lobby.len() < ARRIVALS => self.lobby.push(other),
                // One too many is turned away.
                Some(_) => {}
                None => break,
            }
        }
        let client = self.clients.iter_mut().find(|client| {
            client.channel.peek() == Some(Request::Cancel)
                && EITHER
                    .iter()
                    .any(|right| may(policy, *right, client.actor.uid, &client.groups))
        })?;
        client.channel.receive().ok().map(|_| client.id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Client> {
        self.clients.iter_mut().find(|client| client.id == id)
    }

    /// Answers a client. One that does not take its answer is forgotten.
    pub(crate) fn reply(&mut self, id: u64, reply: &Reply) {
        self.reply_with(id, reply, &[]);
    }

    pub(crate) fn reply_with(&mut self, id: u64, reply: &Reply, descriptors: &[BorrowedFd<'_>]) {
        if let Some(index) = self.clients.iter().position(|client| client.id == id) {
            let taken = self.clients.get_mut(index).is_some_and(|client| {
                if !matches!(reply, Reply::Progress(_)) {
                    client.awaiting = Awaiting::Nothing;
                }
                client.channel.send_with(reply, descriptors).is_ok()
            });
            if !taken {
                self.clients.swap_remove(index);
            }
        }
    }

    /// Answers all who wait for this.
    pub(crate) fn answer(&mut self, awaiting: Awaiting, reply: &Reply) {
        for id in self.waiting(awaiting) {
            self.reply(id, reply);
        }
    }

    /// Who waits for this.
    pub(crate) fn waiting(&self, awaiting: Awaiting) -> Vec<u64> {
        self.clients
            .iter()
            .filter(|client| client.awaiting == awaiting)
            .map(|client| client.id)
            .collect()
    }

    /// Who has waited for the worker's answer for longer than this, and for which.
    pub(crate) fn overdue(&self, bound: Duration) -> Vec<(u64, Awaiting)> {
        let waits_for_worker = |client: &&Client| {
            matches!(
                client.awaiting,
                Awaiting::Status | Awaiting::Paused | Awaiting::Resumed | Awaiting::Devices
            )
        };
        self.clients
            .iter()
            .filter(waits_for_worker)
            .filter(|client| client.since.elapsed() > bound)
            .map(|client| (client.id, client.awaiting))
            .collect()
    }

    /// Whether anybody waits for the worker's answer.
    pub(crate) fn any_waiting(&self) -> bool {
        self.clients
            .iter()
            .any(|client| client.awaiting != Awaiting::Nothing)
    }
}

/// Whether somebody may ask for what takes this right. Root could anyway, and the broker's user is the broker.
fn may(policy: &Policy, right: Right, user: u32, groups: &[u32]) -> bool {
    is_owner(user) || policy.access.permits(right, user, groups)
}

/// Whether this is root or the broker's own user.
fn is_owner(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

/// The right that a client lacks for a request: one of its row's, and one for what it approves of.
fn lacking(row: &Row, request: &Request, may: impl Fn(Right) -> bool) -> Option<Right> {
    if !row.3.iter().any(|right| may(*right)) {
        return row.3.first().copied();
    }
    let approves = matches!(request, Request::ApprovedUpgrade { .. });
    (approves && !may(Right::Approve)).then_some(Right::Approve)
}

fn denied(policy: &Policy, row: &Row, right: Right, user: u32) -> Refusal {
    let name = row.0;
    crate::refusal::refused(
        format_args!(
            "policy {} does not let user {user} ask for `{name}`",
            policy.name
        ),
        format_args!("it takes the right `{right}`: [[access]] in the policy gives it"),
    )
}

/// The groups of who is at the other end; none but its first one if it is gone by now.
fn groups(socket: &OwnedFd, peer: &UCred) -> Vec<u32> {
    let mut groups = vec![peer.gid.as_raw()];
    let pid = peer.pid.as_raw_nonzero().get();
    if let Ok(held) = nix::sys::socket::getsockopt(socket, PeerPidfd) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .ok()
            .and_then(|text| TaskStatus::parse(&text).ok());
        let mut fds = [PollFd::new(&held, PollFlags::IN)];
        // Not readable: it has not ended, so what was read is its own record (pidfd_open(2)).
        if rustix::event::poll(&mut fds, Some(&Timespec::default())) == Ok(0) {
            groups.extend(status.into_iter().flat_map(|status| status.groups));
        }
    }
    groups
}

/// Who is at the other end. The unit is that of the process that connected, or none when that is gone by now: its number
/// may be another's.
pub(crate) fn actor(socket: &OwnedFd, peer: &UCred) -> Actor {
    let pid = peer.pid.as_raw_nonzero().get();
    let unit = nix::sys::socket::getsockopt(socket, PeerPidfd)
        .ok()
        .and_then(|held| {
            let unit = baton_audit::actor::unit_of(pid)?;
            let mut fds = [PollFd::new(&held, PollFlags::IN)];
            // Readable: it has ended (pidfd_open(2)).
            let alive = rustix::event::poll(&mut fds, Some(&Timespec::default())) == Ok(0);
            alive.then_some(unit)
        });
    Actor {
        uid: peer.uid.as_raw(),
        pid,
        unit,
    }
}

fn admit(
    row: &Row,
    request: &Request,
    state: VmState,
    descriptors: usize,
) -> std::result::Result<(), Refusal> {
    let (name, _, states, _) = row;
    // A worker's binary, and its signature.
    let most = match request {
        Request::Upgrade { .. } | Request::ApprovedUpgrade { .. } => 2,
        _ => 0,
    };
    if descriptors > most {
        return Err(refusal(
            Exit::Usage,
            format_args!("{descriptors} descriptors came with `{name}`"),
            "",
        ));
    }
    if states.contains(&state) {
        return Ok(());
    }
    let exit = match (state, request) {
        (Upgrading, _) => Exit::Busy,
        (Lost, _) => Exit::Lost,
        _ => Exit::Unfit,
    };
    let state = match state {
        Starting => "is starting",
        Running => "is running",
        Paused => "is paused",
        Upgrading => "is being upgraded",
        Stopped => "has stopped",
        Lost => "is lost",
        Incoming => "is awaited from another broker",
        Postmigrate => "was handed to another broker",
        VmState::Orphaned => "is orphaned",
        VmState::GuestPanicked => "has panicked",
    };
    Err(refusal(
        exit,
        format_args!("the VM {state}, so `{name}` is not possible"),
        match exit {
            Exit::Busy => {
                "try again when the upgrade has ended, or `baton status` to see how it goes"
            }
            _ => "`baton status` shows its state",
        },
    ))
}

#[cfg(test)]
mod tests;
