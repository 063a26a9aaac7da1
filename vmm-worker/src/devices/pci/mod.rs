//! PCI: one segment with one bus, its configuration mechanisms, and what every function on it has.
//!
//! ```text
//! ports 0xCF8..0xCFF ─┐
//! ECAM window ────────┼─► segment ─► function (configuration space, MSI-X, memory BARs)
//! memory window ──────┘
//! ```
//!
//! The hot-plug registers lock the segment, and the segment a function, never the other way round; a function calls nobody but
//! the sink of its interrupts. Bus numbers, windows and ids are facts of this machine that a guest reads and cannot change;
//! where it puts a BAR, and what it writes into a vector, is state.

pub mod config_space;
pub mod hotplug;
pub mod msix;
pub mod segment;

/// Where a guest reads and writes 1, 2 or 4 bytes of a function's 256 bytes of configuration space.
pub type ConfigOffset = u8;

/// What the segment asks of a function.
pub trait Function: Send {
    /// Reads configuration space; `data` is 1, 2 or 4 bytes that do not reach past its end.
    fn config_read(&mut self, offset: ConfigOffset, data: &mut [u8]);
    /// Writes configuration space, of the same sizes.
    fn config_write(&mut self, offset: ConfigOffset, data: &[u8]);
    /// Where in the function's memory these guest-physical bytes begin, counted in its own way, if one of its BARs has all of them
    /// now; none has while memory decoding is off.
    fn decode(&self, bytes: &std::ops::Range<u64>) -> Option<u64>;
    /// Reads where [`Function::decode`] said; `data` is 1, 2, 4 or 8 bytes of all ones.
    fn bar_read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes there, of the same sizes.
    fn bar_write(&mut self, offset: u64, data: &[u8]);
}
