//! What two brokers say to each other while one hands its guest to the other.
//!
//! The new broker listens on the cpr socket, a Unix stream socket as QEMU's is. The old one connects and sends the preamble
//! ([`MAGIC`], [`VERSION`]) with two ends of `SOCK_SEQPACKET` connections: the *link*, on which these messages go, and the one
//! on which the descriptors go ([`crate::cpr`]). Nothing of the guest leaves the old broker before the new one has said hello.
//!
//! ```text
//! old broker                                              new broker
//!   │ preamble + link + cpr                                  │  peers' user ids compared on both sides
//!   │                                                  hello │
//!   │ claim of each tap; the vsock's listening socket        │
//!   │ offer: nonce, VM, generation, machine; consoles        │
//!   │ (cpr) every descriptor                                 │  compared with its own VM file, checked by fstat
//!   │                                               deferred │  only until `migrate-incoming`
//!   │                                              listening │
//!   │ (main) nonce ─────────────────────────────────────────►│  spawns and confines the new worker
//!   │                                               greeting │  which offers over main
//!   │ agreed                                                 │  descriptors go to the new worker, which builds
//!   │                ready + pidfd + the worker's control socket  "the hang-up"
//!   │ … the old broker alone arbitrates the pause over that socket …
//!   │ committed                                              │  takes over name and listening paths
//!   │ ended: the audit log is yours                          │
//!   │ the vsock's callers                                    │
//!   │ console bytes, listeners; hang-up                      │  reads the console from here on
//! ```
//!
//! Either side says why it gives up ([`ToNew::Cancelled`], [`ToOld::Failed`]); a hang-up without a word is the peer's death.

use std::net::SocketAddr;

use serde::Deserialize;
use serde::Serialize;

use crate::CpuFeature;
use crate::VmId;
use crate::control::UpgradeOutcome;
use crate::worker::BuildTimes;
use crate::worker::Pages;
use crate::worker::RamBacking;
use crate::worker::RamRegion;
use crate::worker::VirtioConfig;
use crate::worker::VirtioKind;

/// The first bytes on the cpr socket.
pub const MAGIC: [u8; 4] = crate::cpr::MAGIC;
/// The version of this exchange, little-endian after the magic.
pub const VERSION: u32 = 2;
/// Bytes of the preamble: magic and version.
pub const PREAMBLE: usize = 8;
/// Bytes of the nonce by which the main connection is known to belong to the same transfer.
pub const NONCE: usize = 32;
/// The most bytes of console in one message.
pub const MAX_CONSOLE: usize = 32 << 10;

/// The preamble's bytes.
#[must_use]
pub fn preamble() -> [u8; PREAMBLE] {
    let [a, b, c, d] = MAGIC;
    let [e, f, g, h] = VERSION.to_le_bytes();
    [a, b, c, d, e, f, g, h]
}

/// Why a preamble was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// QEMU's CPR state.
    #[error(
        "this is a QEMU's CPR state (magic QCPR); Baton and QEMU cannot take over each other's guests"
    )]
    Qemu,
    /// Something else.
    #[error("not a migration stream (bad magic {})", hex(.0))]
    Magic([u8; 4]),
    /// Another version.
    #[error("unsupported migration stream version {0} (this is {VERSION})")]
    Version(u32),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks a preamble.
///
/// # Errors
///
/// [`PreambleError`].
pub fn check_preamble(bytes: [u8; PREAMBLE]) -> Result<(), PreambleError> {
    let [a, b, c, d, e, f, g, h] = bytes;
    match [a, b, c, d] {
        MAGIC => {}
        crate::cpr::QEMU_MAGIC => return Err(PreambleError::Qemu),
        other => return Err(PreambleError::Magic(other)),
    }
    match u32::from_le_bytes([e, f, g, h]) {
        VERSION => Ok(()),
        other => Err(PreambleError::Version(other)),
    }
}

/// What makes a guest's machine: two VM files that agree on this describe the same one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMachine {
    /// The VM's name.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u8,
    /// CPUID features that the guest does not see, ascending.
    pub hide: Vec<CpuFeature>,
    /// RAM, ascending.
    pub ram: Vec<RamRegion>,
    /// How RAM is backed.
    pub pages: Pages,
    /// The kernel's command line, which a reset uses again.
    pub cmdline: String,
    /// Whether there is an initrd.
    pub initrd: bool,
    /// The kinds of its consoles, as the VM file names them.
    pub console: String,
    /// virtio devices, in ascending order of their slots.
    pub virtio: Vec<VirtioConfig>,
    /// Where RAM is.
    pub backing: RamBacking,
}

