//! Is anything in a worker's address space both writable and executable, or executable and not the worker's own binary?

use super::{Discrepancy, Finding};

/// A file by what `/proc/PID/maps` says of it: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Major number of the device.
    pub major: u32,
    /// Minor number of the device.
    pub minor: u32,
    /// Inode.
    pub inode: u64,
}

/// What there is in an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// How many mappings.
    pub mappings: usize,
    /// How many of them are executable.
    pub executable: usize,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Code that the kernel itself puts there (`arch_vma_name`, arch/x86/mm).
const KERNELS: [&str; 2] = ["[vdso]", "[vsyscall]"];

/// Judges the text of `/proc/PID/maps` (proc_pid_maps(5)) of a worker that executes this file.
#[must_use]
pub fn memory(binary: FileIdentity, text: &str) -> Memory {
    let mut memory = Memory::default();
    let mut find = |what: String| {
        memory.findings.push(Finding {
            tid: None,
            what: Discrepancy::Memory { what },
        });
    };
    for line in text.lines() {
        let Some((permissions, identity, name)) = mapping(line) else {
            find(format!("a mapping that cannot be read: {line:.80?}"));
            continue;
        };
        memory.mappings += 1;
        if !permissions.contains('x') {
            continue;
        }
        memory.executable += 1;
        if permissions.contains('w') {
            find(format!("writable and executable memory: {line:.120}"));
        } else if identity != binary && !KERNELS.contains(&name) {
            find(format!(
                "executable memory that is not the worker's binary: {line:.120}"
            ));
        }
    }
    if memory.mappings == 0 {
        find("no mapping at all".to_owned());
    }
    memory
}

/// Permissions, file and name of a mapping.
fn mapping(line: &str) -> Option<(&str, FileIdentity, &str)> {
    let mut words = line.splitn(6, ' ');
    let (_range, permissions, _offset) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?.parse().ok()?;
    let identity = FileIdentity {
        major: u32::from_str_radix(major, 16).ok()?,
        minor: u32::from_str_radix(minor, 16).ok()?,
        inode,
    };
    (permissions.len() == 4).then_some((permissions, identity, words.next().unwrap_or("").trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINARY: FileIdentity = FileIdentity {
        major: 0,
        minor: 1,
        inode: 77,
    };
    const MAPS: &str = "\
7f0000000000-7f0000001000 r--p 00000000 00:01 77    /memfd:baton-worker (deleted)
7f0000001000-7f0000002000 r-xp 00001000 00:01 77    /memfd:baton-worker (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0 
7f0000003000-7f0004003000 rw-s 00000000 00:01 78    /memfd:guest-ram (deleted)
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0     [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn a_workers_own_code_and_the_kernels_are_all_that_is_executable() {
        let found = memory(BINARY, MAPS);
        assert_eq!((found.mappings, found.executable), (6, 3));
        assert_eq!(found.findings, []);
    }

    #[test]
    fn everything_else_is_found() {
        for (from, to) in [
            ("r-xp 00001000", "rwxp 00001000"),
            ("rw-p 00000000 00:00 0", "r-xp 00000000 00:00 0"),
            ("rw-s 00000000 00:01 78", "r-xs 00000000 00:01 78"),
            ("r-xp 00001000 00:01 77", "r-xp 00001000 00:02 77"),
            ("[vdso]", "[vdso2]"),
            ("r-xp 00001000 00:01 77", "garbage"),
        ] {
            let text = MAPS.replacen(from, to, 1);
            assert_ne!(text, MAPS);
            assert_eq!(memory(BINARY, &text).findings.len(), 1, "{to}");
        }
        assert_eq!(memory(BINARY, "").findings.len(), 1);
    }

    #[test]
    fn this_process_is_its_own_binary() {
        use std::os::unix::fs::MetadataExt;
        let exe = std::fs::metadata("/proc/self/exe").unwrap();
        let binary = FileIdentity {
            major: rustix::fs::major(exe.dev()),
            minor: rustix::fs::minor(exe.dev()),
            inode: exe.ino(),
        };
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let found = memory(binary, &text);
        assert!(found.executable >= 2, "{found:?}");
        assert_eq!(found.findings, []);
    }
}
