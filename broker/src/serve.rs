//! What the broker does for each request that the table of requests has let through.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::Instant;

use baton_audit::Actor;
use baton_audit::Checkpoint;
use baton_audit::quoted;
use baton_ipc::control::Exit;
use baton_ipc::control::Happening;
use baton_ipc::control::LogHead;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::VmState;
use baton_ipc::worker::Order;
use serde_json::json;

use crate::broker::Broker;
use crate::clients::Asked;
use crate::clients::Awaiting;
use crate::devices::console::Port;
use crate::refusal::Result;
use crate::refusal::refusal;
use crate::refusal::unfit;
use crate::upgrade::Upgrade;
use crate::worker::Phase;
use crate::worker::Worker;
use crate::worker::binary::Unchecked;

/// What the old broker hears of a transfer that is cancelled on the side that waits.
const CANCELLED_THERE: &str = "it was cancelled there";

impl Broker {
    /// Begins an upgrade whose outcome this client waits for.
    fn follow_upgrade(
        &mut self,
        client: u64,
        descriptors: Vec<OwnedFd>,
        dry_run: bool,
        approve: Option<String>,
        who: &Actor,
    ) {
        self.await_for(client, Awaiting::Upgrade);
        let mut files = descriptors.into_iter().map(File::from);
        let file = files.next().map(|binary| Unchecked {
            binary,
            signature: files.next(),
        });
        if let Err(refusal) = self.begin_upgrade(file, dry_run, approve, who) {
            let record = json!({"request": "upgrade", "reason": quoted(&refusal.reason)});
            self.log.note_by("upgrade-refused", Some(who), &record);
            self.clients.reply(client, &Reply::Refused(refusal));
        }
    }

    /// Presses one of the machine's buttons. It has them while its guest runs or stands still at the operator's wish, and so also
    /// while a new worker is made; not while its state goes into a file.
    fn press(&self, button: &Order) -> Reply {
        let saving = self.upgrade.as_ref().is_some_and(Upgrade::saves);
        let worker = self.worker.as_ref().filter(|worker| {
            !saving && matches!(worker.phase, Phase::Running | Phase::Transferring)
        });
        match worker.map(|worker| worker.order(button)) {
            Some(Ok(())) => Reply::Done,
            Some(Err(_)) => Reply::Refused(unfit("the worker takes no order now", "try again")),
            None => Reply::Refused(refusal(
                Exit::Busy,
                "the guest is between two workers, or on its way into a file",
                "try again when the upgrade has ended, or `baton status` to see how it goes",
            )),
        }
    }

    /// Has the guest that is awaited stand still when it has come, or not: as `-S` says it, until this. One that stood still before
    /// stays so.
    fn stands_on_arrival(&mut self, stands: bool) -> Reply {
        match (&mut self.incoming, &mut self.options.restore) {
            (Some(incoming), _) => incoming.stands(stands),
            (None, Some(restore)) if self.restoring.is_none() => restore.paused = stands,
            _ => {
                return Reply::Refused(refusal(
                    Exit::Busy,
                    "the guest is on its way out of its file",
                    "say it again when it is here",
                ));
            }
        }
        Reply::Done
    }

    /// Has the other broker keep its guest, if that is not on its way already. What comes of it is that broker's word.
    fn cancel_incoming(&mut self) -> Reply {
        match &mut self.incoming {
            Some(incoming) if incoming.has_begun() => {
                incoming.withdraw(CANCELLED_THERE);
                Reply::Done
            }
            Some(_) => Reply::Refused(unfit(
                "nothing has come that could be cancelled",
                "`baton stop` ends the waiting",
            )),
            None => Reply::Refused(refusal(
                Exit::Busy,
                "a guest that comes out of its file cannot be sent back",
                "`baton stop` ends it when it is here",
            )),
        }
    }

