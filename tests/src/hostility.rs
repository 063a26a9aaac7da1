//! How a hostile worker misbehaves, and the binary that does.
//!
//! A worker is told nothing by arguments, environment or files, so the mode is written into a copy of `hostile-worker`:
//! each mode is a binary, with a digest of its own that policy has to allow first.

use std::path::Path;
use std::path::PathBuf;

/// What precedes the mode in the binary. Kept in halves, so that it is in no binary but once, in front of a mode.
const MARK: [&[u8]; 2] = [b"baton-tests: hostile", b" mode: "];

/// What the mark is aligned to in the binary, in bytes.
const ALIGNMENT: usize = 64;

/// Room for a mode's name, in bytes.
pub const ROOM: usize = 32;

/// Writes the binary of one mode into a directory.
///
/// # Panics
///
/// When `hostile_worker` is not the built `hostile-worker`.
#[must_use]
pub fn binary(hostile_worker: &Path, mode: &str, directory: &Path) -> PathBuf {
    let mut bytes = std::fs::read(hostile_worker).unwrap();
    let mark = MARK.concat();
    // It is aligned in memory, and so it is in the file.
    let found: Vec<usize> = bytes
        .chunks(ALIGNMENT)
        .enumerate()
        .filter(|(_, chunk)| chunk.starts_with(&mark))
        .map(|(number, _)| number * ALIGNMENT + mark.len())
        .collect();
    let [at] = found.as_slice() else {
        panic!("the mark is in the hostile worker {} times", found.len());
    };
    assert!(mode.len() < ROOM, "{mode} is too long");
    let place = bytes.get_mut(*at..at + ROOM).unwrap();
    place.fill(0);
    place
        .get_mut(..mode.len())
        .unwrap()
        .copy_from_slice(mode.as_bytes());
    let path = directory.join(format!("worker-{mode}"));
    std::fs::write(&path, bytes).unwrap();
    path
}
