//! The confined worker: runs the guest's vCPUs over memory and descriptors that it was handed, and hands them on.

pub mod boot;
pub mod devices;
