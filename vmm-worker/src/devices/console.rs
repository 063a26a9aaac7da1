//! What the guest wrote to its console and nobody has read yet.

use std::collections::VecDeque;
use std::io;
use std::io::Write;

/// Bytes kept at most. When it is full, the guest's newest bytes are dropped and counted: a vCPU never waits for a
/// reader.
pub const CONSOLE_OUT_MAX: usize = 64 * 1024;
/// Bytes offered to the reader at once: the device is locked meanwhile.
const CHUNK: usize = 4096;

/// A bounded queue of console output. All its memory is allocated at the start.
#[derive(Debug)]
pub struct ConsoleOut {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl ConsoleOut {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        ConsoleOut {
            bytes: VecDeque::with_capacity(CONSOLE_OUT_MAX),
            dropped: 0,
        }
    }

    /// A queue with these bytes in it, those beyond [`CONSOLE_OUT_MAX`] dropped.
    pub(super) fn with(bytes: &[u8], dropped: u64) -> Self {
        let mut queue = ConsoleOut::new();
        queue.dropped = dropped;
        bytes.iter().for_each(|byte| queue.push(*byte));
        queue
    }

    /// A queue that takes the place of another for a moment, without memory.
    pub(super) fn hollow() -> Self {
        ConsoleOut {
            bytes: VecDeque::new(),
            dropped: 0,
        }
    }

    /// Whether there is nothing to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes were dropped because the queue was full, since the VM's start.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    fn push(&mut self, byte: u8) {
        if self.bytes.len() < CONSOLE_OUT_MAX {
            self.bytes.push_back(byte);
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    /// Gives the bytes to `write`, oldest first, and forgets as many as it says it took; stops when the queue is empty,
    /// or `write` takes nothing or would block. Returns how many it took.
    pub(super) fn drain(
        &mut self,
        mut write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut total = 0;
        loop {
            let (front, _) = self.bytes.as_slices();
            let chunk = front.get(..front.len().min(CHUNK)).unwrap_or_default();
            if chunk.is_empty() {
                return Ok(total);
            }
            match write(chunk) {
                Ok(0) => return Ok(total),
                Ok(n) => {
                    let n = n.min(chunk.len());
                    self.bytes.drain(..n);
                    total += n;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(total),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Default for ConsoleOut {
    fn default() -> Self {
        ConsoleOut::new()
    }
}

/// Never fails and never blocks: what does not fit is counted.
impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_the_newest_and_counts() {
        let mut out = ConsoleOut::new();
        let written: Vec<u8> = (0..CONSOLE_OUT_MAX + 300)
            .map(|i| (i % 253) as u8)
            .collect();
        out.write_all(&written).unwrap();
        assert_eq!(out.dropped(), 300);
        let mut read = Vec::new();
        out.drain(|chunk| {
            assert!(chunk.len() <= CHUNK);
            read.extend_from_slice(chunk);
            Ok(chunk.len())
        })
        .unwrap();
        assert_eq!(read, written[..CONSOLE_OUT_MAX]);
        assert!(out.is_empty());
    }

    #[test]
    fn a_slow_reader_loses_nothing() {
        let mut out = ConsoleOut::new();
        out.write_all(b"0123456789").unwrap();
        let mut answers = [
            Ok(3),
            Err(io::ErrorKind::Interrupted),
            Ok(4),
            Err(io::ErrorKind::WouldBlock),
        ]
        .into_iter();
        let mut seen = Vec::new();
        let taken = out.drain(|chunk| {
            let answer = answers.next().unwrap().map_err(io::Error::from);
            seen.extend_from_slice(&chunk[..*answer.as_ref().unwrap_or(&0)]);
            answer
        });
        assert_eq!(
            (taken.unwrap(), seen.as_slice(), out.bytes().as_slice()),
            (7, &b"0123456"[..], &b"789"[..])
        );
        assert!(
            out.drain(|_| Err(io::ErrorKind::BrokenPipe.into()))
                .is_err()
        );
        assert_eq!(out.bytes(), b"789");
    }
}
