//! A socket pair stands in for the tap: it keeps packets apart, and is readable when there is one.

use baton_ipc::StartMode;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::RateLimit;
use proptest::prelude::*;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use super::*;
use crate::devices::Device as _;
use crate::devices::virtio::F_EVENT_IDX;
use crate::devices::virtio::F_VERSION_1;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const DATA: u64 = BUFFERS;
const ALL: u64 = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF | F_MAC;

fn config(queues: u8) -> NetConfig {
    NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queues,
        limits: DeviceLimits::default(),
    }
}

/// An interface, the other ends of its taps, and the features that the driver accepts.
struct Site {
    config: NetConfig,
    taps: Vec<OwnedFd>,
    wires: Vec<OwnedFd>,
}

impl Site {
    fn new(config: NetConfig) -> Self {
        let pair = |_| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).unwrap()
        };
        let (taps, wires) = (0..config.queues).map(pair).unzip();
        Self {
            config,
            taps,
            wires,
        }
    }

    fn device(&self) -> Box<Net> {
        let taps = self.taps.iter().map(|tap| tap.try_clone().unwrap());
        let device = Net::with_offloads(taps.collect(), &self.config, |_, _| Ok(()));
        Box::new(device)
    }

    fn rig(&self, features: u64) -> Rig {
        let mut rig = Rig::new(self.device());
        bring_up(&mut rig, features);
        rig
    }

    fn send(&self, wire: usize, packet: &[u8]) {
        rustix::io::write(&self.wires[wire], packet).unwrap();
    }

    fn sent(&self, wire: usize) -> Option<Vec<u8>> {
        let mut packet = vec![0; 1 << 17];
        let length = rustix::io::read(&self.wires[wire], &mut packet).ok()?;
        packet.truncate(length);
        Some(packet)
    }
}

fn bring_up(rig: &mut Rig, features: u64) {
    rig.write(0x14, 0, 1);
    rig.write(0x14, 3, 1);
    rig.negotiate(features | F_VERSION_1);
}

/// A packet as a tap gives it: ten bytes of header are written, two are not.
fn packet(flags: u8, gso: u8, length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER + length];
    packet[0] = flags;
    packet[1] = gso;
    for (index, byte) in packet.iter_mut().enumerate().skip(HEADER) {
        *byte = u8::try_from(index % 251).unwrap();
    }
    packet
}

#[test]
fn a_packet_goes_out_as_it_is_framed() {
    let site = Site::new(config(1));
    let mut rig = site.rig(ALL);
    let packet = packet(1, 4, 3000);
    rig.put(DATA, &packet);
    let head = rig.offer(
        TRANSMIT,
        &[(DATA, 5, 0), (DATA + 5, 7, 0), (DATA + 12, 3000, 0)],
    );
    rig.serve();
    assert_eq!(site.sent(0), Some(packet));
    assert_eq!(rig.last_used(TRANSMIT), (head.into(), 0));
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x42]);
}

#[test]
fn a_packet_comes_into_as_many_buffers_as_it_takes_and_no_more() {
    let site = Site::new(config(1));
    let mut rig = site.rig(F_MRG_RXBUF);
    for index in 0..3 {
        rig.offer(RECEIVE, &[(DATA + index * 0x1000, 1000, WRITE)]);
    }
    let (long, short) = (packet(0, 0, 1400), packet(0, 0, 60));
    site.send(0, &long);
    site.send(0, &short);
    rig.serve();
    // The first two hold the first packet; the next does not find the room that any has to find.
    assert_eq!(rig.used(RECEIVE), 2);
    assert_eq!(rig.get(DATA + 10, 2), [2, 0]);
    assert_eq!(rig.get(DATA + 12, 988), long[12..1000]);
    assert_eq!(rig.get(DATA + 0x1000, 412), long[1000..]);
    std::thread::sleep(receive::GRACE);
    rig.serve();
    assert_eq!(rig.used(RECEIVE), 3);
    assert_eq!(rig.get(DATA + 0x2000 + 10, 2), [1, 0]);
    assert_eq!(rig.get(DATA + 0x2000 + 12, 60), short[12..]);
    assert_eq!(rig.last_used(RECEIVE).1, 72);
    // One interrupt each time, not one a buffer.
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x41; 2]);
}

