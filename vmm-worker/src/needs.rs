//! The note in the worker's file that says what it needs: the built-in policy, under which it is built and tested. A broker
//! reads it before it runs this worker (`baton_policy::declaration`).

baton_policy::declare_needs!("baton-worker", protocol 5);

const _: () = assert!(
    baton_ipc::worker::PROTOCOL == 5,
    "the note above names another version of the protocol"
);