    pub(crate) fn serve(&mut self, asked: Asked) -> Result<()> {
        let Asked {
            client,
            name,
            request,
            descriptors,
        } = asked;
        let Some(who) = self
            .clients
            .get_mut(client)
            .map(|client| client.actor.clone())
        else {
            return Ok(());
        };
        if !matches!(request, Request::Status | Request::LogHead) {
            self.log
                .note_by("request", Some(&who), &json!({"request": name}));
        }
        match request {
            Request::Status => self.order_for(client, &Order::Query, Awaiting::Status),
            Request::Pause | Request::Resume if self.state == VmState::Incoming => {
                let reply = self.stands_on_arrival(request == Request::Pause);
                self.clients.reply(client, &reply);
            }
            Request::Pause => {
                self.pausing = true;
                self.order_for(client, &Order::Pause, Awaiting::Paused);
            }
            Request::Resume => self.order_for(client, &Order::Resume, Awaiting::Resumed),
            Request::PowerButton => {
                let reply = self.press(&Order::PowerButton);
                if reply == Reply::Done {
                    self.happened(Happening::PowerButton);
                }
                self.clients.reply(client, &reply);
            }
            Request::Subscribe => {
                if let Some(client) = self.clients.get_mut(client) {
                    client.subscribed = true;
                }
                self.clients.reply(client, &Reply::Done);
            }
            Request::Reset => {
                let reply = self.press(&Order::Reset);
                self.resets_asked += u32::from(reply == Reply::Done);
                self.clients.reply(client, &reply);
            }
            Request::Stop { force } => {
                self.await_for(client, Awaiting::End);
                if let Err(refusal) = self.stop(force) {
                    self.clients.reply(client, &Reply::Refused(refusal));
                }
            }
            Request::Upgrade { dry_run } => {
                self.follow_upgrade(client, descriptors, dry_run, None, &who);
            }
            Request::ApprovedUpgrade { dry_run, why } => {
                self.follow_upgrade(client, descriptors, dry_run, Some(why), &who);
            }
            Request::BeginUpgrade { hold } => {
                let reply = match self.begin_upgrade(None, false, None, &who) {
                    Ok(()) => {
                        self.hold_upgrade(hold);
                        Reply::Done
                    }
                    Err(refusal) => {
                        let record = json!({"request": name, "reason": quoted(&refusal.reason)});
                        self.log.note_by("upgrade-refused", Some(&who), &record);
                        Reply::Refused(refusal)
                    }
                };
                self.clients.reply(client, &reply);
            }
            Request::Transfer {
                main,
                cpr,
                hold,
                follow,
            } => {
                if follow {
                    self.await_for(client, Awaiting::Upgrade);
                }
                match self.begin_transfer(main, &cpr, hold, &who) {
                    Ok(()) if follow => {}
                    Ok(()) => self.clients.reply(client, &Reply::Done),
                    Err(refusal) => {
                        let record = json!({"request": name, "reason": quoted(&refusal.reason)});
                        self.log.note_by("upgrade-refused", Some(&who), &record);
                        self.clients.reply(client, &Reply::Refused(refusal));
                    }
                }
            }
            Request::Incoming { main } => {
                let reply = match self.open_main(&main) {
                    Ok(()) => Reply::Done,
                    Err(refusal) => Reply::Refused(refusal),
                };
                self.clients.reply(client, &reply);
            }
            Request::Balloon { bytes } => {
                let reply = match self.want_balloon(bytes) {
                    Ok(()) => Reply::Done,
                    Err(refusal) => Reply::Refused(refusal),
                };
                self.clients.reply(client, &reply);
            }
            Request::Save { file, hold } => {
                let reply = match self.begin_save(&file, hold, &who) {
                    Ok(()) => Reply::Done,
                    Err(refusal) => {
                        let record = json!({"request": name, "reason": quoted(&refusal.reason)});
                        self.log.note_by("upgrade-refused", Some(&who), &record);
                        Reply::Refused(refusal)
                    }
                };
                self.clients.reply(client, &reply);
            }
            Request::Restore { file } => {
                let reply = match self.begin_restore(&file, Some(&who)) {
                    Ok(()) => Reply::Done,
                    Err(refusal) => Reply::Refused(refusal),
                };
                self.clients.reply(client, &reply);
            }
            Request::AddNode(node) => {
                let done = self.add_node(&node, &who);
                self.answer(client, done);
            }
            Request::DeleteNode { name } => {
                let done = self.delete_node(&name, &who);
                self.answer(client, done);
            }
            Request::AddDevice(device) => {
                self.await_for(client, Awaiting::Devices);
                if let Err(refusal) = self.begin_plug(&device, &who) {
                    self.clients.reply(client, &Reply::Refused(refusal));
                }
            }
            Request::AddNetdev(netdev) => {
                let done = self.add_netdev(&netdev, &who);
                self.answer(client, done);
            }
            Request::DeleteNetdev { id } => {
                let done = self.delete_netdev(&id, &who);
                self.answer(client, done);
            }
            Request::AddInterface(interface) => {
                self.await_for(client, Awaiting::Devices);
                if let Err(refusal) = self.begin_plug_interface(&interface, &who) {
                    self.clients.reply(client, &Reply::Refused(refusal));
                }
            }
            Request::DeleteDevice { id } => {
                let done = self.begin_unplug(&id, &who);
                self.answer(client, done);
            }
            Request::Resize { disk, bytes } => {
                self.await_for(client, Awaiting::Devices);
                if let Err(refusal) = self.begin_resize(&disk, bytes, &who) {
                    self.clients.reply(client, &Reply::Refused(refusal));
                }
            }
            Request::Continue => {
                let reply = match self.continue_upgrade() {
                    Ok(()) => Reply::Done,
                    Err(refusal) => Reply::Refused(refusal),
                };
                self.clients.reply(client, &reply);
            }
            Request::Cancel if self.state == VmState::Incoming => {
                let reply = self.cancel_incoming();
                self.clients.reply(client, &reply);
            }
            Request::Cancel => {
                if self.upgrade_can_be_cancelled() {
                    self.happened(Happening::UpgradeCancelled);
                }
                self.upgrade_refused(crate::upgrade::pause::CANCELLED)?;
                self.clients.reply(client, &Reply::Done);
            }
            Request::Console => self.serve_console(client, Port::Serial),
            Request::VirtioConsole => self.serve_console(client, Port::Virtio),
            Request::LogHead => {
                let Checkpoint { count, head, .. } = self.log.checkpoint();
                self.clients
                    .reply(client, &Reply::LogHead(LogHead { count, head }));
            }
            Request::Audit => {
                let reply = match self.audit() {
                    Ok(report) => Reply::Audit(Box::new(report)),
                    Err(refusal) => Reply::Refused(refusal),
                };
                self.clients.reply(client, &reply);
            }
        }
        Ok(())
    }

