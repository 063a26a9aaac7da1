//! The new side of a transfer: a broker that waits for another's guest, beside its name.
//!
//! ```text
//! Waiting ── connected ──► Greeting ── preamble ──► Offered ── CPR state whole, and as the VM file says ──► (Deferred)
//!   ──► Listening ── main connected ──► Building ── ready ──► Lent ── committed ──► Settling ──► an ordinary broker
//! ```
//!
//! The old broker arbitrates. From `Lent` on, this one does nothing to its worker until the old one has said how it went, or is
//! dead; then the worker's own word counts: one that was told `commit` has the guest, another ends.

mod arrival;
mod build;
mod verdict;

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::Address;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Refusal;
use baton_ipc::control::StartReport;
use baton_ipc::control::Step;
use baton_ipc::control::Waiting;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::transfer::Offer;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::MAX_SLOTS;
use baton_policy::Policy;

use crate::broker::Broker;
use crate::devices::console::Console;
use crate::devices::console::Port;
use crate::devices::console::file::ConsoleFile;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::transfer::channel_path::Which;
use crate::transfer::channel_socket::Doors;
use crate::transfer::channel_socket::Listener;
use crate::vm_file;
use crate::worker::Worker;
use crate::worker::nascent::Nascent;

/// Where a broker waits for a guest, as `--incoming` says.
#[derive(Clone, Debug)]
pub(crate) struct Channels {
    /// Where the CPR state comes in.
    pub(crate) cpr: Address,
    /// Where the main channel comes in; `None` waits for `migrate-incoming`.
    pub(crate) main: Option<Address>,
    /// The guest stands still when it has come.
    pub(crate) paused: bool,
}

type Link = Channel<ToOld, ToNew>;

/// A second `migrate-incoming` (QEMU, `migration/migration.c`).
const STARTED: &str = "The incoming migration has already been started";

/// How far it is.
#[derive(Debug)]
enum Stage {
    /// Nobody has come.
    Waiting(Listener),
    /// Somebody has connected to the cpr socket.
    Greeting(Listener, OwnedFd, Instant),
    /// The CPR state comes.
    Offered {
        link: Link,
        state: FdSocket,
        receiver: CprReceiver,
        offer: Option<Box<Offer>>,
        registry: Option<Registry>,
    },
    /// Everything is there but `migrate-incoming`.
    Deferred(Link),
    /// The main channel is awaited. Who has connected has yet to send the nonce.
    Listening(Link, Vec<OwnedFd>),
    /// The worker is on its way, and gets its end of the main channel when it is confirmed.
    Building {
        link: Link,
        main: Option<OwnedFd>,
        nascent: Box<Nascent>,
    },
    /// The worker waits for its guest, at the old broker's orders.
    Lent(Link, Box<Worker>),
    /// The old broker is dead, and has not said how it went: the worker was asked.
    Asked(Box<Worker>),
    /// The guest runs here; the rest of it comes, the past and the listeners of its consoles among that.
    Settling(Link, Vec<Console>, Instant),
    /// Between two stages, or over.
    Gone,
}

/// A broker's waiting for a guest.
#[derive(Debug)]
pub(crate) struct Incoming {
    stage: Stage,
    main: Option<Listener>,
    /// The old broker's process.
    peer: Option<OwnedFd>,
    offer: Option<Box<Offer>>,
    /// Where the old worker is.
    old_cgroup: Vec<PathBuf>,
    /// The broker's ends of the consoles, in their order, which the old broker reads until the commit.
    consoles: Vec<OwnedFd>,
    /// What keeps its taps from other VMs.
    claims: Vec<OwnedFd>,
    /// Where programs of the host reach its vsock.
    vsock: Option<OwnedFd>,
    /// The files that they are copied to.
    files: Vec<Option<ConsoleFile>>,
    paused: bool,
    /// The old broker was told that this one ends.
    withdrawn: bool,
    deadline: Option<Instant>,
}

