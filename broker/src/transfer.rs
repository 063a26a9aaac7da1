//! Mode `cpr-transfer` with channels: the guest goes to another broker, or comes from one.

pub(crate) mod channel_path;
pub(crate) mod channel_socket;
pub(crate) mod incoming;
pub(crate) mod outgoing;