    /// Passes an order on; the worker's word is the answer. Without a worker, or with one that does not answer, a status is what
    /// the broker knows.
    fn order_for(&mut self, client: u64, order: &Order, awaiting: Awaiting) {
        // A worker that writes its guest into a file hears nothing but that it is to stop.
        let deaf =
            |worker: &Worker| self.is_saving() || (worker.silent && awaiting == Awaiting::Status);
        let worker = self.worker.as_ref().filter(|worker| !deaf(worker));
        match worker {
            Some(worker) if worker.order(order).is_ok() => self.await_for(client, awaiting),
            _ if awaiting == Awaiting::Status => {
                let reply = Reply::Status(Box::new(self.vm_status()));
                self.clients.reply(client, &reply);
            }
            _ => self.clients.reply(
                client,
                &Reply::Refused(unfit("there is no worker to tell", "")),
            ),
        }
    }

    fn serve_console(&mut self, client: u64, port: Port) {
        match self.attach_console(port) {
            Ok(end) => self
                .clients
                .reply_with(client, &Reply::Console, &[end.as_fd()]),
            Err(refusal) => self.clients.reply(client, &Reply::Refused(refusal)),
        }
    }

    fn answer(&mut self, client: u64, done: Result<()>) {
        let reply = match done {
            Ok(()) => Reply::Done,
            Err(refusal) => Reply::Refused(refusal),
        };
        self.clients.reply(client, &reply);
    }

    /// Tells those who have waited for the worker's answer long enough.
    pub(crate) fn answer_overdue(&mut self) {
        for (client, awaiting) in self.clients.overdue(self.deadlines.order()) {
            let reply = if awaiting == Awaiting::Status {
                // Its answer is still to come, and says then that it answers.
                if let Some(worker) = &mut self.worker {
                    worker.silent = true;
                }
                Reply::Status(Box::new(self.vm_status()))
            } else {
                Reply::Refused(unfit(
                    "the worker does not answer",
                    "`baton stop --force` ends it",
                ))
            };
            self.clients.reply(client, &reply);
        }
    }

    fn await_for(&mut self, client: u64, awaiting: Awaiting) {
        if let Some(client) = self.clients.get_mut(client) {
            (client.awaiting, client.since) = (awaiting, Instant::now());
        }
    }
}
