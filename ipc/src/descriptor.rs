//! What a descriptor is: its name in the registry, the kind of kernel object behind it, and the check that both ends make.

use std::fmt;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use rustix::fs::FileType;
use rustix::fs::OFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// The longest descriptor name, in bytes.
pub const MAX_NAME: usize = 32;

/// The name of `/dev/kvm`.
pub const KVM: &str = "kvm";
/// The name of guest RAM; the id is the index of the region, in ascending guest physical address.
pub const RAM: &str = "ram";
/// The name of the kernel's file.
pub const KERNEL: &str = "kernel";
/// The name of the initrd's file.
pub const INITRD: &str = "initrd";
/// The name of the worker's end of a console's stream.
pub const CONSOLE: &str = "console";
/// The id of the serial port's console.
pub const SERIAL_CONSOLE: u32 = 0;
/// The id of the virtio console's.
pub const VIRTIO_CONSOLE: u32 = 1;

/// The name of a disk; the id is the device's slot.
pub const DISK: &str = "disk";
/// The name of a queue of a tap; the id is [`VirtioConfig::tap`](crate::worker::VirtioConfig::tap)'s.
pub const NET: &str = "net";
/// The name of a connection of a guest's vsock; the id is the broker's choice.
pub const VSOCK: &str = "vsock";
/// The name of the connection to a process that implements a device; the id is the device's slot.
pub const VHOST_USER: &str = "vhost-user";
/// The name of the eventfd by which a guest notifies a virtqueue; the id is
/// [`VirtioConfig::kick`](crate::worker::VirtioConfig::kick)'s.
pub const KICK: &str = "kick";
/// The name of the VFIO container, through which guest RAM is mapped for the DMA of all of a VM's host devices.
pub const VFIO_CONTAINER: &str = "vfio-container";
/// The name of a PCI device of the host; the id is the device's slot.
pub const VFIO_DEVICE: &str = "vfio-device";
/// The name of the eventfd that a vector of a PCI device of the host signals; the id is
/// [`VfioConfig::vector`](crate::worker::VfioConfig::vector)'s.
pub const VFIO_VECTOR: &str = "vfio-vector";

/// Seals that every guest-RAM memfd carries before it leaves the broker: its size is fixed, and no holder can add a seal
/// that would break the next worker's mapping (memfd_create(2), fcntl(2) "File Sealing").
pub const RAM_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// The part of `st_mode` that says what a file is (S_IFMT, inode(7)).
const FILE_TYPE: u32 = 0o170_000;

/// `/dev/kvm`'s device number (Documentation/admin-guide/devices.txt: misc major 10, minor 232).
const KVM_DEVICE: (u32, u32) = (10, 232);
/// `/dev/net/tun`'s device number (Documentation/networking/tuntap.rst: misc major 10, minor 200).
const TUN_DEVICE: (u32, u32) = (10, 200);
/// `/dev/vfio/vfio`'s device number (Documentation/admin-guide/devices.txt: misc major 10, minor 196).
const VFIO_DEVICE_NUMBER: (u32, u32) = (10, 196);

/// A descriptor's name and id, the key of the registry.
///
/// The id is the index within an owner: the region of RAM, the queue of a tap, the vector of an interrupt array.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(String, u32)", into = "(String, u32)")]
pub struct DescriptorKey {
    name: String,
    id: u32,
}

impl DescriptorKey {
    /// A key, if `name` is 1 to [`MAX_NAME`] characters of `a-z 0-9 . _ - /`.
    ///
    /// # Errors
    ///
    /// [`DescriptorError::Name`].
    pub fn new(name: &str, id: u32) -> Result<Self, DescriptorError> {
        let fits = (1..=MAX_NAME).contains(&name.len());
        let plain = name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/'));
        if fits && plain {
            Ok(Self {
                name: name.to_owned(),
                id,
            })
        } else {
            Err(DescriptorError::Name(name.chars().take(MAX_NAME).collect()))
        }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The index within the owner that the name stands for.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl fmt::Display for DescriptorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.name, self.id)
    }
}

impl TryFrom<(String, u32)> for DescriptorKey {
    type Error = DescriptorError;

    fn try_from((name, id): (String, u32)) -> Result<Self, Self::Error> {
        Self::new(&name, id)
    }
}

impl From<DescriptorKey> for (String, u32) {
    fn from(key: DescriptorKey) -> Self {
        (key.name, key.id)
    }
}