impl GuestMachine {
    /// The first difference from `other`, in words: what this one has, and what `other` has.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<String> {
        // Destructured, so that a new field does not compile until somebody compares it.
        let Self {
            name,
            cpus,
            hide,
            ram,
            pages,
            cmdline,
            initrd,
            console,
            virtio,
            backing,
        } = self;
        let differ = |what: &str, here: String, there: String| {
            Some(format!(
                "{what}: the running VM has {here}, the new VM file {there}"
            ))
        };
        let bytes = |ram: &[RamRegion]| -> u64 { ram.iter().map(|region| region.size).sum() };
        if *name != other.name {
            return differ("name", name.clone(), other.name.clone());
        }
        if *cpus != other.cpus {
            return differ("cpus.count", cpus.to_string(), other.cpus.to_string());
        }
        if *ram != other.ram {
            let (here, there) = (bytes(ram), bytes(&other.ram));
            return differ(
                "memory.size",
                format!("{here} bytes"),
                format!("{there} bytes"),
            );
        }
        if *pages != other.pages {
            return differ(
                "memory.pages",
                format!("{pages:?}"),
                format!("{:?}", other.pages),
            );
        }
        if *backing != other.backing {
            return differ(
                "memory.path",
                format!("{backing:?}"),
                format!("{:?}", other.backing),
            );
        }
        if *hide != other.hide {
            return differ(
                "cpus.hide",
                format!("{hide:?}"),
                format!("{:?}", other.hide),
            );
        }
        for position in 0..virtio.len().max(other.virtio.len()) {
            let (here, there) = (virtio.get(position), other.virtio.get(position));
            if here != there {
                return differ(
                    &format!("device {}", position + 1),
                    device(here),
                    device(there),
                );
            }
        }
        if *console != other.console {
            return differ("console.kind", console.clone(), other.console.clone());
        }
        if *initrd != other.initrd {
            return differ("boot.initrd", initrd.to_string(), other.initrd.to_string());
        }
        if *cmdline != other.cmdline {
            return differ(
                "boot.cmdline",
                format!("{cmdline:?}"),
                format!("{:?}", other.cmdline),
            );
        }
        None
    }
}

fn device(config: Option<&VirtioConfig>) -> String {
    let Some(VirtioConfig { slot, device }) = config else {
        return "nothing".to_owned();
    };
    match device {
        VirtioKind::Block(block) => format!(
            "a disk in slot {slot} of {} bytes, {} queues, serial {:?}, readonly {}, direct {}, block size {}, {:?}",
            block.bytes,
            block.queues,
            block.serial,
            block.readonly,
            block.direct,
            block.block_size,
            block.limits
        ),
        other => format!("{other:?} in slot {slot}"),
    }
}

/// What the old broker has to hand over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Random: the main connection begins with it.
    pub nonce: [u8; NONCE],
    /// The VM.
    pub vm: VmId,
    /// The generation that the new worker is to be.
    pub generation: u32,
    /// The machine that the guest runs in.
    pub machine: GuestMachine,
    /// Those of its devices that came while it ran: no VM file has them.
    pub hotplugged: Vec<Hotplugged>,
}

/// A disk or a network interface that came while the guest ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hotplugged {
    /// The device's name.
    pub id: String,
    /// The name of the node or netdev that it is made of.
    pub backing: String,
    /// Its PCI device number.
    pub slot: u8,
    /// The guest was asked to let it go.
    pub asked: bool,
}

/// The guest has changed hands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The guest stands still at the operator's wish.
    pub paused: bool,
    /// Microseconds since the VM started.
    pub uptime_us: u64,
    /// Resets that were ordered and that the worker has not reported.
    pub resets_asked: u32,
    /// It stands still because it has panicked.
    pub panicked: bool,
    /// Connections of the vsock that were not closed since they were handed over: the ids of their descriptors.
    pub connections: Vec<u32>,
}

/// A piece of the console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsolePart {
    /// The recent past, which an attaching person is shown; at most [`MAX_CONSOLE`] bytes.
    Scrollback(Vec<u8>),
    /// Typed, and not yet taken by the worker; at most [`MAX_CONSOLE`] bytes.
    Typed(Vec<u8>),
    /// Somebody who listens: comes with that one's stream, and for a pseudo-terminal with its other end.
    Listener,
    /// What the last listener has not read yet; at most [`MAX_CONSOLE`] bytes.
    Behind(Vec<u8>),
}

/// Who wants a connection of the guest's vsock, and has none yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VsockPart {
    /// A program of the host, with what was read of its line so far. Comes with its socket.
    Caller(Vec<u8>),
    /// The guest: the tickets by which its worker asks, and the ports of the host.
    Asked(Vec<(u32, u32)>),
}

