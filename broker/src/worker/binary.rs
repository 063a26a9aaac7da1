//! The worker's binary: read once, checked against the allow-list, and executed from the sealed copy that was checked.

use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use baton_policy::Declaration;
use baton_policy::Digest;
use baton_policy::signature;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;

/// How often sealing is tried.
const SEAL_TRIES: u32 = 5;
/// Nobody changes the copy any more, and nobody takes these off.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);
/// The largest binary, in bytes.
const MAX_SIZE: u64 = 64 << 20;
/// How much of it is searched for an interpreter, in bytes. Linkers put the program headers right behind the ELF header.
const HEAD: usize = 16 << 10;

/// How a binary comes onto the allow-list.
pub(crate) const LISTING: &str =
    "install its digest (`sha256sum`) in a file of the policy's workers.directory, then try again";

/// A binary that may be a worker, and its signature if one lies beside it.
#[derive(Debug)]
pub(crate) struct Unchecked {
    pub(crate) binary: File,
    pub(crate) signature: Option<File>,
}

/// A checked, sealed copy.
#[derive(Debug)]
pub(crate) struct WorkerBinary {
    memfd: OwnedFd,
    /// SHA-256 of its bytes.
    pub(crate) digest: Digest,
    /// The key by whose signature it may run, if it is by one.
    pub(crate) signed_by: Option<String>,
}

/// Why a binary may run as a worker.
#[derive(Debug)]
pub(crate) enum Permitted {
    /// Its digest is on the allow-list.
    Listed,
    /// By this key's signature.
    SignedBy(String),
}

impl WorkerBinary {
    /// Opens a worker by the path that the VM file or the broker's own place names.
    pub(crate) fn open(path: &Path) -> Result<Unchecked> {
        let binary = crate::devices::resources::open_image(path).map_err(|e| {
            unfit(
                format_args!("cannot open the worker {}: {e}", path.display()),
                crate::own::remedy(
                    &e,
                    "name one in the VM file's `worker`, or install baton-worker beside baton-broker",
                ),
            )
        })?;
        let mut signature = path.as_os_str().to_owned();
        signature.push(signature::SUFFIX);
        // One that cannot be opened is none: the digest may be on the list.
        let signature = crate::devices::resources::open_image(Path::new(&signature)).ok();
        Ok(Unchecked { binary, signature })
    }

    /// Copies a binary into a memfd that nobody can change, if `permits` says so of that copy and its digest.
    pub(crate) fn admit(
        file: File,
        permits: impl FnOnce(&Digest, &mut File) -> Result<Option<Permitted>>,
    ) -> Result<Self> {
        let metadata = file
            .metadata()
            .doing("cannot examine the worker's binary")?;
        if !metadata.is_file() || metadata.size() > MAX_SIZE {
            return Err(unfit(
                format_args!(
                    "the worker's binary is no regular file of at most {} MiB",
                    MAX_SIZE >> 20
                ),
                "",
            ));
        }
        let memfd = rustix::fs::memfd_create(
            "baton-worker",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::EXEC,
        )
        .doing("cannot make a memfd for the worker's binary")?;
        // Copied, sealed, and only then looked at: never the whole of it in this process's memory.
        let mut copy = File::from(memfd);
        let size = std::io::copy(&mut file.take(MAX_SIZE + 1), &mut copy)
            .doing("cannot copy the worker's binary")?;
        if size > MAX_SIZE {
            return Err(unfit("the worker's binary grew while it was read", ""));
        }
        seal(&copy).doing("cannot seal the worker's binary")?;
        copy.rewind()
            .and_then(|()| Digest::of_reader(&mut copy))
            .doing("cannot read the worker's binary")
            .and_then(|digest| Self::admit_copy(copy, digest, permits))
    }

    fn admit_copy(
        mut copy: File,
        digest: Digest,
        permits: impl FnOnce(&Digest, &mut File) -> Result<Option<Permitted>>,
    ) -> Result<Self> {
        let signed_by = match permits(&digest, &mut copy)? {
            Some(Permitted::Listed) => None,
            Some(Permitted::SignedBy(key)) => Some(key),
            None => {
                return Err(refused(
                    format_args!("the worker {digest} is not on the policy's allow-list"),
                    LISTING,
                ));
            }
        };
        let mut head = Vec::with_capacity(HEAD);
        (&copy)
            .rewind()
            .and_then(|()| (&copy).take(HEAD as u64).read_to_end(&mut head))
            .doing("cannot read the worker's binary")?;
        if !is_static_elf(&head) {
            return Err(unfit(
                format_args!("{digest} is no worker: not a static x86-64 ELF executable"),
                "build it with `cargo build --release -p baton-worker`",
            ));
        }
        // The writing descriptor goes; a process that executes a file open for writing gets ETXTBSY.
        let memfd = rustix::fs::open(
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&copy)),
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .doing("cannot reopen the worker's binary")?;
        Ok(Self {
            memfd,
            digest,
            signed_by,
        })
    }

    /// What this build says that it needs.
    pub(crate) fn declaration(&self) -> Result<Declaration> {
        let copy = self
            .memfd
            .try_clone()
            .doing("cannot hold the worker's binary")?;
        Declaration::read(&File::from(copy)).map_err(|e| {
            unfit(
                format_args!("{} is no worker of this broker: {e}", self.digest),
                "every baton-worker carries the policy that it was built and tested under; see docs/threat-model.md",
            )
        })
    }

    /// Device and inode, which /proc/PID/exe of every process that executes it has.
    pub(crate) fn identity(&self) -> Option<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.memfd).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }
}

