//! An interpreter and a disassembler for the classic BPF that seccompiler emits.
//!
//! They exist so that nobody has to trust the compiler: the interpreter runs a filter on any call and is held
//! against the policy's own meaning ([`crate::judge`]) by property tests, the disassembler shows what was installed.
//! Seven instructions are known; any other is an error, as is everything that the kernel's checker refuses
//! (`seccomp_check_filter`, `bpf_check_classic` in the kernel).

use std::fmt::Write;

use crate::condition::symbolic;
use crate::constants::Family;
use crate::program::{Instruction, Program};
use crate::syscalls::Syscall;

/// `AUDIT_ARCH_X86_64` (`linux/audit.h`).
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

// `linux/bpf_common.h`, `linux/filter.h`.
const LD_W_ABS: u16 = 0x20;
const ALU_AND_K: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGT_K: u16 = 0x25;
const JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

/// Size of `struct seccomp_data` (`linux/seccomp.h`): number, architecture, instruction pointer, six arguments.
const DATA_SIZE: u32 = 64;

/// A call as a filter sees it, `struct seccomp_data`. The instruction pointer is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The number in `eax`.
    pub number: u32,
    /// The calling convention.
    pub arch: u32,
    /// The arguments.
    pub arguments: [u64; 6],
}

/// What a filter, or several, answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The call is executed.
    Allow,
    /// It is not, and returns this error number.
    Errno(u16),
    /// It is not, and raises SIGSYS.
    Trap,
    /// It is not, and ends the process.
    KillProcess,
    /// Anything else that the kernel knows.
    Other(u32),
}

/// A program that no kernel would accept, or that the compiler would not emit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BpfError {
    /// An instruction of another kind.
    #[error(
        "instruction {at} has the code {code:#06x}, which is none of the seven that are emitted"
    )]
    Code {
        /// Where.
        at: usize,
        /// Its code.
        code: u16,
    },
    /// A load from outside `struct seccomp_data`, or not of a word.
    #[error("instruction {at} loads from offset {offset}")]
    Load {
        /// Where.
        at: usize,
        /// From where.
        offset: u32,
    },
    /// The end of the program was passed.
    #[error("instruction {at} is past the end")]
    End {
        /// Where.
        at: usize,
    },
}

impl Call {
    /// An ordinary call of a 64-bit program.
    #[must_use]
    pub const fn new(number: u32, arguments: [u64; 6]) -> Self {
        Self {
            number,
            arch: AUDIT_ARCH_X86_64,
            arguments,
        }
    }

    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64, high: bool| {
            let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
            u32::from_le_bytes(if high { [e, f, g, h] } else { [a, b, c, d] })
        };
        match offset {
            0 => Some(self.number),
            4 => Some(self.arch),
            8 | 12 => Some(0),
            16..DATA_SIZE if offset % 4 == 0 => {
                let argument = self
                    .arguments
                    .get(usize::try_from((offset - 16) / 8).ok()?)?;
                Some(half(*argument, offset % 8 == 4))
            }
            _ => None,
        }
    }
}

impl Answer {
    /// The answer that a filter's return value stands for (`SECCOMP_RET_*`).
    #[must_use]
    pub fn from_value(value: u32) -> Self {
        match value & libc::SECCOMP_RET_ACTION_FULL {
            libc::SECCOMP_RET_ALLOW => Self::Allow,
            libc::SECCOMP_RET_TRAP => Self::Trap,
            libc::SECCOMP_RET_KILL_PROCESS => Self::KillProcess,
            libc::SECCOMP_RET_ERRNO => {
                // The low 16 bits, SECCOMP_RET_DATA.
                let [a, b, ..] = value.to_le_bytes();
                Self::Errno(u16::from_le_bytes([a, b]))
            }
            _ => Self::Other(value),
        }
    }
}

