//! The files of one log: `NAME.jsonl`, which is written, and `NAME.jsonl.SEQUENCE`, which were: the sequence number of a
//! file's first record in 20 digits, so that names sort as records do.

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

/// The decimal digits of a `u64`.
const DIGITS: usize = 20;

/// The name that the file of this log gets when it is full.
#[must_use]
pub fn archived(current: &Path, first: u64) -> PathBuf {
    suffixed(current, &format!("{first:0DIGITS$}"))
}

/// The name of the next file of this log while it is made.
#[must_use]
pub fn unborn(current: &Path) -> PathBuf {
    suffixed(current, "new")
}

fn suffixed(current: &Path, suffix: &str) -> PathBuf {
    let mut name = current.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// The rotated files of a log, oldest first, with the sequence numbers of their first records.
///
/// # Errors
///
/// When the directory cannot be read.
pub fn archive(current: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let directory = current.parent().unwrap_or(Path::new("."));
    let name = current.file_name().unwrap_or_default();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let entry_name = entry.file_name();
        let digits = entry_name
            .as_encoded_bytes()
            .strip_prefix(name.as_encoded_bytes())
            .and_then(|rest| rest.strip_prefix(b"."))
            .filter(|digits| digits.len() == DIGITS && digits.iter().all(u8::is_ascii_digit));
        let first = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok());
        if let Some(first) = first {
            found.push((first, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// All files of a log that are there, in the order of their records.
///
/// # Errors
///
/// When the directory cannot be read.
pub fn all(current: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<_> = archive(current)?
        .into_iter()
        .map(|(_, path)| path)
        .collect();
    if current.exists() {
        files.push(current.to_owned());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_logs_files_are_its_own_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("web1.jsonl");
        for name in [
            "web1.jsonl",
            "web1.jsonl.00000000000000000100",
            "web1.jsonl.00000000000000000020",
            "web1.jsonl.1",
            "web1.jsonl.new",
            "web1.jsonl.0000000000000000002x",
            "web1.jsonl.99999999999999999999",
            "web1.jsonl.jsonl",
            "web10.jsonl.00000000000000000020",
        ] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        let names: Vec<_> = all(&current)
            .unwrap()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(
            names,
            [
                "web1.jsonl.00000000000000000020",
                "web1.jsonl.00000000000000000100",
                "web1.jsonl"
            ]
        );
        assert_eq!(
            archived(&current, 20),
            dir.path().join("web1.jsonl.00000000000000000020")
        );
    }
}
