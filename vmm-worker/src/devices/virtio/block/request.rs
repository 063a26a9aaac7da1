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

/// Bytes of one read or write of the file: between two of them a request can be stopped.
const PART: usize = 1 << 20;
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
    /// It was stopped and has to be served again.
    Stopped,
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
        let (status, written) = match kind {
            IN => match self.read(chain, sector, room, stop) {
                Ok(Some(())) => (OK, room),
                Ok(None) => return Ok(Outcome::Stopped),
                Err(_) => (IOERR, 0),
            },
            OUT => match self.write(chain, sector, sent, stop) {
                Ok(Some(())) => (OK, 0),
                Ok(None) => return Ok(Outcome::Stopped),
                Err(_) => (IOERR, 0),
            },
            FLUSH => (status_of(sync(&self.disk)), 0),
            GET_ID => {
                let id = self.disk.serial;
                let data = chain.writable.range(0, room.min(id.len()));
                (OK, data.copy_in(&id))
            }
            DISCARD | WRITE_ZEROES if !self.disk.readonly => {
                match self.deallocate(chain, kind, sent, stop) {
                    Ok(Some(status)) => (status, 0),
                    Ok(None) => return Ok(Outcome::Stopped),
                    Err(e) => (status_of(Err(e)), 0),
                }
            }
            _ => (UNSUPP, 0),
        };
        let paid = if kind == OUT { sent } else { written };
        self.disk.limits().take(paid);
        let place = chain.writable.range(room, 1);
        place.copy_in(&[status]);
        Ok(Outcome::Done(u32::try_from(written).unwrap_or(u32::MAX)))
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

    /// Fills the writable buffers but for the status. `None`: stopped.
    fn read(
        &mut self,
        chain: &Chain,
        sector: u64,
        room: usize,
        stop: &Stop,
    ) -> io::Result<Option<()>> {
        let offset = self.place(sector, room)?;
        let mut done = 0;
        while done < room {
            if done > 0 && stop.requested() {
                return Ok(None);
            }
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
        }
        Ok(Some(()))
    }

    /// Writes the readable buffers after the header. `None`: stopped.
    fn write(
        &mut self,
        chain: &Chain,
        sector: u64,
        sent: usize,
        stop: &Stop,
    ) -> io::Result<Option<()>> {
        if self.disk.readonly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let offset = self.place(sector, sent)?;
        let mut done = 0;
        while done < sent {
            if done > 0 && stop.requested() {
                return Ok(None);
            }
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
        }
        if !self.disk.write_back.load(Ordering::SeqCst) {
            sync(&self.disk)?;
        }
        Ok(Some(()))
    }

    /// Discards or zeroes what the segments name. All are checked before the first is touched.
    fn deallocate(
        &self,
        chain: &Chain,
        kind: u32,
        sent: usize,
        stop: &Stop,
    ) -> io::Result<Option<u8>> {
        let count = sent / SEGMENT;
        let fits = sent % SEGMENT == 0
            && count > 0
            && u32::try_from(count).is_ok_and(|count| count <= MAX_DISCARD_SEGMENTS);
        if !fits {
            return Ok(Some(IOERR));
        }
        let mut ranges = Vec::with_capacity(count);
        for index in 0..count {
            let at = HEADER + index * SEGMENT;
            let bytes: Option<[u8; SEGMENT]> = chain.readable.range(at, SEGMENT).head();
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] =
                bytes.ok_or(io::ErrorKind::InvalidInput)?;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let known = if kind == DISCARD { 0 } else { UNMAP };
            if flags & !known != 0 {
                return Ok(Some(UNSUPP));
            }
            let end = sector.checked_add(sectors.into());
            if sectors > MAX_DISCARD_SECTORS || end.is_none_or(|end| end > self.disk.sectors()) {
                return Ok(Some(IOERR));
            }
            let unmap = kind == DISCARD || flags & UNMAP != 0;
            ranges.push((sector * SECTOR, u64::from(sectors) * SECTOR, unmap));
        }
        for (offset, length, unmap) in ranges.into_iter().filter(|(_, length, _)| *length > 0) {
            if self.zero(offset, length, unmap, kind, stop)?.is_none() {
                return Ok(None);
            }
        }
        if !self.disk.write_back.load(Ordering::SeqCst) {
            sync(&self.disk)?;
        }
        Ok(Some(OK))
    }

    fn zero(
        &self,
        offset: u64,
        length: u64,
        unmap: bool,
        kind: u32,
        stop: &Stop,
    ) -> io::Result<Option<()>> {
        let flags = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        let flags = flags | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.disk.file, flags, offset, length)) {
            Ok(()) => return Ok(Some(())),
            // A file system or a disk that cannot: a discard is advice, zeroes have to be there.
            Err(Errno::OPNOTSUPP) if kind == WRITE_ZEROES => {}
            Err(e) => return Err(e.into()),
        }
        // Aligned for direct I/O.
        let mut memory = Vec::new();
        let zeroes = bounce(&mut memory, PART);
        let mut done = 0;
        while done < length {
            if done > 0 && stop.requested() {
                return Ok(None);
            }
            let count = usize::try_from(length - done).unwrap_or(PART).min(PART);
            let part = zeroes.get(..count).unwrap_or_default();
            match retry(|| rustix::io::pwrite(&self.disk.file, part, offset + done))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => done += count as u64,
            }
        }
        Ok(Some(()))
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
                Outcome::Stopped => {
                    queue.put_back();
                    return Ok(Next::Wait);
                }
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

fn status_of(outcome: io::Result<()>) -> u8 {
    match outcome {
        Ok(()) => OK,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => UNSUPP,
        Err(_) => IOERR,
    }
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
