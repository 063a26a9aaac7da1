//! What a worker's build says that it needs, without executing it.
//!
//! A worker carries the policy that it was built and tested under, whole, in an ELF note of its own (System V gABI, "Note
//! Section"). The broker reads it from the sealed copy that it is about to run and compares it with the running worker's:
//! a build that needs more is told from one that does not before it runs. What a worker *may* do is never its own word; that
//! is the VM's policy.
//!
//! ```text
//! name "Baton\0"  type 1  descriptor: "baton-worker 0.1.0 protocol 2\n" and the policy's text
//! ```
//!
//! The file is hostile: every offset is checked, and nothing larger than [`MAX_NOTES`] is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::parse::PolicyError;
use crate::policy::Policy;

/// The longest segment of notes that is read, in bytes: a policy and what linkers add.
pub const MAX_NOTES: u64 = crate::parse::MAX_TEXT + (64 << 10);

/// The most program headers that are looked at. Linkers write about a dozen.
const MAX_SEGMENTS: u16 = 64;

/// The owner of the note, with its end.
const OWNER: &[u8] = b"Baton\0";

/// The type of the note among its owner's.
const DECLARATION: u32 = 1;

/// The longest first line, in bytes.
const MAX_LINE: usize = 128;

/// What a build declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// The program's name and version, for people; printable ASCII.
    pub build: String,
    /// The version of the worker's protocol.
    pub protocol: u32,
    /// The policy that it was built and tested under.
    pub policy: Policy,
}

/// A binary that does not say what it needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeclarationError {
    /// It cannot be read.
    #[error("cannot read the binary: {0}")]
    Read(#[from] io::Error),
    /// It is no 64-bit little-endian ELF file with program headers within bounds.
    #[error("it is no 64-bit little-endian ELF file with at most {MAX_SEGMENTS} program headers")]
    Elf,
    /// A segment of notes is longer than is read.
    #[error("it has {0} bytes of notes, more than {MAX_NOTES}")]
    Long(u64),
    /// There is no such note.
    #[error("it has no note that says what it needs")]
    Absent,
    /// There are several.
    #[error("it has more than one note that says what it needs")]
    Several,
    /// The first line is not as above.
    #[error("its declaration begins with {0:?}, not with `NAME VERSION protocol NUMBER`")]
    Line(String),
    /// The policy in it does not parse.
    #[error("the policy that it declares: {0}")]
    Policy(#[from] PolicyError),
}

impl Declaration {
    /// Reads the declaration of an ELF file.
    ///
    /// # Errors
    ///
    /// [`DeclarationError`]; also when the policy in it is one that only newer programs read.
    pub fn read(binary: &File) -> Result<Self, DeclarationError> {
        let mut declared = None;
        for (offset, length) in note_segments(binary)? {
            if length > MAX_NOTES {
                return Err(DeclarationError::Long(length));
            }
            let mut notes = vec![0; usize::try_from(length).map_err(|_| DeclarationError::Elf)?];
            binary.read_exact_at(&mut notes, offset)?;
            for note in Notes(&notes) {
                if note.owner == OWNER && note.kind == DECLARATION {
                    let before = declared.replace(Self::parse(note.descriptor)?);
                    if before.is_some() {
                        return Err(DeclarationError::Several);
                    }
                }
            }
        }
        declared.ok_or(DeclarationError::Absent)
    }

    fn parse(descriptor: &[u8]) -> Result<Self, DeclarationError> {
        let end = descriptor
            .iter()
            .take(MAX_LINE)
            .position(|byte| *byte == b'\n');
        let (line, text) = match end.and_then(|end| descriptor.split_at_checked(end)) {
            Some((line, text)) => (line, text.get(1..).unwrap_or_default()),
            None => (descriptor.get(..MAX_LINE).unwrap_or(descriptor), &[][..]),
        };
        let line = String::from_utf8_lossy(line);
        let wrong = || DeclarationError::Line(line.escape_default().to_string());
        let is_text = |word: &&str| word.bytes().all(|byte| byte.is_ascii_graphic());
        let words: Vec<&str> = line.split(' ').filter(is_text).collect();
        let [name, version, "protocol", protocol] = words.as_slice() else {
            return Err(wrong());
        };
        let text = String::from_utf8_lossy(text);
        Ok(Self {
            build: format!("{name} {version}"),
            protocol: protocol.parse().map_err(|_| wrong())?,
            // The section is filled up with zeroes.
            policy: Policy::parse(text.trim_end_matches('\0'), "the worker's declaration")?,
        })
    }
}

/// Offset and length of the segments that hold notes.
fn note_segments(binary: &File) -> Result<Vec<(u64, u64)>, DeclarationError> {
    const PT_NOTE: u32 = 4;
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let mut header = [0; HEADER];
    read_whole(binary, &mut header, 0)?;
    let (table, size, count) = (
        u64::from_le_bytes(bytes(&header, 32)?),
        u16::from_le_bytes(bytes(&header, 54)?),
        u16::from_le_bytes(bytes(&header, 56)?),
    );
    if !header.starts_with(b"\x7fELF\x02\x01")
        || usize::from(size) != SEGMENT
        || count > MAX_SEGMENTS
    {
        return Err(DeclarationError::Elf);
    }
    let mut found = Vec::new();
    for index in 0..u64::from(count) {
        let mut segment = [0; SEGMENT];
        let offset = table.checked_add(index * u64::from(size));
        read_whole(binary, &mut segment, offset.ok_or(DeclarationError::Elf)?)?;
        if u32::from_le_bytes(bytes(&segment, 0)?) == PT_NOTE {
            let (offset, length) = (bytes(&segment, 8)?, bytes(&segment, 32)?);
            found.push((u64::from_le_bytes(offset), u64::from_le_bytes(length)));
        }
    }
    Ok(found)
}

fn read_whole(binary: &File, buffer: &mut [u8], offset: u64) -> Result<(), DeclarationError> {
    binary
        .read_exact_at(buffer, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => DeclarationError::Elf,
            _ => DeclarationError::Read(error),
        })
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Result<[u8; N], DeclarationError> {
    from.get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .ok_or(DeclarationError::Elf)
}

struct Note<'a> {
    owner: &'a [u8],
    kind: u32,
    descriptor: &'a [u8],
}

