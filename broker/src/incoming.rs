//! The new side of a transfer: a broker that waits for another's guest, beside its name.
//!
//! ```text
//! Waiting ── connected ──► Greeting ── preamble ──► Offered ── CPR state whole, and as the VM file says ──► (Deferred)
//!   ──► Listening ── main connected ──► Building ── ready ──► Lent ── committed ──► Settling ──► an ordinary broker
//! ```
//!
//! The old broker arbitrates. From `Lent` on, this one does nothing to its worker until the old one has said how it went, or is
//! dead; then the worker's own word counts: one that was told `commit` has the guest, another ends.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::Address;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::Refusal;
use baton_ipc::control::StartReport;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::Waiting;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::transfer;
use baton_ipc::transfer::Committed;
use baton_ipc::transfer::Offer;
use baton_ipc::transfer::Ready;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use serde_json::json;

use crate::broker::Broker;
use crate::channel_socket;
use crate::channel_socket::Listener;
use crate::console::Console;
use crate::launch::Begun;
use crate::launch::Program;
use crate::nascent::Advance;
use crate::nascent::Nascent;
use crate::outgoing::DEFERRED;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::worker::Phase;
use crate::worker::Worker;

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
    /// The guest runs here; the rest of it comes, its console's past and listeners among that.
    Settling(Link, Option<Console>, Instant),
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
    /// The broker's end of the console, which the old broker reads until the commit.
    console: Option<OwnedFd>,
    /// The file that the console is copied to.
    file: Option<File>,
    paused: bool,
    deadline: Option<Instant>,
}

