//! The embedded guest's account of itself, read in its RAM past everything that runs it.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use baton_guest::DiskReport;
use baton_guest::LoadReport;
use baton_guest::NetReport;
use baton_guest::Report;
use baton_guest::VsockReport;
use baton_guest::layout;

/// A VM's lowest region of guest RAM.
#[derive(Debug)]
pub(crate) struct Guest(File);

impl Guest {
    /// Opens it through the broker, whose first `guest-ram` memfd begins at address 0.
    pub(crate) fn open(broker: u32) -> Result<Self> {
        let mut numbers: Vec<u32> = std::fs::read_dir(format!("/proc/{broker}/fd"))?
            .flatten()
            .filter(|entry| {
                std::fs::read_link(entry.path())
                    .is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:guest-ram"))
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let number = numbers.first().context("the broker holds no guest RAM")?;
        let path = format!("/proc/{broker}/fd/{number}");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        Ok(Self(file.with_context(|| format!("cannot open {path}"))?))
    }

    /// Opens guest RAM that is a file, and begins at address 0.
    pub(crate) fn of_file(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok(Self(file.with_context(|| {
            format!("cannot open {}", path.display())
        })?))
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        self.0.read_exact_at(&mut bytes, layout::REPORT_ADDRESS)?;
        Ok(bytes)
    }

    /// The report as it is now.
    pub(crate) fn report(&self) -> Result<Report> {
        Ok(Report::parse(&self.bytes()?)?)
    }

    /// What it says of its disk.
    pub(crate) fn disk(&self) -> Result<DiskReport> {
        Ok(DiskReport::parse(&self.bytes()?))
    }

    /// What it says of its network interface.
    pub(crate) fn net(&self) -> Result<NetReport> {
        Ok(NetReport::parse(&self.bytes()?))
    }

    /// What it says of its socket device.
    pub(crate) fn vsock(&self) -> Result<VsockReport> {
        Ok(VsockReport::parse(&self.bytes()?))
    }

    /// What it says of the device that it loads.
    pub(crate) fn load(&self) -> Result<LoadReport> {
        Ok(LoadReport::parse(&self.bytes()?))
    }

    /// Waits until the report is as wished.
    pub(crate) fn until(
        &self,
        what: &str,
        patience: Duration,
        wish: impl Fn(&Report) -> bool,
    ) -> Result<Report> {
        let deadline = Instant::now() + patience;
        loop {
            // Before the guest has booted there is none.
            if let Ok(report) = self.report() {
                if wish(&report) {
                    return Ok(report);
                }
            }
            if Instant::now() > deadline {
                bail!(
                    "waited {} s in vain for the guest {what}",
                    patience.as_secs()
                );
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Gives it a command.
    pub(crate) fn mail(&self, command: u64) -> Result<()> {
        let at = layout::REPORT_ADDRESS + layout::MAILBOX_OFFSET as u64;
        Ok(self.0.write_all_at(&command.to_le_bytes(), at)?)
    }

    /// Has it forget the gaps that it has seen.
    pub(crate) fn clear(&self) -> Result<()> {
        let before = self.report()?.clears;
        self.mail(layout::COMMAND_CLEAR)?;
        self.until("to take a command", Duration::from_secs(20), |report| {
            report.clears > before && report.cleared()
        })?;
        Ok(())
    }
}