/// The notes of a segment, up to the first that is cut short: three words, then owner and descriptor, each filled up to
/// whole words.
struct Notes<'a>(&'a [u8]);

impl<'a> Iterator for Notes<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        let mut word = || -> Option<u32> {
            let (word, rest) = self.0.split_first_chunk()?;
            self.0 = rest;
            Some(u32::from_le_bytes(*word))
        };
        let (owner, descriptor, kind) = (word()?, word()?, word()?);
        let mut part = |length: u32| -> Option<&'a [u8]> {
            let length = usize::try_from(length).ok()?;
            let part = self.0.get(..length)?;
            self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some(part)
        };
        Some(Note {
            owner: part(owner)?,
            descriptor: part(descriptor)?,
            kind,
        })
    }
}

/// A note as it lies in the file; [`crate::declare_needs!`] makes one.
#[doc(hidden)]
#[repr(C, align(4))]
#[derive(Debug)]
pub struct DeclarationNote<const LENGTH: usize> {
    owner_length: u32,
    descriptor_length: u32,
    kind: u32,
    /// With its filling.
    owner: [u8; 8],
    descriptor: [u8; LENGTH],
}

impl<const LENGTH: usize> DeclarationNote<LENGTH> {
    /// `LENGTH` is that of the texts together, filled up to whole words.
    #[doc(hidden)]
    #[must_use]
    #[expect(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        reason = "evaluated by the compiler, where a mistake is an error of the build"
    )]
    pub const fn new(line: &str, policy: &str) -> Self {
        let (line, policy) = (line.as_bytes(), policy.as_bytes());
        let mut descriptor = [0; LENGTH];
        let mut at = 0;
        while at < line.len() {
            descriptor[at] = line[at];
            at += 1;
        }
        while at < line.len() + policy.len() {
            descriptor[at] = policy[at - line.len()];
            at += 1;
        }
        Self {
            owner_length: OWNER.len() as u32,
            descriptor_length: LENGTH as u32,
            kind: DECLARATION,
            owner: *b"Baton\0\0\0",
            descriptor,
        }
    }
}