/// The kind of kernel object that a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DescriptorKind {
    /// `/dev/kvm`.
    Kvm,
    /// A memfd of guest RAM, sealed with [`RAM_SEALS`].
    GuestRam,
    /// A regular file that is only read: kernel, initrd.
    Image,
    /// A connected `AF_UNIX` stream socket.
    Stream,
    /// A disk of the guest that is a regular file.
    Disk,
    /// A disk of the guest that is a block device.
    BlockDevice,
    /// An eventfd. All of them look alike to fstat(2): KVM_IOEVENTFD refuses what is none.
    Eventfd,
    /// A queue of a tap. All of them look alike to fstat(2): which interface it belongs to is the broker's word.
    Tap,
    /// A regular file that guest RAM is in, outliving every process. Nothing seals it: its owner has to leave its size alone.
    RamFile,
    /// `/dev/vfio/vfio`, with an IOMMU.
    VfioContainer,
    /// A device that VFIO gave out. All of them look alike to fstat(2): which one it is is the broker's word.
    VfioDevice,
}

impl DescriptorKind {
    /// Whether there may be nothing to read for now: then it has O_NONBLOCK from its beginning, which is the open file's and
    /// so everybody's who shares it.
    fn is_waited_for(self) -> bool {
        matches!(self, Self::Stream | Self::Eventfd | Self::Tap)
    }
}

/// What a descriptor may be used for (O_ACCMODE, open(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// O_RDONLY.
    Read,
    /// O_WRONLY.
    Write,
    /// O_RDWR.
    ReadWrite,
}

impl Access {
    /// The access mode among the flags of F_GETFL or of fdinfo.
    #[must_use]
    pub fn of(flags: OFlags) -> Option<Self> {
        match flags & OFlags::ACCMODE {
            OFlags::RDONLY => Some(Self::Read),
            OFlags::WRONLY => Some(Self::Write),
            OFlags::RDWR => Some(Self::ReadWrite),
            _ => None,
        }
    }
}

/// Why a descriptor is not what it should be.
#[derive(Debug, Error)]
pub enum DescriptorError {
    /// A name that no registry holds.
    #[error("{0:?} is no descriptor name (1 to {MAX_NAME} of a-z 0-9 . _ - /)")]
    Name(String),
    /// A system call that only reads the descriptor's properties failed.
    #[error("cannot examine the descriptor ({call}): {source}")]
    Examine {
        /// The call.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// Another kind of object.
    #[error("expected {expected:?}, found {found}")]
    Kind {
        /// The kind that was announced.
        expected: DescriptorKind,
        /// What fstat(2) says.
        found: String,
    },
    /// Another access mode.
    #[error("expected access {expected:?}, found flags {found:#o}")]
    Access {
        /// The access that was announced.
        expected: Access,
        /// The flags of F_GETFL.
        found: u32,
    },
    /// Whoever reads it could be made to wait, and whoever changes that changes it for all who share it.
    #[error("expected {kind:?} that is open with O_NONBLOCK, found flags {found:#o}")]
    Blocking {
        /// The kind that was announced.
        kind: DescriptorKind,
        /// The flags of F_GETFL.
        found: u32,
    },
    /// Another size.
    #[error("expected {expected} bytes, found {found}")]
    Size {
        /// The size that was announced, in bytes.
        expected: u64,
        /// The size of fstat(2), in bytes.
        found: u64,
    },
    /// Seals are missing.
    #[error("guest RAM is not sealed: seals {0:#x}")]
    Seals(u32),
    /// Seals are not those that were announced.
    #[error("expected seals {expected:#x}, found {found:#x}")]
    OtherSeals {
        /// The seals that were announced.
        expected: u32,
        /// The seals of F_GET_SEALS.
        found: u32,
    },
    /// Another object of the same kind.
    #[error("another object than the one announced (device {device:#x}, inode {inode})")]
    Identity {
        /// The device number found.
        device: u64,
        /// The inode found.
        inode: u64,
    },
}

impl DescriptorError {
    fn examine(call: &'static str, source: rustix::io::Errno) -> Self {
        Self::Examine {
            call,
            source: source.into(),
        }
    }
}

/// What the sender says a descriptor is, and the receiver checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The kind of object.
    pub kind: DescriptorKind,
    /// The access mode.
    pub access: Access,
    /// The object's size in bytes (0 for a block device); compared for guest RAM and disks only, since files may grow.
    pub size: u64,
    /// The seals (F_GET_SEALS, fcntl(2)), of guest RAM only; 0 for everything else.
    pub seals: u32,
    /// `st_dev` of fstat(2).
    pub device: u64,
    /// `st_ino` of fstat(2).
    pub inode: u64,
}