impl AsFd for WorkerBinary {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

/// A 64-bit little-endian x86-64 ELF without an interpreter (System V gABI, "ELF Header" and "Program Header"): what can
/// run in an empty root at all. Anything else about it shows when it runs, confined.
fn is_static_elf(bytes: &[u8]) -> bool {
    const PT_INTERP: [u8; 4] = 3_u32.to_le_bytes();
    let field = |at: usize, length: usize| bytes.get(at..at.checked_add(length)?);
    let number = |at: usize, length: usize| {
        let mut value = [0; 8];
        value.get_mut(..length)?.copy_from_slice(field(at, length)?);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let segments = || -> Option<bool> {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        for index in 0..count {
            let at = table.checked_add(index.checked_mul(size)?)?;
            if field(at, 4)? == PT_INTERP {
                return Some(false);
            }
        }
        Some(count > 0)
    };
    field(0, 6) == Some(b"\x7fELF\x02\x01")
        && field(18, 2) == Some(&[0x3e, 0])
        && segments() == Some(true)
}

/// Seals a copy.
fn seal(copy: &File) -> rustix::io::Result<()> {
    until_free(|| rustix::fs::fcntl_add_seals(copy, SEALS))
}

/// Seals again what is busy. The kernel refuses to seal with EBUSY while anybody holds a page, which on a busy host it does itself for
/// longer than it waits, about 0.1 s (`memfd_wait_for_pins`, mm/memfd.c).
fn until_free(mut seal: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    for _ in 1..SEAL_TRIES {
        let sealed = seal();
        if sealed != Err(Errno::BUSY) {
            return sealed;
        }
    }
    seal()
}

#[cfg(test)]
mod tests {
    use rustix::pipe::SpliceFlags;

    use super::*;

    /// A copy, and a pipe that holds its first page, as the kernel itself does now and then.
    fn held() -> (File, OwnedFd, OwnedFd) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy = rustix::fs::memfd_create("copy", flags).unwrap();
        rustix::io::pwrite(&copy, b"worker", 0).unwrap();
        let (page, end) = rustix::pipe::pipe().unwrap();
        // No bytes are copied: the pipe has a reference to the page (splice(2)).
        let held = rustix::pipe::splice(&copy, Some(&mut 0), &end, None, 6, SpliceFlags::empty());
        assert_eq!(held, Ok(6));
        (copy.into(), page, end)
    }

    #[test]
    fn a_copy_of_which_somebody_holds_a_page_is_sealed_when_it_is_let_go() {
        let (copy, page, _end) = held();
        let mut busy = 0;
        let sealed = until_free(|| {
            let sealed = rustix::fs::fcntl_add_seals(&copy, SEALS);
            if sealed == Err(Errno::BUSY) {
                busy += 1;
                rustix::io::read(&page, &mut [0; 6]).unwrap();
            }
            sealed
        });
        assert_eq!((sealed, busy), (Ok(()), 1));
        assert_eq!(rustix::fs::fcntl_get_seals(&copy), Ok(SEALS));
        let refused = rustix::io::pwrite(&copy, b"x", 0);
        assert_eq!(refused, Err(Errno::PERM));
    }

    #[test]
    fn a_copy_whose_page_is_never_let_go_is_not_taken() {
        let (copy, _page, _end) = held();
        assert_eq!(seal(&copy), Err(Errno::BUSY));
        // Any other error is no reason to try again.
        let mut tries = 0;
        let refused = until_free(|| {
            tries += 1;
            Err(Errno::PERM)
        });
        assert_eq!((refused, tries), (Err(Errno::PERM), 1));
    }

    #[test]
    fn only_a_static_elf_is_a_worker() {
        // This test binary is a static-pie, as the worker is.
        let me = std::fs::read("/proc/self/exe").unwrap();
        assert!(is_static_elf(&me));
        assert!(!is_static_elf(&me[..60]));
        assert!(!is_static_elf(b"#!/bin/sh\n"));
        if let Ok(dynamic) = std::fs::read("/bin/sh") {
            assert!(!is_static_elf(&dynamic));
        }
    }
}
