//! The old side of a transfer to another broker: S1 to S5, and the hand-over after the commit. The pause between is the same
//! as of any upgrade (see `pause`): this broker alone decides who runs the guest, over a worker that the other one has lent.
//!
//! ```text
//! Greeting ── hello ──► Offered ── (deferred) ── listening ──► Connected ── greeting ──► Agreeing ── agreed ──► Building
//!                                                                                            ── ready ──► pause
//! ```

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;
use std::time::Instant;

use baton_audit::Actor;
use baton_audit::quoted;
use baton_ipc::Address;
use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::StartMode;
use baton_ipc::control::Happening;
use baton_ipc::control::Refusal;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmState;
use baton_ipc::cpr;
use baton_ipc::cpr::CprHeader;
use baton_ipc::transfer;
use baton_ipc::transfer::Committed;
use baton_ipc::transfer::Offer;
use baton_ipc::transfer::Ready;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::Order;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use serde_json::json;

use crate::broker::Broker;
use crate::devices::console::Console;
use crate::devices::console::Port;
use crate::devices::vfio;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::transfer::channel_path::Which;
use crate::transfer::channel_socket;
use crate::transfer::channel_socket::Doors;
use crate::upgrade::Upgrade;
use crate::upgrade::phase_clock::PhaseClock;
use crate::upgrade::phase_clock::micros;
use crate::worker::Phase;
use crate::worker::Worker;

/// How long a broker without a guest stays for those who ask what became of it.
const LINGER: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    Offered,
    Deferred,
    Connected,
    Agreeing,
    Building,
    Ready,
}

impl Stage {
    /// What is waited for.
    fn awaits(self) -> &'static str {
        match self {
            Self::Greeting => "the other broker's hello",
            Self::Offered => "the other broker to take the CPR state",
            Self::Deferred => "`migrate-incoming` on the other side",
            Self::Connected => "the other broker to start its worker",
            Self::Agreeing => "the workers to agree",
            Self::Building => "the new worker to be built",
            Self::Ready => "the pause",
        }
    }
}

/// A transfer under way.
#[derive(Debug)]
pub(crate) struct Outgoing {
    link: Channel<ToNew, ToOld>,
    /// Where the descriptors go, until they have gone.
    cpr: Option<FdSocket>,
    main: Address,
    nonce: [u8; transfer::NONCE],
    stage: Stage,
    /// The other broker's process, as it says.
    process: u32,
    /// This side's end of the main channel, until the old worker has it.
    main_socket: Option<OwnedFd>,
    ready: Option<Worker>,
    pub(crate) deadline: Instant,
}

impl Outgoing {
    /// What to poll for reading.
    pub(crate) fn source(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// What is waited for.
    pub(crate) fn awaits(&self) -> &'static str {
        self.stage.awaits()
    }

    /// The new worker, built and lent, once it is there.
    pub(crate) fn take_ready(&mut self) -> Option<Worker> {
        self.ready.take()
    }

    /// Whether the other broker is still there: one that is not is given nothing.
    pub(crate) fn still_there(&mut self) -> Result<()> {
        match self.link.receive() {
            Ok(Received::Empty) => Ok(()),
            Ok(Received::Message(ToOld::Failed(reason), _)) => Err(failed(&reason)),
            Ok(Received::Message(..)) => Err(out_of_turn()),
            Ok(Received::HungUp) | Err(_) => Err(unfit("the other broker is gone", "")),
        }
    }

    /// Tells the other broker that nothing comes of it; its worker, if there is one, for its reaping.
    pub(crate) fn cancel(mut self, reason: &str) -> Option<Worker> {
        let worker = self.ready.take();
        worker.iter().for_each(Worker::kill);
        let _ = self.link.send(&ToNew::Cancelled(quoted(reason)));
        worker
    }
}

fn failed(reason: &str) -> Refusal {
    unfit(format_args!("the new side: {}", quoted(reason)), "")
}

fn out_of_turn() -> Refusal {
    unfit("the other broker spoke out of turn", "")
}

