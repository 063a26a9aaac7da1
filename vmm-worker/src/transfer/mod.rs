//! The two sides of an upgrade: [`outgoing`] of the worker that is replaced, [`incoming`] of the one that replaces it,
//! the
//! [`main_channel`] between them, and the [`entries`] that both were handed.

pub(crate) mod entries;
pub(crate) mod incoming;
pub(crate) mod main_channel;
pub(crate) mod outgoing;
