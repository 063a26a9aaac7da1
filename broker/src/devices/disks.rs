//! Disks: opened once with their final flags, locked for as long as anybody holds them, and described to the worker.
//!
//! The lock belongs to the open file description (F_OFD_SETLK, fcntl(2)), which the broker and all generations of its
//! worker share: it is never taken again and never let go of in between, and ends when the last of them is gone.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use baton_ipc::DescriptorKind;
use baton_ipc::worker::BlockConfig;
use nix::fcntl::FcntlArg;
use nix::fcntl::fcntl;
use nix::libc;
use rustix::event::EventfdFlags;
use rustix::fs::OFlags;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::disk::Disk;

/// Sizes of disks are multiples of this many bytes (virtio 1.2, 5.2.4).
pub(crate) const SECTOR: u64 = 512;

/// A disk that is open.
#[derive(Debug)]
pub(crate) struct OpenDisk {
    pub(crate) file: OwnedFd,
    pub(crate) kind: DescriptorKind,
    pub(crate) config: BlockConfig,
}

/// Opens and locks a disk.
pub(crate) fn open(disk: &Disk) -> Result<OpenDisk> {
    open_at(disk, &disk.path)
}

/// The same by another path, which leads to it.
pub(crate) fn open_at(disk: &Disk, door: &Path) -> Result<OpenDisk> {
    let (id, path) = (&disk.id.0, disk.path.display());
    let cannot = |what: &str, e: &dyn std::fmt::Display, remedy: &str| {
        unfit(format_args!("disk {id}: cannot {what} {path}: {e}"), remedy)
    };
    let metadata =
        std::fs::metadata(door).map_err(|e| cannot("open", &e, "mend the path in the VM file"))?;
    // A block device that is mounted, or another's, is refused by the kernel itself (open(2), O_EXCL).
    let exclusive = metadata.file_type().is_block_device() && !disk.readonly;
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    flags.set(OFlags::EXCL, exclusive);
    flags.set(OFlags::DIRECT, disk.direct);
    let file = OpenOptions::new()
        .read(true)
        .write(!disk.readonly)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(door)
        .map_err(|e| {
            let remedy = match e.raw_os_error() {
                Some(libc::EINVAL) if disk.direct => {
                    "this file system has no direct I/O: leave `direct` out"
                }
                Some(libc::EBUSY) => "unmount it, or end what uses it",
                _ => crate::own::remedy(&e, "mend the path in the VM file"),
            };
            cannot("open", &e, remedy)
        })?;
    // It was for the opening alone, of what may have been a pipe.
    let opened =
        rustix::fs::fcntl_getfl(&file).doing(format_args!("cannot read the flags of {path}"))?;
    rustix::fs::fcntl_setfl(&file, opened - OFlags::NONBLOCK)
        .doing(format_args!("cannot set the flags of {path}"))?;
    let (kind, block_size, bytes) = shape(&file).map_err(|e| cannot("use", &e, ""))?;
    if bytes == 0 || bytes % SECTOR != 0 {
        return Err(unfit(
            format_args!("disk {id}: {path} has {bytes} bytes"),
            "a disk has a multiple of 512 bytes, and at least one of them: truncate -s",
        ));
    }
    lock(&file, disk.readonly).map_err(|e| match e {
        nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES => unfit(
            format_args!("disk {id}: {path} is locked: another VM or a tool uses it"),
            "end that one; a disk that several VMs share has to be `readonly = true` in all of them",
        ),
        e => cannot("lock", &e, ""),
    })?;
    Ok(OpenDisk {
        file: file.into(),
        kind,
        config: disk.config(bytes, kind == DescriptorKind::BlockDevice, block_size),
    })
}

/// What it is, its block size and its size, both in bytes.
fn shape(mut file: &File) -> std::io::Result<(DescriptorKind, u32, u64)> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((DescriptorKind::Disk, 512, metadata.len()))
    } else if metadata.file_type().is_block_device() {
        let block_size = rustix::fs::ioctl_blksszget(file)?;
        // Nobody ever uses the position: every read and write says where.
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok((DescriptorKind::BlockDevice, block_size, bytes))
    } else {
        Err(std::io::Error::other(
            "it is neither a regular file nor a block device",
        ))
    }
}

/// Locks all of a file: for this VM alone, or with others that only read.
pub(crate) fn lock(file: &File, shared: bool) -> nix::Result<()> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let whole = libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// What a guest notifies a queue by.
pub(crate) fn kick() -> Result<OwnedFd> {
    rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
        .doing("cannot make an eventfd")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Disk {
        toml::from_str(text).unwrap()
    }

    fn image(directory: &std::path::Path, bytes: u64) -> Disk {
        let path = directory.join("disk.img");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        disk(&format!(
            "id = \"root\"\npath = {:?}\nserial = \"S1\"",
            path.display()
        ))
    }

    #[test]
    fn a_disk_is_one_vms_alone_unless_all_only_read() {
        let directory = tempfile::tempdir().unwrap();
        let writable = image(directory.path(), 1024);
        let mut readonly = writable.clone();
        readonly.readonly = true;
        let first = open(&writable).unwrap();
        assert_eq!(
            (first.config.bytes, first.config.serial.as_str()),
            (1024, "S1")
        );
        for second in [&writable, &readonly] {
            let refusal = open(second).unwrap_err().to_string();
            assert!(
                refusal.contains("disk root: ") && refusal.contains("is locked"),
                "{refusal}"
            );
        }
        // A copy of the descriptor, as a worker has, keeps the lock.
        let copy = first.file.try_clone().unwrap();
        drop(first);
        open(&writable).unwrap_err();
        drop(copy);
        let readers = [open(&readonly).unwrap(), open(&readonly).unwrap()];
        open(&writable).unwrap_err();
        drop(readers);
        open(&writable).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused_and_said_why() {
        let directory = tempfile::tempdir().unwrap();
        for (bytes, expected) in [(0, "has 0 bytes"), (513, "has 513 bytes")] {
            let refusal = open(&image(directory.path(), bytes))
                .unwrap_err()
                .to_string();
            assert!(refusal.contains(expected), "{refusal}");
        }
        for (path, expected) in [
            ("/dev/null", "neither a regular file nor a block device"),
            ("/nonexistent", "cannot open /nonexistent"),
        ] {
            let refusal = open(&disk(&format!("id = \"d\"\npath = {path:?}")))
                .unwrap_err()
                .to_string();
            assert!(refusal.contains(expected), "{refusal}");
        }
    }
}
