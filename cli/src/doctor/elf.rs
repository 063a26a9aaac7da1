//! Whether a program needs a loader and libraries, which an empty root does not have.
//!
//! A program without a PT_INTERP segment needs none (System V gABI, "Program Header"; offsets are those of
//! Elf64_Ehdr and Elf64_Phdr in elf(5)).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// A static x86-64 program.
    Static,
    /// An x86-64 program with an interpreter.
    Dynamic,
    /// Anything else.
    Other,
}

/// Looks at the headers of the file at `path`.
pub(super) fn classify(path: &Path) -> io::Result<Program> {
    let file = File::open(path)?;
    Ok(headers(&file).unwrap_or(Program::Other))
}

fn headers(file: &File) -> Option<Program> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    // 64-bit, little-endian; EM_X86_64.
    if header.get(..6)? != b"\x7fELF\x02\x01" || header.get(18..20)? != [0x3e, 0] {
        return None;
    }
    let table = u64::from_le_bytes(header.get(32..40)?.try_into().ok()?);
    let size = u16::from_le_bytes(header.get(54..56)?.try_into().ok()?);
    let count = u16::from_le_bytes(header.get(56..58)?.try_into().ok()?);
    for index in 0..count {
        let mut kind = [0; 4];
        let at = table.checked_add(u64::from(index) * u64::from(size))?;
        file.read_exact_at(&mut kind, at).ok()?;
        // PT_INTERP.
        if u32::from_le_bytes(kind) == 3 {
            return Some(Program::Dynamic);
        }
    }
    (count > 0).then_some(Program::Static)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_dynamic_and_no_program_are_told_apart() {
        let me = std::env::current_exe().unwrap();
        assert_eq!(classify(&me).unwrap(), Program::Static);
        assert_eq!(classify(Path::new("/bin/sh")).unwrap(), Program::Dynamic);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("script");
        for text in [&b"#!/bin/sh\n"[..], b"", &std::fs::read(&me).unwrap()[..60]] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(classify(&path).unwrap(), Program::Other);
        }
        assert!(classify(Path::new("/nonexistent")).is_err());
    }
}