impl Incoming {
    /// Listens.
    pub(crate) fn listen(channels: &Channels, doors: Doors<'_>) -> Result<Self> {
        let main = channels.main.as_ref();
        Ok(Self {
            stage: Stage::Waiting(doors.listen(&channels.cpr, Which::Cpr)?),
            main: main
                .map(|main| doors.listen(main, Which::Main))
                .transpose()?,
            peer: None,
            offer: None,
            old_cgroup: Vec::new(),
            consoles: Vec::new(),
            claims: Vec::new(),
            vsock: None,
            files: Vec::new(),
            paused: channels.paused,
            withdrawn: false,
            deadline: None,
        })
    }

    /// Whether the guest is to stand still when it has come.
    pub(crate) fn stands(&mut self, stands: bool) {
        self.paused = stands;
    }

    /// Opens the file that the next console is to go to, if it is to go to one, while this broker still may.
    pub(crate) fn open_console(
        &mut self,
        port: Port,
        kind: &vm_file::Console,
        policy: &Policy,
    ) -> Result<()> {
        self.files.push(match kind {
            vm_file::Console::File { path } => {
                Some(ConsoleFile::open(port, path, policy.io.console_file)?)
            }
            _ => None,
        });
        Ok(())
    }

    /// What to poll for reading.
    pub(crate) fn sources(&self) -> Vec<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Waiting(listener) => vec![listener.as_fd()],
            Stage::Greeting(_, stream, _) => vec![stream.as_fd()],
            Stage::Offered { link, state, .. } => vec![link.as_fd(), state.as_fd()],
            Stage::Deferred(link) | Stage::Settling(link, ..) => vec![link.as_fd()],
            Stage::Listening(link, guests) => {
                let mut sources = vec![link.as_fd()];
                sources.extend(self.main.as_ref().map(AsFd::as_fd));
                sources.extend(guests.iter().map(AsFd::as_fd));
                sources
            }
            Stage::Building { link, nascent, .. } => {
                let mut sources = nascent.sources();
                sources.push(link.as_fd());
                sources
            }
            Stage::Lent(link, worker) => {
                let mut sources = vec![link.as_fd(), worker.pidfd()];
                sources.extend(worker.diagnostics());
                sources
            }
            Stage::Asked(worker) => {
                let mut sources = vec![worker.pidfd(), worker.control()];
                sources.extend(self.peer.as_ref().map(AsFd::as_fd));
                sources
            }
            Stage::Gone => Vec::new(),
        }
    }

    /// When to look again, whatever happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Greeting(_, _, by) | Stage::Settling(_, _, by) => Some(*by),
            Stage::Building { nascent, .. } => Some(nascent.deadline),
            // A dead broker's pidfd may be missing, and then nothing wakes.
            Stage::Asked(_) => Some(Instant::now() + Duration::from_millis(20)),
            _ => self.deadline,
        }
    }

    /// What is waited for.
    pub(crate) fn awaits(&self) -> &'static str {
        match &self.stage {
            Stage::Waiting(_) => "another broker on the cpr channel",
            Stage::Greeting(..) => "the other broker's first bytes",
            Stage::Offered { .. } => "the CPR state",
            Stage::Deferred(_) => "`migrate-incoming`",
            Stage::Listening(..) => "the other broker on the main channel",
            Stage::Building { .. } => "the new worker to be built",
            Stage::Lent(..) => "the other broker to hand the guest over",
            Stage::Asked(_) => "the new worker's word",
            Stage::Settling(..) | Stage::Gone => "what follows the guest",
        }
    }

    /// The worker in the making.
    pub(crate) fn nascent(&self) -> Option<&Nascent> {
        match &self.stage {
            Stage::Building { nascent, .. } => Some(nascent),
            _ => None,
        }
    }

    /// The worker that waits for its guest.
    pub(crate) fn worker(&self) -> Option<&Worker> {
        match &self.stage {
            Stage::Lent(_, worker) | Stage::Asked(worker) => Some(worker),
            _ => None,
        }
    }

    /// Somebody else decides whether the worker runs the guest: until then this broker must not end.
    pub(crate) fn is_undecided(&self) -> bool {
        self.worker().is_some()
    }

    /// Whether another broker has come.
    pub(crate) fn has_begun(&self) -> bool {
        !matches!(self.stage, Stage::Waiting(_) | Stage::Greeting(..))
    }

    /// Tells the old broker, which alone decides, why this one does not want its guest: it keeps that, unless it is on its way
    /// already.
    pub(crate) fn withdraw(&mut self, why: &str) {
        if !std::mem::replace(&mut self.withdrawn, true) {
            self.tell(&ToOld::Failed(why.to_owned()));
        }
    }

    fn tell(&self, said: &ToOld) {
        if let Stage::Offered { link, .. }
        | Stage::Deferred(link)
        | Stage::Listening(link, _)
        | Stage::Building { link, .. }
        | Stage::Lent(link, _) = &self.stage
        {
            let _ = link.send(said);
        }
    }
}

