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
use rustix::fs::AtFlags;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::disk::Disk;

/// Blocks that a guest can be told of, in bytes: capacities are counted in the smallest (virtio 1.2, 5.2.4), and Linux as a guest
/// takes none that are larger than a page.
const MIN_BLOCK_SIZE: u32 = 512;
const MAX_BLOCK_SIZE: u32 = 4096;

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
    let (kind, bytes) = shape(&file).map_err(|e| cannot("use", &e, ""))?;
    let block_size = match kind {
        DescriptorKind::BlockDevice => {
            rustix::fs::ioctl_blksszget(&file).map_err(|e| cannot("use", &e, ""))?
        }
        _ if disk.direct => direct_block_size(&file).map_err(|e| cannot("use", &e, ""))?,
        _ => MIN_BLOCK_SIZE,
    };
    if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
        return Err(cannot(
            "use",
            &format_args!("it is read and written by blocks of {block_size} bytes"),
            if kind == DescriptorKind::Disk {
                "a guest's blocks have 512 to 4096 bytes: leave `direct` out"
            } else {
                "a guest's blocks have 512 to 4096 bytes"
            },
        ));
    }
    check_bytes(bytes, block_size).map_err(|remedy| {
        unfit(
            format_args!("disk {id}: {path} has {bytes} bytes"),
            format_args!("{remedy}: truncate -s"),
        )
    })?;
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

/// What it is, and its size in bytes.
fn shape(mut file: &File) -> std::io::Result<(DescriptorKind, u64)> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((DescriptorKind::Disk, metadata.len()))
    } else if metadata.file_type().is_block_device() {
        // Nobody ever uses the position: every read and write says where.
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok((DescriptorKind::BlockDevice, bytes))
    } else {
        Err(std::io::Error::other(
            "it is neither a regular file nor a block device",
        ))
    }
}

/// What places and lengths of direct I/O on a regular file have to be a multiple of, in bytes: at least [`MIN_BLOCK_SIZE`].
/// File systems that do not tell (statx(2), STATX_DIOALIGN) either need nothing of the kind, as tmpfs and NFS, or do without
/// direct I/O where it does not fit; one that shows itself to be of neither sort is refused.
fn direct_block_size(file: &File) -> std::io::Result<u32> {
    let unfit = |what: &str| Err(std::io::Error::other(format!("{what}: leave `direct` out")));
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if told.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return if takes_direct_reads(file)? {
            Ok(MIN_BLOCK_SIZE)
        } else {
            unfit("its file system does not say how direct I/O has to be aligned")
        };
    }
    // The worker's buffers are aligned to this, whatever the guest's are.
    if told.stx_dio_offset_align == 0 || told.stx_dio_mem_align > MAX_BLOCK_SIZE {
        return unfit("it has no direct I/O that a disk can use");
    }
    Ok(told.stx_dio_offset_align.max(MIN_BLOCK_SIZE))
}

/// Whether a file can be read directly by [`MIN_BLOCK_SIZE`] bytes, as far as its first data show.
fn takes_direct_reads(file: &File) -> std::io::Result<bool> {
    let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) {
        Ok(at) => at,
        Err(rustix::io::Errno::NXIO) => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    let size = u64::from(MIN_BLOCK_SIZE);
    let alignment = usize::try_from(MAX_BLOCK_SIZE).unwrap_or(0);
    let mut memory = vec![0; 2 * alignment];
    let start = memory.as_ptr().align_offset(alignment);
    let end = start.saturating_add(usize::try_from(size).unwrap_or(0));
    let buffer = memory.get_mut(start..end).unwrap_or_default();
    match rustix::io::pread(file, buffer, data.next_multiple_of(size) + size) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether a disk of such blocks can have this size; what it has to be.
pub(crate) fn check_bytes(bytes: u64, block_size: u32) -> std::result::Result<(), String> {
    if bytes > 0 && bytes % u64::from(block_size) == 0 {
        return Ok(());
    }
    let why = if block_size == MIN_BLOCK_SIZE {
        ""
    } else {
        " there, as its host reads and writes it by such blocks"
    };
    Err(format!(
        "a disk has a multiple of {block_size} bytes{why}, and at least one of them"
    ))
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
    fn blocks_are_as_large_as_direct_io_needs_them() {
        // A file system with a disk of 4096-byte blocks below it needs those; this one may be any.
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut direct = image(directory.path(), 8192);
        direct.direct = true;
        let open = open(&direct).unwrap();
        let block_size = open.config.block_size;
        let mut memory = vec![0_u8; 8192];
        let start = memory.as_ptr().align_offset(4096);
        let mut read = |at: u32, bytes: u32| {
            let buffer = &mut memory[start..start + bytes as usize];
            rustix::io::pread(&open.file, buffer, at.into())
        };
        assert_eq!(read(block_size, block_size), Ok(block_size as usize));
        if block_size > 512 {
            assert_eq!(
                read(block_size / 2, block_size),
                Err(rustix::io::Errno::INVAL)
            );
        }
        drop(open);
        direct.direct = false;
        let open = super::open(&direct).unwrap();
        assert_eq!(open.config.block_size, 512);
    }

    #[test]
    fn a_size_is_a_multiple_of_the_block_size() {
        for (bytes, block_size) in [(512, 512), (4096, 512), (8192, 4096)] {
            check_bytes(bytes, block_size).unwrap();
        }
        for (bytes, block_size, expected) in [
            (0, 512, "a multiple of 512 bytes,"),
            (513, 512, "a multiple of 512 bytes,"),
            (4608, 4096, "a multiple of 4096 bytes there"),
        ] {
            let refusal = check_bytes(bytes, block_size).unwrap_err();
            assert!(refusal.contains(expected), "{refusal}");
        }
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
