//! One seccomp filter as the kernel takes it: classic BPF, eight bytes an instruction.
//!
//! A program is what travels: the broker compiles it, the launcher and the worker's threads install it, and what
//! the kernel reports of a running thread is one again, so that the two can be compared byte by byte.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::kernel;

/// The most instructions that the kernel accepts, `BPF_MAXINSNS` (`linux/bpf_common.h`).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// One instruction, `struct sock_filter` (`linux/filter.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Instruction {
    /// Class, size, mode or operation.
    pub code: u16,
    /// How many instructions a true comparison skips.
    pub jt: u8,
    /// How many instructions a false comparison skips.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

/// A seccomp filter: 1 to [`MAX_INSTRUCTIONS`] instructions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Program(Vec<u8>);

/// Bytes that are no filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are no filter: it has 1 to {MAX_INSTRUCTIONS} instructions of 8 bytes")]
pub struct ProgramError {
    /// How many bytes there were.
    pub bytes: usize,
}

impl Program {
    /// The program with these bytes, in the byte order of this machine. What the instructions do is the kernel's
    /// to check, which refuses jumps out of the program and loads outside `struct seccomp_data`.
    ///
    /// # Errors
    ///
    /// When `bytes` is empty, no multiple of 8, or longer than the kernel accepts.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ProgramError> {
        Self::try_from(bytes.to_vec())
    }

    pub(crate) fn from_instructions(
        instructions: impl Iterator<Item = Instruction>,
    ) -> Result<Self, ProgramError> {
        Self::try_from(
            instructions
                .flat_map(Instruction::to_bytes)
                .collect::<Vec<u8>>(),
        )
    }

    /// Its bytes, eight an instruction.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// How many instructions it has. Never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a program is never empty")]
    pub fn len(&self) -> usize {
        self.0.len() / 8
    }

    /// Its instructions, first to last.
    pub fn instructions(&self) -> impl Iterator<Item = Instruction> + '_ {
        self.0
            .chunks_exact(8)
            .filter_map(|bytes| Some(Instruction::from_bytes(*bytes.first_chunk()?)))
    }

    /// The digest of its bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }

    /// Puts the filter on the calling thread, for good, below every filter that the thread has. Threads that it
    /// makes afterwards inherit it; its siblings do not get it.
    ///
    /// # Errors
    ///
    /// EACCES without `no_new_privs` (see [`crate::no_new_privs`]) and without CAP_SYS_ADMIN; EINVAL when the
    /// program is malformed; ENOMEM when all filters of the thread together are too long.
    pub fn install(&self) -> io::Result<()> {
        kernel::seccomp_install(self)
    }
}

impl Instruction {
    fn to_bytes(self) -> [u8; 8] {
        let [c0, c1] = self.code.to_ne_bytes();
        let [k0, k1, k2, k3] = self.k.to_ne_bytes();
        [c0, c1, self.jt, self.jf, k0, k1, k2, k3]
    }

    fn from_bytes([c0, c1, jt, jf, k0, k1, k2, k3]: [u8; 8]) -> Self {
        Self {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        }
    }
}

impl TryFrom<Vec<u8>> for Program {
    type Error = ProgramError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, ProgramError> {
        if bytes.is_empty() || bytes.len() % 8 != 0 || bytes.len() / 8 > MAX_INSTRUCTIONS {
            return Err(ProgramError { bytes: bytes.len() });
        }
        Ok(Self(bytes))
    }
}

impl From<Program> for Vec<u8> {
    fn from(program: Program) -> Self {
        program.0
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Program({} instructions, {})", self.len(), self.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_programs_of_a_size_that_the_kernel_takes_are_accepted() {
        for bytes in [0, 7, 9, MAX_INSTRUCTIONS * 8 + 8] {
            assert_eq!(
                Program::from_bytes(&vec![0; bytes]),
                Err(ProgramError { bytes })
            );
        }
        assert_eq!(
            Program::from_bytes(&vec![0; MAX_INSTRUCTIONS * 8])
                .unwrap()
                .len(),
            MAX_INSTRUCTIONS
        );
    }

    #[test]
    fn instructions_and_bytes_are_the_same_thing() {
        let all = [
            Instruction {
                code: 0x20,
                jt: 0,
                jf: 0,
                k: 4,
            },
            Instruction {
                code: 0x15,
                jt: 1,
                jf: 255,
                k: 0xc000_003e,
            },
        ];
        let program = Program::from_instructions(all.into_iter()).unwrap();
        assert_eq!(program.instructions().collect::<Vec<_>>(), all);
        assert_eq!(Program::from_bytes(program.as_bytes()).unwrap(), program);
        let text = serde_json::to_string(&program).unwrap();
        assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program);
        assert!(serde_json::from_str::<Program>("[1,2,3]").is_err());
    }
}
