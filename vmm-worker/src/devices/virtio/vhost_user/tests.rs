use std::mem::MaybeUninit;
use std::sync::atomic::AtomicBool;

use baton_ipc::StartMode;
use proptest::prelude::*;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use super::*;
use crate::devices::Device as _;
use crate::devices::lifecycle::DeviceError;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const MODE: StartMode = StartMode::CprTransfer;
/// What a backend may offer of rings, and of a disk: flush.
const FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | 1 << 9;

// Requests by their numbers.
const SET_FEATURES: u32 = 2;
const SET_NUM: u32 = 8;
const SET_ADDR: u32 = 9;
const SET_BASE: u32 = 10;
const GET_BASE: u32 = 11;
const SET_KICK: u32 = 12;
const SET_CALL: u32 = 13;
const ENABLE: u32 = 18;

fn connection() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
}

fn device(connection: OwnedFd, queues: u8) -> Box<VhostUser> {
    let config = VhostUserConfig {
        kind: VhostUserKind::Blk,
        queues,
        features: FEATURES,
        config: vec![7; 60],
    };
    Box::new(VhostUser::new(connection, &config).unwrap())
}

/// A request as it came: its number, the first words of its payload, its descriptor.
struct Asked {
    request: u32,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// The backend's end.
struct Peer(OwnedFd);

impl Peer {
    fn hear(&self) -> Option<Asked> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [io::IoSliceMut::new(&mut header)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(&self.0, &mut slices, &mut control, flags).ok()?;
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 1);
        let mut payload = vec![0; word(8) as usize];
        if !payload.is_empty() {
            assert_eq!(
                rustix::io::read(&self.0, &mut payload).unwrap(),
                payload.len()
            );
        }
        let request = word(0);
        Some(Asked {
            request,
            payload,
            fd,
        })
    }

    fn hear_all(&self) -> Vec<Asked> {
        std::iter::from_fn(|| self.hear()).collect()
    }

    fn say(&self, bytes: &[u8]) {
        rustix::io::write(&self.0, bytes).unwrap();
    }

    fn answer_base(&self, queue: u32, next: u32) {
        self.say(&message(GET_BASE, 5, &[queue, next]));
    }
}

fn message(request: u32, flags: u32, words: &[u32]) -> Vec<u8> {
    let length = u32::try_from(words.len() * 4).unwrap();
    let all = [&[request, flags, length], words].concat();
    all.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn numbers(asked: &[Asked]) -> Vec<u32> {
    asked.iter().map(|one| one.request).collect()
}

/// What starts one ring.
const START: [u32; 6] = [SET_NUM, SET_BASE, SET_ADDR, SET_CALL, SET_KICK, ENABLE];

fn rig(queues: u8) -> (Rig, Peer) {
    let (ours, theirs) = connection();
    let mut rig = Rig::new(device(ours, queues));
    rig.bring_up();
    rig.serve();
    (rig, Peer(theirs))
}

fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
}

/// Parks while an I/O thread serves.
fn park(rig: &mut Rig) -> Result<(), DeviceError> {
    let seats: Vec<_> = rig.transport.seats().map(Arc::clone).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                seats.iter().for_each(|seat| seat.serve());
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let parked = rig.transport.park(MODE);
        over.store(true, Ordering::SeqCst);
        parked
    })
}

/// Parks, however busy this machine is, with a backend that says this when it is asked something; what it was asked.
fn park_answered(rig: &mut Rig, peer: &Peer, bytes: &[u8]) -> u32 {
    std::thread::scope(|scope| {
        let backend = scope.spawn(|| {
            loop {
                if let Some(asked) = peer.hear() {
                    peer.say(bytes);
                    return asked.request;
                }
                std::thread::yield_now();
            }
        });
        while park(rig).is_err() {
            rig.transport.failed(MODE);
            rig.transport.resume(MODE).unwrap();
        }
        backend.join().unwrap()
    })
}

