//! What the guest's devices need of the host: opened by policy, described to the worker, held over every generation.

pub(crate) mod balloon;
pub(crate) mod console;
pub(crate) mod disks;
pub(crate) mod granted_socket;
pub(crate) mod hotplug;
pub(crate) mod io_limits;
pub(crate) mod netdevs;
pub(crate) mod nodes;
pub(crate) mod planned;
pub(crate) mod ram_file;
pub(crate) mod resizing;
pub(crate) mod resources;
pub(crate) mod taps;
pub(crate) mod vfio;
pub(crate) mod vhost_user;
pub(crate) mod vsock;