#[test]
fn a_packet_stays_in_the_tap_while_there_is_no_buffer() {
    let site = Site::new(config(1));
    let mut rig = site.rig(0);
    site.send(0, &packet(0, 0, 60));
    rig.serve();
    let waits = |rig: &Rig| {
        let mut sources = Vec::new();
        rig.transport.seats().next().unwrap().awaited(&mut sources);
        sources.len()
    };
    // The queues' notifications alone: the tap would be readable for ever.
    assert_eq!(waits(&rig), 2);
    rig.offer(RECEIVE, &[(DATA, 2048, WRITE)]);
    rig.serve();
    assert_eq!(rig.used(RECEIVE), 1);
    rig.offer(RECEIVE, &[(DATA, 2048, WRITE)]);
    rig.serve();
    assert_eq!((rig.used(RECEIVE), waits(&rig)), (1, 3));
}

#[test]
fn what_the_driver_cannot_take_is_dropped_and_costs_no_buffer() {
    let site = Site::new(config(1));
    for (features, bad) in [
        (F_GUEST_CSUM, packet(1, 1, 60)),
        (F_GUEST_CSUM, packet(0, 3, 60)),
        (F_GUEST_CSUM | F_GUEST_TSO4, packet(1, 4, 60)),
        (0, packet(1, 0, 60)),
        (0, packet(0, 0, 60)[..11].to_vec()),
        (0, packet(0, 0, 3000)),
    ] {
        let mut rig = site.rig(features);
        rig.offer(RECEIVE, &[(DATA, 2048, WRITE)]);
        site.send(0, &bad);
        let mut good = packet(2, 0, 60);
        site.send(0, &good);
        rig.serve();
        assert_eq!(rig.used(RECEIVE), 1, "{features:#x}");
        if features == 0 {
            good[0] = 0;
        }
        good[10] = 1;
        assert_eq!(rig.get(DATA, good.len()), good, "{features:#x}");
    }
}

#[test]
fn interrupts_cover_all_buffers_of_a_packet() {
    let site = Site::new(config(1));
    let mut rig = site.rig(F_MRG_RXBUF | F_EVENT_IDX);
    // The driver wants to be told of the first entry; the packet takes three, written at once.
    for index in 0..4 {
        rig.offer(RECEIVE, &[(DATA + index * 0x1000, 400, WRITE)]);
    }
    site.send(0, &packet(0, 0, 1000));
    rig.serve();
    std::thread::sleep(receive::GRACE);
    rig.serve();
    assert_eq!(rig.used(RECEIVE), 3);
    assert_eq!(*rig.fired.0.lock().unwrap(), [0x41]);
}

fn command(rig: &mut Rig, queue: u64, bytes: &[u8]) -> u8 {
    rig.put(DATA, bytes);
    rig.put(DATA + 0x100, &[0xEE]);
    let length = u32::try_from(bytes.len()).unwrap();
    rig.offer(queue, &[(DATA, length, 0), (DATA + 0x100, 1, WRITE)]);
    rig.serve();
    rig.get(DATA + 0x100, 1)[0]
}

#[test]
fn each_tap_has_one_reader_however_many_pairs_are_used() {
    let site = Site::new(config(3));
    let mut rig = site.rig(F_CTRL_VQ | F_MQ);
    for pair in 0..3 {
        for index in 0..6 {
            rig.offer(
                2 * pair,
                &[(DATA + 0x1000 * (index + 6 * pair), 2048, WRITE)],
            );
        }
    }
    let all = |rig: &mut Rig, expected: [u16; 3]| {
        for wire in 0..3 {
            site.send(wire, &packet(0, 0, 60));
        }
        rig.serve();
        assert_eq!([rig.used(0), rig.used(2), rig.used(4)], expected);
    };
    all(&mut rig, [3, 0, 0]);
    assert_eq!(command(&mut rig, 6, &[4, 0, 2, 0]), 0);
    all(&mut rig, [5, 1, 0]);
    assert_eq!(command(&mut rig, 6, &[4, 0, 3, 0]), 0);
    all(&mut rig, [6, 2, 1]);
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[4],
    ] {
        assert_eq!(command(&mut rig, 6, bad), 1, "{bad:?}");
    }
    // It is known after an upgrade.
    let mut rig = rig.hand_over(site.device());
    for pair in 0..3 {
        rig.offer(2 * pair, &[(DATA, 2048, WRITE)]);
    }
    all(&mut rig, [7, 3, 2]);
}

#[test]
fn a_driver_of_one_pair_has_its_commands_in_queue_2() {
    let site = Site::new(config(2));
    let mut rig = site.rig(F_CTRL_VQ);
    assert_eq!(command(&mut rig, 2, &[4, 0, 1, 0]), 1);
    assert_eq!(rig.used(2), 1);
}