#[test]
fn rings_are_started_where_they_are_with_the_eventfds_of_this_worker() {
    let (rig, peer) = rig(2);
    let asked = peer.hear_all();
    assert_eq!(
        numbers(&asked),
        [&[SET_FEATURES][..], &START, &START].concat()
    );
    let accepted = FEATURES | F_PROTOCOL_FEATURES;
    assert_eq!(asked[0].payload, accepted.to_le_bytes());
    let words = |payload: &[u8]| -> Vec<u64> {
        let chunks = payload.chunks_exact(8);
        chunks
            .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
            .collect()
    };
    let second = 0x4000;
    assert_eq!(
        words(&asked[9].payload),
        [
            1,
            RINGS + second,
            RINGS + second + USED,
            RINGS + second + AVAILABLE,
            0
        ]
    );
    let base: Vec<u8> = [1_u32, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(asked[8].payload, base);
    // What the guest notifies by is read by nobody here, and a first notification is there.
    rig.serve();
    let kick = asked[11].fd.as_ref().unwrap();
    assert_eq!(rustix::io::read(kick, &mut [0; 8]), Ok(8));
    // The backend interrupts one queue, and that one's vector fires.
    signal(asked[10].fd.as_ref().unwrap());
    rig.serve();
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x42]);
}

#[test]
fn a_stop_waits_for_what_is_under_way_and_the_next_worker_goes_on_there() {
    let (mut rig, peer) = rig(1);
    let first = peer.hear_all();
    rig.offer(0, &[(BUFFERS, 16, 0), (BUFFERS + 0x100, 1, WRITE)]);
    let _ = rustix::io::read(first[5].fd.as_ref().unwrap(), &mut [0; 8]);
    // Not finished: the park fails, the ring is not touched, what was offered is notified.
    let refused = park(&mut rig).unwrap_err().to_string();
    assert!(
        refused.contains("has not finished its requests"),
        "{refused}"
    );
    assert_eq!(numbers(&peer.hear_all()), [0; 0]);
    assert_eq!(
        rustix::io::read(first[5].fd.as_ref().unwrap(), &mut [0; 8]),
        Ok(8)
    );
    rig.transport.failed(MODE);
    rig.transport.resume(MODE).unwrap();
    rig.serve();
    assert_eq!(numbers(&peer.hear_all()), [0; 0]);
    // Finished.
    rig.put(RINGS + USED + 2, &1_u16.to_le_bytes());
    signal(first[4].fd.as_ref().unwrap());
    let answer = message(GET_BASE, 5, &[0, 1]);
    assert_eq!(park_answered(&mut rig, &peer, &answer), GET_BASE);
    assert_eq!(numbers(&peer.hear_all()), [0; 0]);
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x41]);
    let section = rig.transport.save(MODE).unwrap();
    let (ours, peer) = connection();
    let peer = Peer(peer);
    let mut new = rig.succeeded_by(device(ours, 1));
    new.transport.load(MODE, &section).unwrap();
    new.serve();
    assert_eq!(numbers(&peer.hear_all()), [0; 0]);
    new.transport.resume(MODE).unwrap();
    new.serve();
    let second = peer.hear_all();
    assert_eq!(numbers(&second), [&[SET_FEATURES][..], &START].concat());
    assert_eq!(second[2].payload[4..], 1_u32.to_le_bytes());
    // A queue that was interrupted for may have been so in vain: the new worker repeats it.
    assert_eq!(*new.fired.0.lock().unwrap(), [0x41]);
}

#[test]
fn rings_that_stop_too_late_are_started_again() {
    let (mut rig, peer) = rig(2);
    peer.hear_all();
    for _ in 0..2 {
        let refused = park(&mut rig).unwrap_err().to_string();
        assert!(refused.contains("has not stopped its rings"), "{refused}");
        rig.transport.failed(MODE);
        rig.transport.resume(MODE).unwrap();
        rig.serve();
    }
    // They were asked once.
    assert_eq!(numbers(&peer.hear_all()), [GET_BASE; 2]);
    peer.answer_base(0, 5);
    rig.serve();
    assert_eq!(numbers(&peer.hear_all()), [0; 0]);
    peer.answer_base(1, 6);
    rig.serve();
    let asked = peer.hear_all();
    assert_eq!(
        numbers(&asked),
        [&[SET_FEATURES][..], &START, &START].concat()
    );
    assert_eq!((asked[2].payload[4], asked[8].payload[4]), (5, 6));
    assert_eq!(rig.status(), 15);
}

#[test]
fn a_reset_is_over_when_the_rings_have_stopped() {
    let (mut rig, peer) = rig(1);
    peer.hear_all();
    rig.write(0x14, 0, 1);
    rig.serve();
    assert_ne!(rig.status(), 0);
    assert_eq!(numbers(&peer.hear_all()), [GET_BASE]);
    peer.answer_base(0, 0);
    rig.serve();
    assert_eq!(rig.status(), 0);
    rig.bring_up();
    rig.serve();
    assert_eq!(numbers(&peer.hear_all()).len(), 7);
}

