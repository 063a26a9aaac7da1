//! The state of migration, as QMP's clients see an upgrade.
//!
//! ```text
//! none ─► setup ─► active ─► (pre-switchover ─►) device ─► completed
//!           │        │          │
//!           ├────────┴──────────┴──► failed
//!           └─► cancelling ─► cancelled
//! ```
//!
//! The broker's events move it, whoever asked for the upgrade. `completed` is said when the new worker runs the guest, `failed`
//! and `cancelled` when the old one does.

use baton_ipc::control::Awaited;
use baton_ipc::control::Happening;
use baton_ipc::control::Outcome;
use baton_ipc::control::Step;
use baton_ipc::control::UpgradeOutcome;
use baton_ipc::control::VmStatus;
use serde_json::Value;
use serde_json::json;

use crate::capability::CAPABILITIES;
use crate::failure::Failure;
use crate::shared::Shared;

/// Why a second operation is refused (QEMU, `migration/migration.c`).
pub(crate) const IN_PROGRESS: &str = "There's a migration process in progress";

/// Where an upgrade is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Setup,
    Active,
    PreSwitchover,
    Device,
    Cancelling,
    Completed,
    Failed,
    Cancelled,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Cancelling => "cancelling",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// How the next migration is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// QEMU's default, in which RAM is copied.
    #[default]
    Normal,
    /// The worker is replaced under its guest.
    CprTransfer,
    /// The guest goes into a file, and every process ends.
    CprReboot,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::CprTransfer => "cpr-transfer",
            Self::CprReboot => "cpr-reboot",
        }
    }
}

/// The state of migration.
#[derive(Debug, Default)]
pub(crate) struct Migration {
    pub(crate) mode: Mode,
    /// The guest leaves this broker, as it was asked to.
    pub(crate) leaves: bool,
    status: Option<Status>,
    outcome: Option<Box<UpgradeOutcome>>,
    enabled: Vec<&'static str>,
}

impl Migration {
    pub(crate) fn in_progress(&self) -> bool {
        self.status.is_some_and(|status| !status.is_final())
    }

    pub(crate) fn status(&self) -> Option<Status> {
        self.status
    }

    pub(crate) fn is_enabled(&self, capability: &str) -> bool {
        self.enabled.contains(&capability)
    }

    /// Switches a capability on or off.
    pub(crate) fn enable(&mut self, capability: &str, on: bool) {
        self.enabled.retain(|known| *known != capability);
        let known = CAPABILITIES.iter().find(|known| known.0 == capability);
        self.enabled
            .extend(known.filter(|_| on).map(|known| known.0));
    }

    /// Whether an upgrade may be asked for now, as far as this program knows.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.in_progress() {
            return Err(Failure::generic(IN_PROGRESS));
        }
        let blocked = CAPABILITIES
            .iter()
            .filter(|known| self.is_enabled(known.0))
            .find_map(|known| known.1?.with(self.mode));
        blocked.map_or(Ok(()), |why| Err(Failure::generic(why)))
    }

    /// What was known before this program came to life.
    pub(crate) fn recall(&mut self, vm: &mut VmStatus) {
        if self.status.is_some() {
            return;
        }
        if let Some(outcome) = vm.last_upgrade.take() {
            self.status = match outcome.outcome {
                Outcome::Aborted if vm.last_cancelled => Some(Status::Cancelled),
                Outcome::Committed | Outcome::Saved => Some(Status::Completed),
                Outcome::Aborted | Outcome::Lost => Some(Status::Failed),
                Outcome::Rehearsed => None,
            };
            self.outcome = Some(Box::new(outcome));
        }
    }

    /// `MigrationInfo`, with what is in the way of the mode that is set, and what is waited for.
    pub(crate) fn info_of(&self, vm: &VmStatus) -> Value {
        let mut info = self.info();
        let blockers: &[String] = match self.mode {
            Mode::Normal => &[],
            Mode::CprTransfer => &vm.blocks_transfer,
            Mode::CprReboot => &vm.blocks_save,
        };
        let Some(members) = info.as_object_mut() else {
            return info;
        };
        if !blockers.is_empty() {
            members.insert("blocked-reasons".to_owned(), json!(blockers));
        }
        if let Some(Awaited { what, left_ms }) = &vm.awaits {
            members.insert("__org.baton_awaits".to_owned(), json!(what));
            let left = left_ms.map(|left| json!(left));
            members.extend(left.map(|left| ("__org.baton_awaits-ms".to_owned(), left)));
        }
        info
    }

    /// `MigrationInfo` without that.
    pub(crate) fn info(&self) -> Value {
        let Some(status) = self.status else {
            return json!({});
        };
        let mut info = json!({"status": status.name()});
        let (true, Some(outcome), Some(members)) =
            (status.is_final(), &self.outcome, info.as_object_mut())
        else {
            return info;
        };
        let mut add = |name: &str, value: Value| drop(members.insert(name.to_owned(), value));
        add("total-time", json!(outcome.total_ms));
        if !outcome.reason.is_empty() {
            add("error-desc", json!(outcome.reason));
        }
        if status == Status::Completed {
            let before_pause = outcome
                .phases
                .iter()
                .filter(|phase| phase.step < Step::Park);
            let setup_us: u64 = before_pause.map(|phase| phase.us).sum();
            add("setup-time", json!(setup_us / 1000));
            add("downtime", json!(outcome.blackout_us.div_ceil(1000)));
            add("__org.baton_downtime-us", json!(outcome.blackout_us));
            add("ram", ram_stats(outcome.state_bytes));
        }
        if let Some(step) = outcome.failed_step {
            add("__org.baton_failed-step", json!(step.to_string()));
        }
        info
    }
}