/// Nothing has come on the link but this.
fn hung_up() -> Refusal {
    unfit("the old broker hung up", "")
}

impl Broker {
    /// Says that it waits.
    pub(crate) fn say_waiting(&mut self) {
        let waiting = Waiting {
            name: self.vm.name.as_str().to_owned(),
            broker_pid: std::process::id(),
            directory: self.directory.path().display().to_string(),
        };
        self.release_standard_error();
        if let Some(starter) = &self.starter {
            let _ = starter.send(&StartReport::Waiting(waiting));
        }
    }

    /// `migrate-incoming`.
    pub(crate) fn open_main(&mut self, main: &Address) -> Result<()> {
        let refused = |text: &str| unfit(text, "");
        let bound = self.deadlines.of(Step::Build);
        let Some(incoming) = &mut self.incoming else {
            return Err(refused(if self.options.incoming.is_some() {
                STARTED
            } else {
                "'-incoming' was not specified on the command line"
            }));
        };
        // Once the old side has come, there is nobody more to listen for.
        let open = matches!(
            incoming.stage,
            Stage::Waiting(_) | Stage::Greeting(..) | Stage::Offered { .. } | Stage::Deferred(_)
        );
        if incoming.main.is_some() || !open {
            return Err(refused(STARTED));
        }
        if matches!(main, Address::Fd(_)) {
            return Err(refused("a descriptor's number says nothing here"));
        }
        let doors = Doors {
            directory: &self.directory,
            policy: &self.rules.policy,
            launcher: &self.launcher,
        };
        incoming.main = Some(doors.listen(main, Which::Main)?);
        if let Stage::Deferred(_) = incoming.stage {
            if let Stage::Deferred(link) = std::mem::replace(&mut incoming.stage, Stage::Gone) {
                incoming.stage = listening(link)?;
                incoming.deadline = Some(Instant::now() + bound);
                self.happened(Happening::UpgradeBegan { dry_run: false });
            }
        }
        Ok(())
    }