impl Description {
    /// Examines a descriptor and describes it, if it is of this kind.
    ///
    /// Uses fstat, F_GETFL and F_GET_SEALS only: nothing that another holder of the same open file could notice.
    ///
    /// # Errors
    ///
    /// [`DescriptorError`], for a descriptor of another kind, a RAM memfd without its seals, and a stream, tap or eventfd without
    /// O_NONBLOCK.
    pub fn of(kind: DescriptorKind, fd: BorrowedFd<'_>) -> Result<Self, DescriptorError> {
        let stat = rustix::fs::fstat(fd).map_err(|e| DescriptorError::examine("fstat", e))?;
        let flags =
            rustix::fs::fcntl_getfl(fd).map_err(|e| DescriptorError::examine("F_GETFL", e))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let device_number = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        let right = match kind {
            DescriptorKind::Kvm => {
                file_type == FileType::CharacterDevice && device_number == KVM_DEVICE
            }
            DescriptorKind::GuestRam
            | DescriptorKind::Image
            | DescriptorKind::Disk
            | DescriptorKind::RamFile => file_type == FileType::RegularFile,
            DescriptorKind::Stream => file_type == FileType::Socket,
            DescriptorKind::BlockDevice => file_type == FileType::BlockDevice,
            // An anonymous inode has no type (Linux, `fs/anon_inodes.c`).
            DescriptorKind::Eventfd | DescriptorKind::VfioDevice => stat.st_mode & FILE_TYPE == 0,
            DescriptorKind::VfioContainer => {
                file_type == FileType::CharacterDevice && device_number == VFIO_DEVICE_NUMBER
            }
            DescriptorKind::Tap => {
                file_type == FileType::CharacterDevice && device_number == TUN_DEVICE
            }
        };
        if !right {
            return Err(DescriptorError::Kind {
                expected: kind,
                found: format!("{file_type:?} {device_number:?}"),
            });
        }
        if kind.is_waited_for() && !flags.contains(OFlags::NONBLOCK) {
            return Err(DescriptorError::Blocking {
                kind,
                found: flags.bits(),
            });
        }
        let mut seals = SealFlags::empty();
        if kind == DescriptorKind::GuestRam {
            seals = rustix::fs::fcntl_get_seals(fd).map_err(|e| match e {
                // What has no seals (fcntl(2)).
                Errno::INVAL => DescriptorError::Kind {
                    expected: kind,
                    found: "no memfd".to_owned(),
                },
                e => DescriptorError::examine("F_GET_SEALS", e),
            })?;
            if !seals.contains(RAM_SEALS) {
                return Err(DescriptorError::Seals(seals.bits()));
            }
        }
        let access = Access::of(flags).ok_or(DescriptorError::Access {
            expected: Access::Read,
            found: flags.bits(),
        })?;
        Ok(Self {
            kind,
            access,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            seals: seals.bits(),
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    /// Whether its size is part of what it is: other files may grow.
    fn has_fixed_size(&self) -> bool {
        matches!(
            self.kind,
            DescriptorKind::GuestRam | DescriptorKind::Disk | DescriptorKind::RamFile
        )
    }

    /// Whether both describe one object that is open in one way. Eventfds are all one object to this, taps of a host likewise.
    #[must_use]
    pub fn is_of_the_same(&self, other: &Self) -> bool {
        // Destructured, so that a new field does not compile until somebody compares it.
        let Self {
            kind,
            access,
            size,
            seals,
            device,
            inode,
        } = self;
        *kind == other.kind
            && *access == other.access
            && *seals == other.seals
            && (*device, *inode) == (other.device, other.inode)
            // A disk's changes when its operator wants it to.
            && (*kind != DescriptorKind::GuestRam || *size == other.size)
    }

    /// Checks that a descriptor that arrived is the one described.
    ///
    /// # Errors
    ///
    /// [`DescriptorError`] with what was found instead.
    pub fn verify(&self, fd: BorrowedFd<'_>) -> Result<(), DescriptorError> {
        let found = Self::of(self.kind, fd)?;
        if found.access != self.access {
            let flags = rustix::fs::fcntl_getfl(fd.as_fd())
                .map_err(|e| DescriptorError::examine("F_GETFL", e))?;
            return Err(DescriptorError::Access {
                expected: self.access,
                found: flags.bits(),
            });
        }
        if (found.device, found.inode) != (self.device, self.inode) {
            return Err(DescriptorError::Identity {
                device: found.device,
                inode: found.inode,
            });
        }
        if found.seals != self.seals {
            return Err(DescriptorError::OtherSeals {
                expected: self.seals,
                found: found.seals,
            });
        }
        if self.has_fixed_size() && found.size != self.size {
            return Err(DescriptorError::Size {
                expected: self.size,
                found: found.size,
            });
        }
        Ok(())
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            access,
            size,
            seals,
            device,
            inode,
        } = self;
        write!(
            f,
            "{kind:?}, {access:?}, {size} bytes, seals {seals:#x}, device {device:#x}, inode {inode}"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use rustix::event::EventfdFlags;
    use rustix::fs::MemfdFlags;

    use super::*;

    fn ram(size: u64, seals: SealFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn a_name_is_parsed() {
        for bad in ["", "Ram", "a b", "../x\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(DescriptorKey::new(bad, 0).is_err(), "{bad:?}");
        }
        let wire = postcard::to_stdvec(&("Bad Name", 1_u32)).unwrap();
        assert!(postcard::from_bytes::<DescriptorKey>(&wire).is_err());
    }

    #[test]
    fn unsealed_ram_is_refused() {
        let fd = ram(4096, SealFlags::SHRINK);
        assert!(matches!(
            Description::of(DescriptorKind::GuestRam, fd.as_fd()),
            Err(DescriptorError::Seals(_))
        ));
    }

    #[test]
    fn another_memory_of_the_same_size_is_refused() {
        let (mine, other, larger) = (
            ram(4096, RAM_SEALS),
            ram(4096, RAM_SEALS),
            ram(8192, RAM_SEALS),
        );
        let mut description = Description::of(DescriptorKind::GuestRam, mine.as_fd()).unwrap();
        description.verify(mine.as_fd()).unwrap();
        for wrong in [&other, &larger] {
            assert!(matches!(
                description.verify(wrong.as_fd()),
                Err(DescriptorError::Identity { .. })
            ));
        }
        description.size += 4096;
        assert!(matches!(
            description.verify(mine.as_fd()),
            Err(DescriptorError::Size {
                expected: 8192,
                found: 4096
            })
        ));
    }

    #[test]
    fn a_disk_of_another_size_is_refused() {
        let file = tempfile();
        let mut description = Description::of(DescriptorKind::Disk, file.as_fd()).unwrap();
        description.verify(file.as_fd()).unwrap();
        description.size += 512;
        assert!(matches!(
            description.verify(file.as_fd()),
            Err(DescriptorError::Size { .. })
        ));
    }

    #[test]
    fn an_eventfd_is_known_by_what_it_is_not() {
        let eventfd = eventfd(EventfdFlags::NONBLOCK);
        let description = Description::of(DescriptorKind::Eventfd, eventfd.as_fd()).unwrap();
        assert_eq!(description.access, Access::ReadWrite);
        for kind in [DescriptorKind::Disk, DescriptorKind::Stream] {
            assert!(Description::of(kind, eventfd.as_fd()).is_err());
        }
    }

    fn eventfd(flags: EventfdFlags) -> OwnedFd {
        rustix::event::eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn what_could_make_its_reader_wait_is_refused() {
        let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
        other.set_nonblocking(true).unwrap();
        for (kind, blocking, good) in [
            (DescriptorKind::Stream, socket.into(), other.into()),
            (
                DescriptorKind::Eventfd,
                eventfd(EventfdFlags::empty()),
                eventfd(EventfdFlags::NONBLOCK),
            ),
        ] {
            let (blocking, good): (OwnedFd, OwnedFd) = (blocking, good);
            assert!(matches!(
                Description::of(kind, blocking.as_fd()),
                Err(DescriptorError::Blocking { .. })
            ));
            // It is looked at again on arrival, whatever was announced.
            let description = Description::of(kind, good.as_fd()).unwrap();
            assert!(matches!(
                description.verify(blocking.as_fd()),
                Err(DescriptorError::Blocking { .. })
            ));
            description.verify(good.as_fd()).unwrap();
        }
    }

    fn tempfile() -> OwnedFd {
        rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn the_wrong_kind_and_access_are_refused() {
        let null = File::open("/dev/null").unwrap();
        for kind in [
            DescriptorKind::Kvm,
            DescriptorKind::GuestRam,
            DescriptorKind::Image,
            DescriptorKind::Stream,
            DescriptorKind::Disk,
            DescriptorKind::BlockDevice,
            DescriptorKind::Eventfd,
            DescriptorKind::Tap,
            DescriptorKind::VfioContainer,
            DescriptorKind::VfioDevice,
        ] {
            assert!(
                matches!(
                    Description::of(kind, null.as_fd()),
                    Err(DescriptorError::Kind { .. })
                ),
                "{kind:?}"
            );
        }
        let file = File::open("/proc/self/exe").unwrap();
        let mut description = Description::of(DescriptorKind::Image, file.as_fd()).unwrap();
        description.access = Access::ReadWrite;
        assert!(matches!(
            description.verify(file.as_fd()),
            Err(DescriptorError::Access {
                expected: Access::ReadWrite,
                ..
            })
        ));
    }
}
