//! What a VM may cost its host's disks and network, whatever its VM file asks for.

use crate::policy::Policy;
use crate::rlimits::Limit;

/// The least that a policy can leave a console's file, in bytes: what is kept of one is not less than a screen.
pub const MIN_CONSOLE_FILE: u64 = 65_536;

/// What a policy says of input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoPolicy {
    /// Bytes that the file of a console may have; the oldest are let go.
    pub console_file: Limit,
    /// Bytes a second of a disk, read and written together.
    pub disk_bytes: Limit,
    /// Requests a second of a disk.
    pub disk_operations: Limit,
    /// Bytes a second of a network interface, in each direction.
    pub net_bytes: Limit,
    /// Packets a second of a network interface, in each direction.
    pub net_operations: Limit,
}

impl Default for IoPolicy {
    fn default() -> Self {
        Self {
            console_file: Limit::At(64 << 20),
            disk_bytes: Limit::Unlimited,
            disk_operations: Limit::Unlimited,
            net_bytes: Limit::Unlimited,
            net_operations: Limit::Unlimited,
        }
    }
}

impl IoPolicy {
    /// All of it, by the names of the file.
    #[must_use]
    pub fn limits(&self) -> [(&'static str, Limit); 5] {
        [
            ("console_file", self.console_file),
            ("disk_bytes", self.disk_bytes),
            ("disk_operations", self.disk_operations),
            ("net_bytes", self.net_bytes),
            ("net_operations", self.net_operations),
        ]
    }
}

impl Limit {
    /// Whether it lets through what has this limit of its own, or none.
    #[must_use]
    pub fn covers(self, own: Option<u64>) -> bool {
        match (self, own) {
            (Self::Unlimited, _) => true,
            (Self::At(most), Some(own)) => own <= most,
            (Self::At(_), None) => false,
        }
    }
}

impl Policy {
    /// What it says of input and output, in a sentence.
    pub(crate) fn io_sentence(&self) -> String {
        let limits = self
            .io
            .limits()
            .map(|(name, limit)| format!("{name} {limit}"));
        format!(
            "What a VM may cost its host: {}. A device that is limited to more, or not at all, is refused.",
            limits.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_limit_is_within_none() {
        assert!(Limit::Unlimited.covers(None));
        assert!(Limit::At(5).covers(Some(5)));
        assert!(!Limit::At(5).covers(Some(6)));
        assert!(!Limit::At(5).covers(None));
    }
}
