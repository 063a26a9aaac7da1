//! `[vsock]` of the VM file.

use std::path::PathBuf;

use baton_ipc::worker::VsockConfig;
use serde::Deserialize;

/// The socket device.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vsock {
    /// The guest's context id.
    pub(crate) cid: Cid,
    /// The socket at the host's end.
    pub(crate) socket: PathBuf,
}

impl Vsock {
    /// What a worker is told.
    pub(crate) fn config(&self) -> VsockConfig {
        VsockConfig { cid: self.cid.0 }
    }
}

/// A context id that a guest can have.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u32")]
pub(crate) struct Cid(pub(crate) u32);

impl TryFrom<u32> for Cid {
    type Error = String;

    fn try_from(cid: u32) -> Result<Self, String> {
        match cid {
            // vsock(7): the hypervisor's, the local one, the host's, and any.
            0..=2 | u32::MAX => Err(format!("{cid} is no guest's context id: 3 to 4294967294")),
            cid => Ok(Self(cid)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_ids_that_mean_something_else_are_refused() {
        for bad in [0, 1, 2, u32::MAX] {
            assert!(Cid::try_from(bad).is_err(), "{bad}");
        }
        assert_eq!(Cid::try_from(3).unwrap().0, 3);
    }
}
