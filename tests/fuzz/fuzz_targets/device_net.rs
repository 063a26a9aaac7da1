//! The network interface, driven through its registers and rings (`baton_fuzz`), on sockets that keep packets apart as a tap does.
#![no_main]

use std::os::fd::OwnedFd;

use baton_fuzz::Script;
use baton_fuzz::Subject;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::NetConfig;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::net::Net;
use libfuzzer_sys::fuzz_target;
use rustix::net::SocketType;

struct Interface {
    config: NetConfig,
    taps: Vec<OwnedFd>,
    wires: Vec<OwnedFd>,
}

impl Subject for Interface {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let taps = self.taps.iter().map(|tap| tap.try_clone().unwrap());
        let device = Net::with_offloads(taps.collect(), &self.config, |_, _| Ok(()));
        Box::new(device)
    }

    fn outside(&mut self, script: &mut Script<'_>) {
        let wire = usize::from(script.byte()) % self.wires.len();
        let count = usize::from(script.short() % 2048);
        let _ = rustix::io::write(&self.wires[wire], script.bytes(count));
        while rustix::io::read(&self.wires[wire], &mut [0; 1 << 14]).is_ok() {}
    }
}

fuzz_target!(|data: &[u8]| {
    let queues = 1 + (data.first().copied().unwrap_or_default() & 1) * 2;
    let pairs = (0..queues).map(|_| baton_fuzz::pair(SocketType::DGRAM));
    let (taps, wires) = pairs.unzip();
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queues,
        limits: DeviceLimits::default(),
    };
    let mut interface = Interface {
        config,
        taps,
        wires,
    };
    baton_fuzz::drive(data, &mut interface);
});