/// What the old broker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNew {
    /// This is the VM. Comes with the broker's end of each console, which the old broker reads until the commit; the other
    /// descriptors follow on the cpr connection.
    Offer(Box<Offer>),
    /// The workers agree on versions and machine: hand the descriptors over.
    Agreed,
    /// The new worker runs the guest.
    Committed(Committed),
    /// A piece of the serial console.
    Console(ConsolePart),
    /// Somebody at the vsock.
    Vsock(VsockPart),
    /// The end of it: the audit log is yours, and this is what it says last.
    Ended(Box<UpgradeOutcome>),
    /// The transfer is off, and why. The old worker runs the guest.
    Cancelled(String),
    /// Before the offer, for each of the VM's taps: comes with what keeps that tap from other VMs.
    Claim,
    /// Before the offer: comes with the socket on which programs of the host reach the guest's vsock. Whoever has the guest
    /// accepts there; until the commit nobody does.
    VsockListener,
    /// A piece of the virtio console.
    VirtioConsole(ConsolePart),
}

/// What the new broker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToOld {
    /// The first word.
    Hello {
        /// Its build.
        build: String,
        /// Device and inode of the directory in which it waits beside the VM's own.
        directory: (u64, u64),
        /// Its process, for whoever supervises the VM's.
        process: u32,
    },
    /// Everything is as it should be; it waits to be told where the main channel comes in.
    Deferred,
    /// It listens for the main channel.
    Listening,
    /// The new worker is confirmed, and has its end of the main channel.
    Greeting {
        /// Where that connection ends on this side and on the other, if it is over TCP, where the kernel says nothing of the
        /// peer: it is the old broker's only if that one has the same to say.
        ends: Option<(SocketAddr, SocketAddr)>,
    },
    /// The new worker is built and confirmed. Comes with its pidfd and its control socket.
    Ready(Ready),
    /// It cannot, and why.
    Failed(String),
}

/// A new worker that waits for its guest's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// SHA-256 of its binary, in hex.
    pub digest: String,
    /// Its build.
    pub build: String,
    /// Where its building time went.
    pub times: BuildTimes,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::BlockConfig;
    use crate::worker::DeviceLimits;

    fn machine() -> GuestMachine {
        GuestMachine {
            name: "web1".into(),
            cpus: 2,
            hide: Vec::new(),
            ram: vec![RamRegion {
                address: 0,
                size: 64 << 20,
            }],
            pages: Pages::Small,
            backing: RamBacking::Shared,
            cmdline: String::new(),
            initrd: false,
            console: "file".into(),
            virtio: vec![VirtioConfig {
                slot: 31,
                device: VirtioKind::Entropy,
            }],
        }
    }

    #[test]
    fn each_difference_is_named() {
        type Change = fn(&mut GuestMachine);
        let changes: [(Change, &str); 9] = [
            (|m| m.name = "web2".into(), "name"),
            (|m| m.cpus = 3, "cpus.count"),
            (|m| m.hide = vec!["xsave".parse().unwrap()], "cpus.hide"),
            (|m| m.ram[0].size *= 2, "memory.size"),
            (|m| m.pages = Pages::Huge, "memory.pages"),
            (|m| m.cmdline = "quiet".into(), "boot.cmdline"),
            (|m| m.initrd = true, "boot.initrd"),
            (|m| m.console = "pty".into(), "console.kind"),
            (
                |m| {
                    let disk = BlockConfig {
                        bytes: 512,
                        device: false,
                        readonly: false,
                        direct: false,
                        block_size: 512,
                        queues: 1,
                        serial: "a".into(),
                        limits: DeviceLimits::default(),
                    };
                    let config = VirtioConfig {
                        slot: 1,
                        device: VirtioKind::Block(disk),
                    };
                    m.virtio.insert(0, config);
                },
                "device 1",
            ),
        ];
        assert_eq!(machine().first_difference(&machine()), None);
        for (change, name) in changes {
            let mut other = machine();
            change(&mut other);
            let difference = machine().first_difference(&other).unwrap();
            assert!(difference.starts_with(name), "{difference}");
        }
    }

    #[test]
    fn a_preamble_is_ours_or_refused_by_name() {
        check_preamble(preamble()).unwrap();
        for (bytes, words) in [
            (*b"QCPR\0\0\0\x01", "QEMU"),
            (*b"HELO\x01\0\0\0", "bad magic 48454c4f"),
            (*b"BCPR\x01\0\0\0", "version 1"),
        ] {
            let error = check_preamble(bytes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
