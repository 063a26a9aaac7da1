//! The entropy device, driven through its registers and rings (`baton_fuzz`).
#![no_main]

use baton_fuzz::Subject;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::entropy::Entropy;
use libfuzzer_sys::fuzz_target;

struct Source;

impl Subject for Source {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Entropy)
    }
}

fuzz_target!(|data: &[u8]| {
    baton_fuzz::drive(data, &mut Source);
});