impl Broker {
    /// S1: connects to the other broker. A refusal here means that nothing has happened.
    pub(crate) fn begin_transfer(
        &mut self,
        main: Address,
        cpr: &Address,
        hold: bool,
        asked_by: &Actor,
    ) -> Result<()> {
        let clock = PhaseClock::start(Instant::now());
        self.check_worker()?;
        if let Some(refusal) = self.blocks_transfer().next() {
            return Err(refusal);
        }
        self.doors().check(&main, Which::Main)?;
        self.log.reserve().recorded()?;
        let begun = self.admit_transfer(main, cpr, asked_by, clock);
        if self.upgrade.is_none() {
            self.log.release();
        }
        begun?;
        self.hold_upgrade(hold);
        Ok(())
    }

    /// What of this VM cannot go to another broker.
    pub(crate) fn blocks_transfer(&self) -> impl Iterator<Item = Refusal> {
        let checks = [
            self.check_shared(),
            self.refuse_loose_nodes(),
            self.refuse_loose_netdevs(),
            self.check_vsock_place(),
            vfio::check_stays(&self.vm),
        ];
        checks.into_iter().filter_map(std::result::Result::err)
    }

    /// A socket in the directory that the two brokers exchange would not be where it was.
    fn check_vsock_place(&self) -> Result<()> {
        let parent = self.vsock.as_ref().and_then(|vsock| vsock.path().parent());
        let parent = parent.and_then(|parent| std::fs::metadata(parent).ok());
        let parent = parent.map(|parent| (parent.dev(), parent.ino()));
        if parent == Some(self.directory.identity()) {
            return Err(unfit(
                "vsock.socket lies in the VM's own run directory, which the other broker replaces",
                "have it elsewhere",
            ));
        }
        Ok(())
    }

