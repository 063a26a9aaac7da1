//! What comes over the cpr and main channels: taken only when it is what the VM file and policy say.

use std::os::fd::OwnedFd;
use std::time::Instant;

use baton_audit::quoted;
use baton_ipc::FdSocket;
use baton_ipc::Registry;
use baton_ipc::control::Happening;
use baton_ipc::control::Step;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::transfer;
use baton_ipc::transfer::Offer;
use baton_ipc::transfer::PreambleError;
use baton_ipc::transfer::ToOld;
use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use serde_json::json;

use super::Link;
use super::Stage;
use super::hear;
use super::hung_up;
use super::listening;
use crate::broker::Broker;
use crate::devices::taps;
use crate::refusal::Doing;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::transfer::channel_socket;
use crate::transfer::channel_socket::Listener;

/// How many may have connected to the main channel without having said the nonce.
const MAX_GUESTS: usize = 4;

impl Broker {
    /// Reads the first bytes. Whoever sends others, or none, is forgotten, and the next one is waited for; but a QEMU ends a
    /// waiting with a main channel.
    pub(super) fn greet(
        &mut self,
        listener: Listener,
        stream: OwnedFd,
        by: Instant,
    ) -> Result<Stage> {
        let greeted = match receive_preamble(&stream) {
            Ok(None) if Instant::now() <= by => {
                return Ok(Stage::Greeting(listener, stream, by));
            }
            Ok(None) => Err(Unwelcome::Stranger("it said nothing".to_owned())),
            Ok(Some(ends)) => Ok(ends),
            Err(unwelcome) => Err(unwelcome),
        };
        let (link, state) = match greeted {
            Ok(ends) => ends,
            Err(unwelcome) => {
                let main = match unwelcome {
                    // It takes a hang-up for the word to go on, connects to the main channel, and its guest is gone for it as
                    // soon as all is written, read or not: so nobody may listen there by then.
                    Unwelcome::Qemu(_) => self.incoming.as_mut().and_then(|one| one.main.take()),
                    Unwelcome::Stranger(_) => None,
                };
                let (Unwelcome::Qemu(reason) | Unwelcome::Stranger(reason)) = unwelcome;
                self.log
                    .note("incoming-refused", &json!({"reason": quoted(&reason)}));
                let Some(main) = main else {
                    return Ok(Stage::Waiting(listener));
                };
                main.refuse();
                return Err(unfit(reason, "have it migrate to a QEMU"));
            }
        };
        let link = Link::new(FdSocket::from(link));
        let hello = ToOld::Hello {
            build: crate::BUILD.to_owned(),
            directory: self.directory.identity(),
            process: std::process::id(),
        };
        if let Err(error) = link.send(&hello) {
            complain(&unfit(format_args!("the old broker: {error}"), ""));
            return Ok(Stage::Waiting(listener));
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.peer = channel_socket::peer_process(&stream);
            incoming.deadline = Some(Instant::now() + self.deadlines.of(Step::Build));
        }
        // Here the path goes: nobody else is taken.
        Ok(Stage::Offered {
            link,
            state: FdSocket::from(state),
            receiver: CprReceiver::default(),
            offer: None,
            registry: None,
        })
    }

    pub(super) fn take_state(
        &mut self,
        link: Link,
        offer: Box<Offer>,
        registry: Registry,
    ) -> Result<Stage> {
        let checked = self.check_state(&offer, &registry);
        let checked = checked.and_then(|()| self.take_devices(&offer, &registry));
        match checked {
            Ok(()) => {
                self.id = offer.vm;
                self.registry = registry;
                let old_cgroup = self.directory.cgroup_of_named();
                let Some(incoming) = &mut self.incoming else {
                    return Ok(Stage::Gone);
                };
                incoming.old_cgroup = old_cgroup;
                incoming.offer = Some(offer);
                let deferred = incoming.main.is_none();
                let bound = match deferred {
                    true => self.deadlines.deferred(),
                    false => self.deadlines.of(Step::Build),
                };
                incoming.deadline = Some(Instant::now() + bound);
                if deferred {
                    link.send(&ToOld::Deferred).doing("the old broker")?;
                    return Ok(Stage::Deferred(link));
                }
                self.happened(Happening::UpgradeBegan { dry_run: false });
                listening(link)
            }
            Err(refusal) => {
                let _ = link.send(&ToOld::Failed(refusal.reason.clone()));
                Err(refusal)
            }
        }
    }

