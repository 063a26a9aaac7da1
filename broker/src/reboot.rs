//! Mode `cpr-reboot`: the guest goes into a file, and comes out of it in a broker of later.

pub(crate) mod restoring;
pub(crate) mod saving;
pub(crate) mod state_file;
