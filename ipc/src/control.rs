//! What `baton` and other clients say to a broker over its control socket, `control.sock` in the VM's directory.
//!
//! A `SOCK_SEQPACKET` connection. The broker speaks first ([`Reply::Hello`]); then each request is answered by exactly one
//! final reply, before which an upgrade sends [`Reply::Progress`]. One request at a time. A client that has asked for events
//! ([`Request::Subscribe`]) gets [`Reply::Event`] at any time.
//!
//! The QMP front is such a client, on a connection that it inherits: `hello` with its last filter, `subscribe` when that is in
//! force, and then, for everybody who connects to the QMP socket, [`Reply::QmpClient`] with that connection and with two
//! control connections of its own, so that what a QMP client asks is asked, and logged, as that client.
//!
//! The types derive `Serialize` once for the wire (postcard) and for people's scripts (the CLI prints them as JSON), so
//! field names here are part of the surface.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use crate::Access;
use crate::Address;
use crate::DescriptorKind;
use crate::FileAddress;
use crate::worker::PanicAction;

/// The version of these messages.
pub const PROTOCOL: u32 = 7;

/// The control socket's name in a VM's directory.
pub const SOCKET: &str = "control.sock";

/// The QMP socket's name in a VM's directory.
pub const QMP_SOCKET: &str = "qmp.sock";

/// Where a successor's broker listens for the CPR state, in the directory in which it waits.
pub const CPR_SOCKET: &str = "cpr.sock";

/// The same, for the main channel.
pub const MAIN_SOCKET: &str = "main.sock";

/// The longest worker path, reason or step that goes over the wire, in bytes.
pub const MAX_TEXT: usize = 4096;

/// The longest reason of an approval that is recorded, in characters.
pub const MAX_APPROVAL: usize = 200;

/// A process's exit status, as scripts see it (also the code of a refused request).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// Done.
    Done,
    /// An audit or a diff has findings.
    Findings,
    /// The command line or the request is wrong.
    Usage,
    /// The host, a file or the VM is not as needed.
    Unfit,
    /// An upgrade was aborted; the old worker runs on.
    Aborted,
    /// The VM is lost.
    Lost,
    /// Policy refuses.
    Refused,
    /// Another operation is under way.
    Busy,
}

impl Exit {
    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Findings => 1,
            Self::Usage => 2,
            Self::Unfit => 3,
            Self::Aborted => 10,
            Self::Lost => 20,
            Self::Refused => 30,
            Self::Busy => 75,
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How is the VM?
    Status,
    /// Stop the vCPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Reset the guest.
    Reset,
    /// End the VM: by the ACPI power button, or at once.
    Stop {
        /// At once.
        force: bool,
    },
    /// Replace the worker. The binary comes as a descriptor; without one the VM's configured worker is opened again.
    Upgrade {
        /// Go through everything that comes before the pause, then let the new worker go.
        dry_run: bool,
    },
    /// Cancel the upgrade that another client has asked for, or the coming of another broker's guest, of which that broker
    /// decides.
    Cancel,
    /// Attach to the serial console: the reply carries one end of a stream socket.
    Console,
    /// Compare the kernel's records of the worker with its policy.
    Audit,
    /// Where does the audit log's chain stand?
    LogHead,
    /// Press the ACPI power button; the VM goes on if its guest does not listen.
    PowerButton,
    /// Send [`Reply::Event`] from now on, until one side hangs up. A client that does not read is hung up on.
    Subscribe,
    /// As [`Request::Upgrade`] of the configured worker, answered as soon as it has begun; events tell the rest.
    BeginUpgrade {
        /// Before the pause, wait for [`Request::Continue`].
        hold: bool,
    },
    /// Go on with the upgrade that waits for this.
    Continue,
    /// Hand the guest to another broker, answered as soon as that has begun; events tell the rest.
    Transfer {
        /// Where the other broker listens for the main channel.
        main: Address,
        /// Where it listens for the cpr channel.
        cpr: Address,
        /// Before the pause, wait for [`Request::Continue`].
        hold: bool,
        /// Answer as to [`Request::Upgrade`]: with its progress, and in the end with its outcome.
        follow: bool,
    },
    /// To a broker that waits for a guest: where to listen for the main channel.
    Incoming {
        /// There.
        main: Address,
    },
    /// Leave the guest this much of its memory, and want the rest in its balloon.
    Balloon {
        /// Bytes.
        bytes: u64,
    },
    /// Stop the guest for good and put it into a file, answered as soon as that has begun; events tell the rest.
    Save {
        /// There.
        file: FileAddress,
        /// Before the pause, wait for [`Request::Continue`].
        hold: bool,
    },
    /// To a broker that waits for a guest: the file that it is in.
    Restore {
        /// There.
        file: FileAddress,
    },
    /// Open a disk that a device can be made of.
    AddNode(NewNode),
    /// Close one.
    DeleteNode {
        /// Which.
        name: String,
    },
    /// Give the guest a device.
    AddDevice(NewDevice),
    /// Ask the guest to let a device go that it was given; events tell what comes of it.
    DeleteDevice {
        /// Which.
        id: String,
    },
    /// Give a disk another size, and tell the guest.
    Resize {
        /// Which, by its id.
        disk: String,
        /// Bytes, a multiple of 512.
        bytes: u64,
    },
    /// As [`Request::Upgrade`], to a worker that may do more than the one before it: who asks approves of that.
    ApprovedUpgrade {
        /// As there.
        dry_run: bool,
        /// The reason, of which [`MAX_APPROVAL`] characters are kept.
        why: String,
    },
    /// As [`Request::Console`], to the virtio console.
    VirtioConsole,
    /// Open a tap that the guest can be given.
    AddNetdev(NewNetdev),
    /// Close one that no network interface is made of.
    DeleteNetdev {
        /// Which.
        id: String,
    },
    /// Give the guest a network interface.
    AddInterface(NewInterface),
}

