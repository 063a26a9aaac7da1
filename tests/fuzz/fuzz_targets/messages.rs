//! Every message that goes over a socket between processes: of clients and brokers, brokers and workers, broker and broker.
//!
//! What is promised: no panic, nothing allocated that was only announced, and what is taken encodes to a message of the same
//! meaning. Input: a byte that chooses the type, and a message.
#![no_main]

use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::StartReport;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::Order;
use baton_ipc::worker::Report;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, message)) = data.split_first() else {
        return;
    };
    match choice % 7 {
        0 => same::<Request>(message),
        1 => same::<Reply>(message),
        2 => same::<StartReport>(message),
        3 => same::<Order>(message),
        4 => same::<Report>(message),
        5 => same::<ToNew>(message),
        _ => same::<ToOld>(message),
    }
    if let Ok(text) = std::str::from_utf8(message) {
        if let Ok(address) = text.parse::<baton_ipc::Address>() {
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
});

fn same<M: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = baton_ipc::decode::<M>(bytes) {
        let again = baton_ipc::encode(&message).unwrap();
        let same: M = baton_ipc::decode(&again).unwrap();
        assert_eq!(format!("{message:?}"), format!("{same:?}"));
    }
}
