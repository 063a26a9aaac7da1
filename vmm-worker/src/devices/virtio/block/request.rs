//! One queue of a disk, and its requests (5.2.6).

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::Disk;
use super::MAX_DISCARD_SECTORS;
use super::MAX_DISCARD_SEGMENTS;
use super::SECTOR;
use crate::devices::virtio::Backend;
use crate::devices::virtio::Next;
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::guest_io;
use crate::devices::virtio::queue::Broken;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::seat::Stop;

// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

// Request statuses.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Bytes of a request's header, and of a discard segment.
const HEADER: usize = 16;
const SEGMENT: usize = 16;
/// Write-zeroes: the device may deallocate.
const UNMAP: u32 = 1;

/// Bytes of one read or write of the file: between two of them a request can be stopped, and each is paid for.
const PART: usize = 1 << 20;
/// Bytes that a file system is asked to free or to zero at once. It writes none of them, but may have pages to let go.
const EXTENT: u64 = 32 << 20;
/// What buffers and their lengths have to be a multiple of when the file was opened with O_DIRECT: the logical block of
/// any disk (open(2), "O_DIRECT").
const ALIGNMENT: usize = 4096;
/// Requests that are served before other queues of the same thread get their turn.
const BATCH: usize = 64;

/// One queue of a disk.
pub(super) struct BlockQueue {
    disk: Arc<Disk>,
    /// Memory for direct I/O of buffers that are not aligned.
    bounce: Vec<u8>,
}

/// How a request ended.
enum Outcome {
    /// With its status written, after this many bytes of data were written into the guest.
    Done(u32),
    /// It was stopped, or has to wait for its rate limit, after so many bytes of its data.
    Stopped(u64),
}

/// How the data of a request ended, if by no error.
enum Data {
    Done,
    Stopped(u64),
}

/// Bytes that a discard or write-zeroes request names.
struct Range {
    offset: u64,
    length: u64,
    /// They may be deallocated.
    unmap: bool,
}

impl BlockQueue {
    pub(super) fn new(disk: Arc<Disk>) -> Self {
        Self {
            disk,
            bounce: Vec::new(),
        }
    }

    /// Serves a request.
    fn request(&mut self, queue: u16, chain: &Chain, stop: &Stop) -> Result<Outcome, Broken> {
        let missing = |what| Broken::Request { queue, what };
        let header: [u8; HEADER] = chain.readable.head().ok_or_else(|| missing("a header"))?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (
            u32::from_le_bytes([t0, t1, t2, t3]),
            u64::from_le_bytes(sector),
        );
        let room = chain
            .writable
            .len()
            .checked_sub(1)
            .ok_or_else(|| missing("a status"))?;
        let sent = chain.readable.len() - HEADER;
        let (outcome, written) = match kind {
            IN => (self.read(chain, sector, room, stop), room),
            OUT => (self.write(chain, sector, sent, stop), 0),
            FLUSH => (sync(&self.disk).map(|()| Data::Done), 0),
            GET_ID => {
                let id = self.disk.serial;
                let data = chain.writable.range(0, room.min(id.len()));
                (Ok(Data::Done), data.copy_in(&id))
            }
            DISCARD | WRITE_ZEROES if !self.disk.readonly => {
                (self.deallocate(chain, kind, sent, stop), 0)
            }
            _ => (Err(io::ErrorKind::Unsupported.into()), 0),
        };
        let (status, written) = match outcome {
            Ok(Data::Stopped(progress)) => return Ok(Outcome::Stopped(progress)),
            Ok(Data::Done) => (OK, written),
            Err(e) => (status_of(&e), 0),
        };
        self.disk.limits().take_operation();
        let place = chain.writable.range(room, 1);
        place.copy_in(&[status]);
        Ok(Outcome::Done(u32::try_from(written).unwrap_or(u32::MAX)))
    }

    /// Pays for bytes that were moved. Whether the rest of the request, of which `left` bytes are left, goes on at once.
    fn pay(&self, bytes: u64, left: u64, stop: &Stop) -> bool {
        let mut limits = self.disk.limits();
        limits.take_bytes(bytes);
        left == 0 || !(stop.requested() || limits.out_of_bytes())
    }

