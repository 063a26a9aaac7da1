//! What another process implements by vhost-user, driven through its registers and rings (`baton_fuzz`), while that process says
//! what it likes. It is told of no ring that is not in guest RAM, and of none that is not there; every message is whole.
#![no_main]

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use baton_fuzz::RAM;
use baton_fuzz::Script;
use baton_fuzz::Subject;
use baton_ipc::vhost_user::Replies;
use baton_ipc::vhost_user::Request;
use baton_ipc::worker::VhostUserConfig;
use baton_ipc::worker::VhostUserKind;
use baton_worker::devices::virtio::VirtioDevice;
use baton_worker::devices::virtio::vhost_user::VhostUser;
use libfuzzer_sys::fuzz_target;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SocketType;

/// Requests by their numbers (QEMU, docs/interop/vhost-user.rst).
const SET_FEATURES: u32 = 2;
const SET_NUM: u32 = 8;
const SET_ADDR: u32 = 9;
const SET_BASE: u32 = 10;
const GET_BASE: u32 = 11;
const SET_KICK: u32 = 12;
const SET_CALL: u32 = 13;
const ENABLE: u32 = 18;
/// Version 1; a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 5;
/// VIRTIO_F_VERSION_1, without which a broker takes no backend.
const VERSION_1: u64 = 1 << 32;

/// What the process knows of a ring.
#[derive(Default)]
struct Ring {
    size: u64,
    available: u64,
    used: u64,
    call: Option<OwnedFd>,
}

struct Process {
    config: VhostUserConfig,
    worker: OwnedFd,
    own: OwnedFd,
    /// The other end of what a forged worker talks to.
    forged: Option<OwnedFd>,
    rings: Vec<Ring>,
    /// Rings that it was asked to stop.
    asked: VecDeque<u16>,
    /// It has broken the protocol.
    rude: bool,
}

impl Process {
    fn make(&self, connection: OwnedFd) -> Box<dyn VirtioDevice> {
        Box::new(VhostUser::new(connection, &self.config).unwrap())
    }

    fn say(&mut self, bytes: &[u8]) {
        let _ = rustix::io::write(&self.own, bytes);
    }

    /// One request, if there is one.
    fn hear(&mut self) -> bool {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [std::io::IoSliceMut::new(&mut header)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(&self.own, &mut slices, &mut control, flags) {
            Ok(received) if received.bytes > 0 => assert_eq!(received.bytes, 12),
            _ => return false,
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), VERSION);
        let mut payload = vec![0; word(8) as usize];
        assert_eq!(rustix::io::read(&self.own, &mut payload), Ok(payload.len()));
        self.heard(word(0), &payload, fd);
        true
    }

