use baton_ipc::StartMode;
use proptest::prelude::*;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use super::*;
use crate::devices::Device as _;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const IN: u64 = RECEIVE as u64;
const OUT: u64 = TRANSMIT as u64;

/// A driver, and who is at the other end of its device's socket, over all generations of it.
struct Site {
    rig: Rig,
    worker: OwnedFd,
    person: OwnedFd,
}

fn device(socket: &OwnedFd) -> Box<Console> {
    Box::new(Console::new(socket.try_clone().unwrap()).0)
}

impl Site {
    fn new() -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (person, worker) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let mut rig = Rig::new(device(&worker));
        rig.bring_up();
        Self {
            rig,
            worker,
            person,
        }
    }

    fn hand_over(self) -> Self {
        let rig = self.rig.hand_over(device(&self.worker));
        Self { rig, ..self }
    }

    /// What came out since the last time.
    fn read(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = rustix::io::read(&self.person, &mut bytes) {
            all.extend_from_slice(&bytes[..count]);
        }
        all
    }

    fn type_in(&self, bytes: &[u8]) {
        assert_eq!(rustix::io::write(&self.person, bytes), Ok(bytes.len()));
    }

    /// Fills the socket, without the driver; how many bytes it took.
    fn fill(&self) -> usize {
        let mut all = 0;
        while let Ok(count) = rustix::io::write(&self.worker, &[b'.'; 4096]) {
            all += count;
        }
        all
    }
}

fn pattern(length: u32) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

#[test]
fn output_of_any_framing_comes_out_in_order_in_every_generation() {
    let mut site = Site::new();
    let bytes = pattern(10_000);
    site.rig.put(BUFFERS, &bytes);
    for round in 0..3_u16 {
        let parts = [
            (BUFFERS, 1, 0),
            (BUFFERS + 1, 0, 0),
            (BUFFERS + 1, 4096, 0),
            (BUFFERS + 4097, 5903, 0),
        ];
        site.rig.offer(OUT, &parts);
        site.rig.serve();
        assert_eq!(site.read(), bytes);
        assert_eq!(site.rig.used(OUT), round + 1);
        assert_eq!(site.rig.last_used(OUT).1, 0);
        site = site.hand_over();
    }
}

#[test]
fn input_waits_for_buffers_and_is_not_read_beyond_them() {
    let mut site = Site::new();
    site.type_in(b"hello, world");
    site.rig.serve();
    site.rig
        .offer(IN, &[(BUFFERS, 2, WRITE), (BUFFERS + 0x100, 3, WRITE)]);
    site.rig.serve();
    assert_eq!((site.rig.used(IN), site.rig.last_used(IN).1), (1, 5));
    let came = [site.rig.get(BUFFERS, 2), site.rig.get(BUFFERS + 0x100, 3)].concat();
    assert_eq!(came, b"hello");
    // What the driver had no room for is there for whoever comes next.
    let mut site = site.hand_over();
    site.rig.offer(IN, &[(BUFFERS, 100, WRITE)]);
    site.rig.serve();
    assert_eq!((site.rig.used(IN), site.rig.last_used(IN).1), (2, 7));
    assert_eq!(site.rig.get(BUFFERS, 8), b", world\0");
}

#[test]
fn output_that_the_socket_takes_in_parts_is_whole_over_a_handover() {
    let mut site = Site::new();
    let length = 0x6_0000;
    let bytes = pattern(length);
    site.rig.put(BUFFERS, &bytes);
    site.rig.offer(OUT, &[(BUFFERS, length, 0)]);
    let mut seen = Vec::new();
    let mut generations = 0;
    while site.rig.used(OUT) == 0 {
        site.rig.serve();
        site = site.hand_over();
        let more = site.read();
        assert!(
            more.len() < bytes.len(),
            "the socket took all of it at once"
        );
        seen.extend(more);
        generations += 1;
        assert!(generations < 1000);
    }
    seen.extend(site.read());
    assert!(seen == bytes, "{} bytes", seen.len());
    assert!(generations > 1);
}

#[test]
fn a_reader_that_is_slow_is_waited_for_and_one_that_stands_still_is_not() {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (person, worker) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let (console, link) = Console::new(worker.try_clone().unwrap());
    let mut rig = Rig::new(Box::new(console));
    rig.bring_up();
    let mut site = Site {
        rig,
        worker,
        person,
    };
    let filled = site.fill();
    site.rig.put(BUFFERS, b"abc");
    site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
    site.rig.serve();
    assert_eq!((site.rig.used(OUT), link.dropped()), (0, 0));
    // Within its patience, none is lost.
    assert_eq!(site.read().len(), filled);
    site.rig.serve();
    assert_eq!((site.rig.used(OUT), site.read()), (1, b"abc".to_vec()));

    let filled = site.fill();
    for more in 2..4 {
        site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
        site.rig.serve();
        if more == 2 {
            assert_eq!((site.rig.used(OUT), link.dropped()), (1, 0));
            std::thread::sleep(PATIENCE);
            site.rig.serve();
        }
        // The second of them waits for nothing.
        assert_eq!(
            (site.rig.used(OUT), link.dropped()),
            (more, u64::from(more - 1) * 3)
        );
    }
    assert_eq!(site.read().len(), filled);
    site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
    site.rig.serve();
    assert_eq!((site.read(), link.dropped()), (b"abc".to_vec(), 6));
}