    fn doors(&self) -> Doors<'_> {
        Doors {
            directory: &self.directory,
            policy: &self.rules.policy,
            launcher: &self.launcher,
        }
    }

    fn admit_transfer(
        &mut self,
        main: Address,
        cpr: &Address,
        asked_by: &Actor,
        mut clock: PhaseClock,
    ) -> Result<()> {
        let stream = self.doors().connect(cpr, Which::Cpr)?;
        let mut nonce = [0; transfer::NONCE];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
            .doing("cannot choose a nonce")?;
        let (link, link_end) = FdSocket::pair().doing("cannot make the brokers' link")?;
        let (state, state_end) = FdSocket::pair().doing("cannot make the cpr connection")?;
        send_preamble(&stream, &[link_end.as_fd(), state_end.as_fd()])?;
        self.log
            .write_synced_by(
                "upgrade-begin",
                asked_by,
                &json!({"generation": self.generation() + 1, "main": main.to_string(), "cpr": cpr.to_string()}),
            )
            .recorded()?;
        self.asked_by = Some(asked_by.clone());
        clock.enter(Step::Spawn);
        self.happened(Happening::UpgradeBegan { dry_run: false });
        let outgoing = Outgoing {
            link: Channel::new(link),
            cpr: Some(state),
            main,
            nonce,
            stage: Stage::Greeting,
            process: 0,
            main_socket: None,
            ready: None,
            deadline: Instant::now() + self.deadlines.of(Step::Spawn),
        };
        self.state = VmState::Upgrading;
        self.upgrade = Some(Upgrade::there(
            outgoing,
            std::rc::Rc::clone(&self.rules),
            clock,
        ));
        self.progress(Step::Spawn);
        Ok(())
    }

    /// Goes on with what the other broker has said.
    pub(crate) fn advance_outgoing(&mut self) -> Result<()> {
        loop {
            let Some(outgoing) = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut) else {
                return Ok(());
            };
            let (stage, late) = (outgoing.stage, Instant::now() > outgoing.deadline);
            match outgoing.link.receive() {
                Ok(Received::Message(said, descriptors)) => {
                    self.or_abort(|broker| broker.other_said(said, descriptors))?;
                    if self.upgrade.as_ref().is_none_or(Upgrade::is_aborting) {
                        return Ok(());
                    }
                }
                Ok(Received::Empty) if late => {
                    return self.abort(&format!(
                        "{} did not come in time",
                        stage.awaits().trim_end()
                    ));
                }
                Ok(Received::Empty) => return Ok(()),
                Ok(Received::HungUp) if stage == Stage::Greeting => {
                    return self.abort(
                        "the other side hung up without a word: a QEMU does that, and Baton and QEMU cannot take over each other's guests",
                    );
                }
                Ok(Received::HungUp) => return self.abort("the other broker hung up"),
                Err(error) => return self.abort(&format!("the other broker: {error}")),
            }
        }
    }

    fn other_said(&mut self, said: ToOld, descriptors: Vec<OwnedFd>) -> Result<()> {
        let Some(outgoing) = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut) else {
            return Ok(());
        };
        match (outgoing.stage, said) {
            (_, ToOld::Failed(reason)) => Err(failed(&reason)),
            (
                Stage::Greeting,
                ToOld::Hello {
                    build: _,
                    directory,
                    process,
                },
            ) => {
                outgoing.process = process;
                self.offer(directory)
                    .map_err(|refusal| self.last_word(refusal))
            }
            (Stage::Offered, ToOld::Deferred) => {
                outgoing.stage = Stage::Deferred;
                outgoing.deadline = Instant::now() + self.deadlines.deferred();
                Ok(())
            }
            (Stage::Offered | Stage::Deferred, ToOld::Listening) => self.connect_main(),
            (Stage::Connected, ToOld::Greeting { ends }) => self.introduce(ends),
            (Stage::Building, ToOld::Ready(ready)) => self.other_ready(ready, descriptors),
            _ => Err(out_of_turn()),
        }
    }

    /// What the other broker said before it hung up, which says more than that it did.
    fn last_word(&mut self, refusal: Refusal) -> Refusal {
        let outgoing = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut);
        match outgoing.map(|outgoing| outgoing.link.receive()) {
            Some(Ok(Received::Message(ToOld::Failed(reason), _))) => failed(&reason),
            _ => refusal,
        }
    }

    /// The other broker is one of ours: it gets everything.
    fn offer(&mut self, directory: (u64, u64)) -> Result<()> {
        if !self.directory.is_beside(directory) {
            return Err(unfit(
                "the other broker waits in another run directory",
                "start it with the same --run-dir, and the same name in its VM file",
            ));
        }
        #[cfg(feature = "fail-points")]
        crate::fail_point::act_at(Step::Spawn, self.worker.as_ref(), None);
        let machine = crate::guest_machine::of(&self.vm, &self.virtio);
        let hotplugged = self.hotplugged();
        let generation = self.generation() + 1;
        self.record_grants(generation, StartMode::CprTransfer)?;
        let bound = self.deadlines.of(Step::Spawn);
        let Some(outgoing) = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut) else {
            return Ok(());
        };
        let offer = Offer {
            nonce: outgoing.nonce,
            vm: self.id,
            generation,
            machine,
            hotplugged,
        };
        let cannot = "cannot send the CPR state";
        let netdevs = self.netdevs.iter().map(|netdev| &netdev.claim);
        for claim in self.claims.iter().chain(netdevs) {
            outgoing
                .link
                .send_with(&ToNew::Claim, &[claim.as_fd()])
                .doing(cannot)?;
        }
        if let Some(vsock) = &self.vsock {
            outgoing
                .link
                .send_with(&ToNew::VsockListener, &[vsock.listener().as_fd()])
                .doing(cannot)?;
        }
        let consoles: Vec<_> = self.consoles.iter().map(Console::guest).collect();
        outgoing
            .link
            .send_with(&ToNew::Offer(Box::new(offer)), &consoles)
            .doing(cannot)?;
        if let Some(state) = outgoing.cpr.take() {
            let header = CprHeader {
                mode: StartMode::CprTransfer,
                vm: self.id,
                generation,
            };
            cpr::send(&state, &header, &self.registry).doing(cannot)?;
        }
        outgoing.stage = Stage::Offered;
        outgoing.deadline = Instant::now() + bound;
        Ok(())
    }

    fn connect_main(&mut self) -> Result<()> {
        let bound = self.deadlines.of(Step::Spawn);
        let Some(outgoing) = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut) else {
            return Ok(());
        };
        let doors = Doors {
            directory: &self.directory,
            policy: &self.rules.policy,
            launcher: &self.launcher,
        };
        let socket = doors.connect(&outgoing.main, Which::Main)?;
        let sent = rustix::net::send(&socket, &outgoing.nonce, SendFlags::NOSIGNAL)
            .doing("cannot begin the main channel")?;
        if sent != outgoing.nonce.len() {
            return Err(unfit("cannot begin the main channel", ""));
        }
        outgoing.main_socket = Some(socket);
        outgoing.stage = Stage::Connected;
        outgoing.deadline = Instant::now() + bound;
        Ok(())
    }

    /// S3: the new worker has its end of the main channel; so gets the old one.
    fn introduce(&mut self, ends: Option<(SocketAddr, SocketAddr)>) -> Result<()> {
        let bound = self.deadlines.of(Step::Agree);
        #[cfg(feature = "fail-points")]
        {
            crate::fail_point::act_at(Step::Agree, self.worker.as_ref(), None);
            for point in crate::fail_point::for_old() {
                self.worker
                    .iter()
                    .for_each(|old| drop(old.order(&Order::Fail(point))));
            }
        }
        let (Some(upgrade), Some(old)) = (&mut self.upgrade, &mut self.worker) else {
            return Ok(());
        };
        let main = upgrade
            .outgoing_mut()
            .and_then(|outgoing| outgoing.main_socket.take())
            .ok_or_else(out_of_turn)?;
        // As it is seen from the other side.
        let seen = ends.map(|(there, here)| (here, there));
        if channel_socket::ends(&main) != seen {
            return Err(unfit(
                "the main channel does not lead to the other broker: somebody else listens there",
                "name the port that the other side listens at",
            ));
        }
        upgrade.enter(Step::Agree);
        old.phase = Phase::Transferring;
        old.order_with(&Order::Transfer { elsewhere: true }, &[main.as_fd()])
            .doing("cannot tell the old worker")?;
        if let Some(outgoing) = upgrade.outgoing_mut() {
            outgoing.stage = Stage::Agreeing;
            outgoing.deadline = Instant::now() + bound;
        }
        self.progress(Step::Agree);
        Ok(())
    }

    /// S4: the workers agree; the other broker hands the descriptors to its worker.
    pub(crate) fn transfer_agreed(&mut self) -> Result<()> {
        let bound = self.deadlines.of(Step::Build);
        #[cfg(feature = "fail-points")]
        for step in [Step::HandOver, Step::Build] {
            crate::fail_point::act_at(step, self.worker.as_ref(), None);
        }
        let Some(upgrade) = &mut self.upgrade else {
            return Ok(());
        };
        upgrade.enter(Step::HandOver);
        let outgoing = upgrade
            .outgoing_mut()
            .filter(|outgoing| outgoing.stage == Stage::Agreeing)
            .ok_or_else(|| unfit("the old worker has agreed twice", ""))?;
        outgoing
            .link
            .send(&ToNew::Agreed)
            .doing("cannot tell the other broker")?;
        outgoing.stage = Stage::Building;
        outgoing.deadline = Instant::now() + bound;
        upgrade.enter(Step::Build);
        self.progress(Step::HandOver);
        self.progress(Step::Build);
        Ok(())
    }

    /// The new worker is there. The hang-up, in QEMU's words.
    fn other_ready(&mut self, ready: Ready, descriptors: Vec<OwnedFd>) -> Result<()> {
        let mut descriptors = descriptors.into_iter();
        let (Some(pidfd), Some(control), None) =
            (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Err(unfit(
                "the other broker's worker came without its descriptors",
                "",
            ));
        };
        let digest = ready
            .digest
            .parse()
            .doing("the other broker named no digest")?;
        let generation = self.generation() + 1;
        let worker = Worker::lent(control, pidfd, generation, digest, quoted(&ready.build))?;
        self.log.note(
            "ready",
            &json!({"generation": generation, "mode": StartMode::CprTransfer, "times": ready.times}),
        );
        let Some(outgoing) = self.upgrade.as_mut().and_then(Upgrade::outgoing_mut) else {
            return Ok(());
        };
        outgoing.stage = Stage::Ready;
        outgoing.ready = Some(worker);
        self.built()
    }

    /// The guest runs in the other broker's worker. Name, console and what else goes with it follow.
    pub(crate) fn hand_name_over(&mut self, outgoing: &mut Outgoing) {
        // First: whoever looks from now on has to find the worker that runs.
        if let Err(refusal) = self.directory.give_way() {
            // The other broker takes the name by itself.
            complain(&refusal);
        }
        // While this process is still the one that may say so.
        if let Err(refusal) = self.manager.main_process(outgoing.process) {
            complain(&refusal);
        }
        let committed = Committed {
            paused: self.paused,
            uptime_us: micros(self.began.elapsed()),
            resets_asked: self.resets_asked,
            panicked: self.panicked,
            connections: crate::devices::vsock::handover::connections(&self.registry),
        };
        #[cfg(feature = "fail-points")]
        if let Some(nobody) = crate::fail_point::cut_link() {
            outgoing.link = Channel::new(nobody);
        }
        if let Err(error) = outgoing.link.send(&ToNew::Committed(committed)) {
            complain(&unfit(
                format_args!("the other broker was not told that its worker runs: {error}"),
                "it finds out by this broker's end",
            ));
        }
    }

    /// What is known of the transfer is written down: the log is the other broker's now, and this one has nothing left.
    pub(crate) fn retire_broker(
        &mut self,
        outgoing: Outgoing,
        new: Worker,
        outcome: &UpgradeOutcome,
    ) {
        new.give_back();
        self.log.end();
        let vsock = self
            .vsock
            .take()
            .map(crate::devices::vsock::Vsock::into_parts);
        let vsock = vsock.into_iter().flatten();
        let vsock = vsock
            .map(|(part, socket)| (ToNew::Vsock(part), socket.into_iter().collect::<Vec<_>>()));
        let consoles = std::mem::take(&mut self.consoles).into_iter();
        let consoles = consoles.flat_map(|console| {
            let part = match console.port() {
                Port::Serial => ToNew::Console,
                Port::Virtio => ToNew::VirtioConsole,
            };
            let parts = console.into_parts().into_iter();
            parts.map(move |(piece, descriptors)| (part(piece), descriptors))
        });
        let mut told = outgoing.link.send(&ToNew::Ended(Box::new(outcome.clone())));
        for (part, descriptors) in vsock.chain(consoles) {
            if told.is_err() {
                // The rest is closed, and its owners see that.
                break;
            }
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            told = outgoing.link.send_with(&part, &borrowed);
        }
        let linger = match told {
            Ok(()) => LINGER,
            Err(error) => {
                complain(&unfit(
                    format_args!("the other broker does not listen: {error}"),
                    "",
                ));
                // Only when this one is gone may it take its worker's word.
                self.deadlines.of(Step::Retire)
            }
        };
        self.registry = baton_ipc::Registry::default();
        self.devices.clear();
        self.nodes.clear();
        self.netdevs.clear();
        self.claims.clear();
        if let Err(refusal) = self.ids.record(&[]) {
            complain(&refusal);
        }
        self.paused = false;
        self.state = VmState::Postmigrate;
        self.linger = Some(Instant::now() + linger);
    }
}

/// Sends the first bytes, and with them the ends of the connections on which everything else goes.
fn send_preamble(stream: &OwnedFd, ends: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(ends)) {
        return Err(unfit("cannot send the brokers' link", ""));
    }
    let preamble = transfer::preamble();
    let sent = rustix::net::sendmsg(
        stream,
        &[std::io::IoSlice::new(&preamble)],
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
    .doing("cannot send the brokers' link")?;
    if sent == preamble.len() {
        Ok(())
    } else {
        Err(unfit("cannot send the brokers' link", ""))
    }
}
