//! The guest's RAM, read past everything that runs it.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt as _;

use baton_guest::BalloonReport;
use baton_guest::DiskReport;
use baton_guest::FsReport;
use baton_guest::HvcReport;
use baton_guest::NetReport;
use baton_guest::Report;
use baton_guest::ReportError;
use baton_guest::RngReport;
use baton_guest::VsockReport;
use baton_guest::WreckReport;
use baton_guest::layout;

use crate::until;

/// The lowest region of a VM's guest RAM, which starts at address 0.
#[derive(Debug)]
pub struct Ram(File);

impl Ram {
    /// Opens it through a process that holds it: of all its `guest-ram` memfds the one that begins at address 0 has the
    /// least descriptor number, since the broker makes them in ascending order. A file of that name (`memory.path`) will do, too.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let mut fds: Vec<u32> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .ok()?
            .flatten()
            .filter(|entry| {
                std::fs::read_link(entry.path())
                    .map(|target| target.to_string_lossy().into_owned())
                    .is_ok_and(|target| {
                        target.starts_with("/memfd:guest-ram") || target.ends_with("/guest-ram")
                    })
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        fds.sort_unstable();
        let path = format!("/proc/{pid}/fd/{}", fds.first()?);
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .ok()
            .map(Self)
    }

    /// The guest's report as it is now. Of a running guest the words are of slightly different moments.
    ///
    /// # Errors
    ///
    /// When there is none, above all because the guest has not come so far.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    pub fn report(&self) -> Result<Report, ReportError> {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        self.0
            .read_exact_at(&mut bytes, layout::REPORT_ADDRESS)
            .expect("guest RAM can be read");
        Report::parse(&bytes)
    }

    /// What the guest says of its disk.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn disk(&self) -> DiskReport {
        self.says(DiskReport::parse)
    }

    /// What the guest says of its virtio console.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn hvc(&self) -> HvcReport {
        self.says(HvcReport::parse)
    }

    /// What the guest says of its entropy device.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn rng(&self) -> RngReport {
        self.says(RngReport::parse)
    }

    /// What the guest says of the devices that it drives as no driver should.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn wreck(&self) -> WreckReport {
        self.says(WreckReport::parse)
    }

    /// What the guest says of its network interface.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn net(&self) -> NetReport {
        self.says(NetReport::parse)
    }

    /// What the guest says of its socket device.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn vsock(&self) -> VsockReport {
        self.says(VsockReport::parse)
    }

    /// What the guest says of its balloon.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn balloon(&self) -> BalloonReport {
        self.says(BalloonReport::parse)
    }

    /// What the guest says of its file system.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be read.
    #[must_use]
    pub fn fs(&self) -> FsReport {
        self.says(FsReport::parse)
    }

    /// Bytes of the host that it takes.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be asked.
    #[must_use]
    pub fn taken(&self) -> u64 {
        // Of 512 bytes, whatever the file system's are (stat(3type)).
        self.0.metadata().expect("guest RAM can be asked").blocks() * 512
    }

    fn says<T>(&self, parse: fn(&[u8]) -> T) -> T {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        self.0
            .read_exact_at(&mut bytes, layout::REPORT_ADDRESS)
            .expect("guest RAM can be read");
        parse(&bytes)
    }

    /// Puts a command (`layout::COMMAND_*`) into the guest's mailbox.
    ///
    /// # Panics
    ///
    /// When the RAM cannot be written.
    pub fn mail(&self, command: u64) {
        let at = layout::REPORT_ADDRESS + layout::MAILBOX_OFFSET as u64;
        self.0
            .write_all_at(&command.to_le_bytes(), at)
            .expect("guest RAM can be written");
    }

    /// The same, and waits until the guest has taken it: whatever it does from then on, it knows of it.
    ///
    /// # Panics
    ///
    /// When it does not take it.
    pub fn tell(&self, command: u64) {
        let at = layout::REPORT_ADDRESS + layout::MAILBOX_OFFSET as u64;
        self.mail(command);
        until("the command to be taken", || {
            let mut word = [0; 8];
            self.0.read_exact_at(&mut word, at).ok()?;
            (u64::from_le_bytes(word) == layout::COMMAND_NONE).then_some(())
        });
    }
}