    /// Whether `bytes` from a sector on are whole sectors of this disk; the offset of the first.
    fn place(&self, sector: u64, bytes: usize) -> io::Result<u64> {
        let bytes = bytes as u64;
        let end = sector.checked_add(bytes / SECTOR);
        if bytes % SECTOR == 0 && end.is_some_and(|end| end <= self.disk.sectors()) {
            Ok(sector * SECTOR)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    /// Fills the writable buffers but for the status.
    fn read(&mut self, chain: &Chain, sector: u64, room: usize, stop: &Stop) -> io::Result<Data> {
        let offset = self.place(sector, room)?;
        let mut done = progress(chain, room);
        while done < room {
            let part = chain.writable.range(done, PART.min(room - done));
            let at = offset + done as u64;
            let count = if self.disk.direct && !aligned(&part) {
                let bounce = bounce(&mut self.bounce, part.len());
                let count = rustix::io::pread(&self.disk.file, &mut *bounce, at)?;
                part.copy_in(bounce.get(..count).unwrap_or_default())
            } else {
                guest_io::read_at(self.disk.file.as_fd(), &part, at)?
            };
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += count;
            if !self.pay(count as u64, (room - done) as u64, stop) {
                return Ok(Data::Stopped(done as u64));
            }
        }
        Ok(Data::Done)
    }

    /// Writes the readable buffers after the header.
    fn write(&mut self, chain: &Chain, sector: u64, sent: usize, stop: &Stop) -> io::Result<Data> {
        if self.disk.readonly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let offset = self.place(sector, sent)?;
        let mut done = progress(chain, sent);
        while done < sent {
            let part = chain.readable.range(HEADER + done, PART.min(sent - done));
            let at = offset + done as u64;
            let count = if self.disk.direct && !aligned(&part) {
                let bounce = bounce(&mut self.bounce, part.len());
                part.copy_out(bounce);
                rustix::io::pwrite(&self.disk.file, bounce, at)?
            } else {
                guest_io::write_at(self.disk.file.as_fd(), &part, at)?
            };
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += count;
            if !self.pay(count as u64, (sent - done) as u64, stop) {
                return Ok(Data::Stopped(done as u64));
            }
        }
        self.settle()
    }

    /// Discards or zeroes what the segments name. All are checked before the first is touched.
    fn deallocate(&self, chain: &Chain, kind: u32, sent: usize, stop: &Stop) -> io::Result<Data> {
        let ranges = self.ranges(chain, kind, sent)?;
        let total: u64 = ranges.iter().map(|range| range.length).sum();
        let mut done = chain.progress.min(total);
        // Where the range begins, counted as `done` is.
        let mut start = 0;
        for range in ranges {
            while let Some(left) = (start + range.length)
                .checked_sub(done)
                .filter(|left| *left > 0)
            {
                let at = range.offset + (done - start);
                let (count, moved) = self.zero(at, left, range.unmap, kind)?;
                done += count;
                if !self.pay(moved, total - done, stop) {
                    return Ok(Data::Stopped(done));
                }
            }
            start += range.length;
        }
        self.settle()
    }

    /// What the segments of a request name.
    fn ranges(&self, chain: &Chain, kind: u32, sent: usize) -> io::Result<Vec<Range>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let count = sent / SEGMENT;
        let fits = sent % SEGMENT == 0
            && count > 0
            && u32::try_from(count).is_ok_and(|count| count <= MAX_DISCARD_SEGMENTS);
        if !fits {
            return Err(invalid());
        }
        let range = |index| {
            let at = HEADER + index * SEGMENT;
            let bytes: Option<[u8; SEGMENT]> = chain.readable.range(at, SEGMENT).head();
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] =
                bytes.ok_or_else(invalid)?;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = if kind == DISCARD { 0 } else { UNMAP };
            if flags & !known != 0 {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let end = sector.checked_add(sectors.into());
            if sectors > MAX_DISCARD_SECTORS || end.is_none_or(|end| end > self.disk.sectors()) {
                return Err(invalid());
            }
            Ok(Range {
                offset: sector * SECTOR,
                length: u64::from(sectors) * SECTOR,
                unmap: kind == DISCARD || flags & UNMAP != 0,
            })
        };
        (0..count).map(range).collect()
    }

    /// Discards or zeroes a piece of `length` bytes: how long it was, and how many bytes were written for it.
    fn zero(&self, offset: u64, length: u64, unmap: bool, kind: u32) -> io::Result<(u64, u64)> {
        let mode = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        // For a disk that cannot zero, the kernel writes, and does not tell.
        let moves = self.disk.device && !unmap;
        let extent = if moves { PART as u64 } else { EXTENT }.min(length);
        let flags = mode | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.disk.file, flags, offset, extent)) {
            Ok(()) => return Ok((extent, if moves { extent } else { 0 })),
            // A file system or a disk that cannot: a discard is advice, zeroes have to be there.
            Err(Errno::OPNOTSUPP) if kind == WRITE_ZEROES => {}
            Err(e) => return Err(e.into()),
        }
        // Aligned for direct I/O.
        let mut memory = Vec::new();
        let zeroes = bounce(&mut memory, PART);
        let count = usize::try_from(length).unwrap_or(PART).min(PART);
        let part = zeroes.get(..count).unwrap_or_default();
        match retry(|| rustix::io::pwrite(&self.disk.file, part, offset))? as u64 {
            0 => Err(io::ErrorKind::WriteZero.into()),
            written => Ok((written, written)),
        }
    }

    /// All data of a request were written.
    fn settle(&self) -> io::Result<Data> {
        if !self.disk.write_back.load(Ordering::SeqCst) {
            sync(&self.disk)?;
        }
        Ok(Data::Done)
    }
}

