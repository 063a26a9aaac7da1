//! A tap that a broker would hold.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use baton_policy::kernel;
use rustix::fs::OFlags;

/// A tap of this test's own, gone with the last descriptor.
pub(crate) struct Tap {
    pub(crate) name: String,
    /// One a queue pair.
    pub(crate) queues: Vec<OwnedFd>,
}

impl Tap {
    /// Makes one. Needs CAP_NET_ADMIN and /dev/net/tun.
    pub(crate) fn new(queues: u8) -> Self {
        let mut flags = kernel::IFF_TAP | kernel::IFF_NO_PI | kernel::IFF_VNET_HDR;
        if queues > 1 {
            flags |= kernel::IFF_MULTI_QUEUE;
        }
        // One test makes one at a time (`alone`).
        let name = format!("bt{}", std::process::id());
        let open = |_| {
            let queue = File::options()
                .read(true)
                .write(true)
                .custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap())
                .open("/dev/net/tun")
                .expect("these tests need /dev/net/tun");
            kernel::tun_set_iff(queue.as_fd(), &name, flags)
                .expect("these tests need CAP_NET_ADMIN");
            OwnedFd::from(queue)
        };
        let queues: Vec<OwnedFd> = (0..queues).map(open).collect();
        kernel::tun_set_vnet_header(queues[0].as_fd(), 12).unwrap();
        kernel::interface_up(&name).unwrap();
        Self { name, queues }
    }
}
