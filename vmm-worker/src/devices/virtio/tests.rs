//! What is so of every virtio device: of a queue that is broken the driver hears, from whoever has the device, until it resets
//! that. (Of those that another process serves, `vhost_user` has the same.)

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::VsockConfig;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use super::test_driver::*;
use super::*;

/// The vector that the driver chose for changes of the configuration, as it arrives.
const CONFIG: u32 = 0x40;

/// A device that can be made again, and which of its queues are served.
struct Subject {
    name: &'static str,
    make: Box<dyn Fn() -> Box<dyn VirtioDevice>>,
    served: &'static [u64],
    /// The other end of what it receives from.
    outside: Option<OwnedFd>,
}

fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
}

fn subjects() -> Vec<Subject> {
    let image = file(1 << 20);
    let (wire, tap) = pair(SocketType::DGRAM);
    let (other_wire, other_tap) = pair(SocketType::DGRAM);
    let (person, socket) = pair(SocketType::STREAM);
    // Nothing is ever sent there.
    std::mem::forget(other_wire);
    let block = BlockConfig {
        bytes: 1 << 20,
        device: false,
        readonly: false,
        direct: false,
        block_size: 512,
        queues: 2,
        serial: String::new(),
        limits: DeviceLimits::default(),
    };
    let net = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queues: 2,
        limits: DeviceLimits::default(),
    };
    vec![
        Subject {
            name: "block",
            make: Box::new(move || {
                let image = image.try_clone().unwrap();
                Box::new(block::Block::new(image.into(), &block))
            }),
            served: &[0, 1],
            outside: None,
        },
        Subject {
            name: "net",
            make: Box::new(move || {
                let taps = [&tap, &other_tap].map(|tap| tap.try_clone().unwrap());
                Box::new(net::Net::with_offloads(taps.into(), &net, |_, _| Ok(())))
            }),
            // Both of the first pair, what the second sends, and control.
            served: &[0, 1, 3, 4],
            outside: Some(wire),
        },
        Subject {
            name: "entropy",
            make: Box::new(|| Box::new(entropy::Entropy)),
            served: &[0],
            outside: None,
        },
        Subject {
            name: "vsock",
            make: Box::new(|| {
                let config = VsockConfig { cid: 3 };
                Box::new(vsock::Vsock::new(&config, BTreeMap::new(), Arc::new(|| {})).0)
            }),
            // Nothing is ever received without a connection, and there are no events.
            served: &[1],
            outside: None,
        },
        Subject {
            name: "balloon",
            make: Box::new(|| Box::new(balloon::Balloon::new(4096))),
            served: &[0, 1, 2],
            outside: None,
        },
        Subject {
            name: "console",
            make: Box::new(move || Box::new(console::Console::new(socket.try_clone().unwrap()).0)),
            served: &[0, 1],
            outside: Some(person),
        },
    ]
}

#[test]
fn a_broken_queue_is_told_by_every_worker_until_the_driver_resets_the_device() {
    for subject in subjects() {
        for queue in subject.served {
            let what = format!("queue {queue} of {}", subject.name);
            let mut rig = Rig::new((subject.make)());
            rig.bring_up();
            rig.serve();
            assert_eq!(rig.status() & NEEDS_RESET, 0, "{what}");
            if let Some(outside) = &subject.outside {
                rustix::io::write(outside, &[0; 100]).unwrap();
            }
            // More than the ring has room for.
            let index = RINGS + RING_STEP * queue + AVAILABLE + 2;
            rig.put(index, &(SIZE + 1).to_le_bytes());
            rig.serve();
            for worker in 0..3 {
                let status = rig.status();
                let expected = NEEDS_RESET | DRIVER_OK;
                assert_eq!(status & expected, expected, "{what}, worker {worker}");
                let told = rig.fired.0.lock().unwrap().contains(&CONFIG);
                assert!(told, "{what}, worker {worker}");
                // Nobody serves it, whatever the driver offers now.
                rig.put(index, &1_u16.to_le_bytes());
                rig.serve();
                assert_eq!(rig.used(*queue), 0, "{what}, worker {worker}");
                rig = rig.hand_over((subject.make)());
            }
            rig.bring_up();
            rig.serve();
            let status = rig.status();
            assert_eq!(status & (NEEDS_RESET | DRIVER_OK), DRIVER_OK, "{what}");
        }
    }
}