/// What the kernel does with `call` under `program`.
///
/// # Errors
///
/// When the program is not one that the kernel accepts and seccompiler emits.
pub fn run(program: &Program, call: &Call) -> Result<u32, BpfError> {
    let instructions: Vec<Instruction> = program.instructions().collect();
    let mut accumulator = 0_u32;
    let mut at = 0_usize;
    // Jumps only go forward, so this ends.
    loop {
        let Instruction { code, jt, jf, k } = *instructions.get(at).ok_or(BpfError::End { at })?;
        let branch = |taken: bool| usize::from(if taken { jt } else { jf });
        let skip = match code {
            LD_W_ABS => {
                accumulator = call.word(k).ok_or(BpfError::Load { at, offset: k })?;
                0
            }
            ALU_AND_K => {
                accumulator &= k;
                0
            }
            JA => usize::try_from(k).map_err(|_| BpfError::End { at })?,
            JEQ_K => branch(accumulator == k),
            JGT_K => branch(accumulator > k),
            JGE_K => branch(accumulator >= k),
            RET_K => return Ok(k),
            code => return Err(BpfError::Code { at, code }),
        };
        at = at.saturating_add(skip).saturating_add(1);
    }
}

/// What the kernel does with `call` under all of `programs`: it runs every one and takes the strictest answer,
/// which is the least as a signed number (`seccomp_run_filters` in `kernel/seccomp.c`).
///
/// # Errors
///
/// As [`run`].
pub fn run_all<'a>(
    programs: impl IntoIterator<Item = &'a Program>,
    call: &Call,
) -> Result<Answer, BpfError> {
    let mut strictest = libc::SECCOMP_RET_ALLOW;
    let rank =
        |value: u32| i32::from_ne_bytes((value & libc::SECCOMP_RET_ACTION_FULL).to_ne_bytes());
    // The kernel begins with the filter that was installed last, which decides between equals.
    let programs: Vec<&Program> = programs.into_iter().collect();
    for program in programs.into_iter().rev() {
        let value = run(program, call)?;
        if rank(value) < rank(strictest) {
            strictest = value;
        }
    }
    Ok(Answer::from_value(strictest))
}

/// The program, an instruction a line, with jumps as line numbers and the names that numbers stand for.
#[must_use]
pub fn disassemble(program: &Program) -> String {
    let mut text = String::new();
    let mut reader = Reader::default();
    for (at, instruction) in program.instructions().enumerate() {
        let (code, comment) = reader.read(at, instruction);
        // Writing to a string does not fail.
        let _ = match comment {
            Some(comment) => writeln!(text, "{at:4}  {code:<34}  ; {comment}"),
            None => writeln!(text, "{at:4}  {code}"),
        };
    }
    text
}

/// What the instructions so far say about the next, in seccompiler's straightforward layout.
#[derive(Default)]
struct Reader {
    loaded: Option<Loaded>,
    call: Option<Syscall>,
}

#[derive(Clone, Copy)]
enum Loaded {
    Number,
    Arch,
    Argument { index: u8, high: bool },
}

impl Reader {
    fn read(&mut self, at: usize, instruction: Instruction) -> (String, Option<String>) {
        let Instruction { code, jt, jf, k } = instruction;
        let to = |skip: u8| at + 1 + usize::from(skip);
        let jump = |name: &str| format!("{name} {k:#x}, {}, {}", to(jt), to(jf));
        match code {
            LD_W_ABS => {
                self.loaded = loaded(k);
                let what = match self.loaded {
                    Some(Loaded::Number) => "the system call's number".to_owned(),
                    Some(Loaded::Arch) => "the architecture".to_owned(),
                    Some(Loaded::Argument { index, high }) => {
                        let name = self.argument(index).map_or_else(
                            || format!("argument {index}"),
                            |(name, _)| name.to_owned(),
                        );
                        format!("{name}, {} half", if high { "upper" } else { "lower" })
                    }
                    None => "?".to_owned(),
                };
                (format!("ld  [{k}]"), Some(what))
            }
            ALU_AND_K => (format!("and {k:#x}"), self.constant(k)),
            JA => (
                format!(
                    "ja  {}",
                    at.saturating_add(1)
                        .saturating_add(usize::try_from(k).unwrap_or(usize::MAX))
                ),
                None,
            ),
            JEQ_K => {
                let comment = match self.loaded {
                    Some(Loaded::Number) => {
                        self.call = Syscall::from_number(k);
                        self.call.map(|call| call.name().to_owned())
                    }
                    Some(Loaded::Arch) if k == AUDIT_ARCH_X86_64 => Some("x86-64".to_owned()),
                    _ => self.constant(k),
                };
                (jump("jeq"), comment)
            }
            JGT_K => (jump("jgt"), None),
            JGE_K => (jump("jge"), None),
            RET_K => {
                // The next call's comparison is reached only by jumping over all of this one's rules, with the
                // number still loaded.
                self.loaded = Some(Loaded::Number);
                (
                    format!("ret {k:#x}"),
                    Some(format!("{:?}", Answer::from_value(k))),
                )
            }
            code => (
                format!("{code:#06x} {jt} {jf} {k:#x}"),
                Some("not known".to_owned()),
            ),
        }
    }

