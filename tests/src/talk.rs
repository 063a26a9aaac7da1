//! A conversation with a program that sends back all that it hears: numbers, each once and in order, for as long as it takes.

use std::io::Read;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::until;

/// Numbers under way at most: more bytes than any queue, and less than what is between two programs, takes.
const WINDOW: u64 = 3 << 10;

/// Bytes of a line.
pub const LINE: usize = 8;

/// The line of a number: text, which goes through every console as it is.
#[must_use]
pub fn line(number: u64) -> String {
    format!("{number:07}\n")
}

/// Two threads, of which one says numbers and the other compares what comes back.
#[derive(Debug)]
pub struct Talk {
    back: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
}

impl Talk {
    /// Begins it, into one stream and out of another. Both stay open until what they belong to ends.
    #[must_use]
    pub fn new(mut out: impl Write + Send + 'static, mut from: impl Read + Send + 'static) -> Self {
        let back = Arc::new(AtomicU64::new(0));
        let end = Arc::new(AtomicBool::new(false));
        let (seen, over) = (Arc::clone(&back), Arc::clone(&end));
        let sender = std::thread::spawn(move || {
            let mut sent = 0_u64;
            while !over.load(Ordering::SeqCst) {
                if sent > seen.load(Ordering::SeqCst) + WINDOW {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                }
                // Pieces of changing lengths.
                let count = 1 + sent % 97;
                let numbers = sent + 1..=sent + count;
                let piece: String = numbers.map(line).collect();
                out.write_all(piece.as_bytes())
                    .expect("the other end listens");
                out.flush().expect("the other end listens");
                sent += count;
            }
            until("the last number", || {
                (seen.load(Ordering::SeqCst) == sent).then_some(())
            });
            sent
        });
        let seen = Arc::clone(&back);
        std::thread::spawn(move || {
            let mut came = [0; LINE];
            let mut expected = 0_u64;
            while from.read_exact(&mut came).is_ok() {
                expected += 1;
                assert_eq!(String::from_utf8_lossy(&came), line(expected));
                seen.store(expected, Ordering::SeqCst);
            }
        });
        Self { back, end, sender }
    }

    /// The last number that came back. Nothing does any more after one that was lost, torn, or there twice.
    #[must_use]
    pub fn back(&self) -> u64 {
        self.back.load(Ordering::SeqCst)
    }

    /// Waits for so many more.
    ///
    /// # Panics
    ///
    /// When they do not come.
    #[track_caller]
    pub fn wait_for(&self, more: u64) {
        let before = self.back();
        until("numbers", || (self.back() > before + more).then_some(()));
    }

    /// Says no more; how many there were, all of which have come back.
    ///
    /// # Panics
    ///
    /// When they have not.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> u64 {
        self.end.store(true, Ordering::SeqCst);
        let sent = self.sender.join().expect("every number came back");
        assert_eq!(self.back.load(Ordering::SeqCst), sent);
        sent
    }
}
