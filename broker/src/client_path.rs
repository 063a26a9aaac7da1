//! What a path names that a client has said: no component of it may be a symbolic link (openat2(2)).

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::ResolveFlags;
use rustix::io::Errno;

use crate::transfer::channel_socket;

/// Opens it, or makes it for this user alone, and lets no program that is executed inherit it. Without O_NOFOLLOW, with which a link
/// would be opened itself.
pub(crate) fn open(directory: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR | Mode::WUSR
    } else {
        Mode::empty()
    };
    rustix::fs::openat2(
        directory,
        path,
        flags | OFlags::CLOEXEC,
        mode,
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Why it cannot be had.
pub(crate) fn words(error: Errno) -> String {
    match error {
        Errno::LOOP => "a symbolic link lies in the path".to_owned(),
        error => channel_socket::words(error),
    }
}