/// Puts into the program that invokes it the note that says what it needs: the built-in policy of its build, and its version
/// of the worker's protocol.
#[macro_export]
macro_rules! declare_needs {
    ($name:literal, protocol $protocol:literal) => {
        const _: () = {
            const LINE: &str = concat!(
                $name,
                " ",
                env!("CARGO_PKG_VERSION"),
                " protocol ",
                $protocol,
                "\n"
            );
            const LENGTH: usize = (LINE.len() + $crate::BUILTIN.len()).next_multiple_of(4);
            #[used]
            #[unsafe(link_section = ".note.baton")]
            static NEEDS: $crate::declaration::DeclarationNote<LENGTH> =
                $crate::declaration::DeclarationNote::new(LINE, $crate::BUILTIN);
        };
    };
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn note(owner: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for length in [owner.len(), descriptor.len()] {
            note.extend(u32::try_from(length).unwrap().to_le_bytes());
        }
        note.extend(kind.to_le_bytes());
        for part in [owner, descriptor] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn good() -> Vec<u8> {
        let text = format!("worker 1.2 protocol 7\n{}\0\0", crate::BUILTIN);
        note(OWNER, DECLARATION, text.as_bytes())
    }

    /// An ELF file with one segment of these notes.
    fn elf(notes: &[u8], length: u64) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64, 0);
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        let mut segment = vec![0; 56];
        segment[..4].copy_from_slice(&4_u32.to_le_bytes());
        segment[8..16].copy_from_slice(&120_u64.to_le_bytes());
        segment[32..40].copy_from_slice(&length.to_le_bytes());
        elf.extend(segment);
        elf.extend(notes);
        elf
    }

    fn read(bytes: &[u8]) -> Result<Declaration, DeclarationError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Declaration::read(&file)
    }

    fn read_notes(notes: &[u8]) -> Result<Declaration, DeclarationError> {
        read(&elf(notes, notes.len() as u64))
    }

    #[test]
    fn a_declaration_is_found_among_other_notes() {
        let notes = [note(b"GNU\0", 3, &[7; 20]), good(), note(b"X\0", 1, b"")].concat();
        let declaration = read_notes(&notes).unwrap();
        assert_eq!(declaration.build, "worker 1.2");
        assert_eq!(declaration.protocol, 7);
        assert_eq!(declaration.policy.rules, Policy::builtin().unwrap().rules);
    }

    #[test]
    fn what_is_no_declaration_is_an_error_that_says_so() {
        let error = |notes: &[u8]| read_notes(notes).unwrap_err();
        assert!(matches!(error(b""), DeclarationError::Absent));
        assert!(matches!(error(&[0xff; 64]), DeclarationError::Absent));
        assert!(matches!(
            error(&note(OWNER, 2, b"later")),
            DeclarationError::Absent
        ));
        assert!(matches!(
            error(&[good(), good()].concat()),
            DeclarationError::Several
        ));
        for line in [
            "",
            "worker 1",
            "a b protocol -1\n",
            "\u{1b}[2J b protocol 1\n",
        ] {
            let error = error(&note(OWNER, DECLARATION, line.as_bytes()));
            assert!(matches!(error, DeclarationError::Line(_)), "{error}");
            assert!(!error.to_string().contains('\u{1b}'));
        }
        let text = "worker 1 protocol 1\nschema = 99\n";
        let error = error(&note(OWNER, DECLARATION, text.as_bytes()));
        assert!(matches!(error, DeclarationError::Policy(_)), "{error}");
        assert!(matches!(
            read(&elf(&good(), MAX_NOTES + 1)).unwrap_err(),
            DeclarationError::Long(_)
        ));
        assert!(matches!(
            read(b"#!/bin/sh").unwrap_err(),
            DeclarationError::Elf
        ));
    }

    #[test]
    fn no_damage_is_taken_for_more_than_an_error() {
        let elf = elf(&good(), good().len() as u64);
        let head = 120 + 20;
        for end in (0..head).chain([elf.len() - 1]) {
            assert!(read(&elf[..end]).is_err(), "cut at {end}");
        }
        for at in 0..head {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = elf.clone();
                damaged[at] = value;
                // Whatever it says, it says it without a panic.
                let _ = read(&damaged);
            }
        }
    }
}
