//! Guest RAM in files that outlive every process of the VM: `memory.path`, for mode `cpr-reboot`.
//!
//! On tmpfs, hugetlbfs or DAX a page of the file is the page that the guest writes; anywhere else the kernel would write the
//! guest's memory to a disk behind its back. The first region is in the file itself, the one above 4 GiB in the file with
//! `.high` behind its name. Files are locked as disks are (F_OFD_SETLK, fcntl(2)), and never removed: they are their owner's.

use std::ffi::OsString;
use std::fs::File;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use baton_ipc::worker::Pages;
use rustix::fs::AtFlags;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;

use crate::devices::disks::lock;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// TMPFS_MAGIC and HUGETLBFS_MAGIC (`linux/magic.h`, statfs(2)).
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;
/// STATX_ATTR_DAX (statx(2)).
const DAX: u64 = 0x0020_0000;

/// The file of a region.
pub(crate) fn path(path: &Path, region: u32) -> PathBuf {
    let mut name = OsString::from(path);
    if region > 0 {
        name.push(".high");
    }
    name.into()
}

/// Opens and locks the file of a region. For a guest that starts it is made or emptied; one that comes out of a state file
/// finds it as it is.
pub(crate) fn open(path: &Path, size: u64, pages: Pages, restoring: bool) -> Result<File> {
    let shown = path.display();
    let cannot = |e: &dyn std::fmt::Display| {
        unfit(
            format_args!("cannot open memory.path {shown}: {e}"),
            "mend the path in the VM file",
        )
    };
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(!restoring)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(path)
        .map_err(|e| cannot(&e))?;
    let metadata = file.metadata().map_err(|e| cannot(&e))?;
    let me = rustix::process::geteuid().as_raw();
    if !metadata.is_file() || ![0, me].contains(&metadata.uid()) || metadata.mode() & 0o077 != 0 {
        return Err(unfit(
            format_args!("memory.path {shown} is not to be trusted"),
            "it has to be a regular file of root or this user, with mode 600",
        ));
    }
    check_file_system(&file, pages, path)?;
    lock(&file, false).map_err(|e| match e {
        nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES => unfit(
            format_args!("memory.path {shown} is locked: another VM uses it"),
            "end that one: `quit`, when its guest has gone into a state file",
        ),
        e => cannot(&e),
    })?;
    if restoring {
        if metadata.len() != size {
            return Err(unfit(
                format_args!(
                    "memory.path {shown} has {} bytes, and the VM {size}",
                    metadata.len()
                ),
                "the guest's RAM is not there",
            ));
        }
    } else {
        file.set_len(0)
            .and_then(|()| file.set_len(size))
            .doing(format_args!(
                "cannot make {size} bytes of guest RAM in {shown}"
            ))?;
    }
    Ok(file)
}

fn check_file_system(file: &File, pages: Pages, path: &Path) -> Result<()> {
    let shown = path.display();
    let stat = rustix::fs::fstatfs(file).doing(format_args!("cannot examine {shown}"))?;
    let statx = rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .doing(format_args!("cannot examine {shown}"))?;
    let dax = statx.stx_attributes.bits() & DAX != 0;
    let huge = pages == Pages::Huge;
    match stat.f_type {
        HUGETLBFS if huge => Ok(()),
        HUGETLBFS => Err(unfit(
            format_args!("memory.path {shown} is on hugetlbfs"),
            "that takes memory.pages = \"2M\"",
        )),
        _ if huge => Err(unfit(
            format_args!("memory.path {shown} is not on hugetlbfs"),
            "memory.pages = \"2M\" takes one that is",
        )),
        TMPFS => Ok(()),
        _ if dax => Ok(()),
        other => Err(unfit(
            format_args!(
                "memory.path {shown} is on a file system (type {other:#x}) that writes memory to a disk"
            ),
            "name a file on tmpfs, hugetlbfs or DAX",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_one_vms_alone_and_stays_for_a_guest_that_comes_back() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = path(&directory.path().join("ram"), 1);
        assert!(place.ends_with("ram.high"));
        assert!(open(&place, 8192, Pages::Small, true).is_err());
        let first = open(&place, 8192, Pages::Small, false).unwrap();
        rustix::io::pwrite(&first, b"x", 5000).unwrap();
        let refused = open(&place, 8192, Pages::Small, true).unwrap_err();
        assert!(refused.reason.contains("locked"), "{refused}");
        drop(first);
        let refused = open(&place, 4096, Pages::Small, true).unwrap_err();
        assert!(refused.reason.contains("8192 bytes"), "{refused}");
        let refused = open(&place, 8192, Pages::Huge, true).unwrap_err();
        assert!(refused.reason.contains("not on hugetlbfs"), "{refused}");
        let mut byte = [0];
        let again = open(&place, 8192, Pages::Small, true).unwrap();
        rustix::io::pread(&again, &mut byte, 5000).unwrap();
        assert_eq!(&byte, b"x");
        drop(again);
        let blank = open(&place, 8192, Pages::Small, false).unwrap();
        rustix::io::pread(&blank, &mut byte, 5000).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn files_of_others_links_and_disks_are_refused() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = directory.path().join("ram");
        std::fs::write(&place, "").unwrap();
        let refused = open(&place, 4096, Pages::Small, false).unwrap_err();
        assert!(refused.reason.contains("not to be trusted"), "{refused}");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&place, &link).unwrap();
        assert!(open(&link, 4096, Pages::Small, false).is_err());
        let disk = tempfile::tempdir_in("/var/tmp").unwrap();
        let refused = open(&disk.path().join("ram"), 4096, Pages::Small, false).unwrap_err();
        assert!(refused.reason.contains("to a disk"), "{refused}");
    }
}
