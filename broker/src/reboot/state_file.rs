//! The file that a guest goes into, and comes out of: where a client may name one, and what becomes of one that is not whole.
//!
//! A client's path is taken as it is: no component may be a symbolic link (openat2(2)), and policy's grant `state` has to have
//! a pattern for it. What is there already is overwritten only if it is empty or a state file.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::FileAddress;
use baton_ipc::state_file::MAGIC;
use baton_ipc::state_file::PRELUDE;
use baton_ipc::state_file::Prelude;
use baton_ipc::state_file::TAKEN;
use baton_policy::Policy;
use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::FlockOperation;
use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::client_path;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;

/// The grant that has the patterns.
pub(crate) const GRANT: &str = "state";

/// A file that is being written. Dropped before it is whole, it is removed, or cut off where the state began.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: File,
    directory: OwnedFd,
    name: OsString,
    offset: u64,
    whole: bool,
}

impl StateFile {
    /// Creates or empties the file.
    pub(crate) fn create(place: &FileAddress, policy: &Policy) -> Result<Self> {
        let path = permitted(&place.path, policy)?;
        let unable = |e: Errno| unable(&path, e);
        let (parent, name) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => (parent, name.to_owned()),
            _ => return Err(unable(Errno::ISDIR)),
        };
        let directory =
            client_path::open(CWD, parent, OFlags::RDONLY | OFlags::DIRECTORY).map_err(unable)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = client_path::open(&directory, Path::new(&name), flags).map_err(unable)?;
        let stat = rustix::fs::fstat(&file).map_err(unable)?;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_nlink == 1;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !ours {
            return Err(unfit(
                format_args!(
                    "{} is no regular file of this user with one name",
                    path.display()
                ),
                "name another file",
            ));
        }
        lock(&file, FlockOperation::NonBlockingLockExclusive, &path)?;
        let mut magic = [0; MAGIC.len()];
        let count = rustix::io::pread(&file, &mut magic, place.offset).map_err(unable)?;
        if count != 0 && ![MAGIC, TAKEN].contains(&magic) {
            return Err(unfit(
                format_args!("{} holds something else", path.display()),
                "name another file, or remove that one",
            ));
        }
        rustix::fs::ftruncate(&file, place.offset).map_err(unable)?;
        rustix::fs::seek(&file, SeekFrom::Start(place.offset)).map_err(unable)?;
        Ok(Self {
            file: file.into(),
            directory,
            name,
            offset: place.offset,
            whole: false,
        })
    }

    /// Everything is in it: it stays, by its name, too.
    pub(crate) fn keep(mut self) -> Result<()> {
        self.whole = true;
        rustix::fs::fsync(&self.directory).doing("cannot make the state file's name durable")
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        if self.whole {
        } else if self.offset == 0 {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        } else {
            let _ = rustix::fs::ftruncate(&self.file, self.offset);
        }
    }
}

/// A file that a guest is in.
#[derive(Debug)]
pub(crate) struct Stored {
    /// To be read, at the position where its state begins.
    pub(crate) file: OwnedFd,
    pub(crate) prelude: Prelude,
    pub(crate) mark: Mark,
}

/// Where a file says whether its guest was let out.
#[derive(Debug)]
pub(crate) struct Mark {
    file: OwnedFd,
    offset: u64,
}

impl Mark {
    /// Says so, durably: from now on the guest may run.
    pub(crate) fn take(&self) -> Result<()> {
        self.write(TAKEN).doing(
            "cannot mark the state file, so that its guest does not run twice: it has to be writable",
        )
    }

    /// The guest never ran.
    pub(crate) fn give_back(&self) -> Result<()> {
        self.write(MAGIC).doing("cannot give the state file back")
    }

    fn write(&self, magic: [u8; 4]) -> std::result::Result<(), Errno> {
        rustix::fs::seek(&self.file, SeekFrom::Start(self.offset))?;
        rustix::io::write(&self.file, &magic)?;
        rustix::fs::fdatasync(&self.file)
    }
}

/// Opens a file that a guest is in.
pub(crate) fn open(place: &FileAddress, policy: &Policy) -> Result<Stored> {
    let path = permitted(&place.path, policy)?;
    let unable = |e: Errno| unable(&path, e);
    let open = |access| client_path::open(CWD, &path, access | OFlags::NONBLOCK | OFlags::NOCTTY);
    let file = open(OFlags::RDONLY).map_err(unable)?;
    let mark = open(OFlags::WRONLY).map_err(unable)?;
    let stat = rustix::fs::fstat(&file).map_err(unable)?;
    let other = rustix::fs::fstat(&mark).map_err(unable)?;
    if (stat.st_dev, stat.st_ino) != (other.st_dev, other.st_ino) {
        return Err(unfit(
            format_args!("{} was exchanged while it was opened", path.display()),
            "",
        ));
    }
    let me = rustix::process::geteuid().as_raw();
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !regular || ![0, me].contains(&stat.st_uid) || stat.st_mode & 0o022 != 0 {
        return Err(unfit(
            format_args!(
                "{} is not to be trusted: no regular file of root or this user that nobody else may write",
                path.display()
            ),
            "",
        ));
    }
    lock(&file, FlockOperation::NonBlockingLockShared, &path)?;
    let wrong = |e: &dyn std::fmt::Display| unfit(format_args!("{}: {e}", path.display()), "");
    let mut prelude = [0; PRELUDE];
    let count = rustix::io::pread(&file, &mut prelude, place.offset).map_err(unable)?;
    if count != PRELUDE {
        return Err(wrong(&format_args!(
            "it has {count} bytes at offset {}, and a state file more",
            place.offset
        )));
    }
    let prelude = Prelude::parse(&prelude).map_err(|e| wrong(&e))?;
    rustix::fs::seek(&file, SeekFrom::Start(place.offset)).map_err(unable)?;
    let mark = Mark {
        file: mark,
        offset: place.offset,
    };
    Ok(Stored {
        file,
        prelude,
        mark,
    })
}

/// The path, if it is plain and policy has a pattern for it.
fn permitted(path: &str, policy: &Policy) -> Result<PathBuf> {
    let plain: PathBuf = Path::new(path).components().collect();
    let odd = plain
        .components()
        .any(|part| matches!(part, Component::ParentDir | Component::CurDir));
    let grant = policy.grant(GRANT);
    if odd || !grant.is_some_and(|grant| grant.permits_path(&plain)) {
        return Err(refused(
            format_args!("policy {} grants no state file at {path}", policy.name),
            "a pattern of its descriptor `state` has to match the path, which may have no `..` in it",
        ));
    }
    Ok(plain)
}

fn lock(file: &OwnedFd, how: FlockOperation, path: &Path) -> Result<()> {
    rustix::fs::flock(file, how).map_err(|_| {
        unfit(
            format_args!("{} is in use by another VM", path.display()),
            "wait until it is not",
        )
    })
}

fn unable(path: &Path, error: Errno) -> baton_ipc::control::Refusal {
    let remedy = if error == Errno::ACCESS {
        crate::own::OUT_OF_REACH
    } else {
        ""
    };
    unfit(
        format_args!(
            "Unable to open {}: {}",
            path.display(),
            client_path::words(error)
        ),
        remedy,
    )
}
