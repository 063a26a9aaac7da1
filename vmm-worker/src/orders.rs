//! The broker's orders: what each does in each phase, and what the broker's death does. One table; what is not in it does
//! not fit.

use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;

use baton_ipc::Description;
use baton_ipc::DescriptorKind;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use baton_ipc::worker::VsockOrder;
use baton_ipc::worker::WorkerStatus;

use crate::control::EXIT_DONE;
use crate::control::EXIT_FAILED;
use crate::control::Exit;
use crate::control::Phase;
use crate::control::Worker;
use crate::control::ballooning::Ballooning;
use crate::devices::virtio::console as virtio_console;
use crate::diagnostics::log;
use crate::transfer::main_channel::MainChannel;
use crate::transfer::outgoing::Outgoing;

impl Worker {
    /// Carries an order out, or says why not.
    pub(crate) fn obey(&mut self, order: Order, mut descriptors: Vec<OwnedFd>) -> Result<(), Exit> {
        let main = if matches!(
            order,
            Order::Transfer { .. } | Order::Vsock(_) | Order::Save | Order::Lend(..)
        ) {
            descriptors.pop()
        } else {
            None
        };
        if !descriptors.is_empty() {
            log!(
                "{} descriptors came with an order that has none",
                descriptors.len()
            );
            return Err(Exit(EXIT_FAILED));
        }
        match (&order, &self.phase) {
            // It never ran its guest, and never will.
            (
                Order::Abandon,
                Phase::Built | Phase::Receiving(_) | Phase::Restored(_) | Phase::Loaded,
            ) => {
                return Err(Exit(EXIT_DONE));
            }
            // It has its guest, which was not to run: the broker that knew is gone.
            (Order::Abandon, Phase::Paused) => self.report(Report::Paused),
            (Order::Query | Order::Abandon, _) => {
                let balloon = self.machinery.balloon.as_ref();
                let serial = self.machinery.console.dropped();
                let other = self.machinery.virtio_console.as_ref();
                let other = other.map_or(0, virtio_console::Link::dropped);
                let status = WorkerStatus {
                    tsc_khz: self.machinery.inventory.tsc_khz(),
                    exits: self.machinery.vcpus.exits(),
                    console_dropped: serial.saturating_add(other),
                    balloon_pages: balloon.map(Ballooning::pages).unwrap_or_default(),
                };
                self.report(Report::Status(status));
            }
            // At any time: the device takes it in when it is served, or when its state is saved.
            (Order::Vsock(order), _) => self.vsock_ordered(*order, main),
            #[cfg(feature = "fail-points")]
            (Order::Fail(fault), _) => crate::fail_point::arm(fault.clone()),
            (Order::Start, Phase::Built) => return self.start(),
            (Order::Commit, Phase::Loaded) => return self.commit(false),
            (Order::CommitPaused, Phase::Loaded) => return self.commit(true),
            (Order::Commit | Order::CommitPaused, Phase::Restored(_)) => {
                let paused = order == Order::CommitPaused;
                if let Phase::Restored(restored) = std::mem::replace(&mut self.phase, Phase::Loaded)
                {
                    return self.restore(restored, paused);
                }
            }
            (Order::Save, Phase::Running | Phase::Paused) => match main {
                Some(file) => self.save_to(file.into()),
                None => self.fail("save", "no file came with the order".to_owned()),
            },
            (Order::Pause, Phase::Running) => self.pause(),
            (Order::Resume, Phase::Paused) => self.resume(),
            (Order::Reset, Phase::Running | Phase::Paused) => self.reset(GuestEvent::Reset),
            (Order::PowerButton, Phase::Running | Phase::Paused) => self.press_power_button(),
            (Order::Balloon { pages }, Phase::Running) => self.inflate(*pages),
            (Order::Lend(key, description), Phase::Running | Phase::Paused) => {
                self.lend(key.clone(), description.clone(), main);
            }
            (Order::Plug(config), Phase::Running | Phase::Paused) => self.plug(config),
            (Order::Unplug { slot }, Phase::Running | Phase::Paused) => self.ask_back(*slot),
            (Order::End { slot }, Phase::Running | Phase::Paused) => self.end_device(*slot),
            (Order::Resize { slot, bytes }, Phase::Running | Phase::Paused) => {
                self.resize(*slot, *bytes);
            }
            (Order::Transfer { elsewhere }, Phase::Running | Phase::Paused) => match main {
                Some(_) if !matches!(self.outgoing, Outgoing::Idle) => {
                    self.fail("transfer", "an upgrade is under way already".to_owned());
                }
                Some(main) => {
                    self.outgoing = Outgoing::begin(MainChannel::new(main), *elsewhere);
                }
                None => self.fail("transfer", "no main channel came with the order".to_owned()),
            },
            (Order::Park, Phase::Running | Phase::Paused) => {
                match std::mem::replace(&mut self.outgoing, Outgoing::Idle) {
                    Outgoing::Agreed(main) => self.park(main),
                    other => {
                        self.outgoing = other;
                        self.fail("park", "no new worker has been agreed with".to_owned());
                    }
                }
            }
            (Order::Rollback, Phase::Running | Phase::Paused) => {
                self.outgoing = Outgoing::Idle;
                self.report(Report::Resumed);
            }
            (Order::Rollback, Phase::Parked(_) | Phase::Ceded) => self.unpark(),
            (Order::Rollback, Phase::Off) => {
                self.outgoing = Outgoing::Idle;
                let reason = format!("there is no guest to let run: it is {}", self.phase.name());
                self.fail("rollback", reason);
            }
            (Order::Ceded, Phase::Parked(_)) => self.phase = Phase::Ceded,
            (order, phase) => {
                let mut order = format!("{order:?}");
                order.truncate(order.find(['(', ' ']).unwrap_or(order.len()));
                let reason = format!(
                    "order {order} does not fit: this worker is {}",
                    phase.name()
                );
                self.fail("order", reason);
            }
        }
        Ok(())
    }

    fn vsock_ordered(&mut self, order: VsockOrder, connection: Option<OwnedFd>) {
        let fits = connection.as_ref().is_none_or(|connection| {
            Description::of(DescriptorKind::Stream, connection.as_fd()).is_ok()
        });
        match &self.machinery.vsock {
            Some(vsock) if fits => vsock.order(order, connection),
            _ => self.fail("vsock", format!("{order:?} does not fit this worker")),
        }
    }

    /// The broker has died, and everything that it had sent was obeyed.
    pub(crate) fn orphaned(&mut self) -> Result<(), Exit> {
        self.control = None;
        self.unsent.clear();
        self.outgoing = Outgoing::Idle;
        if let Some(vsock) = &self.machinery.vsock {
            vsock.orphan();
        }
        match self.phase {
            // Never run without an order to.
            Phase::Built | Phase::Receiving(_) | Phase::Restored(_) | Phase::Loaded => {
                Err(Exit(EXIT_DONE))
            }
            // Another worker may run, or nobody needs this one any more.
            Phase::Ceded | Phase::Off => Err(Exit(EXIT_DONE)),
            Phase::Running | Phase::Paused => Ok(()),
            Phase::Parked(_) => {
                self.unpark();
                Ok(())
            }
        }
    }
}