/// The device is broken, stays so, and can be parked and saved all the same.
fn assert_broken(mut rig: Rig) {
    rig.serve();
    assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    park(&mut rig).unwrap();
    let section = rig.transport.save(MODE).unwrap();
    let mut new = rig.succeeded_by(device(connection().0, 1));
    new.transport.load(MODE, &section).unwrap();
    new.transport.resume(MODE).unwrap();
    new.serve();
    assert_eq!(new.status() & NEEDS_RESET, NEEDS_RESET);
    // A reset does not bring a backend back.
    rig.transport.resume(MODE).unwrap();
    rig.bring_up();
    rig.serve();
    assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn a_backend_that_is_gone_breaks_the_device() {
    let (running, peer) = rig(1);
    drop(peer);
    assert_broken(running);
}

#[test]
fn a_backend_that_speaks_unasked_breaks_the_device() {
    for bytes in [&b"?"[..], &[0xFF; 64], &message(GET_BASE, 5, &[0, 0])] {
        let (rig, peer) = rig(1);
        peer.say(bytes);
        assert_broken(rig);
    }
}

#[test]
fn nonsense_where_a_ring_stops_breaks_the_device() {
    for bytes in [
        message(GET_BASE, 5, &[1, 0]),
        message(GET_BASE, 5, &[0, 0x1_0000]),
        message(GET_BASE, 5, &[0]),
        message(GET_BASE, 5, &[0, 0, 0]),
        message(GET_BASE, 1, &[0, 0]),
        message(1, 5, &[0, 0]),
        vec![0xFF; 300],
    ] {
        let (mut rig, peer) = rig(1);
        peer.hear_all();
        assert_eq!(park_answered(&mut rig, &peer, &bytes), GET_BASE);
        rig.transport.resume(MODE).unwrap();
        assert_broken(rig);
    }
}

#[test]
fn a_backend_that_does_not_read_breaks_the_device() {
    let (mut rig, peer) = rig(1);
    // Every start is some requests more in a queue that nobody reads.
    for _ in 0..1000 {
        if rig.status() & NEEDS_RESET != 0 {
            assert!(peer.hear_all().len() > 100);
            return assert_broken(rig);
        }
        let refused = park(&mut rig).map_err(|error| error.to_string());
        rig.transport.failed(MODE);
        rig.transport.resume(MODE).unwrap();
        rig.serve();
        // On a busy machine nobody may have got around to asking.
        if refused.is_err_and(|why| why.contains("has not stopped its rings")) {
            peer.answer_base(0, 0);
            rig.serve();
        }
    }
    panic!("its queue is never full");
}

#[test]
fn what_a_driver_finds_is_what_the_broker_found() {
    let (mut rig, _peer) = rig(1);
    assert_eq!(rig.read(0x2000, 4), 0x0707_0707);
    rig.write(0x2000, 0, 4);
    assert_eq!(rig.read(0x2000, 4), 0x0707_0707);
    rig.write(0x00, 0, 4);
    assert_eq!(rig.read(0x04, 4), FEATURES & 0xFFFF_FFFF);
}

#[test]
fn a_state_with_bytes_of_its_own_is_refused() {
    let (ours, _theirs) = connection();
    let mut device = device(ours, 1);
    assert_eq!(device.load(&[], None), Ok(()));
    assert_eq!(device.load(&[0], None), Err(StateError::Trailing(1)));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a driver does and a backend says, nothing here breaks but the device.
    #[test]
    fn hostility_on_both_sides_is_survived(
        steps in prop::collection::vec(
            prop_oneof![
                4 => hostility(2).prop_map(Some),
                1 => Just(None),
            ],
            0..60,
        ),
        said in prop::collection::vec(any::<u8>(), 0..64),
        bit in any::<usize>(),
    ) {
        let (mut rig, peer) = rig(2);
        for (at, step) in steps.into_iter().enumerate() {
            match step {
                Some(hostility) => rig.suffer(hostility),
                None => {
                    peer.hear_all();
                    peer.answer_base(0, 0);
                    peer.say(said.get(..at % 32).unwrap_or(&[]));
                }
            }
            rig.serve();
            rig.status();
        }
        drop(peer);
        rig.serve();
        rig.bring_up();
        rig.serve();
        assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
        // With nobody at its other end: what the flipped bit makes of the rings may never be given back.
        let (alone, _) = connection();
        rig.forge(bit, device(alone, 2));
    }
}