impl Backend for BlockQueue {
    fn serve(&mut self, queues: &mut [Virtqueue], stop: &Stop) -> Result<Next, Broken> {
        let Some(queue) = queues.first_mut() else {
            return Ok(Next::Wait);
        };
        let mut chain = Chain::default();
        queue.ignore()?;
        for _ in 0..BATCH {
            if stop.requested() {
                return Ok(Next::Wait);
            }
            let wait = self.disk.limits().wait_ns();
            if wait > 0 {
                // The driver need not notify meanwhile.
                return Ok(Next::At(Instant::now() + Duration::from_nanos(wait)));
            }
            if !queue.take(&mut chain)? {
                return Ok(Next::Wait);
            }
            match self.request(queue.index(), &chain, stop)? {
                Outcome::Done(written) => {
                    // The status byte too.
                    queue.complete(chain.head, written.saturating_add(1))?;
                    queue.interrupt()?;
                }
                // If it is the limit that it waits for: the loop's next turn says until when.
                Outcome::Stopped(progress) => queue.put_back_at(progress),
            }
        }
        Ok(Next::Again)
    }
}

fn retry<T>(mut f: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match f() {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

fn sync(disk: &Disk) -> io::Result<()> {
    retry(|| rustix::fs::fdatasync(&disk.file)).map_err(io::Error::from)
}

fn status_of(error: &io::Error) -> u8 {
    let unsupported = error.kind() == io::ErrorKind::Unsupported
        || error.raw_os_error() == Some(libc::EOPNOTSUPP);
    if unsupported { UNSUPP } else { IOERR }
}

/// How many of the `length` bytes of a request's data are done already.
fn progress(chain: &Chain, length: usize) -> usize {
    usize::try_from(chain.progress)
        .unwrap_or(length)
        .min(length)
}

/// Whether direct I/O takes these buffers as they are.
fn aligned(buffers: &Buffers) -> bool {
    buffers.pieces().iter().all(|piece| {
        let address = piece.ptr_guard().as_ptr().addr();
        address % ALIGNMENT == 0 && piece.len() % ALIGNMENT == 0
    })
}

/// `length` aligned bytes of `memory`, at most [`PART`].
fn bounce(memory: &mut Vec<u8>, length: usize) -> &mut [u8] {
    memory.resize(PART + ALIGNMENT, 0);
    let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let end = start + length.min(PART);
    memory.get_mut(start..end).unwrap_or_default()
}
