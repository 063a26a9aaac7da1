//! The `baton` binary against a broker that answers as the test tells it to: no KVM, no privilege.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that goes wrong here is to panic"
)]

mod canned;
mod commands;
mod demo;
mod fleet;
mod help;
mod orphan;
mod policy;
mod run;
