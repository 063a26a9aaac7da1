//! The file of a listening socket, removed with this value if it is still the same one: nobody removes another's.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

/// A path, and the device and inode that were there when the socket was bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// What lies there now.
    pub(crate) fn at(path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity_of(path)?,
        })
    }

    /// Leaves it to another process.
    pub(crate) fn leave(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity_of(&self.path).is_ok_and(|there| there == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity_of(path: &Path) -> std::io::Result<(u64, u64)> {
    let there = std::fs::symlink_metadata(path)?;
    Ok((there.dev(), there.ino()))
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
