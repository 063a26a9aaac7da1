//! The wire between the processes of one VM: message types, the descriptor-passing socket, the registry of descriptors, the
//! cpr channel and the main channel.
//!
//! This crate decides what can be said, never whether it is permitted: it opens no file, starts no process and keeps no
//! policy. Everything that it parses comes from a process that may be hostile, so every length is bounded and every error
//! names the value that was refused.
#![forbid(unsafe_code)]

mod address;
pub mod channel;
pub mod control;
pub mod cpr;
mod cpu_feature;
pub mod descriptor;
#[cfg(feature = "fail-points")]
mod fail_point;
mod inet;
mod registry;
mod socket;
mod start_mode;
pub mod state_file;
pub mod state_stream;
pub mod transfer;
pub mod vhost_user;
mod vm_id;
pub mod worker;

pub use address::Address;
pub use address::AddressError;
pub use address::FileAddress;
pub use channel::Channel;
pub use channel::ChannelError;
pub use channel::decode;
pub use channel::encode;
pub use cpu_feature::CpuFeature;
pub use cpu_feature::CpuidRegister;
pub use cpu_feature::UnknownFeature;
pub use descriptor::Access;
pub use descriptor::Description;
pub use descriptor::DescriptorError;
pub use descriptor::DescriptorKey;
pub use descriptor::DescriptorKind;
#[cfg(feature = "fail-points")]
pub use fail_point::FailAction;
#[cfg(feature = "fail-points")]
pub use fail_point::FailPoint;
#[cfg(feature = "fail-points")]
pub use fail_point::FailSite;
pub use inet::InetOptions;
pub use registry::Registry;
pub use registry::RegistryError;
pub use socket::FdSocket;
pub use socket::MAX_DESCRIPTORS;
pub use socket::MAX_MESSAGE;
pub use socket::Received;
pub use socket::SocketError;
pub use start_mode::StartMode;
pub use state_stream::StateDigest;
pub use vm_id::VmId;
