//! How a worker comes to its guest.

use serde::Deserialize;
use serde::Serialize;

/// How a worker comes to its guest: set before the CPR state is read, handed to every device's constructor and
/// lifecycle call, and back to [`StartMode::None`] when the load has ended or failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartMode {
    /// A cold start: the guest begins at its kernel's entry, and the worker writes that kernel into blank RAM.
    #[default]
    None,
    /// QEMU's `cpr-transfer`: RAM stays in place, descriptors come from the broker, state comes over the main channel.
    CprTransfer,
    /// QEMU's `cpr-reboot`: every process of the VM has ended, state comes out of a file, and RAM out of that or of one of its
    /// own.
    CprReboot,
}

impl StartMode {
    /// Whether guest RAM, and everything that descriptors stand for, belongs to a guest that was begun by another worker.
    #[must_use]
    pub fn preserves_guest(self) -> bool {
        match self {
            StartMode::None => false,
            StartMode::CprTransfer | StartMode::CprReboot => true,
        }
    }
}
