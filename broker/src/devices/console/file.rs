//! The file that a console is copied to. A guest can print without end; the file's size is bounded, and what goes is the oldest.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use baton_policy::Limit;
use rustix::fs::OFlags;

use super::Port;
use crate::refusal::Result;
use crate::refusal::unfit;

/// The most that is kept when the oldest is let go, in bytes: it is in memory for a moment.
const MAX_KEPT: u64 = 4 << 20;

/// An open file, appended to.
#[derive(Debug)]
pub(crate) struct ConsoleFile {
    file: File,
    limit: Limit,
}

impl ConsoleFile {
    /// Opens it, or makes it.
    pub(crate) fn open(port: Port, path: &Path, limit: Limit) -> Result<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
            .open(path)
            .and_then(|file| match file.metadata()?.is_file() {
                true => Ok(Self { file, limit }),
                false => Err(io::Error::other("not a regular file")),
            })
            .map_err(|e| {
                unfit(
                    format_args!("cannot open {}.path {}: {e}", port.table(), path.display()),
                    "it has to be a file that this user may read and write, and no symbolic link",
                )
            })
    }

    /// Appends what the guest has printed. A full disk costs the guest its log, and nothing else.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        let _ = self.file.write_all(bytes).and_then(|()| self.shrink());
    }

    /// Keeps the newest lines, of a quarter of what it may have.
    fn shrink(&mut self) -> io::Result<()> {
        let Limit::At(limit) = self.limit else {
            return Ok(());
        };
        let size = self.file.metadata()?.len();
        if size <= limit {
            return Ok(());
        }
        let keep = (limit / 4).min(MAX_KEPT);
        let mut kept = vec![0; usize::try_from(keep).unwrap_or(0)];
        self.file.read_exact_at(&mut kept, size - keep)?;
        let start = kept.iter().position(|byte| *byte == b'\n');
        let kept = kept
            .get(start.map_or(0, |end| end + 1)..)
            .unwrap_or_default();
        self.file.set_len(0)?;
        self.file.write_all(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_prints_without_end_has_a_bounded_file_with_its_newest_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut file = ConsoleFile::open(Port::Serial, &path, Limit::At(65_536)).unwrap();
        let mut most = 0;
        for number in 0..20_000 {
            file.append(format!("line {number}\n").as_bytes());
            most = most.max(path.metadata().unwrap().len());
        }
        assert!(most <= 65_536, "{most}");
        let text = std::fs::read_to_string(&path).unwrap();
        let first: u32 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        let lines: String = (first..20_000)
            .map(|number| format!("line {number}\n"))
            .collect();
        assert_eq!(text, lines, "whole lines, the newest, each once");
        assert!(text.len() > 16_000, "{}", text.len());
    }

    #[test]
    fn without_a_limit_all_of_it_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut file = ConsoleFile::open(Port::Serial, &path, Limit::Unlimited).unwrap();
        for _ in 0..10 {
            file.append(&[b'x'; 16 << 10]);
        }
        assert_eq!(path.metadata().unwrap().len(), 160 << 10);
    }
}