/// A disk that is to be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// Its name, of no other disk: 1 to [`crate::worker::MAX_SERIAL`] of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Where it is, an absolute path.
    pub path: String,
    /// It is a block device, and no regular file.
    pub device: bool,
    /// The guest may not write.
    pub readonly: bool,
    /// It is opened with O_DIRECT.
    pub direct: bool,
}

/// A virtio disk that the guest is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDevice {
    /// Its name, of no other device.
    pub id: String,
    /// What it is made of.
    pub node: String,
    /// Its serial number; none is none.
    pub serial: Option<String>,
    /// How many queues, 1 to [`crate::worker::MAX_DISK_QUEUES`].
    pub queues: u8,
    /// The PCI device number; the first that is free if left out.
    pub slot: Option<u8>,
}

/// A tap that is to be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNetdev {
    /// Its name, of no other: 1 to [`crate::worker::MAX_SERIAL`] of `A-Z a-z 0-9 . _ -`.
    pub id: String,
    /// The tap's name in the broker's network namespace.
    pub tap: String,
    /// How many queue pairs, 1 to [`crate::worker::MAX_NET_QUEUES`].
    pub pairs: u8,
}

/// A virtio network interface that the guest is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInterface {
    /// Its name, of no other device.
    pub id: String,
    /// What it is made of.
    pub netdev: String,
    /// The guest's address, six bytes in hexadecimal with colons.
    pub mac: String,
    /// The PCI device number; the first that is free if left out.
    pub slot: Option<u8>,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The first message of a connection.
    Hello {
        /// [`PROTOCOL`] of the broker.
        protocol: u32,
        /// The broker's build.
        build: String,
    },
    /// It is done.
    Done,
    /// Nothing was done.
    Refused(Refusal),
    /// The answer to [`Request::Status`].
    Status(Box<VmStatus>),
    /// An upgrade has reached a step.
    Progress(Step),
    /// An upgrade has ended.
    Upgrade(Box<UpgradeOutcome>),
    /// The answer to [`Request::Console`] and [`Request::VirtioConsole`].
    Console,
    /// The answer to [`Request::Audit`].
    Audit(Box<AuditReport>),
    /// The answer to [`Request::LogHead`].
    LogHead(LogHead),
    /// The first message to the QMP front, instead of `hello`.
    Front {
        /// [`PROTOCOL`] of the broker.
        protocol: u32,
        /// The filter that it has to take, as a classic BPF program of 8-byte instructions.
        filter: Vec<u8>,
    },
    /// Somebody has connected to the QMP socket: with that connection, a control connection for what it asks, and one more
    /// for what it asks out of band.
    QmpClient,
    /// Something happened, to a client that has asked for events.
    Event(Box<Event>),
}

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in microseconds since 1970 (CLOCK_REALTIME).
    pub at_us: u64,
    /// What.
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Happening {
    /// The guest stands still.
    Stopped,
    /// It runs again.
    Resumed,
    /// It was reset.
    Reset {
        /// By itself.
        guest: bool,
    },
    /// Its power button was pressed.
    PowerButton,
    /// It has ended.
    Ended {
        /// By itself.
        guest: bool,
    },
    /// Nobody runs it any more, and nobody will.
    Lost {
        /// Why.
        reason: String,
    },
    /// An upgrade has begun.
    UpgradeBegan {
        /// It is a dry run.
        dry_run: bool,
    },
    /// An upgrade waits, before its pause, to be told to go on. The guest runs.
    UpgradeHeld,
    /// An upgrade has reached a step that the guest can feel.
    UpgradeStep(Step),
    /// An upgrade is being cancelled.
    UpgradeCancelled,
    /// An upgrade has ended.
    UpgradeEnded(Box<UpgradeOutcome>),
    /// The guest's kernel has panicked.
    GuestPanicked(PanicAction),
    /// It has panicked, and its crash kernel takes over.
    GuestCrashLoaded,
    /// It has shut down through its pvpanic device; `ended` follows.
    GuestPvShutdown,
    /// The balloon leaves the guest this much memory, in bytes.
    BalloonChanged(u64),
    /// A device that was added is gone, and nothing of it is left.
    DeviceDeleted {
        /// Which.
        id: String,
    },
    /// The guest was asked to let a device go, and does not.
    DeviceKept {
        /// Which.
        id: String,
    },
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The exit status that fits.
    pub exit: Exit,
    /// What is wrong.
    pub reason: String,
    /// What to do about it; may be empty.
    pub remedy: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if !self.remedy.is_empty() {
            write!(f, "\n  {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

/// What a broker tells whoever started it, over the socket that is its standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartReport {
    /// The guest runs.
    Started(Started),
    /// It does not, and the broker exits.
    Failed(Refusal),
    /// The broker waits for a guest that another broker has; `started` or `failed` follows.
    Waiting(Waiting),
}

/// A broker that waits for a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The VM's name.
    pub name: String,
    /// The broker.
    pub broker_pid: u32,
    /// The directory in which it waits, beside the VM's own.
    pub directory: String,
}

/// A started VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The VM's name.
    pub name: String,
    /// The broker.
    pub broker_pid: u32,
    /// The worker, in the broker's pid namespace.
    pub worker_pid: u32,
    /// The worker's generation.
    pub generation: u32,
    /// The VM's directory.
    pub directory: String,
    /// From the broker's first instruction to "running", in microseconds.
    pub start_us: u64,
    /// What the broker found and cleaned up, or wants the operator to know.
    pub notes: Vec<String>,
}

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Not yet running.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still at the operator's wish.
    Paused,
    /// The guest runs, and its worker is being replaced.
    Upgrading,
    /// The guest has powered off.
    Stopped,
    /// The worker died, and the guest with it.
    Lost,
    /// The worker runs and its broker is dead.
    Orphaned,
    /// The broker waits for a guest that another broker has.
    Incoming,
    /// Another broker has the guest.
    Postmigrate,
    /// The guest has panicked, and stands still until an operator lets it go on.
    GuestPanicked,
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Its identity, 32 hex digits, chosen when it started.
    pub id: String,
    /// Its state.
    pub state: VmState,
    /// The broker's process.
    pub broker_pid: u32,
    /// The worker's process, in the broker's pid namespace.
    pub worker_pid: u32,
    /// The worker has answered whenever it was asked lately; if not, `tsc_khz`, `console_dropped` and `balloon` are older.
    pub worker_answers: bool,
    /// The worker's generation.
    pub generation: u32,
    /// SHA-256 of the worker's binary, in hex.
    pub worker_digest: String,
    /// The worker's build.
    pub worker_build: String,
    /// Seconds since the VM started.
    pub uptime_s: u64,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// The guest stands still at the operator's wish, also while its worker is being replaced.
    pub paused: bool,
    /// Its disks, in the order in which the guest finds them.
    pub disks: Vec<DiskStatus>,
    /// The threads that run the vCPUs, in the broker's pid namespace and in the vCPUs' order, by the names that the worker
    /// gives them: for people, and evidence of nothing.
    pub vcpu_threads: Vec<u32>,
    /// Frequency of the guest's TSC, in kHz.
    pub tsc_khz: u32,
    /// Console bytes dropped because nobody took them.
    pub console_dropped: u64,
    /// The last upgrade.
    pub last_upgrade: Option<UpgradeOutcome>,
    /// It was aborted because somebody had it cancelled.
    pub last_cancelled: bool,
    /// The VM file that its broker was started from, an absolute path.
    pub vm_file: String,
    /// What the balloon leaves to the guest, in bytes, as the guest says; none without a balloon.
    pub balloon: Option<u64>,
    /// The names of its devices that other processes implement.
    pub vhost_user: Vec<String>,
    /// The names of its devices that are PCI devices of the host.
    pub vfio: Vec<String>,
    /// What an upgrade that is under way, or a broker without a guest, waits for.
    pub awaits: Option<Awaited>,
    /// Its taps that were opened while it ran.
    pub netdevs: Vec<NetdevStatus>,
    /// What would have [`Request::Transfer`] refused, in words.
    pub blocks_transfer: Vec<String>,
    /// What would have [`Request::Save`] refused.
    pub blocks_save: Vec<String>,
}

