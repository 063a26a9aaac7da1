//! A file that is read with `pread` only.
//!
//! The kernel's and the initrd's descriptors share one open file description with the broker and with the worker that
//! replaces this one. Its offset is theirs, so nothing here moves it: the position that `Seek` sets is our own.

use std::fs::File;
use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::unix::fs::FileExt as _;

use rustix::fs::FileType;
use vm_memory::ReadVolatile;
use vm_memory::VolatileMemoryError;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::BootError;

/// Bytes a `pread` asks for: few calls, and the copy to guest memory still finds them in the cache.
const CHUNK: usize = 256 * 1024;

/// A regular file with a position of its own.
pub(super) struct PreadFile<'a> {
    file: &'a File,
    what: &'static str,
    position: u64,
    len: u64,
    chunk: Box<[u8]>,
}

impl<'a> PreadFile<'a> {
    /// Wraps `file`, which errors call `what`.
    ///
    /// # Errors
    ///
    /// [`BootError::NotAFile`] when it is no regular file, [`BootError::Read`] when its size cannot be had.
    pub(super) fn new(file: &'a File, what: &'static str) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            what,
            offset: 0,
            len: 0,
            source,
        };
        let stat = rustix::fs::fstat(file).map_err(|errno| read(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(BootError::NotAFile {
                what,
                mode: stat.st_mode,
            });
        }
        let len = u64::try_from(stat.st_size)
            .map_err(|e| read(io::Error::new(ErrorKind::InvalidData, e)))?;
        Ok(PreadFile {
            file,
            what,
            position: 0,
            len,
            chunk: vec![0; CHUNK].into_boxed_slice(),
        })
    }

    /// The file's size when it was wrapped, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// [`BootError::Read`], also when the file ends before.
    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BootError> {
        let len = buf.len() as u64;
        self.file
            .read_exact_at(buf, offset)
            .map_err(|source| BootError::Read {
                what: self.what,
                offset,
                len,
                source,
            })
    }
}

impl Read for PreadFile<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.position)?;
        self.position = self.position.saturating_add(n as u64);
        Ok(n)
    }
}

impl Seek for PreadFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(delta) => self.len.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
        };
        self.position = target
            .ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "seek outside the file"))?;
        Ok(self.position)
    }
}

impl ReadVolatile for PreadFile<'_> {
    /// Fills `buf` unless the file ends: guest memory takes a short read for the end.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let want = (buf.len() - done).min(self.chunk.len());
            let chunk = self.chunk.get_mut(..want).unwrap_or_default();
            let n = match self.file.read_at(chunk, self.position) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(VolatileMemoryError::IOError(error)),
            };
            buf.subslice(done, n)?
                .copy_from(chunk.get(..n).unwrap_or_default());
            self.position = self.position.saturating_add(n as u64);
            done += n;
        }
        Ok(done)
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use vm_memory::Bytes as _;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::boot::tests::guest_memory;

    #[test]
    fn the_shared_offset_never_moves() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..CHUNK * 2 + 77).map(|i| (i % 251) as u8).collect();
        file.write_all(&content).unwrap();
        file.seek(SeekFrom::Start(5)).unwrap();

        let mem = guest_memory(4);
        let mut reader = PreadFile::new(&file, "kernel").unwrap();
        assert_eq!(reader.len(), content.len() as u64);
        reader.seek(SeekFrom::End(-10)).unwrap();
        reader
            .seek(SeekFrom::Current(-(content.len() as i64 - 10)))
            .unwrap();
        mem.read_exact_volatile_from(GuestAddress(0x1000), &mut reader, content.len())
            .unwrap();
        let mut back = vec![0; content.len()];
        mem.read_slice(&mut back, GuestAddress(0x1000)).unwrap();
        assert_eq!(back, content);
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0, "at the end");
        assert!(reader.seek(SeekFrom::Current(i64::MIN)).is_err());

        assert_eq!(rustix::fs::tell(file.as_fd()).unwrap(), 5);
    }

    #[test]
    fn a_pipe_has_no_size() {
        let (pipe, _write) = rustix::pipe::pipe().unwrap();
        let file = File::from(pipe);
        assert!(matches!(
            PreadFile::new(&file, "initrd"),
            Err(BootError::NotAFile { what: "initrd", .. })
        ));
    }

    #[test]
    fn a_file_cut_short_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let reader = PreadFile::new(&file, "kernel").unwrap();
        assert!(matches!(
            reader.read_exact_at(&mut [0; 4], 9),
            Err(BootError::Read {
                offset: 9,
                len: 4,
                ..
            })
        ));
    }
}
