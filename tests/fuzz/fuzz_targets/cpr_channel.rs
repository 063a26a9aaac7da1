//! The cpr channel: its preamble between brokers, and a CPR state message by message, with and without descriptors.
//!
//! What is promised: no panic; what is taken was announced, verified and counted. Input: messages, each a length byte (low 6
//! bits, times 4; the high bits say how many descriptors come with it) and that many bytes.
#![no_main]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use baton_ipc::FdSocket;
use baton_ipc::cpr::CprReceiver;
use baton_ipc::transfer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some((first, _)) = data.split_first_chunk::<{ transfer::PREAMBLE }>() {
        assert_eq!(
            transfer::check_preamble(*first).is_ok(),
            *first == transfer::preamble()
        );
    }
    let file = File::open("/proc/self/exe").unwrap();
    let descriptors: Vec<BorrowedFd<'_>> = vec![file.as_fd(); 3];
    let (sender, socket) = FdSocket::pair().unwrap();
    let mut receiver = CprReceiver::default();
    let mut rest = data;
    let mut entries = 0;
    while let Some((&head, after)) = rest.split_first() {
        let length = (usize::from(head & 0x3f) * 4).min(after.len());
        let (message, after) = after.split_at(length);
        rest = after;
        let count = usize::from(head >> 6);
        if message.is_empty() || sender.send(message, &descriptors[..count]).is_err() {
            continue;
        }
        entries += usize::from(count == 1);
        match receiver.receive(&socket) {
            Ok(None) => {}
            Ok(Some((_, registry))) => {
                assert!(registry.len() <= entries);
                return;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return;
            }
        }
    }
});
