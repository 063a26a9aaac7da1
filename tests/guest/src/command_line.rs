//! The guest's command line, as the VMM hands it over.

use std::fmt;

/// Builds the words that the guest understands; what is not said takes the guest's default.
///
/// ```
/// let line = baton_guest::CommandLine::new().cpus(2).walk_bytes(64 << 20).console().period_ms(50);
/// assert_eq!(line.to_string(), "cpus=2 walk=67108864 console period_ms=50");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine(Vec<String>);

impl CommandLine {
    /// One vCPU that counts, and nothing else.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn word(mut self, word: String) -> Self {
        self.0.push(word);
        self
    }

    /// Starts this many vCPUs in all (1 to [`MAX_VCPUS`](crate::layout::MAX_VCPUS)), whose APIC ids are 0, 1, 2, ….
    #[must_use]
    pub fn cpus(self, count: usize) -> Self {
        self.word(format!("cpus={count}"))
    }

    /// Walks all usable RAM above the image.
    #[must_use]
    pub fn walk(self) -> Self {
        self.word("walk".into())
    }

    /// Walks that many bytes of it, rounded down to pages.
    #[must_use]
    pub fn walk_bytes(self, bytes: u64) -> Self {
        self.word(format!("walk={bytes}"))
    }

    /// Prints to the serial port at 0x3f8, and takes commands there.
    #[must_use]
    pub fn console(self) -> Self {
        self.word("console".into())
    }

    /// Prints a status line each so many milliseconds; 100 by default.
    #[must_use]
    pub fn period_ms(self, period: u64) -> Self {
        self.word(format!("period_ms={period}"))
    }

    /// Counts gaps of at least so many microseconds; 100 by default.
    #[must_use]
    pub fn gap_us(self, gap: u64) -> Self {
        self.word(format!("gap_us={gap}"))
    }

    /// Says how fast the TSC runs (`KVM_GET_TSC_KHZ`), over what CPUID says.
    #[must_use]
    pub fn tsc_khz(self, khz: u32) -> Self {
        self.word(format!("tsc_khz={khz}"))
    }

    /// Has each vCPU interrupted by its local timer, each so many microseconds (up to 4 s).
    #[must_use]
    pub fn timer_us(self, period: u32) -> Self {
        self.word(format!("timer_us={period}"))
    }

    /// Has each vCPU interrupt the next one, at most once in so many microseconds.
    #[must_use]
    pub fn ipi_us(self, period: u32) -> Self {
        self.word(format!("ipi_us={period}"))
    }

    /// Drives the first virtio disk: writes blocks and reads them back.
    #[must_use]
    pub fn disk(self) -> Self {
        self.word("disk".into())
    }

    /// The same, with an interrupt for each completion.
    #[must_use]
    pub fn disk_irq(self) -> Self {
        self.word("disk_irq".into())
    }

    /// Drives a virtio disk that comes while it runs, and lets it go when it is asked to.
    #[must_use]
    pub fn hotplug(self) -> Self {
        self.word("hotplug".into())
    }

    /// Drives the first virtio network interface: sends frames, and checks those that come.
    #[must_use]
    pub fn net(self) -> Self {
        self.word("net".into())
    }

    /// The same, but begins at rest: whoever is at the other end has to be there first.
    #[must_use]
    pub fn net_rest(self) -> Self {
        self.word("net_rest".into())
    }

    /// Drives the virtio socket device: connects to this port of the host, unless it is 0, and sends back what comes on
    /// any connection.
    #[must_use]
    pub fn vsock(self, port: u32) -> Self {
        self.word(format!("vsock={port}"))
    }

    /// Drives the virtio balloon: fills memory, and says that it is free, on command.
    #[must_use]
    pub fn balloon(self) -> Self {
        self.word("balloon".into())
    }

    /// Drives the first virtio file system: makes a file and writes into it.
    #[must_use]
    pub fn fs(self) -> Self {
        self.word("fs".into())
    }

    /// Loads the first virtio disk with requests of that many bytes, `depth` at once (1 to 85), one place after the other.
    #[must_use]
    pub fn load_disk(self, bytes: u32, depth: u16) -> Self {
        self.word(format!("load={bytes} load_depth={depth}"))
    }

    /// Those requests write.
    #[must_use]
    pub fn load_writing(self) -> Self {
        self.word("load_write".into())
    }

    /// Those requests are for random places.
    #[must_use]
    pub fn load_random(self) -> Self {
        self.word("load_random".into())
    }

    /// Sends frames of that many bytes (14 to 1514), as many as the first network interface takes.
    #[must_use]
    pub fn load_sending(self, bytes: u16) -> Self {
        self.word(format!("load={bytes} load_send"))
    }

    /// Counts the frames that the first network interface receives.
    #[must_use]
    pub fn load_receiving(self) -> Self {
        self.word("load=1 load_receive".into())
    }

    /// Does what firmware would do, on a machine of QEMU's that has none.
    #[must_use]
    pub fn bare(self) -> Self {
        self.word("bare".into())
    }

    /// Drives the virtio console: sends back what is typed there.
    #[must_use]
    pub fn hvc(self) -> Self {
        self.word("hvc".into())
    }

    /// Drives the entropy device: asks for random bytes.
    #[must_use]
    pub fn rng(self) -> Self {
        self.word("rng".into())
    }

    /// Drives every virtio device that nothing else here drives as no driver should, but the balloon.
    #[must_use]
    pub fn wreck(self) -> Self {
        self.word("wreck".into())
    }

    /// Puts every virtio device that nothing else here drives, but the balloon, where the first of them is, and leaves them there.
    #[must_use]
    pub fn stack(self) -> Self {
        self.word("stack".into())
    }

    /// Resets the machine through the keyboard controller after that status line.
    #[must_use]
    pub fn reset_after_lines(self, lines: u64) -> Self {
        self.word(format!("reset_after_lines={lines}"))
    }

    /// Switches the machine off through ACPI after that status line.
    #[must_use]
    pub fn off_after_lines(self, lines: u64) -> Self {
        self.word(format!("off_after_lines={lines}"))
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}
