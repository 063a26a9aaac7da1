//! What a broker and a worker say to each other over the worker's control socket.
//!
//! A cold start:
//!
//! ```text
//! broker                                        worker
//!   │                                    hello    │  single-threaded, confined, holding two descriptors
//!   │  … the kernel's own records are read …      │
//!   │  configure + cpr socket                     │
//!   │  (cpr) every descriptor                     │  memory, VM, vCPUs; last filters of all threads; rehearsal
//!   │                                    ready    │
//!   │                                (cpr) hang-up│
//!   │  … all threads' filters are read back …     │
//!   │  start                                      │  writes the kernel into RAM
//!   │                                  running    │  and only then the first KVM_RUN
//!   │                                first-run    │
//! ```
//!
//! An upgrade (S-numbers as in `docs/architecture.md`):
//!
//! ```text
//! broker                          old worker        new worker
//!   │                                 │       hello    │ S2
//!   │  configure + cpr + main ────────┼───────────────►│ S3
//!   │  transfer + main ──────────────►│◄═ offer ═══════│    main channel
//!   │               agreed, or failed │═ answer ══════►│
//!   │  (cpr) every descriptor ────────┼───────────────►│ S4
//!   │                                 │  ready, hang-up│ S5
//!   │  park ─────────────────────────►│                │ S6 pause starts
//!   │                          parked │                │
//!   │                           saved │═ state ═══════►│ S7
//!   │  … SIGSTOP old, confirmed …     │         loaded │ S8
//!   │  ceded ────────────────────────►│ (queued)       │ S9
//!   │  commit ────────────────────────┼───────────────►│
//!   │                                 │        running │ S10 then KVM_RUN: pause ends
//!   │                                 │      first-run │
//!   │  … SIGKILL old …                                 │ S12
//! ```

use serde::Deserialize;
use serde::Serialize;

use crate::CpuFeature;
use crate::Description;
use crate::DescriptorKey;
use crate::StartMode;
use crate::StateDigest;
use crate::VmId;

/// The version of these messages; a worker of another version is refused before it is given anything.
pub const PROTOCOL: u32 = 5;

/// The most vCPUs of a VM.
pub const MAX_CPUS: u8 = 8;

/// The longest kernel command line, in bytes (COMMAND_LINE_SIZE of x86 Linux is 2048 with its NUL).
pub const MAX_CMDLINE: usize = 2047;

/// The most queues of one virtio device: the ids of its notification descriptors are this many apart.
pub const MAX_QUEUES: u32 = 32;

/// The most PCI devices; the host bridge is device 0 (device numbers have 5 bits).
pub const MAX_SLOTS: u8 = 32;

/// The most queues of a disk: one a vCPU.
pub const MAX_DISK_QUEUES: u8 = MAX_CPUS;

/// The most queues of a device that another process implements: one a vCPU, and one of a file system for what may not wait
/// behind its requests (virtio 1.2, 5.11.2).
pub const MAX_VHOST_USER_QUEUES: u8 = MAX_CPUS + 1;

/// The most queue pairs of a network interface: one a vCPU.
pub const MAX_NET_QUEUES: u8 = MAX_CPUS;

/// Bytes of a disk's serial number (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID).
pub const MAX_SERIAL: usize = 20;

/// The most connections of a VM's vsock: what each may hold back ([`VSOCK_CREDIT`]) fits the device's saved state.
pub const MAX_VSOCK_CONNECTIONS: u32 = 64;

/// Bytes that a guest may have sent on one vsock connection and the host's program has not taken.
pub const VSOCK_CREDIT: u32 = 15 << 10;

/// The most I/O threads of a worker.
pub const MAX_IO_THREADS: u8 = 4;

/// How guest RAM is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pages {
    /// 4 KiB pages.
    #[serde(rename = "4K")]
    Small,
    /// 2 MiB hugetlb pages.
    #[serde(rename = "2M")]
    Huge,
    /// 4 KiB pages that the kernel may merge into transparent huge pages.
    #[serde(rename = "thp")]
    Transparent,
}