impl Incoming {
    /// Listens.
    pub(crate) fn listen(channels: &Channels) -> Result<Self> {
        Ok(Self {
            stage: Stage::Waiting(Listener::at(&channels.cpr)?),
            main: channels.main.as_ref().map(Listener::at).transpose()?,
            peer: None,
            offer: None,
            console: None,
            file: None,
            paused: channels.paused,
            deadline: None,
        })
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
            return Err(refused("'-incoming' was not specified on the command line"));
        };
        if incoming.main.is_some() {
            return Err(refused("The incoming migration has already been started"));
        }
        let main = match main {
            Address::Unix(path) => {
                let path = self.directory.path().join(path);
                Address::unix(&path.display().to_string()).doing("cannot listen")?
            }
            Address::Fd(_) => return Err(refused("a descriptor's number says nothing here")),
        };
        incoming.main = Some(Listener::at(&main)?);
        if let Stage::Deferred(_) = incoming.stage {
            if let Stage::Deferred(link) = std::mem::replace(&mut incoming.stage, Stage::Gone) {
                incoming.stage = listening(link)?;
                incoming.deadline = Some(Instant::now() + bound);
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
                            incoming.tell(&ToOld::Failed("the old side took too long".to_owned()));
                            return Err(unfit("the old side took too long", ""));
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
            Stage::Greeting(listener, stream, by) => Ok(self.greet(listener, stream, by)),
            Stage::Offered {
                mut link,
                state,
                mut receiver,
                mut offer,
                mut registry,
            } => {
                if offer.is_none() {
                    offer = match hear(&mut link)? {
                        Some((ToNew::Offer(offer), console)) => {
                            if let Some(incoming) = &mut self.incoming {
                                incoming.console = console.into_iter().next();
                            }
                            Some(offer)
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
            Stage::Settling(link, console, by) => self.settle(link, console, by),
            Stage::Gone => Ok(Stage::Gone),
        }
    }

    /// Reads the first bytes. Whoever sends others, or none, is forgotten, and the next one is waited for.
    fn greet(&mut self, listener: Listener, stream: OwnedFd, by: Instant) -> Stage {
        let greeted = match receive_preamble(&stream) {
            Ok(None) if Instant::now() <= by => return Stage::Greeting(listener, stream, by),
            Ok(None) => Err("it said nothing".to_owned()),
            Ok(Some(ends)) => Ok(ends),
            Err(reason) => Err(reason),
        };
        let (link, state) = match greeted {
            Ok(ends) => ends,
            Err(reason) => {
                self.log
                    .note("incoming-refused", &json!({"reason": quoted(&reason)}));
                return Stage::Waiting(listener);
            }
        };
        let link = Link::new(FdSocket::from(link));
        let hello = ToOld::Hello {
            build: crate::BUILD.to_owned(),
            directory: self.directory.identity(),
        };
        if let Err(error) = link.send(&hello) {
            complain(&unfit(format_args!("the old broker: {error}"), ""));
            return Stage::Waiting(listener);
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.peer = channel_socket::peer_process(&stream);
            incoming.deadline = Some(Instant::now() + self.deadlines.of(Step::Build));
        }
        // Here the path goes: nobody else is taken.
        Stage::Offered {
            link,
            state: FdSocket::from(state),
            receiver: CprReceiver::default(),
            offer: None,
            registry: None,
        }
    }

    fn take_state(&mut self, link: Link, offer: Box<Offer>, registry: Registry) -> Result<Stage> {
        match self.check_state(&offer, &registry) {
            Ok(file) => {
                self.id = offer.vm;
                self.virtio.clone_from(&offer.machine.virtio);
                self.registry = registry;
                let bound = self.deadlines.of(Step::Build);
                let Some(incoming) = &mut self.incoming else {
                    return Ok(Stage::Gone);
                };
                incoming.file = file;
                incoming.offer = Some(offer);
                let deferred = incoming.main.is_none();
                incoming.deadline = Some(Instant::now() + if deferred { DEFERRED } else { bound });
                self.happened(Happening::UpgradeBegan { dry_run: false });
                if deferred {
                    link.send(&ToOld::Deferred).doing("the old broker")?;
                    return Ok(Stage::Deferred(link));
                }
                listening(link)
            }
            Err(refusal) => {
                let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                Err(refusal)
            }
        }
    }

    /// Compares what has come with this broker's VM file and policy. The console's file, if there is one.
    fn check_state(&mut self, offer: &Offer, registry: &Registry) -> Result<Option<File>> {
        let machine = &offer.machine;
        let devices = crate::guest_machine::devices(&self.vm, &machine.virtio);
        let ours = crate::guest_machine::of(&self.vm, &devices);
        if let Some(difference) = machine.first_difference(&ours) {
            return Err(unfit(
                difference,
                "start the new side from the same VM file",
            ));
        }
        crate::guest_machine::check(&self.vm, &self.rules.policy, registry, machine)?;
        crate::resources::check_console(&self.vm.console, &self.rules.policy, &mut self.log)?;
        for (key, description, _) in registry.iter() {
            self.log
                .write(
                    "received",
                    &json!({"descriptor": key.name(), "id": key.id(), "what": description}),
                )
                .recorded()?;
        }
        match &self.vm.console {
            crate::vm_file::Console::File { path } => crate::console::open_file(path).map(Some),
            _ => Ok(None),
        }
    }

    /// Waits for the one connection that begins with the nonce.
    fn await_main(&mut self, mut link: Link, mut guests: Vec<OwnedFd>) -> Result<Stage> {
        if hear(&mut link)?.is_some() {
            return Err(hung_up());
        }
        let Some((incoming, nonce)) = self.incoming.as_mut().and_then(|incoming| {
            let nonce = incoming.offer.as_ref()?.nonce;
            Some((incoming, nonce))
        }) else {
            return Ok(Stage::Gone);
        };
        if let Some(stream) = incoming.main.as_ref().and_then(Listener::accept) {
            guests.push(stream);
        }
        let mut main = None;
        guests.retain_mut(|stream| {
            let mut found = [0; transfer::NONCE];
            // All of it or nothing: it was sent whole, into an empty buffer.
            match rustix::net::recv(&*stream, &mut found, RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN | Errno::INTR) => true,
                Ok((_, count)) if count == found.len() && found == nonce => {
                    main = stream.try_clone().ok();
                    false
                }
                _ => false,
            }
        });
        guests.truncate(4);
        let Some(main) = main else {
            return Ok(Stage::Listening(link, guests));
        };
        // Its path goes: nobody else is taken.
        incoming.main = None;
        match self.launch_successor() {
            Ok(nascent) => Ok(Stage::Building {
                link,
                main: Some(main),
                nascent: Box::new(nascent),
            }),
            Err(refusal) => {
                let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                Err(refusal)
            }
        }
    }

    fn launch_successor(&mut self) -> Result<Nascent> {
        let generation = self.offered_generation();
        let (binary, declared) =
            crate::rules::worker_binary(&self.vm, &self.options, &self.rules.policy, None)?;
        if let Some(rules) = std::rc::Rc::get_mut(&mut self.rules) {
            rules.declared = Some(declared);
        }
        let config = self.config(generation, StartMode::CprTransfer, &self.rules.compiled)?;
        let begun = Begun::start(Program::Worker, self.ids.ids, self.cgroup.as_ref())?;
        self.launch(begun, binary, config, &self.rules)
    }

    fn offered_generation(&self) -> u32 {
        let offer = self.incoming.as_ref().and_then(|one| one.offer.as_ref());
        offer.map_or(0, |offer| offer.generation)
    }

    /// S2 to S5, as in any upgrade.
    fn build(
        &mut self,
        mut link: Link,
        main: Option<OwnedFd>,
        nascent: Box<Nascent>,
    ) -> Result<Stage> {
        let heard = hear(&mut link);
        let built = heard.and_then(|heard| self.build_in(&link, heard, main, nascent));
        match built {
            Ok((main, nascent, None)) => Ok(Stage::Building {
                link,
                main,
                nascent,
            }),
            Ok((_, nascent, Some(times))) => match self.lend(&link, *nascent, times) {
                Ok(worker) => Ok(Stage::Lent(link, worker)),
                Err(refusal) => {
                    let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                    Err(refusal)
                }
            },
            Err(refusal) => {
                let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                Err(refusal)
            }
        }
    }

    fn build_in(
        &mut self,
        link: &Link,
        heard: Option<(ToNew, Vec<OwnedFd>)>,
        mut main: Option<OwnedFd>,
        mut nascent: Box<Nascent>,
    ) -> Result<(Option<OwnedFd>, Box<Nascent>, Option<BuildTimes>)> {
        let fault = |fault: crate::nascent::NascentFault| unfit(fault, "");
        match heard {
            None => {}
            Some((ToNew::Agreed, _)) => {
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::HandOver, None, nascent.worker());
                self.record_grants(self.offered_generation(), StartMode::CprTransfer)?;
                let bound = self.deadlines.of(Step::Build);
                nascent.hand_over(&self.registry, bound).map_err(fault)?;
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::Build, None, nascent.worker());
            }
            Some((ToNew::Cancelled(reason), _)) => return Err(cancelled(&reason)),
            Some(_) => return Err(hung_up()),
        }
        let late = Instant::now() > nascent.deadline;
        let advance = nascent.advance();
        // After the advance: a worker that has failed has said its last by then.
        let text = nascent.read_diagnostics();
        self.log_diagnostics(&text);
        match advance.map_err(fault)? {
            Advance::Waiting if late => Err(unfit("the new worker took too long", "")),
            Advance::Waiting => Ok((main, nascent, None)),
            Advance::Greeted => {
                self.confirm_fresh(&nascent, &std::rc::Rc::clone(&self.rules))?;
                #[cfg(feature = "fail-points")]
                {
                    crate::fail_point::act_at(Step::Spawn, None, nascent.worker());
                    nascent.arm(crate::fail_point::for_new());
                }
                nascent.configure(main.take()).map_err(fault)?;
                nascent.deadline = Instant::now() + self.deadlines.of(Step::Build);
                link.send(&ToOld::Greeting).doing("the old broker")?;
                #[cfg(feature = "fail-points")]
                crate::fail_point::act_at(Step::Agree, None, nascent.worker());
                Ok((main, nascent, None))
            }
            Advance::Listening(times) => Ok((main, nascent, Some(times))),
        }
    }

    /// The hang-up: the worker is at the old broker's orders from now on.
    fn lend(&mut self, link: &Link, nascent: Nascent, times: BuildTimes) -> Result<Box<Worker>> {
        let generation = self.offered_generation();
        self.log
            .write(
                "ready",
                &json!({"generation": generation, "mode": StartMode::CprTransfer, "times": times}),
            )
            .recorded()?;
        let worker = nascent.into_worker()?;
        self.confirm_settled(&worker, &std::rc::Rc::clone(&self.rules))?;
        // Should this process die after the commit, this is how the guest's worker is found.
        self.publish_worker(&worker, None)?;
        let ready = Ready {
            digest: worker.digest.to_string(),
            build: worker.build.clone(),
            times,
        };
        link.send_with(&ToOld::Ready(ready), &[worker.pidfd(), worker.control()])
            .doing("the old broker")?;
        if let Some(incoming) = &mut self.incoming {
            incoming.deadline = None;
        }
        Ok(Box::new(worker))
    }

    /// The old broker says how it went.
    fn await_verdict(&mut self, mut link: Link, mut worker: Box<Worker>) -> Result<Stage> {
        let text = worker.read_diagnostics();
        self.log_diagnostics(&text);
        match link.receive() {
            Ok(Received::Empty) => Ok(Stage::Lent(link, worker)),
            Ok(Received::Message(ToNew::Committed(committed), _)) => {
                let console = self.take_over_from(*worker, &committed);
                let by = Instant::now() + self.deadlines.order();
                Ok(Stage::Settling(link, console, by))
            }
            Ok(Received::Message(ToNew::Cancelled(reason), _)) => {
                self.retired.push(*worker);
                Err(cancelled(&reason))
            }
            // Dead, or as good as that: nobody else tells the worker anything any more.
            Ok(Received::Message(..) | Received::HungUp) | Err(_) => {
                self.log.note(
                    "incoming-undecided",
                    &json!({"reason": "the old broker hung up without a word"}),
                );
                let _ = worker.order(&Order::Abandon);
                Ok(Stage::Asked(worker))
            }
        }
    }

    /// The old broker hung up without a word. Only when it is dead is its worker's word this broker's to read.
    fn await_word(&mut self, mut worker: Box<Worker>) -> Result<Stage> {
        let gone = worker.reap();
        if let Some(how) = gone {
            self.retired.push(*worker);
            return Err(unfit(
                format_args!(
                    "the old broker is gone, and the new worker never ran the guest ({how})"
                ),
                "",
            ));
        }
        let peer_lives = self
            .incoming
            .as_ref()
            .and_then(|incoming| incoming.peer.as_ref())
            .is_some_and(|peer| !is_over(peer));
        if peer_lives {
            return Ok(Stage::Asked(worker));
        }
        worker.phase = Phase::Running;
        match worker.hear() {
            // It answers only when it has the guest.
            Ok(Some(Report::Status(_))) => {
                let committed = Committed {
                    paused: false,
                    uptime_us: 0,
                    resets_asked: 0,
                };
                self.console = self.take_over_from(*worker, &committed);
                self.settled_down(None);
                Ok(Stage::Gone)
            }
            _ => Ok(Stage::Asked(worker)),
        }
    }

    /// The guest is this broker's. Its console, not yet read.
    fn take_over_from(&mut self, mut worker: Worker, committed: &Committed) -> Option<Console> {
        worker.phase = Phase::Running;
        let generation = worker.generation;
        let pause = self.incoming.as_ref().is_some_and(|one| one.paused) && !committed.paused;
        self.worker = Some(worker);
        self.paused = committed.paused;
        self.resets_asked = committed.resets_asked;
        self.state = self.at_rest();
        let uptime = Duration::from_micros(committed.uptime_us);
        self.began = Instant::now().checked_sub(uptime).unwrap_or(self.began);
        // Each of these whatever becomes of the others: the guest runs.
        for done in [self.directory.take_name(), self.publish()] {
            if let Err(refusal) = done {
                complain(&refusal);
            }
        }
        self.log.note(
            "running",
            &json!({"generation": generation, "mode": StartMode::CprTransfer}),
        );
        self.happened(Happening::UpgradeStep(Step::Park));
        if !self.paused {
            self.happened(Happening::Resumed);
        }
        if pause {
            // `-S`: it stands still as soon as it can be told to.
            if let Some(worker) = &self.worker {
                self.pausing = worker.order(&Order::Pause).is_ok();
            }
        }
        let incoming = self.incoming.as_mut()?;
        let console = Console::resume(incoming.console.take()?, incoming.file.take());
        console.map_err(|refusal| complain(&refusal)).ok()
    }

    /// What follows the guest.
    fn settle(
        &mut self,
        mut link: Link,
        mut console: Option<Console>,
        by: Instant,
    ) -> Result<Stage> {
        loop {
            match link.receive() {
                Ok(Received::Message(ToNew::Ended(outcome), _)) => {
                    self.settled_down(Some(outcome));
                }
                Ok(Received::Message(ToNew::Console(part), descriptors)) => {
                    if let Some(console) = &mut console {
                        let taken = console.take_part(part, descriptors, self.directory.path());
                        taken.unwrap_or_else(|refusal| complain(&refusal));
                    }
                }
                Ok(Received::Empty) if Instant::now() <= by => {
                    return Ok(Stage::Settling(link, console, by));
                }
                _ => {
                    self.settled_down(None);
                    // Nobody else reads it by now, and everybody who listens is there.
                    self.console = console;
                    return Ok(Stage::Gone);
                }
            }
        }
    }

    /// The audit log is this broker's, and with it everything.
    fn settled_down(&mut self, outcome: Option<Box<UpgradeOutcome>>) {
        if self.has_log {
            return;
        }
        self.has_log = true;
        match self.open_own_log() {
            Ok(log) => self.log = log,
            Err(refusal) => complain(&refusal),
        }
        let generation = self.generation();
        self.log.note(
            "taken-over",
            &json!({"generation": generation, "vm_file": self.options.vm_file, "policy_digest": self.rules.policy.digest.to_string()}),
        );
        if let Some(outcome) = outcome {
            self.last_upgrade = Some((*outcome).clone());
            self.happened(Happening::UpgradeEnded(outcome));
        }
        self.say_started();
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

/// Whether a process has ended (pidfd_open(2): readable).
fn is_over(pidfd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))
        .is_ok_and(|ready| ready > 0)
}

/// The two connections that come with the preamble; `None` while it has not come.
fn receive_preamble(stream: &OwnedFd) -> std::result::Result<Option<(OwnedFd, OwnedFd)>, String> {
    let mut bytes = [0; transfer::PREAMBLE];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        stream,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    );
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut ends = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten();
    let ends = (ends.next(), ends.next(), ends.next());
    if received.bytes == 0 {
        return Err("it left without a word".to_owned());
    }
    if received.bytes < bytes.len() {
        return Err("not a migration stream (it is too short)".to_owned());
    }
    transfer::check_preamble(bytes).map_err(|e| e.to_string())?;
    match ends {
        (Some(link), Some(state), None) => Ok(Some((link, state))),
        _ => Err("the brokers' link did not come with it".to_owned()),
    }
}