    /// Goes on with what has come.
    pub(crate) fn advance_incoming(&mut self) -> Result<()> {
        // A stage may be over at once; the next one may have its message already.
        for _ in 0..16 {
            let Some(mut incoming) = self.incoming.take() else {
                return Ok(());
            };
            let before = std::mem::discriminant(&incoming.stage);
            let stage = std::mem::replace(&mut incoming.stage, Stage::Gone);
            let deadline = incoming.deadline;
            self.incoming = Some(incoming);
            let next = self.step_incoming(stage);
            let Some(incoming) = &mut self.incoming else {
                return next.map(drop);
            };
            match next {
                Ok(Stage::Gone) => {
                    self.incoming = None;
                    return Ok(());
                }
                Ok(stage) => {
                    let same = std::mem::discriminant(&stage) == before;
                    incoming.stage = stage;
                    if same {
                        let late = deadline.is_some_and(|by| Instant::now() > by);
                        if late && !incoming.is_undecided() {
                            let reason = format!("{} did not come in time", incoming.awaits());
                            incoming.tell(&ToOld::Failed(reason.clone()));
                            return Err(unfit(reason, ""));
                        }
                        return Ok(());
                    }
                }
                Err(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    fn step_incoming(&mut self, stage: Stage) -> Result<Stage> {
        match stage {
            Stage::Waiting(listener) => Ok(match listener.accept() {
                Some(stream) => {
                    let by = Instant::now() + self.deadlines.of(Step::Spawn);
                    Stage::Greeting(listener, stream, by)
                }
                None => Stage::Waiting(listener),
            }),
            Stage::Greeting(listener, stream, by) => self.greet(listener, stream, by),
            Stage::Offered {
                mut link,
                state,
                mut receiver,
                mut offer,
                mut registry,
            } => {
                if offer.is_none() {
                    offer = match hear(&mut link)? {
                        Some((ToNew::Offer(offer), consoles)) => {
                            if let Some(incoming) = &mut self.incoming {
                                incoming.consoles = consoles;
                            }
                            Some(offer)
                        }
                        Some((ToNew::Claim, claim)) => {
                            if let Some(incoming) = &mut self.incoming {
                                incoming.claims.extend(claim);
                                if incoming.claims.len() > usize::from(MAX_SLOTS) {
                                    return Err(unfit(
                                        "more claims of taps came than there are devices",
                                        "",
                                    ));
                                }
                            }
                            None
                        }
                        Some((ToNew::VsockListener, listener)) => {
                            if let Some(incoming) = &mut self.incoming {
                                incoming.vsock = listener.into_iter().next();
                            }
                            None
                        }
                        Some(_) => return Err(hung_up()),
                        None => None,
                    };
                }
                if registry.is_none() {
                    let received = receiver.receive(&state).map_err(|e| {
                        let refusal = unfit(e, "");
                        let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                        refusal
                    })?;
                    registry = received.map(|(_, registry)| registry);
                }
                match (offer, registry) {
                    (Some(offer), Some(registry)) => self.take_state(link, offer, registry),
                    (offer, registry) => Ok(Stage::Offered {
                        link,
                        state,
                        receiver,
                        offer,
                        registry,
                    }),
                }
            }
            Stage::Deferred(mut link) => match hear(&mut link)? {
                None => Ok(Stage::Deferred(link)),
                Some(_) => Err(hung_up()),
            },
            Stage::Listening(link, guests) => self.await_main(link, guests),
            Stage::Building {
                link,
                main,
                nascent,
            } => self.build(link, main, nascent),
            Stage::Lent(link, worker) => self.await_verdict(link, worker),
            Stage::Asked(worker) => self.await_word(worker),
            Stage::Settling(link, consoles, by) => self.settle(link, consoles, by),
            Stage::Gone => Ok(Stage::Gone),
        }
    }
}

fn cancelled(reason: &str) -> Refusal {
    refusal(
        Exit::Aborted,
        format_args!("the old broker gave up: {}", quoted(reason)),
        "",
    )
}

/// Tells the old broker that it may connect.
fn listening(link: Link) -> Result<Stage> {
    link.send(&ToOld::Listening).doing("the old broker")?;
    Ok(Stage::Listening(link, Vec::new()))
}

/// The next thing that the old broker has said before the worker is lent.
fn hear(link: &mut Link) -> Result<Option<(ToNew, Vec<OwnedFd>)>> {
    match link.receive() {
        Ok(Received::Empty) => Ok(None),
        Ok(Received::Message(ToNew::Cancelled(reason), _)) => Err(cancelled(&reason)),
        Ok(Received::Message(said, descriptors)) => Ok(Some((said, descriptors))),
        Ok(Received::HungUp) => Err(hung_up()),
        Err(error) => Err(unfit(format_args!("the old broker: {error}"), "")),
    }
}