/// A tap that was opened while the VM ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetdevStatus {
    /// Its name.
    pub id: String,
    /// The tap's.
    pub tap: String,
    /// The network interface that was made of it, by its name.
    pub added: Option<String>,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// In words.
    pub what: String,
    /// For so many milliseconds yet; none if for as long as it takes.
    pub left_ms: Option<u64>,
}

/// A disk, as its description says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub id: String,
    /// The file or block device behind it.
    pub path: String,
    /// The guest may not write.
    pub readonly: bool,
    /// It is opened with O_DIRECT.
    pub direct: bool,
    /// What the guest sees of it, in bytes; 0 before it is open.
    pub bytes: u64,
    /// The device that was made of it while the guest ran, by its name; none of a disk of the VM file.
    pub added: Option<String>,
}

/// The steps of an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// S1: request and policy.
    Request,
    /// S2: the new worker is spawned and confined.
    Spawn,
    /// S3: hello, versions.
    Agree,
    /// S4: descriptors go over.
    HandOver,
    /// S5: the new worker builds, populates, rehearses; ends with its hang-up.
    Build,
    /// S6: the old worker parks; the pause starts.
    Park,
    /// S7: the old worker saves and streams.
    Save,
    /// S8: the new worker validates and loads.
    Load,
    /// S9: commit.
    Commit,
    /// S10: the new worker says "running" and runs; the pause ends.
    Run,
    /// S11: the new worker re-kicks queues and interrupts.
    Kick,
    /// S12: the old worker is retired.
    Retire,
}

