//! The balloon, driven through its registers and rings (`baton_fuzz`). Guest RAM is a file in which it punches holes.
#![no_main]

use baton_fuzz::Subject;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::balloon::Balloon;
use libfuzzer_sys::fuzz_target;

struct Pages(u64);

impl Subject for Pages {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Balloon::new(self.0))
    }
}

fuzz_target!(|data: &[u8]| {
    let huge = data.first().is_some_and(|first| first & 1 != 0);
    baton_fuzz::drive(data, &mut Pages(if huge { 2 << 20 } else { 4096 }));
});
