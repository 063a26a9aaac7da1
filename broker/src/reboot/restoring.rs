//! Mode `cpr-reboot`, the new side: a broker that takes its guest out of a file, in which this broker looks for the VM's identity
//! and nothing else. It is a cold start whose first worker has that file instead of a kernel to begin with.

use std::os::fd::OwnedFd;
use std::time::Instant;

use baton_audit::Actor;
use baton_ipc::FileAddress;
use baton_ipc::StartMode;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Step;
use baton_ipc::worker::Order;
use serde_json::json;

use crate::broker::Broker;
use crate::reboot::state_file;
use crate::reboot::state_file::Mark;
use crate::reboot::state_file::Stored;
use crate::refusal::Recorded;
use crate::refusal::Result;
use crate::refusal::complain;
use crate::refusal::unfit;
use crate::upgrade::pause::PauseFacts;
use crate::upgrade::phase_clock::PhaseClock;

/// What `baton run --incoming` asks for when there is no cpr channel.
#[derive(Clone, Debug)]
pub(crate) struct Restore {
    /// The file; `None` waits for `migrate-incoming`.
    pub(crate) file: Option<FileAddress>,
    /// The guest stands still when it has come.
    pub(crate) paused: bool,
}

/// A guest on its way out of a file.
#[derive(Debug)]
pub(crate) struct Restoring {
    generation: u32,
    /// Until the worker has it.
    file: Option<OwnedFd>,
    mark: Mark,
    /// The guest is to stand still.
    stands: bool,
    clock: PhaseClock,
}

impl Broker {
    /// Whether it waits to be told of a file.
    pub(crate) fn awaits_file(&self) -> bool {
        let deferred = matches!(&self.options.restore, Some(Restore { file: None, .. }));
        deferred && self.restoring.is_none() && self.worker.is_none()
    }

    /// Opens the file, and launches the worker. A refusal here means that nothing has happened.
    pub(crate) fn begin_restore(
        &mut self,
        place: &FileAddress,
        asked_by: Option<&Actor>,
    ) -> Result<()> {
        let Some(Restore { paused, .. }) = self.options.restore else {
            return Err(unfit(
                if self.incoming.is_some() {
                    "this broker waits for a cpr channel, and a guest out of a file has none"
                } else {
                    "'-incoming' was not specified on the command line"
                },
                "",
            ));
        };
        if self.restoring.is_some() || self.worker.is_some() {
            return Err(unfit("The incoming migration has already been started", ""));
        }
        let mut clock = PhaseClock::start(Instant::now());
        let Stored {
            file,
            prelude,
            mark,
        } = state_file::open(place, &self.rules.policy)?;
        if prelude.generation == 0 {
            return Err(unfit("the state file is for generation 0", ""));
        }
        let (binary, declared) =
            crate::rules::worker_binary(&self.vm, &self.options, &self.rules.policy, None)?;
        self.id = prelude.vm;
        let config = self.config(
            prelude.generation,
            StartMode::CprReboot,
            &self.rules.compiled,
        )?;
        self.log.reserve().recorded()?;
        let record = json!({"generation": prelude.generation, "file": place.to_string(), "worker": binary.digest.to_string()});
        match asked_by {
            Some(who) => self.log.write_synced_by("upgrade-begin", who, &record),
            None => self.log.write_synced("upgrade-begin", &record),
        }
        .recorded()?;
        self.declare(declared);
        self.asked_by = asked_by.cloned();
        clock.enter(Step::Spawn);
        self.happened(Happening::UpgradeBegan { dry_run: false });
        self.first = Some(self.launch(binary, config, &self.rules)?);
        self.restoring = Some(Restoring {
            generation: prelude.generation,
            file: Some(file),
            mark,
            stands: prelude.stands || paused,
            clock,
        });
        Ok(())
    }

    /// The first worker's generation, how it comes to its guest, and by which order.
    pub(crate) fn beginning(&self) -> (u32, StartMode, Order) {
        match &self.restoring {
            None => (1, StartMode::None, Order::Start),
            Some(restoring) => {
                let order = if restoring.stands {
                    Order::CommitPaused
                } else {
                    Order::Commit
                };
                (restoring.generation, StartMode::CprReboot, order)
            }
        }
    }

    /// The file, for the worker.
    pub(crate) fn take_state_file(&mut self) -> Option<OwnedFd> {
        let restoring = self.restoring.as_mut()?;
        restoring.clock.enter(Step::Build);
        restoring.file.take()
    }

    /// Just before the order by which the guest runs.
    pub(crate) fn let_out(&self) -> Result<()> {
        self.restoring
            .as_ref()
            .map_or(Ok(()), |restoring| restoring.mark.take())
    }

    /// The worker has said that it could not: the guest can still come out of the file.
    pub(crate) fn not_let_out(&self) {
        let given_back = self
            .restoring
            .as_ref()
            .map_or(Ok(()), |restoring| restoring.mark.give_back());
        if let Err(refusal) = given_back {
            complain(&refusal);
        }
    }

    /// The guest is here: runs, or stands still as it stood.
    pub(crate) fn restored(&mut self) {
        let Some(restoring) = self.restoring.take() else {
            return;
        };
        self.paused = restoring.stands;
        self.state = self.at_rest();
        self.happened(Happening::UpgradeStep(Step::Park));
        if !self.paused {
            self.happened(Happening::Resumed);
        }
        let facts = PauseFacts::default();
        let finished = self.finish(Outcome::Committed, Step::Run, "", restoring.clock, &facts);
        if let Err(refusal) = finished {
            complain(&refusal);
        }
    }
}
