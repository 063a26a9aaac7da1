//! A disk whose size the broker changes: requests that reach beyond the new end are none any more, and the driver is told.

use baton_ipc::worker::Report;

use crate::control::Worker;

impl Worker {
    /// Says what came of it: the broker cuts a file off only after that.
    pub(crate) fn resize(&mut self, slot: u8, bytes: u64) {
        match self.machinery.platform.pci.resize(slot, bytes) {
            Ok(()) => self.report(Report::Resized { slot, bytes }),
            Err(error) => self.fail("resize", format!("PCI device {slot}: {error}")),
        }
    }
}
