//! What the embedded guest does with its disk and its network, and whether all of it was done, once.

use baton_guest::DiskReport;
use baton_guest::DriverState;
use baton_guest::NetReport;
use baton_guest::layout;

use crate::Vm;
use crate::Wire;
use crate::patience::until_said;

impl Vm {
    /// Waits until the guest says this of its disk; what it says.
    pub fn until_disk(
        &self,
        what: &str,
        mut wanted: impl FnMut(&DiskReport) -> bool,
    ) -> DiskReport {
        until_said(what, || {
            let report = Box::new(self.ram.disk());
            if wanted(&report) {
                Ok(*report)
            } else {
                Err(report)
            }
        })
    }

    /// The same of its network.
    pub fn until_net(&self, what: &str, mut wanted: impl FnMut(&NetReport) -> bool) -> NetReport {
        until_said(what, || {
            let report = Box::new(self.ram.net());
            if wanted(&report) {
                Ok(*report)
            } else {
                Err(report)
            }
        })
    }

    /// Has the guest leave its disk alone; every request is done, and this image in the VM's directory is what the guest wrote.
    ///
    /// # Panics
    ///
    /// When it is not.
    #[track_caller]
    pub fn assert_disk_is_whole(&self, image: &str) -> DiskReport {
        self.ram.mail(layout::COMMAND_DISK_REST);
        let report = self.until_disk("the disk at rest", |disk| {
            disk.state == DriverState::Resting
        });
        assert_eq!((report.faults(), report.flying), (0, 0), "{report:?}");
        let image = std::fs::read(self.site.path(image)).expect("the image");
        let nonce = self.ram.report().expect("a report").nonce;
        let checked = report.check(nonce, &image).expect("a whole disk");
        assert!(checked > 32, "{report:?}");
        report
    }

    /// Has the guest leave its network alone; every frame of either side came to the other, once.
    ///
    /// # Panics
    ///
    /// When one did not.
    #[track_caller]
    pub fn assert_frames_arrived(&self, wire: &Wire) -> NetReport {
        self.ram.mail(layout::COMMAND_NET_REST);
        let report = self.until_net("the network at rest", |net| {
            net.state == DriverState::Resting && net.received == wire.peer().sent
        });
        let peer = wire.peer();
        let faults = (report.faults(), peer.faults());
        assert_eq!(faults, (0, 0), "{report:?} {peer:?}");
        assert_eq!(report.sent, peer.received, "{report:?} {peer:?}");
        report
    }
}