/// The broker says that an upgrade has come on.
pub(crate) fn happened(shared: &mut Shared, at_us: u64, what: &Happening) {
    let migration = &mut shared.migration;
    match what {
        Happening::UpgradeBegan { dry_run: false } => {
            migration.outcome = None;
            migration.leaves = false;
            enter(shared, at_us, Status::Setup);
        }
        Happening::UpgradeHeld => {
            enter(shared, at_us, Status::Active);
            enter(shared, at_us, Status::PreSwitchover);
        }
        // Said already by one that was held.
        Happening::UpgradeStep(Step::Park) if migration.status == Some(Status::PreSwitchover) => {}
        Happening::UpgradeStep(Step::Park) => enter(shared, at_us, Status::Active),
        Happening::UpgradeStep(Step::Save) => enter(shared, at_us, Status::Device),
        Happening::UpgradeCancelled if migration.in_progress() => {
            enter(shared, at_us, Status::Cancelling);
        }
        Happening::UpgradeEnded(outcome) if outcome.outcome != Outcome::Rehearsed => {
            let status = match (outcome.outcome, migration.status) {
                (Outcome::Committed | Outcome::Saved, _) => Status::Completed,
                (Outcome::Aborted, Some(Status::Cancelling)) => Status::Cancelled,
                _ => Status::Failed,
            };
            migration.outcome = Some(outcome.clone());
            let replaced = outcome.outcome == Outcome::Committed;
            if replaced && !migration.leaves {
                // As in QEMU, whose new process knows nothing of what the old one was told.
                migration.mode = Mode::Normal;
            }
            enter(shared, at_us, status);
            if replaced {
                let data = json!({
                    "generation": outcome.generation, "worker-digest": outcome.worker_digest, "downtime-us": outcome.blackout_us,
                });
                shared.emit(at_us, "__org.baton_WORKER_REPLACED", &data);
            }
        }
        _ => {}
    }
}

fn enter(shared: &mut Shared, at_us: u64, status: Status) {
    shared.migration.status = Some(status);
    if shared.migration.is_enabled("events") {
        shared.emit(at_us, "MIGRATION", &json!({"status": status.name()}));
    }
}

/// QEMU's MigrationRAMStats (`qapi/migration.json`): clients expect all members.
fn ram_stats(state_bytes: u64) -> Value {
    json!({
        "transferred": state_bytes, "downtime-bytes": state_bytes, "page-size": 4096, "mbps": 0.0,
        "total": 0, "remaining": 0, "duplicate": 0, "normal": 0, "normal-bytes": 0, "dirty-pages-rate": 0,
        "dirty-sync-count": 0, "postcopy-requests": 0, "multifd-bytes": 0, "pages-per-second": 0, "precopy-bytes": 0,
        "postcopy-bytes": 0, "dirty-sync-missed-zero-copy": 0,
    })
}
