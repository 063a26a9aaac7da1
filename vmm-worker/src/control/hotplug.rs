//! Devices that come and go at the broker's wish. What the guest makes of it comes back by the hot-plug registers.

use std::os::fd::OwnedFd;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::Registry;
use baton_ipc::worker::Report;
use baton_ipc::worker::VirtioConfig;

use crate::assembly;
use crate::control::Phase;
use crate::control::Worker;
use crate::sections;
use crate::transfer::entries::Entries;

impl Worker {
    /// A descriptor of the device that comes next.
    pub(crate) fn lend(
        &mut self,
        key: DescriptorKey,
        description: Description,
        descriptor: Option<OwnedFd>,
    ) {
        let Some(descriptor) = descriptor else {
            return self.fail("plug", format!("{key} did not come with the order"));
        };
        if let Err(error) = self.lent.save_verified(key, description, descriptor) {
            self.fail("plug", error.to_string());
        }
    }

    /// Makes a device of what was lent, whatever it is: nothing of that is kept for another one.
    pub(crate) fn plug(&mut self, config: &VirtioConfig) {
        let lent = std::mem::take(&mut self.lent);
        match self.join(config, lent) {
            Ok(()) => self.report(Report::Plugged { slot: config.slot }),
            Err(reason) => self.fail("plug", reason),
        }
    }

    fn join(&mut self, config: &VirtioConfig, lent: Registry) -> Result<(), String> {
        let entries = Entries::lasting(&lent);
        let parts = assembly::newcomer(config, lent).map_err(|error| error.to_string())?;
        self.machinery
            .platform
            .join(&self.machinery.pool, parts)
            .map_err(|error| error.to_string())?;
        self.machinery.entries.join(entries);
        self.count_devices();
        Ok(())
    }

    /// Asks the guest for a device. It may take its time, and need not let it go at all.
    pub(crate) fn ask_back(&mut self, slot: u8) {
        let mut hotplug = self.machinery.platform.hotplug();
        if hotplug.is_removable(slot) {
            hotplug.ask_back(slot);
        }
    }

    /// Ends a device that the guest has let go.
    pub(crate) fn end_device(&mut self, slot: u8) {
        let machinery = &mut self.machinery;
        match machinery.platform.leave(&machinery.pool, slot) {
            Ok(()) => {
                machinery.entries.leave(slot);
                self.count_devices();
                self.report(Report::Unplugged { slot });
            }
            Err(error) => self.fail("unplug", error.to_string()),
        }
    }

    /// The machine that a successor has to have.
    fn count_devices(&mut self) {
        let ids = self.machinery.platform.devices.ids();
        self.machine.devices = sections::ids(ids);
    }

    /// Says which devices the guest has let go.
    pub(crate) fn look_after_hotplug(&mut self) {
        if !matches!(self.phase, Phase::Running | Phase::Paused) {
            return;
        }
        let gone = self.machinery.platform.hotplug().take_gone();
        for slot in gone {
            self.report(Report::Ejected { slot });
        }
    }
}