#[test]
fn a_limit_leaves_packets_where_they_are() {
    let mut config = config(1);
    config.limits.operations = Some(RateLimit {
        per_second: 1,
        burst: 2,
    });
    let site = Site::new(config);
    let mut rig = site.rig(0);
    rig.put(DATA, &packet(0, 0, 60));
    for _ in 0..4 {
        rig.offer(TRANSMIT, &[(DATA, 72, 0)]);
        rig.offer(RECEIVE, &[(DATA + 0x1000, 2048, WRITE)]);
        site.send(0, &packet(0, 0, 60));
    }
    rig.serve();
    assert_eq!((rig.used(TRANSMIT), rig.used(RECEIVE)), (2, 2));
    // An upgrade fills no bucket.
    let rig = rig.hand_over(site.device());
    rig.serve();
    assert_eq!((rig.used(TRANSMIT), rig.used(RECEIVE)), (2, 2));
    assert!(site.sent(0).is_some() && site.sent(0).is_some() && site.sent(0).is_none());
}

#[test]
fn a_broken_queue_needs_a_reset_and_gets_one() {
    let site = Site::new(config(1));
    type Break = fn(&mut Rig);
    let breaks: [(&str, Break); 5] = [
        ("a packet without a header", |rig| {
            rig.offer(TRANSMIT, &[(DATA, 11, 0)]);
        }),
        ("a buffer without room for one", |rig| {
            rig.offer(RECEIVE, &[(DATA, 11, WRITE)]);
        }),
        ("a buffer behind RAM", |rig| {
            rig.offer(RECEIVE, &[(RAM - 1000, 1001, WRITE)]);
        }),
        ("a chain in a circle", |rig| {
            rig.descriptor(RINGS, (DATA, 16, NEXT | WRITE), 1);
            rig.descriptor(RINGS + 16, (DATA, 16, NEXT | WRITE), 0);
            rig.make_available(RECEIVE, 0);
        }),
        ("a head that is none", |rig| {
            rig.make_available(TRANSMIT, SIZE)
        }),
    ];
    for (what, break_it) in breaks {
        let mut rig = site.rig(ALL);
        break_it(&mut rig);
        rig.serve();
        assert_ne!(rig.status() & NEEDS_RESET, 0, "{what}");
        bring_up(&mut rig, 0);
        assert_eq!(rig.status() & NEEDS_RESET, 0, "{what}");
        rig.put(DATA, &packet(0, 0, 60));
        rig.offer(TRANSMIT, &[(DATA, 72, 0)]);
        rig.serve();
        assert_eq!(site.sent(0), Some(packet(0, 0, 60)), "{what}");
    }
}

#[test]
fn nothing_is_read_or_told_to_a_tap_before_the_commit() {
    let site = Site::new(config(1));
    let mut old = site.rig(ALL);
    // Enough room for the largest packet.
    for _ in 0..2 {
        old.offer(RECEIVE, &[(DATA, 0x9000, WRITE)]);
    }
    old.serve();
    old.transport.park(StartMode::CprTransfer).unwrap();
    let section = old.transport.save(StartMode::CprTransfer).unwrap();
    site.send(0, &packet(0, 0, 60));
    let tap = site.taps[0].try_clone().unwrap();
    let device = Net::with_offloads(vec![tap], &site.config, |_, _| panic!("told too early"));
    let mut new = old.succeeded_by(Box::new(device));
    new.transport
        .load(StartMode::CprTransfer, &section)
        .unwrap();
    // Neither of the two takes it, whoever serves.
    old.serve();
    new.serve();
    assert_eq!(old.used(RECEIVE), 0);
    let mut sources = Vec::new();
    for seat in new.transport.seats().chain(old.transport.seats()) {
        assert!(seat.awaited(&mut sources).is_none());
    }
    // Rolled back, the old one goes on with it.
    old.transport.failed(StartMode::CprTransfer);
    old.transport.resume(StartMode::CprTransfer).unwrap();
    old.serve();
    assert_eq!(old.used(RECEIVE), 1);
}

#[test]
fn taps_are_told_what_the_driver_takes() {
    static TOLD: Mutex<Vec<u32>> = Mutex::new(Vec::new());
    let site = Site::new(config(1));
    let tap = site.taps[0].try_clone().unwrap();
    let device = Net::with_offloads(vec![tap], &site.config, |_, offloads| {
        TOLD.lock().unwrap().push(offloads);
        Ok(())
    });
    let mut rig = Rig::new(Box::new(device));
    for (features, told) in [
        (0, 0),
        (F_GUEST_CSUM, TUN_CSUM),
        (F_GUEST_CSUM | F_GUEST_TSO6, TUN_CSUM | TUN_TSO6),
        (F_GUEST_TSO4, 0),
        (ALL, TUN_CSUM | TUN_TSO4 | TUN_TSO6),
    ] {
        bring_up(&mut rig, features);
        // Not by the vCPU's thread.
        assert!(TOLD.lock().unwrap().is_empty());
        rig.serve();
        rig.serve();
        assert_eq!(std::mem::take(&mut *TOLD.lock().unwrap()), [told]);
    }
}

