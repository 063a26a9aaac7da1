//! PCI devices of the host in the guest, by VFIO (Linux, `Documentation/driver-api/vfio.rst`).
//!
//! ```text
//! guest ─ configuration space ─► config: what it may see and change ─┐
//!       ─ BARs ────────────────────────────────────────────────────► device ─ pread, pwrite ─► the device's registers
//!       ◄─ KVM ◄─ irqfd ◄─ interrupts: the broker's eventfds ◄─────────────────────────────── its vectors
//!   guest RAM ◄──────────────── container: pages pinned, mapped by the IOMMU ◄─────────────── its DMA
//! ```
//!
//! The device goes on while its worker is replaced. The old worker unbinds the vectors' eventfds from its VM when it parks, so that
//! interrupts are counted in them from then on, and gives up its addresses of guest RAM when it is saved, which leaves every page
//! pinned and mapped for the device. The new one gives the same ranges its own addresses, and binds the same eventfds, once the
//! guest runs: what was counted fires then. To VFIO itself nothing is said in between.

pub(crate) mod config;
pub(crate) mod container;
pub(crate) mod device;
pub(crate) mod interrupts;

use std::io;

use baton_ipc::worker::MAX_SLOTS;
use baton_ipc::worker::MAX_VFIO_VECTORS;
use baton_ipc::worker::VFIO_BARS;
use baton_ipc::worker::VFIO_CONFIG;
use baton_ipc::worker::VfioConfig;
use thiserror::Error;

/// `_IO(';', 100 + number)` (`linux/vfio.h`).
const fn request(number: libc::c_ulong) -> libc::c_ulong {
    0x3b64 + number
}

/// Why a device of the host cannot be the guest's.
#[derive(Debug, Error)]
pub(crate) enum VfioError {
    /// What no broker of ours would say.
    #[error("configuration: vfio in slot {slot}: {what}")]
    Config {
        /// The device's PCI device number.
        slot: u8,
        /// What is wrong.
        what: &'static str,
    },
    /// Its configuration space says what cannot be.
    #[error("vfio in slot {slot}: its configuration space: {what}")]
    Space {
        /// The device's PCI device number.
        slot: u8,
        /// What is wrong.
        what: &'static str,
    },
    /// There is no room for its BARs.
    #[error(
        "vfio in slot {slot}: no room for a BAR of {size:#x} bytes in the {window:#x} bytes below 4 GiB"
    )]
    Room {
        /// The device's PCI device number.
        slot: u8,
        /// The BAR's size in bytes.
        size: u64,
        /// All bytes for BARs.
        window: u64,
    },
    /// VFIO refuses.
    #[error("{call}: {source}{}", remedy(.call, .source))]
    Ioctl {
        /// Its request.
        call: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What to do about VFIO's refusal, where that is known.
fn remedy(call: &str, source: &io::Error) -> &'static str {
    match (call, source.raw_os_error()) {
        (container::MAP, Some(libc::ENOMEM)) => {
            ": guest RAM is pinned; start the broker with a higher RLIMIT_MEMLOCK, and with as much free memory"
        }
        _ => "",
    }
}

/// Checks what no broker of ours would say.
///
/// # Errors
///
/// [`VfioError::Config`].
pub(crate) fn check(config: &VfioConfig) -> Result<(), VfioError> {
    let VfioConfig {
        slot,
        space,
        space_at: _,
        bars,
        interrupts: _,
        vectors,
        resets: _,
    } = config;
    let wrong = |what| Err(VfioError::Config { slot: *slot, what });
    if *slot == 0 || *slot >= MAX_SLOTS {
        return wrong("no such slot");
    }
    if space.len() != VFIO_CONFIG {
        return wrong("not 256 bytes of configuration space");
    }
    if bars.len() != VFIO_BARS {
        return wrong("not 6 BARs");
    }
    if bars
        .iter()
        .any(|bar| bar.at.checked_add(bar.size).is_none())
    {
        return wrong("a BAR beyond everything");
    }
    if *vectors == 0 || *vectors > MAX_VFIO_VECTORS {
        return wrong("a number of vectors that cannot be");
    }
    Ok(())
}
