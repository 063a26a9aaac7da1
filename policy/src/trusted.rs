//! Files that decide what is permitted: read only when nobody but root or the caller could have written them.
//!
//! The check is made on the open descriptor, so what was checked is what is read. Directories above are not
//! checked: who can write those can replace the file, but not pass the check with a file of its own.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat};

/// A file or directory that is not to be trusted, or cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// It cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It belongs to somebody else.
    #[error("{} belongs to user {owner}; it must belong to root or to user {caller} (chown it)", path.display())]
    Owner {
        /// Which.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The caller.
        caller: u32,
    },
    /// Others may write it.
    #[error("{} has mode {mode:04o}; group and others must not be able to write it (chmod go-w)", path.display())]
    Mode {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is a symlink, whose target others may choose.
    #[error("{} is a symlink; name the file itself", path.display())]
    Symlink {
        /// Which.
        path: PathBuf,
    },
    /// It is no regular file, or no directory.
    #[error("{} is not a {expected}", path.display())]
    Type {
        /// Which.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// It is longer than such a file can be.
    #[error("{} is longer than {limit} bytes", path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
        /// The longest that is read.
        limit: u64,
    },
    /// It is not UTF-8.
    #[error("{} is not UTF-8 text", path.display())]
    NotText {
        /// Which.
        path: PathBuf,
    },
}

/// The text of the regular file `path`, at most `limit` bytes. The last component must not be a symlink.
pub(crate) fn read(path: &Path, limit: u64) -> Result<String, TrustError> {
    let unreadable = |source: io::Error| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    // Not blocking on a FIFO; a regular file does not care.
    let flags =
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::LOOP) => {
            return Err(TrustError::Symlink {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(unreadable(error.into())),
    };
    check(&file, path, FileType::RegularFile)?;
    let mut bytes = Vec::new();
    File::from(file)
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(TrustError::TooLong {
            path: path.to_owned(),
            limit,
        });
    }
    String::from_utf8(bytes).map_err(|_| TrustError::NotText {
        path: path.to_owned(),
    })
}

/// The directory `path`, open for listing; nothing when there is none.
pub(crate) fn directory(path: &Path) -> Result<Option<OwnedFd>, TrustError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECTORY;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(directory) => check(&directory, path, FileType::Directory).map(|()| Some(directory)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(TrustError::Read {
            path: path.to_owned(),
            source: error.into(),
        }),
    }
}

fn check(file: &impl AsFd, path: &Path, expected: FileType) -> Result<(), TrustError> {
    let path = path.to_owned();
    let stat: Stat = match rustix::fs::fstat(file) {
        Ok(stat) => stat,
        Err(error) => {
            return Err(TrustError::Read {
                path,
                source: error.into(),
            });
        }
    };
    if FileType::from_raw_mode(stat.st_mode) != expected {
        let expected = if expected == FileType::Directory {
            "directory"
        } else {
            "regular file"
        };
        return Err(TrustError::Type { path, expected });
    }
    allowed(
        path,
        stat.st_uid,
        stat.st_mode & 0o7777,
        rustix::process::geteuid().as_raw(),
    )
}

/// Whether a file with this owner and these permission bits is to be trusted by `caller`.
fn allowed(path: PathBuf, owner: u32, mode: u32, caller: u32) -> Result<(), TrustError> {
    if owner != 0 && owner != caller {
        return Err(TrustError::Owner {
            path,
            owner,
            caller,
        });
    }
    if mode & 0o022 != 0 {
        return Err(TrustError::Mode { path, mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn file(mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        std::fs::write(&path, "text").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (directory, path)
    }

    #[test]
    fn a_file_that_others_can_write_is_not_read() {
        for mode in [0o620, 0o602, 0o666, 0o622] {
            let (_directory, path) = file(mode);
            assert!(
                matches!(read(&path, 10), Err(TrustError::Mode { mode: found, .. }) if found == mode)
            );
        }
        let (_directory, path) = file(0o644);
        assert_eq!(read(&path, 10).unwrap(), "text");
    }

    #[test]
    fn a_file_of_somebody_else_is_not_trusted() {
        let judged = |owner, caller| allowed(PathBuf::from("/x"), owner, 0o644, caller);
        assert!(judged(0, 1000).is_ok() && judged(1000, 1000).is_ok() && judged(0, 0).is_ok());
        assert!(matches!(
            judged(1001, 1000),
            Err(TrustError::Owner {
                owner: 1001,
                caller: 1000,
                ..
            })
        ));
        assert!(matches!(
            judged(1001, 0),
            Err(TrustError::Owner {
                owner: 1001,
                caller: 0,
                ..
            })
        ));
    }

    #[test]
    fn symlinks_directories_fifos_and_long_files_are_refused() {
        let (directory, path) = file(0o644);
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(matches!(read(&link, 10), Err(TrustError::Symlink { .. })));
        assert!(matches!(
            read(directory.path(), 10),
            Err(TrustError::Type { .. })
        ));
        assert!(matches!(
            read(&path, 3),
            Err(TrustError::TooLong { limit: 3, .. })
        ));
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(matches!(read(&fifo, 10), Err(TrustError::Type { .. })));
    }
}