    fn heard(&mut self, request: u32, payload: &[u8], fd: Option<OwnedFd>) {
        let word = |at: usize| u32::from_le_bytes(payload[4 * at..4 * at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(payload[8 * at..8 * at + 8].try_into().unwrap());
        if request == SET_FEATURES {
            assert_eq!((payload.len(), fd.is_some()), (8, false));
            return;
        }
        let queue = word(0) as u16;
        let ring = &mut self.rings[usize::from(queue)];
        match request {
            SET_NUM => {
                ring.size = word(1).into();
                assert!((1..=256).contains(&ring.size) && ring.size.is_power_of_two());
            }
            SET_BASE => assert!(word(1) <= 0xFFFF),
            SET_ADDR => {
                let [table, used, available] = [long(1), long(2), long(3)];
                for (start, bytes) in [
                    (table, 16 * ring.size),
                    (available, 4 + 2 * ring.size),
                    (used, 4 + 8 * ring.size),
                ] {
                    let end = start.checked_add(bytes);
                    assert!(end.is_some_and(|end| end <= RAM), "a ring at {start:#x}");
                }
                (ring.available, ring.used) = (available, used);
            }
            GET_BASE => self.asked.push_back(queue),
            SET_KICK => assert!(fd.is_some()),
            SET_CALL => {
                assert!(fd.is_some());
                ring.call = fd;
            }
            ENABLE => assert_eq!(word(1), 1),
            other => panic!("request {other}"),
        }
    }

    fn hear_all(&mut self) {
        while self.hear() {}
    }

    fn call(&self, queue: usize) {
        if let Some(call) = self.rings.get(queue).and_then(|ring| ring.call.as_ref()) {
            let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
        }
    }
}

fn message(request: u32, flags: u32, words: &[u32]) -> Vec<u8> {
    let header = [request, flags, 4 * words.len() as u32];
    [&header, words].concat().into_iter().flat_map(u32::to_le_bytes).collect()
}

impl Subject for Process {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        self.make(self.worker.try_clone().unwrap())
    }

    fn forged(&mut self) -> Box<dyn VirtioDevice> {
        let (worker, own) = baton_fuzz::pair(SocketType::STREAM);
        self.forged = Some(own);
        self.make(worker)
    }

    fn outside(&mut self, script: &mut Script<'_>) {
        let kind = script.byte();
        match kind % 8 {
            // A request is given back, or seems to be; and the driver hears of it, or of nothing.
            0..=2 => {
                let queue = usize::from(script.byte()) % self.rings.len();
                let used = self.rings[queue].used;
                if kind & 0x10 != 0 && used != 0 {
                    baton_fuzz::put(used + 2, &script.short().to_le_bytes());
                }
                self.call(queue);
            }
            3 | 4 => self.answer(),
            5 => {
                self.rude = true;
                let words = [script.number() as u32, script.number() as u32];
                let request = if kind & 0x10 != 0 { GET_BASE } else { script.byte().into() };
                let flags = if kind & 0x20 != 0 { REPLY } else { script.number() as u32 };
                self.say(&message(request, flags, &words));
            }
            6 => {
                self.rude = true;
                let count = usize::from(script.short() % 512);
                let bytes = script.bytes(count).to_vec();
                self.say(&bytes);
            }
            _ => {
                self.rude = true;
                let _ = rustix::net::shutdown(&self.own, rustix::net::Shutdown::Both);
            }
        }
    }

    fn check(&mut self) {
        self.hear_all();
    }

    fn elsewhere(&self) -> bool {
        true
    }

    /// Gives everything back, and stops what is to stop.
    fn answer(&mut self) {
        self.hear_all();
        for ring in &self.rings {
            if ring.size != 0 {
                let all = baton_fuzz::index(ring.available + 2);
                baton_fuzz::put(ring.used + 2, &all.to_le_bytes());
            }
        }
        while let Some(queue) = self.asked.pop_front() {
            let next = baton_fuzz::index(self.rings[usize::from(queue)].available + 2);
            self.say(&message(GET_BASE, REPLY, &[queue.into(), next.into()]));
        }
    }

    fn usable(&self) -> bool {
        !self.rude
    }
}

/// What a broker asks a backend as a VM starts, and what comes back in two pieces.
fn replies(data: &[u8]) {
    let (own, theirs) = baton_fuzz::pair(SocketType::STREAM);
    let middle = data.len() / 2;
    let mut replies = Replies::default();
    for piece in [&data[..middle], &data[middle..]] {
        let _ = rustix::io::write(&theirs, piece);
        while let Ok(Some(reply)) = replies.receive(&own) {
            for request in [Request::GetFeatures, Request::GetProtocolFeatures, Request::GetQueueNum] {
                let _ = reply.number(&request);
            }
            let _ = reply.vring_base(1);
            if let Ok(config) = reply.config(60) {
                assert_eq!(config.len(), 60);
            }
        }
    }
    let _ = replies.expect_none(&own);
}

fuzz_target!(|data: &[u8]| {
    let [kind, features, config, rest @ ..] = data else {
        return;
    };
    if kind & 3 == 3 {
        return replies(data);
    }
    let queues = 1 + (kind >> 2 & 1);
    let (worker, own) = baton_fuzz::pair(SocketType::STREAM);
    let config = VhostUserConfig {
        kind: if kind & 1 == 0 { VhostUserKind::Blk } else { VhostUserKind::Fs },
        queues,
        features: VERSION_1 | u64::from(*features) << 24 | u64::from(*features),
        config: vec![*config; usize::from(*config)],
    };
    let mut process = Process {
        config,
        worker,
        own,
        forged: None,
        rings: (0..queues).map(|_| Ring::default()).collect(),
        asked: VecDeque::new(),
        rude: false,
    };
    baton_fuzz::drive(rest, &mut process);
});