    /// Compares what has come with this broker's VM file and policy.
    pub(super) fn check_state(&mut self, offer: &Offer, registry: &Registry) -> Result<()> {
        let machine = &offer.machine;
        let devices = crate::guest_machine::devices(&self.vm, &machine.virtio, &offer.hotplugged);
        let ours = crate::guest_machine::of(&self.vm, &devices);
        if let Some(difference) = machine.first_difference(&ours) {
            return Err(unfit(
                difference,
                "start the new side from the same VM file",
            ));
        }
        crate::guest_machine::check(&self.vm, &self.rules.policy, registry, machine)?;
        if let Some(vsock) = &self.vm.vsock {
            let path = crate::devices::resources::vsock_place(vsock, &self.rules.policy)?;
            let listener = self.incoming.as_ref().and_then(|one| one.vsock.as_ref());
            crate::devices::vsock::handover::check_listener(listener, &path)?;
            let record = json!({"descriptor": "vsock listener", "path": path});
            self.log.write("received", &record).recorded()?;
        }
        for (key, description, _) in registry.iter() {
            self.log
                .write(
                    "received",
                    &json!({"descriptor": key.name(), "id": key.id(), "what": description}),
                )
                .recorded()?;
        }
        Ok(())
    }

    /// Takes what the broker itself has of devices: the claims of all taps, and no others, and what came while the guest ran.
    fn take_devices(&mut self, offer: &Offer, registry: &Registry) -> Result<()> {
        self.virtio.clone_from(&offer.machine.virtio);
        let claims = self.incoming.as_mut().map(|one| &mut one.claims);
        let mut claims = claims.map(std::mem::take).unwrap_or_default();
        for net in &self.vm.net.0 {
            self.claims.push(taps::take_claim(&mut claims, &net.tap)?);
        }
        self.adopt_devices(&offer.hotplugged, registry, &mut claims)?;
        if claims.is_empty() {
            Ok(())
        } else {
            Err(unfit("a claim came of a tap that the VM does not have", ""))
        }
    }

    /// Waits for the one connection that begins with the nonce.
    pub(super) fn await_main(&mut self, mut link: Link, mut guests: Vec<OwnedFd>) -> Result<Stage> {
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
            // Of those who say nothing the first goes: whoever comes to hand a guest over says the nonce at once.
            if guests.len() == MAX_GUESTS {
                guests.remove(0);
            }
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
}

/// Who has connected, and is no broker of ours; why.
enum Unwelcome {
    Stranger(String),
    Qemu(String),
}

/// The two connections that come with the preamble; `None` while it has not come.
fn receive_preamble(
    stream: &OwnedFd,
) -> std::result::Result<Option<(OwnedFd, OwnedFd)>, Unwelcome> {
    let stranger = |reason: &str| Unwelcome::Stranger(reason.to_owned());
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
        Err(error) => return Err(stranger(&error.to_string())),
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
        return Err(stranger("it left without a word"));
    }
    if received.bytes < bytes.len() {
        return Err(stranger("not a migration stream (it is too short)"));
    }
    transfer::check_preamble(bytes).map_err(|error| match error {
        PreambleError::Qemu => Unwelcome::Qemu(error.to_string()),
        other => stranger(&other.to_string()),
    })?;
    match ends {
        (Some(link), Some(state), None) => Ok(Some((link, state))),
        _ => Err(stranger("the brokers' link did not come with it")),
    }
}
