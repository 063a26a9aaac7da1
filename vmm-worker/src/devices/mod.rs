//! The small platform devices, the buses that vCPU threads reach them by, and the lifecycle that all devices share.
//!
//! A device takes a [`Trigger`] or an [`IrqLine`] and knows nothing of KVM; its tests need no VM. It is called from vCPU
//! threads (port and MMIO exits) and from the control thread, so each lives in an `Arc<Mutex<_>>` of its own: an exit
//! locks exactly one device, holds no other lock, and never allocates or blocks on I/O. Nobody calls into a second
//! device while holding the lock of a first; what has to reach further (a wake-up, a power event) goes through a
//! trigger that must not lock a device either.

pub mod acpi_pm;
pub mod bus;
pub mod console;
pub mod i8042;
pub mod id;
pub mod lifecycle;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
mod signal;
pub mod state;
pub mod virtio;

pub use bus::Bus;
pub use bus::BusDevice;
pub use id::DeviceId;
pub use id::DeviceKind;
pub use lifecycle::Device;
pub use lifecycle::Devices;
pub use signal::IrqLine;
pub use signal::SharedLine;
pub use signal::Trigger;

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the numbers in these tests are small"
)]
mod tests;