/// Where guest RAM is, and who sees what is written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamBacking {
    /// In memfds, which every worker of the VM maps.
    Shared,
    /// In files that outlive every process, which every worker of the VM maps.
    File,
    /// In the worker's own memory: it cannot be handed over.
    Private,
}

/// One region of guest RAM, backed by descriptor `ram` with its index as id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Everything that a worker is told about its guest. No path, no descriptor number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// The VM.
    pub vm: VmId,
    /// This worker's generation, from 1.
    pub generation: u32,
    /// How it comes to its guest.
    pub mode: StartMode,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// CPUID features that the guest does not see.
    pub hide: Vec<CpuFeature>,
    /// RAM, ascending.
    pub ram: Vec<RamRegion>,
    /// How RAM is backed.
    pub pages: Pages,
    /// Where it is.
    pub backing: RamBacking,
    /// The host's boot, by `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// The kernel's command line, at most [`MAX_CMDLINE`] bytes.
    pub cmdline: String,
    /// Whether there is an initrd.
    pub initrd: bool,
    /// The last filters, as classic BPF programs of 8-byte instructions.
    pub filters: Filters,
    /// virtio devices, in ascending order of their slots.
    pub virtio: Vec<VirtioConfig>,
    /// PCI devices of the host, in ascending order of their slots.
    pub vfio: Vec<VfioConfig>,
    /// Threads that serve them, 1 to [`MAX_IO_THREADS`].
    pub io_threads: u8,
    /// How long requests in flight may take when devices park, in milliseconds.
    pub drain_ms: u32,
    /// What follows when the guest says that it has panicked.
    pub on_panic: PanicAction,
    /// PCI device numbers that devices come to and go from while the guest runs, one bit each.
    pub removable: u32,
}

/// What follows when a guest says that it has panicked: QEMU's `-action panic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PanicAction {
    /// It runs on.
    Run,
    /// It stands still until an operator lets it go on.
    #[default]
    Pause,
    /// It ends.
    PowerOff,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioConfig {
    /// Its PCI device number, from 1 to below [`MAX_SLOTS`]; also the id of its descriptors.
    pub slot: u8,
    /// What it is.
    pub device: VirtioKind,
}

/// What a virtio device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VirtioKind {
    /// A disk, on descriptor `disk` with its slot as id.
    Block(BlockConfig),
    /// A source of randomness, without a descriptor of its own.
    Entropy,
    /// A network interface, on descriptors `net`.
    Net(NetConfig),
    /// A socket device; descriptors `vsock` are the connections that there are.
    Vsock(VsockConfig),
    /// A memory balloon, without a descriptor of its own.
    Balloon,
    /// A device that another process implements, on descriptor `vhost-user` with its slot as id.
    VhostUser(VhostUserConfig),
    /// A console of one port, on descriptor `console` of id [`descriptor::VIRTIO_CONSOLE`](crate::descriptor::VIRTIO_CONSOLE).
    Console,
}

impl VirtioKind {
    /// How many virtqueues it has, each with a notification descriptor.
    #[must_use]
    pub fn queues(&self) -> u32 {
        match self {
            Self::Block(block) => block.queues.into(),
            Self::Entropy => 1,
            // Receive and transmit each, and with several pairs one for commands (virtio 1.2, 5.1.2).
            Self::Net(net) => u32::from(net.queues) * 2 + u32::from(net.queues > 1),
            // Receive, transmit, events (virtio 1.2, 5.10.2); inflate, deflate, report (5.5.2).
            Self::Vsock(_) | Self::Balloon => 3,
            Self::VhostUser(backend) => backend.queues.into(),
            // Receive and transmit of one port (5.3.2).
            Self::Console => 2,
        }
    }
}

impl VirtioConfig {
    /// The id of the notification descriptor `kick` of one of its queues.
    #[must_use]
    pub fn kick(&self, queue: u32) -> u32 {
        u32::from(self.slot) * MAX_QUEUES + queue
    }

