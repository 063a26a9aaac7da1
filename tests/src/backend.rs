//! A process that implements a device by vhost-user: a real one.

use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Child;
use std::process::Command;

use crate::continue_process;
use crate::until;

/// The process.
#[derive(Debug)]
pub struct Backend(Child);

impl Backend {
    /// QEMU's storage daemon, which has made the file `image` of so many MiB, and serves it as a disk at `socket`.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn storage_daemon(image: &Path, mib: u64, socket: &Path) -> Self {
        let file = std::fs::File::create(image).unwrap();
        file.set_len(mib << 20).unwrap();
        let (image, path) = (image.display(), socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args([
            "--blockdev",
            &format!("driver=file,node-name=image,filename={image},locking=off"),
            "--export",
            &format!(
                "type=vhost-user-blk,id=disk,node-name=image,writable=on,addr.type=unix,addr.path={path}"
            ),
        ]);
        Self::start(command, socket, "qemu-storage-daemon", "qemu-utils")
    }

    /// virtiofsd, which has made the directory `share`, and serves it as a file system at `socket`.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[must_use]
    pub fn virtiofsd(share: &Path, socket: &Path) -> Self {
        std::fs::create_dir(share).unwrap();
        // Debian's package has it where no PATH leads.
        let packaged = Path::new("/usr/libexec/virtiofsd");
        let program = if packaged.exists() {
            packaged
        } else {
            Path::new("virtiofsd")
        };
        let mut command = Command::new(program);
        command.arg("--shared-dir").arg(share);
        command.arg("--socket-path").arg(socket);
        // Its other sandbox is a child, and this is about one process.
        command.args(["--sandbox", "chroot", "--log-level", "error"]);
        Self::start(
            command,
            socket,
            "virtiofsd",
            "virtiofsd (Debian 13), or cargo install virtiofsd",
        )
    }

    fn start(mut command: Command, socket: &Path, program: &str, package: &str) -> Self {
        let child = command.spawn();
        let child = child.unwrap_or_else(|e| panic!("{program}: {e}: apt-get install {package}"));
        let backend = Self(child);
        until("the backend listens", || {
            let metadata = std::fs::metadata(socket).ok()?;
            metadata.file_type().is_socket().then_some(())
        });
        backend
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    /// Whether it still runs.
    ///
    /// # Panics
    ///
    /// When the kernel does not say.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The inodes of its sockets: those of its connection, and of where it listens.
    ///
    /// # Panics
    ///
    /// When it is gone.
    #[must_use]
    pub fn sockets(&self) -> Vec<u64> {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut sockets: Vec<_> = descriptors
            .flatten()
            .filter_map(|entry| std::fs::metadata(entry.path()).ok())
            .filter(|metadata| metadata.file_type().is_socket())
            .map(|metadata| metadata.ino())
            .collect();
        sockets.sort_unstable();
        sockets
    }

    /// Kills it, and waits until it is gone.
    ///
    /// # Panics
    ///
    /// When that fails.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            continue_process(self.pid());
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}