const LIMITS: DeviceLimits = {
    let limit = RateLimit {
        per_second: 1,
        burst: 1,
    };
    DeviceLimits {
        bytes: Some(limit),
        operations: Some(limit),
    }
};

/// Buckets that owe more than any request costs.
fn in_debt() -> SavedLimits {
    SavedLimits::impossible(LIMITS)
}

#[test]
fn impossible_states_are_refused() {
    let mut limited = config(2);
    limited.limits = LIMITS;
    let site = Site::new(limited);
    let good = SavedNet {
        mac: site.config.mac,
        mtu: 1500,
        pairs: 2,
        received: Limits::new(LIMITS, 0).save(),
        sent: Limits::new(LIMITS, 0).save(),
    };
    let bytes = postcard::to_stdvec(&good).unwrap();
    site.device().load(&bytes, None).unwrap();
    type Change = fn(&mut SavedNet);
    let changes: [(&str, Change); 6] = [
        ("mac", |saved| saved.mac[5] = 2),
        ("mtu", |saved| saved.mtu = 1501),
        ("pairs", |saved| saved.pairs = 0),
        ("pairs", |saved| saved.pairs = 3),
        ("bucket.tokens", |saved| saved.received = in_debt()),
        ("bucket.tokens", |saved| saved.sent = in_debt()),
    ];
    for (field, change) in changes {
        let mut saved: SavedNet = postcard::from_bytes(&bytes).unwrap();
        change(&mut saved);
        let bytes = postcard::to_stdvec(&saved).unwrap();
        match site.device().load(&bytes, None) {
            Err(StateError::Field { name, .. }) => assert_eq!(name, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    let long = [bytes.clone(), vec![0]].concat();
    assert!(matches!(
        site.device().load(&long, None),
        Err(StateError::Trailing(1))
    ));
    assert!(site.device().load(&bytes[..3], None).is_err());
}

#[derive(Clone, Debug)]
enum Action {
    Driver(Hostility),
    /// A request that may be a good one, in a queue.
    Offer(u64, u64, u32, u16),
    /// A packet from outside.
    Packet(usize, u8, u8, usize),
    Serve,
    BringUp(u64),
    HandOver,
    /// A bit of the saved state is flipped, and the result loaded.
    Forge(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        13 => hostility(5).prop_map(Action::Driver),
        8 => (0..5_u64, DATA..RAM, 0..0x1_8000_u32, 0..3_u16)
            .prop_map(|(queue, at, length, flags)| Action::Offer(queue, at, length, flags & WRITE)),
        6 => (0..2_usize, any::<u8>(), 0..6_u8, 0..4000_usize)
            .prop_map(|(wire, flags, gso, length)| Action::Packet(wire, flags, gso, length)),
        8 => Just(Action::Serve),
        2 => any::<u64>().prop_map(Action::BringUp),
        1 => Just(Action::HandOver),
        1 => any::<usize>().prop_map(Action::Forge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, nothing panics, and a driver that behaves gets its network back.
    #[test]
    fn hostile_drivers_harm_nobody_but_themselves(actions in prop::collection::vec(action(), 1..60)) {
        let site = Site::new(config(2));
        let offered = site.device().features();
        let mut rig = site.rig(ALL | F_CTRL_VQ | F_MQ);
        for action in actions {
            match action {
                Action::Driver(hostility) => rig.suffer(hostility),
                Action::Offer(queue, at, length, flags) => {
                    rig.offer(queue, &[(at, length, flags), (at / 2, length / 2, flags)]);
                }
                Action::Packet(wire, flags, gso, length) => {
                    // A full one drops it.
                    let _ = rustix::io::write(&site.wires[wire], &packet(flags, gso, length));
                }
                Action::Serve => rig.serve(),
                Action::BringUp(features) => bring_up(&mut rig, features & (offered | F_EVENT_IDX)),
                Action::HandOver => rig = rig.hand_over(site.device()),
                Action::Forge(bit) => rig.forge(bit, site.device()),
            }
            while site.sent(0).is_some() || site.sent(1).is_some() {}
        }
        bring_up(&mut rig, 0);
        rig.put(DATA, &packet(0, 0, 60));
        rig.offer(TRANSMIT, &[(DATA, 72, 0)]);
        rig.serve();
        prop_assert_eq!(site.sent(0), Some(packet(0, 0, 60)));
    }
}
