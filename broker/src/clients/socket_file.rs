//! The file of a listening socket, removed with this value if it is still the same one: nobody removes another's.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// A name in a directory, and the device and inode that were there when the socket was bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    directory: OwnedFd,
    name: OsString,
    /// None when it is left to another process.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// What lies there now.
    pub(crate) fn at(path: &Path) -> Result<Self, Errno> {
        let name = path.file_name().ok_or(Errno::ISDIR)?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
        Self::in_directory(directory, name)
    }

    /// What lies there by this name now.
    pub(crate) fn in_directory(directory: OwnedFd, name: OsString) -> Result<Self, Errno> {
        let mut file = Self {
            directory,
            name,
            identity: None,
        };
        file.identity = Some(file.found()?);
        Ok(file)
    }

    /// Leaves it to another process.
    pub(crate) fn leave(mut self) {
        self.identity = None;
    }

    fn found(&self) -> Result<(u64, u64), Errno> {
        let there = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((there.st_dev, there.st_ino))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.found().ok() == self.identity {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_to_another_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        std::fs::write(&path, b"").unwrap();
        SocketFile::at(&path).unwrap().leave();
        assert!(path.exists());
    }

    #[test]
    fn only_what_was_bound_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        std::fs::write(&path, b"").unwrap();
        drop(SocketFile::at(&path).unwrap());
        assert!(!path.exists());

        std::fs::write(&path, b"").unwrap();
        let file = SocketFile::at(&path).unwrap();
        let other = dir.path().join("other");
        std::fs::write(&other, b"another's").unwrap();
        std::fs::rename(&other, &path).unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");
    }
}
