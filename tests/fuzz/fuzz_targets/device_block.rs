//! The disk, driven through its registers and rings (`baton_fuzz`). Its file keeps its size whatever is asked for.
#![no_main]

use std::os::fd::OwnedFd;

use baton_fuzz::Subject;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::RateLimit;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::block::Block;
use libfuzzer_sys::fuzz_target;

const BYTES: u64 = 1 << 16;

struct Disk(OwnedFd, BlockConfig);

impl Subject for Disk {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Block::new(self.0.try_clone().unwrap(), &self.1))
    }

    fn check(&mut self) {
        assert_eq!(rustix::fs::fstat(&self.0).unwrap().st_size, BYTES as i64);
    }
}

fuzz_target!(|data: &[u8]| {
    let flags = data.first().copied().unwrap_or_default();
    let limit = RateLimit {
        per_second: 1 << 20,
        burst: 1 << 14,
    };
    let config = BlockConfig {
        bytes: BYTES,
        device: false,
        readonly: flags & 1 != 0,
        direct: false,
        block_size: 512 << (flags >> 1 & 3),
        queues: 1 + (flags >> 3 & 1),
        serial: "fuzz".to_owned(),
        limits: DeviceLimits {
            bytes: (flags & 0x40 != 0).then_some(limit),
            operations: (flags & 0x80 != 0).then_some(limit),
        },
    };
    baton_fuzz::drive(data, &mut Disk(baton_fuzz::file(BYTES), config));
});
