//! What a guest sees of a device's configuration space, made of what the broker has read there (PCI Local Bus 3.0, chapter 6).
//!
//! | of the device | in the guest |
//! |---|---|
//! | identity, class, subsystem | the same |
//! | command | memory space and bus master reach the device |
//! | memory BARs | of the same sizes and kinds, where this machine puts them; the guest may move them |
//! | I/O BARs, expansion ROM, interrupt pin | none |
//! | MSI-X, or else MSI | of our making, with as many vectors as the broker has eventfds for |
//! | capabilities of its vendor | as they were read, not to be changed |
//! | all others, PCI Express and power management among them | hidden |

use std::ops::Range;

use baton_ipc::worker::VfioConfig;
use baton_ipc::worker::VfioInterrupts;

use super::VfioError;
use crate::devices::pci::config_space::BARS;
use crate::devices::pci::config_space::ConfigSpace;
use crate::devices::pci::config_space::Identity;
use crate::devices::pci::config_space::SIZE;
use crate::devices::pci::msix;
use crate::devices::pci::msix::ENTRY_SIZE;
use crate::devices::pci::msix::Message;

// Offsets of the type 0 header (6.1), and of what it links to (6.7).
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x08;
const HEADER_TYPE: usize = 0x0E;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2C;
const SUBSYSTEM: usize = 0x2E;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Status: there is a chain of capabilities.
const CAPABILITIES_LIST: u16 = 1 << 4;
/// A BAR's lowest bits: I/O, and for memory two bits of its type (of which this is 64 bits) and prefetchable (6.2.5.1).
const BAR_IO: u32 = 1;
const BAR_TYPE: u32 = 6;
const BAR_WIDE: u32 = 4;
const BAR_KIND: u32 = 0xF;
/// The least memory BAR, in bytes: 16 are what its address bits can say.
const MIN_BAR: u64 = 16;

/// Ids of capabilities (appendix H).
const MSI: u8 = 0x05;
const VENDOR_SPECIFIC: u8 = 0x09;
/// MSI's message control: enabled, and with an upper address.
const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
/// The lowest 3 bits of where MSI-X's table and pending bits are: in which BAR (6.8.2).
const BAR_NUMBER: u32 = 7;

/// What a guest sees at power-on, and how it says what the vectors write.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) space: ConfigSpace,
    pub(crate) signal: Signal,
}

/// The capability by which it interrupts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// MSI, of one vector.
    Msi {
        /// Where in configuration space.
        at: u8,
    },
    /// MSI-X.
    MsiX {
        /// Where in configuration space.
        at: u8,
        /// Where in the device's descriptor the table is.
        table: Range<u64>,
        /// Where in it the pending bits are.
        pending: Range<u64>,
    },
}

impl Signal {
    /// Message control as MSI-X has it: whether vectors are enabled, and masked all together.
    pub(crate) fn control(&self, space: &ConfigSpace) -> u16 {
        match self {
            Self::Msi { at } if space.word(at.saturating_add(2)) & MSI_ENABLE != 0 => msix::ENABLE,
            Self::Msi { .. } => 0,
            Self::MsiX { at, .. } => space.word(at.saturating_add(2)),
        }
    }

    /// What an MSI writes. MSI-X has a table for that.
    pub(crate) fn message(&self, space: &ConfigSpace) -> Option<Message> {
        let Self::Msi { at } = self else {
            return None;
        };
        let [low, high] = [4, 8].map(|after| space.dword(at.saturating_add(after)));
        Some(Message {
            address: u64::from(high) << 32 | u64::from(low),
            data: space.word(at.saturating_add(12)).into(),
        })
    }
}

/// A device's own configuration space. Reads beyond its end are of zeros.
struct Space<'a>(&'a [u8]);

impl Space<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Its capabilities, by id and place, in the order of their chain; of one that goes round, each once.
    fn capabilities(&self) -> Vec<(u8, usize)> {
        let mut found: Vec<(u8, usize)> = Vec::new();
        if self.word(STATUS) & CAPABILITIES_LIST == 0 {
            return found;
        }
        let link = |at: usize| usize::from(self.byte(at) & !3);
        let mut at = link(CAPABILITIES);
        while at >= FIRST_CAPABILITY && found.iter().all(|(_, before)| *before != at) {
            found.push((self.byte(at), at));
            at = link(at + 1);
        }
        found
    }
}

