//! Block devices on files, and file systems on them.
#![expect(clippy::expect_used, reason = "a test that cannot do its work fails")]

use std::ffi::OsStr;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

/// A block device on a file, gone when it is dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// One with blocks of 512 bytes.
    ///
    /// # Panics
    ///
    /// When the host gives none.
    #[must_use]
    pub fn on(file: &Path) -> Self {
        Self::with_blocks(file, 512)
    }

    /// One with logical blocks of so many bytes.
    ///
    /// # Panics
    ///
    /// When the host gives none.
    #[must_use]
    pub fn with_blocks(file: &Path, bytes: u32) -> Self {
        let size = format!("--sector-size={bytes}");
        let arguments = ["--find", "--show", &size].map(OsStr::new);
        let out = run("losetup", arguments.into_iter().chain([file.as_os_str()]));
        Self(PathBuf::from(out.trim()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The file has another size; so has the device.
    ///
    /// # Panics
    ///
    /// When the host refuses.
    pub fn refresh(&self) {
        run("losetup", ["--set-capacity".as_ref(), self.0.as_os_str()]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", ["--detach".as_ref(), self.0.as_os_str()]);
    }
}

/// An ext4 of 64 MiB whose disk has logical blocks of a given size, mounted; gone when it is dropped.
#[derive(Debug)]
pub struct Mount {
    directory: tempfile::TempDir,
    _device: LoopDevice,
}

impl Mount {
    /// One below this directory.
    ///
    /// # Panics
    ///
    /// When the host cannot make it.
    #[must_use]
    pub fn with_blocks(below: &Path, bytes: u32) -> Self {
        let image = tempfile::NamedTempFile::new_in(below).expect("a file");
        image.as_file().set_len(64 << 20).expect("a file");
        // The device has the file open.
        let device = LoopDevice::with_blocks(image.path(), bytes);
        let options = ["-q", "-b", "4096"].map(OsStr::new);
        let path = device.path().as_os_str();
        run("mkfs.ext4", options.into_iter().chain([path]));
        let directory = tempfile::tempdir_in(below).expect("a directory");
        run("mount", [path, directory.path().as_os_str()]);
        Self {
            directory,
            _device: device,
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a test that fails leaves a VM behind for a moment.
        run("umount", ["--lazy".as_ref(), self.path().as_os_str()]);
    }
}

fn run<'a>(program: &str, arguments: impl IntoIterator<Item = &'a OsStr>) -> String {
    let out = Command::new(program).args(arguments).output();
    let out = out.expect("losetup, mount and mkfs.ext4, of Debian's packages mount and e2fsprogs");
    // A drop while a test fails is no place for another panic.
    assert!(out.status.success() || std::thread::panicking(), "{out:?}");
    String::from_utf8(out.stdout).expect("text")
}
