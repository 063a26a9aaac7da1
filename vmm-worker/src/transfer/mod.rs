//! The two sides of an upgrade: [`outgoing`] of the worker that is replaced, [`incoming`] of the one that replaces it,
//! and the [`main_channel`] between them.

pub(crate) mod incoming;
pub(crate) mod main_channel;
pub(crate) mod outgoing;
