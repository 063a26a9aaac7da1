//! A worker's binary, as far as the broker looks at it without executing it.
//!
//! What is promised: no panic, bounded memory. Input: the file.
#![no_main]

use std::fs::File;
use std::io::Write;

use baton_policy::Declaration;
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;

fuzz_target!(|data: &[u8]| {
    let memfd = rustix::fs::memfd_create("fuzzed", MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.write_all(data).unwrap();
    match Declaration::read(&file) {
        Ok(declaration) => assert!(
            declaration
                .build
                .bytes()
                .all(|byte| byte.is_ascii_graphic() || byte == b' ')
        ),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
