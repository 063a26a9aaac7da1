//! The command line: words separated by spaces; unknown ones are left to whoever understands them.

use crate::layout::MAX_VCPUS;

/// I/O as fast as it goes; none of 0 bytes.
pub struct Load {
    /// Of a request, or of a frame.
    pub bytes: u64,
    pub depth: u64,
    pub write: bool,
    pub random: bool,
    pub send: bool,
    pub receive: bool,
}

/// What the words say; defaults where they say nothing.
pub struct Options {
    pub vcpus: usize,
    /// Bytes to walk; 0 without `walk`.
    pub walk: u64,
    pub console: bool,
    pub period_ms: u64,
    pub gap_us: u64,
    pub tsc_khz: Option<u64>,
    pub timer_us: Option<u64>,
    pub ipi_us: Option<u64>,
    pub reset_after_lines: Option<u64>,
    pub off_after_lines: Option<u64>,
    pub disk: bool,
    pub disk_irq: bool,
    pub hotplug: bool,
    pub net: bool,
    pub net_rest: bool,
    pub vsock: Option<u64>,
    pub balloon: bool,
    pub fs: bool,
    pub load: Load,
    /// The machine has no firmware.
    pub bare: bool,
    pub hvc: bool,
    pub rng: bool,
    pub wreck: bool,
    pub stack: bool,
}

impl Options {
    pub fn parse(line: &[u8]) -> Self {
        let mut options = Self {
            vcpus: 1,
            walk: 0,
            console: false,
            period_ms: 100,
            gap_us: 100,
            tsc_khz: None,
            timer_us: None,
            ipi_us: None,
            reset_after_lines: None,
            off_after_lines: None,
            disk: false,
            disk_irq: false,
            hotplug: false,
            net: false,
            net_rest: false,
            vsock: None,
            balloon: false,
            fs: false,
            load: Load {
                bytes: 0,
                depth: 32,
                write: false,
                random: false,
                send: false,
                receive: false,
            },
            bare: false,
            hvc: false,
            rng: false,
            wreck: false,
            stack: false,
        };
        for word in line.split(|byte| *byte == b' ') {
            let mut halves = word.splitn(2, |byte| *byte == b'=');
            let key = halves.next().unwrap_or_default();
            let value = halves.next().map(size);
            match (key, value) {
                (b"walk", None) => options.walk = u64::MAX,
                (b"walk", Some(Some(bytes))) => options.walk = bytes,
                (b"console", None) => options.console = true,
                (b"net", None) => options.net = true,
                (b"net_rest", None) => (options.net, options.net_rest) = (true, true),
                (b"vsock", Some(Some(port))) => options.vsock = Some(port),
                (b"balloon", None) => options.balloon = true,
                (b"fs", None) => options.fs = true,
                (b"load", Some(Some(bytes))) => options.load.bytes = bytes,
                (b"load_depth", Some(Some(depth))) => options.load.depth = depth,
                (b"load_write", None) => options.load.write = true,
                (b"load_random", None) => options.load.random = true,
                (b"load_send", None) => options.load.send = true,
                (b"load_receive", None) => options.load.receive = true,
                (b"bare", None) => options.bare = true,
                (b"hvc", None) => options.hvc = true,
                (b"rng", None) => options.rng = true,
                (b"wreck", None) => options.wreck = true,
                (b"stack", None) => (options.wreck, options.stack) = (true, true),
                (b"disk", None) => options.disk = true,
                (b"disk_irq", None) => (options.disk, options.disk_irq) = (true, true),
                (b"hotplug", None) => options.hotplug = true,
                (b"cpus", Some(Some(count))) => {
                    options.vcpus = (count as usize).clamp(1, MAX_VCPUS)
                }
                (b"period_ms", Some(Some(ms))) => options.period_ms = ms.max(1),
                (b"gap_us", Some(Some(us))) => options.gap_us = us.max(1),
                (b"tsc_khz", Some(Some(khz))) if khz != 0 => options.tsc_khz = Some(khz),
                (b"timer_us", Some(Some(us))) if us != 0 => options.timer_us = Some(us),
                (b"ipi_us", Some(us @ Some(_))) => options.ipi_us = us,
                (b"reset_after_lines", Some(lines @ Some(_))) => options.reset_after_lines = lines,
                (b"off_after_lines", Some(lines @ Some(_))) => options.off_after_lines = lines,
                _ => {}
            }
        }
        options
    }
}

/// A number, with `K`, `M` or `G` for the binary multiples.
fn size(text: &[u8]) -> Option<u64> {
    let (digits, unit) = match text.split_last() {
        Some((b'K', digits)) => (digits, 1 << 10),
        Some((b'M', digits)) => (digits, 1 << 20),
        Some((b'G', digits)) => (digits, 1 << 30),
        _ => (text, 1),
    };
    if digits.is_empty() {
        return None;
    }
    let mut value = 0_u64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))?;
    }
    value.checked_mul(unit)
}