    /// The id of the descriptor `net` of one of its queue pairs.
    #[must_use]
    pub fn tap(&self, pair: u8) -> u32 {
        u32::from(self.slot) * u32::from(MAX_NET_QUEUES) + u32::from(pair)
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its size in bytes, a multiple of 512.
    pub bytes: u64,
    /// It is a block device, not a regular file.
    pub device: bool,
    /// The guest may not write.
    pub readonly: bool,
    /// It was opened with O_DIRECT.
    pub direct: bool,
    /// The block size that the guest is told, in bytes: a power of two from 512.
    pub block_size: u32,
    /// Queues, 1 to [`MAX_DISK_QUEUES`].
    pub queues: u8,
    /// Its serial number, at most [`MAX_SERIAL`] bytes of printable ASCII.
    pub serial: String,
    /// Rate limits.
    pub limits: DeviceLimits,
}

/// Rate limits of a device, over all of its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLimits {
    /// Of bytes.
    pub bytes: Option<RateLimit>,
    /// Of requests or packets.
    pub operations: Option<RateLimit>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address, not a group's.
    pub mac: [u8; 6],
    /// The largest packet without its Ethernet header, in bytes: 68 (RFC 791) to 65535.
    pub mtu: u16,
    /// Queue pairs, 1 to [`MAX_NET_QUEUES`], each with a queue of the tap.
    pub queues: u8,
    /// Rate limits of each direction.
    pub limits: DeviceLimits,
}

/// A socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id: 3 to 2^32 - 2 (vsock(7): 0 to 2 and the last are reserved).
    pub cid: u32,
}

/// A device that another process implements, as the broker has found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserConfig {
    /// What it is to the guest.
    pub kind: VhostUserKind,
    /// Its virtqueues, 1 to [`MAX_VHOST_USER_QUEUES`].
    pub queues: u8,
    /// The features that the backend offers, those of rings and of the version among them.
    pub features: u64,
    /// Its configuration space, at most [`vhost_user::MAX_CONFIG`](crate::vhost_user::MAX_CONFIG) bytes.
    pub config: Vec<u8>,
}

/// A PCI device of the host that is the guest's, as the broker has found it, on descriptor `vfio-device` with its slot as id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfioConfig {
    /// Its PCI device number in the guest, from 1 to below [`MAX_SLOTS`].
    pub slot: u8,
    /// The first [`VFIO_CONFIG`] bytes of its configuration space, as VFIO shows them.
    pub space: Vec<u8>,
    /// Where in its descriptor configuration space begins.
    pub space_at: u64,
    /// What is behind each of its BARs, [`VFIO_BARS`] of them; of no bytes where there is none.
    pub bars: Vec<VfioBar>,
    /// By what it interrupts.
    pub interrupts: VfioInterrupts,
    /// How many vectors it has, 1 to [`MAX_VFIO_VECTORS`].
    pub vectors: u16,
    /// It can be reset by itself.
    pub resets: bool,
}

/// Bytes of configuration space (PCI Local Bus 3.0, 6.1) that a guest sees of a PCI device of the host.
pub const VFIO_CONFIG: usize = 256;
/// BARs of a function (PCI Local Bus 3.0, 6.1).
pub const VFIO_BARS: usize = 6;
/// The most vectors of a PCI device of the host: the ids of their descriptors are this many apart.
pub const MAX_VFIO_VECTORS: u16 = 64;

/// What is behind a BAR of a PCI device of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfioBar {
    /// Where in the device's descriptor it begins.
    pub at: u64,
    /// Bytes.
    pub size: u64,
}

/// By what a PCI device of the host interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VfioInterrupts {
    /// Message-signalled interrupts (PCI Local Bus 3.0, 6.8.1).
    Msi,
    /// MSI-X (6.8.2).
    MsiX,
}

impl VfioConfig {
    /// The id of the descriptor `vfio-vector` of one of its vectors.
    #[must_use]
    pub fn vector(&self, vector: u16) -> u32 {
        u32::from(self.slot) * u32::from(MAX_VFIO_VECTORS) + u32::from(vector)
    }
}

/// What a device that another process implements is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VhostUserKind {
    /// A disk.
    Blk,
    /// A file system.
    Fs,
}

