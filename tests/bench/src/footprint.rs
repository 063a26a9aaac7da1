//! What a process costs the host, apart from guest RAM.

use anyhow::Context;
use anyhow::Result;
use serde::Serialize;

/// From `/proc/PID/smaps` (proc_pid_smaps(5)), without mappings of guest RAM; in KiB.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Footprint {
    /// Resident.
    pub(crate) rss_kib: u64,
    /// Resident, each page divided by the number of processes that map it.
    pub(crate) pss_kib: u64,
    /// Resident, and nobody else's.
    pub(crate) private_kib: u64,
}

impl Footprint {
    /// Of a process now, without the mappings whose names have `guest_ram` in them.
    pub(crate) fn of(pid: u32, guest_ram: &str) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(Self::parse(&text, guest_ram))
    }

    fn parse(text: &str, guest_ram: &str) -> Self {
        let mut sum = Self::default();
        let mut guest = false;
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let first = words.next().unwrap_or_default();
            let Some(field) = first.strip_suffix(':') else {
                guest = line.contains(guest_ram);
                continue;
            };
            let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match field {
                _ if guest => {}
                "Rss" => sum.rss_kib += value,
                "Pss" => sum.pss_kib += value,
                "Private_Clean" | "Private_Dirty" => sum.private_kib += value,
                _ => {}
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let text = "\
55d0-55d1 r--p 00000000 fe:00 1 /usr/libexec/baton-worker
Rss:                   8 kB
Pss:                   4 kB
Private_Clean:         2 kB
7f00-7f10 rw-s 00000000 00:01 2 /memfd:guest-ram (deleted)
Rss:              262144 kB
Pss:              262144 kB
Private_Dirty:    262144 kB
7f20-7f21 rw-p 00000000 00:00 0
Rss:                   4 kB
Pss:                   4 kB
Private_Dirty:         4 kB
VmFlags: rd wr
";
        let sum = Footprint::parse(text, "/memfd:guest-ram");
        assert_eq!((sum.rss_kib, sum.pss_kib, sum.private_kib), (12, 8, 6));
    }
}
