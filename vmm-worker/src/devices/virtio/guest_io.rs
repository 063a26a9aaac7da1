//! Reading into guest RAM and writing from it: files, at a given place, taps, a packet a call, and streams.
#![expect(
    unsafe_code,
    reason = "preadv(2), readv(2) and their kin on memory that the guest may change meanwhile, which no reference may be to"
)]

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;

use super::buffers::Buffers;
use super::buffers::Piece;

/// TUNSETOFFLOAD (`linux/if_tun.h`).
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// Pieces of one call (UIO_MAXIOV, `include/uapi/linux/uio.h`).
const MAX_PIECES: usize = 1024;

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// Fills `buffers` from `offset` of the file on; how many bytes there were.
///
/// # Errors
///
/// preadv(2)'s; EINTR is tried again.
pub(super) fn read_at(file: BorrowedFd<'_>, buffers: &Buffers, offset: u64) -> io::Result<usize> {
    transfer(file, buffers, offset, Direction::Read)
}

/// Writes `buffers` from `offset` of the file on; how many bytes were taken.
///
/// # Errors
///
/// pwritev(2)'s; EINTR is tried again.
pub(super) fn write_at(file: BorrowedFd<'_>, buffers: &Buffers, offset: u64) -> io::Result<usize> {
    transfer(file, buffers, offset, Direction::Write)
}

fn transfer(
    file: BorrowedFd<'_>,
    buffers: &Buffers,
    offset: u64,
    direction: Direction,
) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let pieces: Vec<libc::iovec> = buffers
        .pieces()
        .iter()
        .take(MAX_PIECES)
        .map(vector)
        .collect();
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    again(|| {
        // SAFETY: each piece is a part of guest RAM, which `Buffers` can only have taken from a mapping that lives as
        // long as the process, with its length inside that mapping. No reference to any of it exists here: the kernel
        // reads or writes it as it would any memory that another process has mapped. `pieces` lives over the call, which
        // keeps none of it.
        unsafe {
            match direction {
                Direction::Read => libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, offset),
                Direction::Write => libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), count, offset),
            }
        }
    })
}

/// Reads one packet into `room`, and what has no room there into `overflow`; its length, with what was cut off if even
/// that was too short. Pieces of `room` beyond what one call takes are left out.
///
/// # Errors
///
/// readv(2)'s; EINTR is tried again.
pub(super) fn receive<'a>(
    tap: BorrowedFd<'_>,
    room: impl Iterator<Item = &'a Piece>,
    overflow: &mut [u8],
) -> io::Result<usize> {
    let mut pieces: Vec<libc::iovec> = room.take(MAX_PIECES - 1).map(vector).collect();
    pieces.push(libc::iovec {
        iov_base: overflow.as_mut_ptr().cast(),
        iov_len: overflow.len(),
    });
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    again(|| {
        // SAFETY: each piece but the last is a part of guest RAM, as in `transfer`; the last is `overflow`, which is
        // borrowed for this function alone, with its length. `pieces` lives over the call, which keeps none of it.
        unsafe { libc::readv(tap.as_raw_fd(), pieces.as_ptr(), count) }
    })
}

/// Fills `room` from a stream, as far as there is something; pieces beyond what one call takes are left out. How many
/// bytes there were: none at the stream's end.
///
/// # Errors
///
/// readv(2)'s; EINTR is tried again.
pub(super) fn read(stream: BorrowedFd<'_>, room: &Buffers) -> io::Result<usize> {
    let pieces: Vec<libc::iovec> = room.pieces().iter().take(MAX_PIECES).map(vector).collect();
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    again(|| {
        // SAFETY: each piece is a part of guest RAM, as in `transfer`. `pieces` lives over the call, which keeps none of it.
        unsafe { libc::readv(stream.as_raw_fd(), pieces.as_ptr(), count) }
    })
}

/// Writes `packet` as one packet, or as much of it as a stream takes now.
///
/// # Errors
///
/// writev(2)'s; EINTR is tried again. InvalidInput for more pieces than one call takes.
pub(super) fn send(tap: BorrowedFd<'_>, packet: &Buffers) -> io::Result<usize> {
    if packet.pieces().len() > MAX_PIECES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let pieces: Vec<libc::iovec> = packet.pieces().iter().map(vector).collect();
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    again(|| {
        // SAFETY: each piece is a part of guest RAM, as in `transfer`, and the kernel only reads it. `pieces` lives over
        // the call, which keeps none of it.
        unsafe { libc::writev(tap.as_raw_fd(), pieces.as_ptr(), count) }
    })
}

/// Tells a tap what the reader of its packets can take: TUN_F_ bits (TUNSETOFFLOAD, Documentation/networking/tuntap.rst).
///
/// # Errors
///
/// ioctl(2)'s: EINVAL for bits that the kernel does not know, ENOTTY for what is no tap.
pub(crate) fn set_tap_offloads(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is the number itself, and nothing is written.
    let outcome = unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn vector(piece: &Piece) -> libc::iovec {
    libc::iovec {
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    }
}

fn again(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use vm_memory::GuestAddress;
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn scattered_memory_meets_one_place_of_a_file() {
        let ram: &'static GuestMemoryMmap = Box::leak(Box::new(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap(),
        ));
        let fd = rustix::fs::memfd_create("io", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(100).unwrap();
        let (mut out, mut back) = (Buffers::default(), Buffers::default());
        for (address, length) in [(0x10, 5), (0x40, 3)] {
            assert!(out.push(ram, GuestAddress(address), length));
            assert!(back.push(ram, GuestAddress(address + 0x100), length));
        }
        out.copy_in(b"abcdefgh");
        assert_eq!(write_at(file.as_fd(), &out, 90).unwrap(), 8);
        assert_eq!(read_at(file.as_fd(), &back, 90).unwrap(), 8);
        assert_eq!(&back.head::<8>().unwrap(), b"abcdefgh");
        // At the end of the file there is less.
        assert_eq!(read_at(file.as_fd(), &back, 97).unwrap(), 3);
        assert!(read_at(file.as_fd(), &back, u64::MAX).is_err());
    }
}