/// What a broker tells a worker of its vsock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VsockOrder {
    /// A program of the host wants this port of the guest. Comes with the connection, descriptor `vsock` of this id.
    Incoming {
        /// The connection.
        id: u32,
        /// The guest's port.
        port: u32,
    },
    /// What the guest asked for. Comes with the connection, as above.
    Connected {
        /// The number that came with [`VsockReport::Connect`].
        ticket: u32,
        /// The connection.
        id: u32,
    },
    /// The guest does not get what it asked for.
    Refused {
        /// The number that came with [`VsockReport::Connect`].
        ticket: u32,
    },
    /// To a new worker, before the guest is its own: a connection that its guest will have. Comes with it.
    Held {
        /// The connection.
        id: u32,
    },
}

/// What a worker tells its broker of its vsock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VsockReport {
    /// The guest wants a port of the host.
    Connect {
        /// A number of the worker's choosing, for the answer.
        ticket: u32,
        /// The port.
        port: u32,
    },
    /// A connection has ended; the worker has closed it.
    Closed {
        /// Which.
        id: u32,
    },
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Tokens that come in a second, at least 1.
    pub per_second: u64,
    /// Tokens that it holds, at least 1.
    pub burst: u64,
}

/// The steady-state filter of each role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filters {
    /// Of the control thread.
    pub control: Vec<u8>,
    /// Of each vCPU thread.
    pub vcpu: Vec<u8>,
    /// Of each I/O thread.
    pub io: Vec<u8>,
}

/// What a broker tells a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Build the VM. Comes with the cpr socket and, in [`StartMode::CprTransfer`], the main channel; in
    /// [`StartMode::CprReboot`], the state file at the position where it begins.
    Configure(Box<WorkerConfig>),
    /// Run the guest from its kernel's entry.
    Start,
    /// Stop the vCPUs at the operator's wish.
    Pause,
    /// Let them run again.
    Resume,
    /// Reset the guest.
    Reset,
    /// Press the ACPI power button.
    PowerButton,
    /// Say how the guest is.
    Query,
    /// Of the guest's vsock.
    Vsock(VsockOrder),
    /// A new worker will come over the main channel that comes with this.
    Transfer {
        /// It has another broker, and its descriptors have gone over a socket between the two.
        elsewhere: bool,
    },
    /// The transfer is off: close the main channel, and if parked, run the guest again.
    Rollback,
    /// Stop all vCPUs, park the devices, then save and stream without further order.
    Park,
    /// Another worker may run the guest from now on: never resume by yourself.
    Ceded,
    /// The guest is yours: say [`Report::Running`] and run it.
    Commit,
    /// The guest is yours, and stands still at the operator's wish: say [`Report::Running`], and hold it.
    CommitPaused,
    /// Nobody will ever say `commit` any more: end, unless it was said. A worker that has the guest answers
    /// as to `query`, or [`Report::Paused`] if it was told to hold it.
    Abandon,
    /// Want so many 4 KiB pages of the guest's in its balloon.
    Balloon {
        /// How many.
        pages: u32,
    },
    /// Stop all vCPUs, park the devices, and write everything into the file that comes with this, from its position on. Only
    /// [`Order::Rollback`] lets the guest run again.
    Save,
    /// The disk in this slot has this many bytes from now on, a multiple of 512. No request reaches beyond them any more once
    /// [`Report::Resized`] is said.
    Resize {
        /// Which.
        slot: u8,
        /// Its size.
        bytes: u64,
    },
    /// A descriptor of the device that the next [`Order::Plug`] is about. Comes with it.
    Lend(DescriptorKey, Description),
    /// The guest gets this device, whose descriptors were lent.
    Plug(Box<VirtioConfig>),
    /// Ask the guest to let the device of this slot go.
    Unplug {
        /// Which.
        slot: u8,
    },
    /// End the device of this slot, which the guest has let go.
    End {
        /// Which.
        slot: u8,
    },
    /// A deterministic fault, for tests; a release build does not contain it.
    #[cfg(feature = "fail-points")]
    Fail(crate::FailPoint),
}