impl Step {
    /// The number in `docs/architecture.md`: 1 to 12.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Spawn => 2,
            Self::Agree => 3,
            Self::HandOver => 4,
            Self::Build => 5,
            Self::Park => 6,
            Self::Save => 7,
            Self::Load => 8,
            Self::Commit => 9,
            Self::Run => 10,
            Self::Kick => 11,
            Self::Retire => 12,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Request => "request",
            Self::Spawn => "spawn",
            Self::Agree => "agree",
            Self::HandOver => "hand-over",
            Self::Build => "build",
            Self::Park => "park",
            Self::Save => "save",
            Self::Load => "load",
            Self::Commit => "commit",
            Self::Run => "run",
            Self::Kick => "kick",
            Self::Retire => "retire",
        };
        write!(f, "S{} {name}", self.number())
    }
}

/// How an upgrade ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The new worker runs the guest.
    Committed,
    /// The old worker runs the guest.
    Aborted,
    /// Nobody does.
    Lost,
    /// A dry run went as far as it goes.
    Rehearsed,
    /// The guest is in a file, and nobody runs it.
    Saved,
}

/// What an upgrade did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeOutcome {
    /// How it ended.
    pub outcome: Outcome,
    /// The generation that runs now.
    pub generation: u32,
    /// The worker that runs now.
    pub worker_pid: u32,
    /// SHA-256 of its binary, in hex.
    pub worker_digest: String,
    /// From the first vCPU's exit in the old worker to the last vCPU's first KVM_RUN in the new one, in microseconds; 0
    /// when the guest was not paused. The workers' own times, clamped to `pause_us`.
    pub blackout_us: u64,
    /// What the broker itself saw of it: "park" sent to "running" received, in microseconds.
    pub pause_us: u64,
    /// From the request to the outcome, in milliseconds.
    pub total_ms: u64,
    /// Bytes of device state that went from worker to worker.
    pub state_bytes: u64,
    /// SHA-256 of that state, in hex; empty when none went over.
    pub state_digest: String,
    /// Microseconds spent in each step that was entered.
    pub phases: Vec<PhaseTime>,
    /// The step that failed, when one did.
    pub failed_step: Option<Step>,
    /// Why it failed; empty when it did not.
    pub reason: String,
}

