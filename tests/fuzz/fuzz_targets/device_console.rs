//! The console, driven through its registers and rings (`baton_fuzz`).
#![no_main]

use std::os::fd::OwnedFd;

use baton_fuzz::Script;
use baton_fuzz::Subject;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::console::Console;
use libfuzzer_sys::fuzz_target;
use rustix::net::SocketType;

struct Ends {
    worker: OwnedFd,
    person: OwnedFd,
}

impl Subject for Ends {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (device, _) = Console::new(self.worker.try_clone().unwrap());
        Box::new(device)
    }

    fn outside(&mut self, script: &mut Script<'_>) {
        match script.byte() {
            0..=0x7f => {
                let count = usize::from(script.short() % 1024);
                let _ = rustix::io::write(&self.person, script.bytes(count));
            }
            0x80..=0xef => {
                while matches!(rustix::io::read(&self.person, &mut [0; 1 << 14]), Ok(1..)) {}
            }
            _ => {
                let _ = rustix::net::shutdown(&self.person, rustix::net::Shutdown::Both);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (worker, person) = baton_fuzz::pair(SocketType::STREAM);
    baton_fuzz::drive(data, &mut Ends { worker, person });
});
