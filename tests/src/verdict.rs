//! What has to be true after an upgrade that a fault met, by outcome.

use crate::Builder;
use crate::Upgrade;
use crate::Vm;
use crate::Witness;
use crate::is_alive;
use crate::until;

/// A VM whose first upgrade has met its fault.
#[derive(Debug)]
pub struct Faulted {
    /// The VM.
    pub vm: Vm,
    /// The worker before.
    pub old: i32,
    /// The guest before.
    pub before: Witness,
    /// How the upgrade ended.
    pub upgrade: Upgrade,
}

impl Faulted {
    /// Starts a VM, and upgrades it into this fault.
    #[must_use]
    pub fn by(faults: &str) -> Self {
        Self::upgrading(Builder::faulty(faults).start())
    }

    /// The same with shorter deadlines, for faults before the pause that only a deadline ends.
    #[must_use]
    pub fn within_deadlines(faults: &str) -> Self {
        Self::upgrading(Builder::faulty(faults).slowness(3).start())
    }

    fn upgrading(vm: Vm) -> Self {
        let (old, before) = (vm.worker(), vm.witness());
        let upgrade = vm.upgrade();
        Self {
            vm,
            old,
            before,
            upgrade,
        }
    }

    /// Cells A and R: aborted in one of these steps (whichever the broker was in when it heard), and
    /// [`Self::assert_old_runs`].
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_aborted(&self, steps: &[&str]) {
        let Self { upgrade, .. } = self;
        assert_eq!(upgrade.outcome, "aborted", "{upgrade:?}");
        let step = upgrade.failed_step.as_deref().unwrap_or_default();
        assert!(steps.contains(&step), "{upgrade:?}");
        self.assert_old_runs();
    }

    /// The upgrade was aborted for some reason: the old worker runs the guest on, nobody else is left, one terminal record
    /// says so, and the next upgrade succeeds on the same guest (I1, I4, I7, I8).
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_old_runs(&self) {
        let Self {
            vm,
            old,
            before,
            upgrade,
        } = self;
        assert!(!upgrade.reason.is_empty(), "{upgrade:?}");
        assert_eq!((upgrade.generation, upgrade.worker_pid), (1, *old));
        assert_eq!(vm.worker(), *old);
        assert_eq!(vm.state(), "running");
        vm.assert_only_runner(*old);
        vm.assert_goes_on(before);
        assert_eq!(vm.audit_log().upgrades(), ["aborted"]);
        vm.assert_upgrades();
        assert_eq!(vm.audit_log().upgrades(), ["aborted", "committed"]);
    }

    /// Cell A: aborted in one of these steps, the guest never paused, and [`Self::assert_old_runs`].
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_aborted_without_pause(&self, steps: &[&str]) {
        assert_eq!(self.upgrade.pause_us, 0, "{:?}", self.upgrade);
        self.assert_aborted(steps);
    }

    /// Cell F: the new worker runs the guest, the old one is gone (I1, I7).
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_committed(&self) {
        let Self {
            vm,
            old,
            before,
            upgrade,
        } = self;
        assert_eq!(upgrade.outcome, "committed", "{upgrade:?}");
        assert_ne!(upgrade.worker_pid, *old);
        until("the old worker is gone", || (!is_alive(*old)).then_some(()));
        vm.assert_only_runner(upgrade.worker_pid);
        vm.assert_goes_on(before);
        assert_eq!(vm.audit_log().upgrades(), ["committed"]);
        vm.assert_upgrades();
    }

    /// Cell L: it is said, nobody runs the guest, and nobody is left.
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_lost(&self) {
        let Self { vm, upgrade, .. } = self;
        assert_eq!(upgrade.outcome, "lost", "{upgrade:?}");
        assert!(!upgrade.reason.is_empty(), "{upgrade:?}");
        until("nobody is left", || {
            vm.site.workers().is_empty().then_some(())
        });
        vm.assert_stands_still();
        assert_eq!(vm.state(), "lost");
        assert_eq!(vm.audit_log().upgrades(), ["lost"]);
        assert_eq!(vm.ask("upgrade").code, Some(20));
    }

    /// The new worker was killed after the commit was sent: it may never have run, have died as it began, or have run the guest
    /// for a moment. In the last case the upgrade was committed, truly, and the VM is lost with its worker.
    ///
    /// # Panics
    ///
    /// When anybody else runs the guest, or the broker does not say what became of it.
    pub fn assert_decided_by_its_word(&self) {
        let Self { vm, upgrade, .. } = self;
        match upgrade.outcome.as_str() {
            "aborted" => self.assert_old_runs(),
            "committed" => {
                until("the loss is known", || (vm.state() == "lost").then_some(()));
                until("nobody is left", || {
                    vm.site.workers().is_empty().then_some(())
                });
                vm.assert_stands_still();
                assert_eq!(vm.audit_log().upgrades(), ["committed"]);
            }
            _ => self.assert_lost(),
        }
    }

    /// Whichever of these the race between the fault and the worker made of it: that, whole.
    ///
    /// # Panics
    ///
    /// When it is another outcome.
    pub fn assert_one_of(&self, outcomes: &[&str]) {
        let outcome = self.upgrade.outcome.as_str();
        assert!(outcomes.contains(&outcome), "{:?}", self.upgrade);
        match outcome {
            "aborted" => self.assert_old_runs(),
            "committed" => self.assert_committed(),
            _ => self.assert_lost(),
        }
    }
}