/// The time of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub step: Step,
    /// Microseconds.
    pub us: u64,
}

/// Where an audit log's chain stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHead {
    /// How many records it has, those in rotated files too.
    pub count: u64,
    /// SHA-256 of the last one's line, in hex.
    pub head: String,
}

/// Whether a worker's confinement is what its policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything was compared, and agrees.
    Proven,
    /// Something disagrees or could not be compared.
    Findings,
}

/// An audit of a running worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditReport {
    /// The verdict.
    pub verdict: Verdict,
    /// The worker.
    pub worker_pid: u32,
    /// Its generation.
    pub generation: u32,
    /// SHA-256 of its binary, in hex.
    pub worker_digest: String,
    /// The policy that it is held to: `default`, or a path.
    pub policy: String,
    /// SHA-256 of that policy's text as it was read for this worker, in hex.
    pub policy_digest: String,
    /// The longest that one thread stood still while its filters were read, in microseconds.
    pub pause_us: u64,
    /// What was compared, besides threads and descriptors.
    pub checks: Vec<AuditCheck>,
    /// Its threads.
    pub threads: Vec<AuditThread>,
    /// Its descriptors.
    pub descriptors: Vec<AuditDescriptor>,
    /// What disagrees.
    pub findings: Vec<Finding>,
    /// What is weaker on this host or for this user than the policy's best; no finding, but said.
    pub weaker: Vec<String>,
}

/// How something was shown to be as declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// The kernel's own record says so.
    Kernel,
    /// The kernel has no record that another process can read; it follows from how the worker was started.
    ByConstruction,
    /// It is not as declared, or the record could not be read.
    Against,
}

/// One thing that was compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditCheck {
    /// What.
    pub what: String,
    /// What was found.
    pub found: String,
    /// How far that shows it.
    pub evidence: Evidence,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditThread {
    /// Its id in the broker's pid namespace.
    pub tid: u32,
    /// The role that its filters show it to have.
    pub role: String,
    /// Number of seccomp filters on it.
    pub filters: u32,
    /// How that was proven: `compared byte for byte`, or `by construction` and why.
    pub proof: String,
}

/// One open descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditDescriptor {
    /// Its number in the worker.
    pub fd: u32,
    /// What /proc says it is.
    pub target: String,
    /// The grant that explains it, as name#id, or what made it.
    pub grant: String,
    /// The kind granted.
    pub kind: Option<DescriptorKind>,
    /// Its access mode.
    pub access: Option<Access>,
    /// `st_dev` and `st_ino` of the open file.
    pub identity: (u64, u64),
    /// Its seals (F_GET_SEALS), where it is a memfd.
    pub seals: Vec<String>,
}

/// Something that is not as the policy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable identifier: `seccomp-filter`, `capabilities`, `descriptor`, …
    pub rule: String,
    /// Which thread, descriptor or file.
    pub subject: String,
    /// What is declared.
    pub declared: String,
    /// What was found.
    pub found: String,
}