/// What a worker tells its broker. All of it is hostile until checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The first message: confined, and waiting to be told what for.
    Hello {
        /// [`PROTOCOL`] of its build.
        protocol: u32,
        /// Its build, for people.
        build: String,
    },
    /// The old worker and the new one agree on versions and machine (from the old one).
    Agreed,
    /// Everything expensive is done, all threads have their last filters. The cpr hang-up follows.
    Ready(BuildTimes),
    /// It cannot go on with what it was told; a new worker exits after this, an old one runs on.
    Failed {
        /// In doing what.
        step: String,
        /// Why.
        reason: String,
    },
    /// All vCPUs and devices stand still.
    Parked {
        /// When the first vCPU left KVM_RUN, in CLOCK_MONOTONIC nanoseconds.
        first_exit_ns: u64,
        /// When everything stood still.
        parked_ns: u64,
    },
    /// All state is in the main channel.
    Saved {
        /// The stream's digest.
        digest: StateDigest,
        /// The stream's length in bytes.
        bytes: u64,
    },
    /// The state is loaded, the guest could run.
    Loaded {
        /// The stream's digest.
        digest: StateDigest,
        /// How many preview entries (routes, BARs) had changed.
        changed: u32,
    },
    /// Sent before the first KVM_RUN, by the thread that releases the vCPUs if this was sent.
    Running,
    /// All vCPUs have begun their first real KVM_RUN.
    FirstRun {
        /// When the last of them did, in CLOCK_MONOTONIC nanoseconds.
        last_run_ns: u64,
    },
    /// The guest runs again, at an operator's [`Order::Resume`]; or, after a rollback, it is as it was before: it runs, or
    /// stands still if it stood.
    Resumed,
    /// The guest stands still at the operator's wish.
    Paused,
    /// The answer to [`Order::Query`].
    Status(WorkerStatus),
    /// Something happened in the guest.
    Guest(GuestEvent),
    /// Of the guest's vsock.
    Vsock(VsockReport),
    /// A thread made a system call that its filter refuses; the call was not executed, the worker exits.
    Violation {
        /// The thread's id in the worker's pid namespace.
        thread: i32,
        /// The system call's number.
        syscall: i32,
        /// The address of the call.
        address: u64,
    },
    /// The guest says that other many pages are in its balloon.
    Balloon {
        /// How many, of 4 KiB each.
        pages: u32,
    },
    /// The answer to [`Order::Plug`]: the guest has it.
    Plugged {
        /// Which.
        slot: u8,
    },
    /// The guest has let the device of this slot go: it is off the bus. Said again by a worker that has taken the guest over.
    Ejected {
        /// Which.
        slot: u8,
    },
    /// The answer to [`Order::End`]: every descriptor of the device is closed.
    Unplugged {
        /// Which.
        slot: u8,
    },
    /// The answer to [`Order::Resize`].
    Resized {
        /// Which disk.
        slot: u8,
        /// Its size.
        bytes: u64,
    },
}

/// Where a build's time went, in microseconds since the worker's exec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildTimes {
    /// Memory mapped and populated.
    pub memory_us: u64,
    /// VM, irqchip, vCPUs and devices made.
    pub vm_us: u64,
    /// Filters in place, rehearsal over.
    pub rehearsed_us: u64,
}

/// How a worker's guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// KVM_RUN exits since this worker took the guest over.
    pub exits: u64,
    /// Console bytes dropped because nobody took them.
    pub console_dropped: u64,
    /// 4 KiB pages that the guest says are in its balloon.
    pub balloon_pages: u32,
}

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestEvent {
    /// It reset itself; it is starting again in this worker.
    Reset,
    /// It powered itself off.
    Shutdown,
    /// It triple-faulted; it is starting again in this worker.
    TripleFault,
    /// KVM cannot go on with it.
    Stuck(String),
    /// Its kernel has panicked. What its worker was told to do about that is done.
    Panicked,
    /// Its kernel has panicked, and its crash kernel takes over.
    CrashLoaded,
    /// It has shut down, through its pvpanic device.
    PvShutdown,
}