    fn argument(&self, index: u8) -> Option<(&'static str, Family)> {
        let argument = self
            .call?
            .arguments()
            .iter()
            .find(|argument| argument.index == index)?;
        Some((argument.name, argument.family))
    }

    fn constant(&self, k: u32) -> Option<String> {
        match self.loaded? {
            Loaded::Argument { index, high: false } => {
                let (_, family) = self.argument(index)?;
                let name = symbolic(family, u64::from(k));
                (!name.starts_with(|first: char| first.is_ascii_digit())).then_some(name)
            }
            _ => None,
        }
    }
}

fn loaded(offset: u32) -> Option<Loaded> {
    match offset {
        0 => Some(Loaded::Number),
        4 => Some(Loaded::Arch),
        16..DATA_SIZE if offset % 4 == 0 => Some(Loaded::Argument {
            index: u8::try_from((offset - 16) / 8).ok()?,
            high: offset % 8 == 4,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(instructions: &[(u16, u8, u8, u32)]) -> Program {
        let all = instructions
            .iter()
            .map(|&(code, jt, jf, k)| Instruction { code, jt, jf, k });
        Program::from_instructions(all).unwrap()
    }

    #[test]
    fn loads_see_each_word_of_the_call() {
        let call = Call {
            number: 7,
            arch: 8,
            arguments: [0x0102_0304_0506_0708, 0, 0, 0, 0, 0xffff_fffe_0000_0001],
        };
        for (offset, word) in [
            (0, 7),
            (4, 8),
            (8, 0),
            (16, 0x0506_0708),
            (20, 0x0102_0304),
            (56, 1),
            (60, 0xffff_fffe),
        ] {
            assert_eq!(call.word(offset), Some(word), "{offset}");
        }
        for offset in [64, 17, 1, u32::MAX] {
            assert_eq!(call.word(offset), None, "{offset}");
        }
    }

    #[test]
    fn what_is_not_emitted_is_not_run() {
        let call = Call::new(0, [0; 6]);
        assert_eq!(
            run(&program(&[(0x16, 0, 0, 0)]), &call),
            Err(BpfError::Code { at: 0, code: 0x16 })
        );
        assert_eq!(
            run(&program(&[(LD_W_ABS, 0, 0, 2)]), &call),
            Err(BpfError::Load { at: 0, offset: 2 })
        );
        assert_eq!(
            run(&program(&[(JA, 0, 0, 5)]), &call),
            Err(BpfError::End { at: 6 })
        );
        assert_eq!(
            run(&program(&[(JA, 0, 0, u32::MAX)]), &call),
            Err(BpfError::End { at: 1 << 32 })
        );
    }

    #[test]
    fn the_strictest_answer_wins() {
        let answer = |values: &[u32]| {
            let programs: Vec<_> = values
                .iter()
                .map(|value| program(&[(RET_K, 0, 0, *value)]))
                .collect();
            run_all(&programs, &Call::new(0, [0; 6])).unwrap()
        };
        let (allow, errno, trap, kill) = (0x7fff_0000, 0x0005_0026, 0x0003_0000, 0x8000_0000);
        assert_eq!(answer(&[]), Answer::Allow);
        assert_eq!(answer(&[errno, allow]), Answer::Errno(38));
        assert_eq!(answer(&[errno, trap, allow]), Answer::Trap);
        assert_eq!(answer(&[kill, trap]), Answer::KillProcess);
        assert_eq!(answer(&[trap, kill]), Answer::KillProcess);
        assert_eq!(
            answer(&[0x0005_0001, errno]),
            Answer::Errno(38),
            "of equals the last installed"
        );
    }

    #[test]
    fn a_disassembly_names_calls_and_constants() {
        let compiled = crate::Policy::builtin().unwrap().compile().unwrap();
        let text = disassemble(compiled.roles.get(&crate::Role::Vcpu).unwrap());
        for expected in [
            "; x86-64",
            "; ioctl",
            "; KVM_RUN",
            "; PROT_EXEC",
            "; request, lower half",
            "; Trap",
            "; Allow",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
        assert!(!text.contains("not known"));
    }
}
