//! Filters as `seccomp-tools dump` writes them, for those who read such listings every day. [`crate::bpf::disassemble`] is for
//! everybody else.

use std::fmt::Write;

use crate::bpf::{AUDIT_ARCH_X86_64, Answer};
use crate::program::{Instruction, Program};
use crate::syscalls::Syscall;

/// What the accumulator holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Number,
    Arch,
    Other,
}

/// The listing: line, code, both jumps and the constant as they are, then what they do.
#[must_use]
pub fn listing(program: &Program) -> String {
    let mut text = String::from(" line  CODE  JT   JF      K\n=================================\n");
    let mut held = Held::Other;
    for (at, instruction) in program.instructions().enumerate() {
        let Instruction { code, jt, jf, k } = instruction;
        let what = statement(at, instruction, &mut held);
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            " {at:04}: {code:#04x} {jt:#04x} {jf:#04x} {k:#010x}  {what}"
        );
    }
    text
}

/// The codes are those of `linux/bpf_common.h` and `linux/filter.h`.
fn statement(at: usize, instruction: Instruction, held: &mut Held) -> String {
    let Instruction { code, jt, jf, k } = instruction;
    let target = |skip: u8| at + 1 + usize::from(skip);
    let compare = |is: &str, is_not: &str| {
        let value = match (*held, Syscall::from_number(k)) {
            (Held::Number, Some(call)) => call.name().to_owned(),
            (Held::Arch, _) if k == AUDIT_ARCH_X86_64 => "ARCH_X86_64".to_owned(),
            _ => format!("{k:#x}"),
        };
        match (jt, jf) {
            (0, jf) => format!("if (A {is_not} {value}) goto {:04}", target(jf)),
            (jt, 0) => format!("if (A {is} {value}) goto {:04}", target(jt)),
            (jt, jf) => {
                let (yes, no) = (target(jt), target(jf));
                format!("if (A {is} {value}) goto {yes:04} else goto {no:04}")
            }
        }
    };
    match code {
        0x20 => {
            // Offsets into `struct seccomp_data`.
            let (holds, what) = match k {
                0 => (Held::Number, "sys_number".to_owned()),
                4 => (Held::Arch, "arch".to_owned()),
                16..64 if k % 8 == 0 => (Held::Other, format!("args[{}]", (k - 16) / 8)),
                16..64 if k % 8 == 4 => (Held::Other, format!("args[{}] >> 32", (k - 16) / 8)),
                _ => (Held::Other, format!("data[{k}]")),
            };
            *held = holds;
            format!("A = {what}")
        }
        0x54 => format!("A &= {k:#x}"),
        0x05 => {
            let skip = usize::try_from(k).unwrap_or(usize::MAX);
            format!("goto {:04}", at.saturating_add(1).saturating_add(skip))
        }
        0x15 => compare("==", "!="),
        0x25 => compare(">", "<="),
        0x35 => compare(">=", "<"),
        0x06 => {
            // The next call's comparison is jumped to with the number held.
            *held = Held::Number;
            match Answer::from_value(k) {
                Answer::Allow => "return ALLOW".to_owned(),
                Answer::Errno(errno) => format!("return ERRNO({errno})"),
                Answer::Trap => "return TRAP".to_owned(),
                Answer::KillProcess => "return KILL_PROCESS".to_owned(),
                Answer::Other(value) => format!("return {value:#x}"),
            }
        }
        code => format!("unknown {code:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Policy, Role};

    #[test]
    fn a_listing_has_the_instructions_and_says_what_they_do() {
        let compiled = Policy::builtin().unwrap().compile().unwrap();
        let program = compiled.roles.get(&Role::Vcpu).unwrap();
        let text = listing(program);
        assert_eq!(text.lines().count(), program.len() + 2);
        for expected in [
            " 0000: 0x20 0x00 0x00 0x00000004  A = arch\n",
            "0xc000003e  if (A == ARCH_X86_64) goto ",
            "A = sys_number\n",
            "read) goto ",
            "A = args[1]\n",
            "return KILL_PROCESS\n",
            "return ALLOW\n",
            "return TRAP\n",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
        assert!(!text.contains("unknown"));
        // Each target is a line of the listing.
        for target in text.split("goto ").skip(1) {
            let target: usize = target.get(..4).unwrap().parse().unwrap();
            assert!(target < program.len());
        }
    }
}