#[test]
fn with_nobody_at_the_other_end_the_driver_goes_on() {
    let mut site = Site::new();
    drop(std::mem::replace(
        &mut site.person,
        rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap(),
    ));
    site.rig.offer(IN, &[(BUFFERS, 3, WRITE)]);
    for round in 1..4 {
        site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
        site.rig.serve();
        assert_eq!((site.rig.used(OUT), site.rig.used(IN)), (round, 0));
        assert_eq!(site.rig.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn buffers_of_the_wrong_direction_break_the_queue() {
    for (queue, parts) in [
        (IN, &[(BUFFERS, 8, 0)][..]),
        (IN, &[(BUFFERS, 8, 0), (BUFFERS, 8, WRITE)]),
        (OUT, &[(BUFFERS, 8, WRITE)]),
        (OUT, &[(BUFFERS, 8, 0), (BUFFERS, 8, WRITE)]),
        (OUT, &[(RAM - 4, 8, 0)]),
    ] {
        let mut site = Site::new();
        site.type_in(b"x");
        site.rig.offer(queue, parts);
        site.rig.serve();
        assert_ne!(site.rig.status() & NEEDS_RESET, 0, "{parts:?}");
        assert_eq!(site.read(), b"");
        site.rig.bring_up();
        site.rig.offer(IN, &[(BUFFERS, 8, WRITE)]);
        site.rig.serve();
        assert_eq!(site.rig.last_used(IN).1, 1);
    }
}

#[test]
fn a_buffer_half_gone_is_forgotten_at_a_reset() {
    let mut site = Site::new();
    let length = 0x6_0000;
    site.rig.offer(OUT, &[(BUFFERS, length, 0)]);
    site.rig.serve();
    let mut site = site.hand_over();
    site.rig.bring_up();
    while !site.read().is_empty() {}
    site.rig.put(BUFFERS, b"abc");
    site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
    site.rig.serve();
    assert_eq!(site.read(), b"abc");
}

#[test]
fn a_state_of_what_no_driver_wrote_is_refused() {
    let site = Site::new();
    let saved = |gone| postcard::to_stdvec(&SavedConsole { gone, dropped: 7 }).unwrap();
    let mut console = device(&site.worker);
    assert!(matches!(
        console.load(&saved(1), None),
        Err(StateError::Field { name: "gone", .. })
    ));
    assert_eq!(console.load(&saved(0), None), Ok(()));
    assert_eq!(console.load(&saved(1), Some(0)), Ok(()));
    assert_eq!(console.save().unwrap(), saved(1));
    let mut long = saved(0);
    long.push(0);
    assert_eq!(console.load(&long, None), Err(StateError::Trailing(1)));
}

#[derive(Clone, Debug)]
enum Action {
    Suffer(Hostility),
    Offer(u64, Vec<(u64, u32, u16)>),
    Type(Vec<u8>),
    Read,
    HandOver,
    Forge(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let part = (
        0..2 * RAM,
        prop_oneof![0..0x100_u32, any::<u32>()],
        0..8_u16,
    );
    let action = prop_oneof![
        4 => hostility(2).prop_map(Action::Suffer),
        4 => (0..2_u64, prop::collection::vec(part, 1..4)).prop_map(|(queue, parts)| Action::Offer(queue, parts)),
        2 => prop::collection::vec(any::<u8>(), 0..300).prop_map(Action::Type),
        1 => Just(Action::Read),
        1 => Just(Action::HandOver),
        1 => any::<usize>().prop_map(Action::Forge),
    ];
    prop::collection::vec(action, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, nothing panics, every state that is saved can be loaded, and a driver that behaves is served.
    #[test]
    fn hostile_drivers_harm_nobody_but_themselves(actions in actions()) {
        let mut site = Site::new();
        for action in actions {
            match action {
                Action::Suffer(hostility) => site.rig.suffer(hostility),
                Action::Offer(queue, parts) => {
                    site.rig.offer(queue, &parts);
                }
                Action::Type(bytes) => {
                    let _ = rustix::io::write(&site.person, &bytes);
                }
                Action::Read => {
                    site.read();
                }
                Action::HandOver => site = site.hand_over(),
                Action::Forge(bit) => site.rig.forge(bit, device(&site.worker)),
            }
            site.rig.serve();
        }
        site.rig.bring_up();
        while !site.read().is_empty() {}
        site.rig.put(BUFFERS, b"abc");
        site.rig.offer(OUT, &[(BUFFERS, 3, 0)]);
        site.rig.serve();
        prop_assert_eq!(site.read(), b"abc");
        site.rig.transport.park(StartMode::CprTransfer).unwrap();
    }
}