/// Makes what the guest sees. `room` says where a BAR of so many bytes goes, below 4 GiB and at a multiple of them.
///
/// # Errors
///
/// [`VfioError::Space`] for a header of another type and MSI-X outside of every BAR, and what `room` says.
pub(crate) fn shape(
    config: &VfioConfig,
    mut room: impl FnMut(u64) -> Result<u32, VfioError>,
) -> Result<Shape, VfioError> {
    let wrong = |what| VfioError::Space {
        slot: config.slot,
        what,
    };
    let own = Space(&config.space);
    if own.byte(HEADER_TYPE) & 0x7F != 0 {
        return Err(wrong("it is a bridge's"));
    }
    let mut space = ConfigSpace::new(Identity {
        vendor: own.word(VENDOR),
        device: own.word(DEVICE),
        class: own.dword(CLASS) >> 8,
        revision: own.byte(REVISION),
        subsystem_vendor: own.word(SUBSYSTEM_VENDOR),
        subsystem: own.word(SUBSYSTEM),
    });
    let mut upper = false;
    for (index, bar) in config.bars.iter().enumerate().take(BARS) {
        let low = own.dword(BAR0 + 4 * index);
        // The second half of one of 64 bits, and I/O, are nobody's.
        let skipped = std::mem::take(&mut upper) || low & BAR_IO != 0;
        if skipped || bar.size == 0 {
            continue;
        }
        if !bar.size.is_power_of_two() || bar.size < MIN_BAR {
            return Err(wrong("a BAR's size is no power of two"));
        }
        upper = low & BAR_TYPE == BAR_WIDE;
        let address = room(bar.size)?;
        space = space.with_memory_bar(index, bar.size, address | low & BAR_KIND);
    }
    let capabilities = own.capabilities();
    let signal = match config.interrupts {
        VfioInterrupts::Msi => msi(&mut space),
        VfioInterrupts::MsiX => {
            let at = capabilities.iter().find(|(id, _)| *id == msix::CAPABILITY);
            let (_, at) = at.ok_or_else(|| wrong("it has no MSI-X, which VFIO says it has"))?;
            msi_x(&mut space, config, &own, *at)?
        }
    };
    let vendors = capabilities.iter().filter(|(id, _)| *id == VENDOR_SPECIFIC);
    // What is left of the 256 bytes after a header of 64 and the longest of the two above.
    let mut left = SIZE - FIRST_CAPABILITY - 16;
    for (id, at) in vendors {
        // Its third byte says how long it is, all included.
        let length = usize::from(own.byte(at + 2));
        let body = config.space.get(at + 2..at + length).unwrap_or_default();
        let taken = (2 + body.len()).next_multiple_of(4);
        if !body.is_empty() && taken <= left {
            space.add_capability(*id, body, &[]);
            left -= taken;
        }
    }
    Ok(Shape { space, signal })
}

fn msi(space: &mut ConfigSpace) -> Signal {
    let mut body = MSI_WIDE.to_le_bytes().to_vec();
    // Address, its upper half, data.
    body.extend([0; 10]);
    let mut writable = MSI_ENABLE.to_le_bytes().to_vec();
    writable.extend((!3_u32).to_le_bytes());
    writable.extend([0xFF; 6]);
    Signal::Msi {
        at: space.add_capability(MSI, &body, &writable),
    }
}

fn msi_x(
    space: &mut ConfigSpace,
    config: &VfioConfig,
    own: &Space<'_>,
    at: usize,
) -> Result<Signal, VfioError> {
    let place = |word: u32, length: u64| {
        let number = usize::try_from(word & BAR_NUMBER).ok()?;
        let bar = config.bars.get(number)?;
        let offset = u64::from(word & !BAR_NUMBER);
        let fits = offset.checked_add(length)? <= bar.size;
        let start = bar.at.checked_add(offset)?;
        fits.then_some(start..start + length)
    };
    let vectors = u64::from(config.vectors);
    let outside = || VfioError::Space {
        slot: config.slot,
        what: "MSI-X lies in no BAR",
    };
    let (table, pending) = (own.dword(at + 4), own.dword(at + 8));
    let mut body = config.vectors.saturating_sub(1).to_le_bytes().to_vec();
    body.extend(table.to_le_bytes());
    body.extend(pending.to_le_bytes());
    let control = (msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes();
    Ok(Signal::MsiX {
        table: place(table, vectors * ENTRY_SIZE).ok_or_else(outside)?,
        // 64 vectors a quad word.
        pending: place(pending, vectors.div_ceil(64) * 8).ok_or_else(outside)?,
        at: space.add_capability(msix::CAPABILITY, &body, &control),
    })
}

#[cfg(test)]
mod tests;
