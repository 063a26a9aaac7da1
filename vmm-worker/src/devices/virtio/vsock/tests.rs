use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;

use baton_ipc::StartMode;
use baton_ipc::worker::VSOCK_CREDIT;
use proptest::prelude::*;

use super::packet::HEADER;
use super::packet::HOST_CID;
use super::packet::Header;
use super::packet::NO_RECEIVE;
use super::packet::NO_SEND;
use super::packet::Operation;
use super::packet::STREAM;
use super::saved::MOST_RESETS;
use super::saved::SavedConnection;
use super::saved::SavedReset;
use super::saved::SavedStage;
use super::saved::SavedVsock;
use super::*;
use crate::devices::Device as _;
use crate::devices::virtio::NEEDS_RESET;
use crate::devices::virtio::test_driver::*;

const CID: u32 = 3;
const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const IN: u64 = BUFFERS;
const OUT: u64 = BUFFERS + 0x2_0000;
const ROOM: u32 = 0x1_0000;

/// A device with a driver, and a broker that holds what it handed over.
struct Site {
    rig: Rig,
    link: Link,
    handed: Vec<(u32, UnixStream)>,
}

fn device(handed: &[(u32, UnixStream)]) -> (Vsock, Link) {
    let held = handed.iter().map(|(id, stream)| {
        let copy = stream.try_clone().unwrap();
        (*id, OwnedFd::from(copy))
    });
    Vsock::new(&VsockConfig { cid: CID }, held.collect(), Arc::new(|| {}))
}

impl Site {
    fn new() -> Self {
        let (device, link) = device(&[]);
        let mut rig = Rig::new(Box::new(device));
        rig.bring_up();
        Self {
            rig,
            link,
            handed: Vec::new(),
        }
    }

    /// Hands a connection over; the program's end of it.
    fn hand(&mut self, id: u32, order: VsockOrder) -> UnixStream {
        let (program, worker) = UnixStream::pair().unwrap();
        worker.set_nonblocking(true).unwrap();
        program.set_nonblocking(true).unwrap();
        self.link
            .order(order, Some(worker.try_clone().unwrap().into()));
        self.handed.push((id, worker));
        program
    }

    fn packet(&mut self, operation: Operation, ports: (u32, u32), data: &[u8]) {
        self.send(header(operation, ports), data);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            length: u32::try_from(data.len()).unwrap(),
            ..header
        };
        self.rig.put(OUT, &[&header.bytes(), data].concat());
        let length = u32::try_from(HEADER + data.len()).unwrap();
        self.rig.offer(TRANSMIT, &[(OUT, length, 0)]);
        self.rig.serve();
    }

    /// The next packet for the driver, which gives a buffer for it.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let before = self.rig.used(RECEIVE);
        let wanted = self.rig.used(RECEIVE).wrapping_add(1);
        self.rig
            .offer(RECEIVE, &[(IN, 44, WRITE), (IN + 44, 0x8000, WRITE)]);
        self.rig.serve();
        if self.rig.used(RECEIVE) == before {
            // Still there for the next one.
            self.rig.take_back(RECEIVE);
            return None;
        }
        assert_eq!(self.rig.used(RECEIVE), wanted);
        let length = usize::try_from(self.rig.last_used(RECEIVE).1).unwrap();
        let bytes = self.rig.get(IN, length);
        let header = Header::parse(bytes.first_chunk().unwrap());
        assert_eq!(header.length as usize, length - HEADER);
        assert_eq!(
            (header.source.0, header.destination.0),
            (HOST_CID, CID.into())
        );
        Some((header, bytes[HEADER..].to_vec()))
    }

    #[track_caller]
    fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        let (header, data) = self.receive().unwrap();
        assert_eq!(header.operation, operation);
        (header, data)
    }

    /// A connection that a program of the host has asked for.
    fn incoming(&mut self, id: u32, port: u32) -> (UnixStream, (u32, u32)) {
        let mut program = self.hand(id, VsockOrder::Incoming { id, port });
        let (header, _) = self.expect(Operation::Request);
        let ports = (port, header.source.1);
        self.packet(Operation::Response, ports, &[]);
        let mut line = [0; 32];
        let length = program.read(&mut line).unwrap();
        assert_eq!(line[..length], *format!("OK {}\n", ports.1).as_bytes());
        (program, ports)
    }

    /// Sends to a program that does not read, until its socket is full and some is kept here; what was sent.
    fn fill(&mut self, ports: (u32, u32)) -> Vec<u8> {
        let (mut sent, mut freed) = (Vec::new(), 0);
        while sent.len() - freed <= 8192 {
            let piece = [u8::try_from(sent.len() / 4096 % 251).unwrap(); 4096];
            self.packet(Operation::Data, ports, &piece);
            sent.extend(piece);
            while let Some((header, _)) = self.receive() {
                assert_eq!(header.operation, Operation::CreditUpdate);
                freed = header.freed as usize;
            }
            assert!(sent.len() < 8 << 20, "the socket has no end");
        }
        sent
    }

    /// What a program reads until there is no more.
    fn drain(&mut self, program: &mut UnixStream) -> Vec<u8> {
        let mut taken = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count) = program.read(&mut buffer) {
            taken.extend(&buffer[..count]);
            self.rig.serve();
        }
        taken
    }

    /// Another worker goes on.
    fn hand_over(self) -> Self {
        let Self { rig, link, handed } = self;
        link.settle();
        let (device, new) = device(&handed);
        let rig = rig.hand_over(Box::new(device));
        new.release();
        Self {
            rig,
            link: new,
            handed,
        }
    }
}

fn header(operation: Operation, (guest, host): (u32, u32)) -> Header {
    Header {
        source: (CID.into(), guest),
        destination: (HOST_CID, host),
        length: 0,
        kind: STREAM,
        operation,
        flags: 0,
        room: ROOM,
        freed: 0,
    }
}

#[test]
fn a_program_of_the_host_talks_to_one_of_the_guest() {
    let mut site = Site::new();
    let (mut program, ports) = site.incoming(4, 1024);
    program.write_all(b"question").unwrap();
    let (header, data) = site.expect(Operation::Data);
    assert_eq!((header.destination.1, header.source.1), ports);
    assert_eq!(data, b"question");
    site.packet(Operation::Data, ports, b"answer");
    let mut answer = [0; 6];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");

    // Each side ends by itself, and then both are gone.
    program.shutdown(std::net::Shutdown::Write).unwrap();
    let (header, _) = site.expect(Operation::Shutdown);
    assert_eq!(header.flags, NO_SEND);
    site.packet(Operation::Data, ports, b"more");
    program.read_exact(&mut answer[..4]).unwrap();
    let shutdown = Header {
        flags: NO_SEND | NO_RECEIVE,
        ..self::header(Operation::Shutdown, ports)
    };
    site.send(shutdown, &[]);
    site.expect(Operation::Reset);
    assert_eq!(site.link.deeds(false), [VsockReport::Closed { id: 4 }]);
    assert_eq!(program.read(&mut answer).unwrap(), 0);
}

#[test]
fn a_program_of_the_guest_is_connected_or_refused_as_the_broker_says() {
    let mut site = Site::new();
    site.packet(Operation::Request, (1, 80), &[]);
    site.packet(Operation::Request, (2, 81), &[]);
    let asked: Vec<_> = site.link.deeds(false);
    let connect = |ticket, port| VsockReport::Connect { ticket, port };
    assert_eq!(asked, [connect(0, 80), connect(1, 81)]);
    assert!(site.receive().is_none());
    site.link.order(VsockOrder::Refused { ticket: 0 }, None);
    let (header, _) = site.expect(Operation::Reset);
    assert_eq!((header.source.1, header.destination.1), (80, 1));
    let order = VsockOrder::Connected { ticket: 1, id: 9 };
    let mut program = site.hand(9, order);
    site.expect(Operation::Response);
    site.packet(Operation::Data, (2, 81), b"hi");
    let mut data = [0; 2];
    program.read_exact(&mut data).unwrap();

    // Given up before the answer: nobody gets it.
    site.packet(Operation::Request, (3, 82), &[]);
    site.packet(Operation::Reset, (3, 82), &[]);
    assert_eq!(site.link.deeds(false), [connect(2, 82)]);
    let order = VsockOrder::Connected { ticket: 2, id: 10 };
    let mut late = site.hand(10, order);
    site.rig.serve();
    assert_eq!(site.link.deeds(false), [VsockReport::Closed { id: 10 }]);
    assert_eq!(late.read(&mut data).unwrap(), 0);
    assert!(site.receive().is_none());
}

#[test]
fn nobody_has_more_under_way_than_the_other_has_room_for() {
    let mut site = Site::new();
    let (mut program, ports) = site.incoming(0, 7);
    // To the guest: no more than it has room for, until it says that some is free.
    let small = |freed| Header {
        room: 100,
        freed,
        ..header(Operation::CreditUpdate, ports)
    };
    site.send(small(0), &[]);
    program.write_all(&[1; 250]).unwrap();
    for (freed, count) in [(0, 100), (60, 60), (160, 90)] {
        site.send(small(freed), &[]);
        assert_eq!(site.expect(Operation::Data).1.len(), count);
        assert!(site.receive().is_none());
    }
    // From the guest: what the program does not take is kept, and the guest is told when it did.
    let sent = site.fill(ports);
    assert!(site.drain(&mut program) == sent);
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_its_connection() {
    let mut site = Site::new();
    let (_program, ports) = site.incoming(0, 7);
    site.packet(Operation::Data, ports, &vec![0; VSOCK_CREDIT as usize + 1]);
    site.expect(Operation::Reset);
    assert_eq!(site.link.deeds(false), [VsockReport::Closed { id: 0 }]);
    assert_eq!(site.rig.status() & NEEDS_RESET, 0);
}

#[test]
fn hostile_headers_are_refused_and_end_nothing_else() {
    let mut site = Site::new();
    let (mut program, ports) = site.incoming(0, 7);
    let good = header(Operation::Data, ports);
    let other = (55, 66);
    let wrong = [
        (header(Operation::Data, other), true),
        (header(Operation::Response, other), true),
        (header(Operation::Other(99), other), true),
        (header(Operation::Reset, other), false),
        // Another guest's, to whom nothing is said.
        (
            Header {
                source: (4, 7),
                ..good
            },
            false,
        ),
        (
            Header {
                source: (u64::MAX, 7),
                ..good
            },
            false,
        ),
        (
            Header {
                destination: (9, 9),
                ..good
            },
            true,
        ),
        (Header { kind: 2, ..good }, true),
    ];
    for (header, answered) in wrong {
        site.send(header, b"x");
        let before = site.rig.used(RECEIVE);
        site.rig.offer(RECEIVE, &[(IN, 0x1000, WRITE)]);
        site.rig.serve();
        let used = site.rig.used(RECEIVE) != before;
        assert_eq!(used, answered, "{header:?}");
        if !used {
            site.rig.take_back(RECEIVE);
        }
    }
    site.packet(Operation::Data, ports, b"on");
    let mut data = [0; 2];
    program.read_exact(&mut data).unwrap();
    // A length that is not that of the data ends the connection that it was for.
    let mut header = header(Operation::Data, ports);
    header.length = 1000;
    site.rig.put(OUT, &header.bytes());
    site.rig.offer(TRANSMIT, &[(OUT, 60, 0)]);
    site.rig.serve();
    site.expect(Operation::Reset);
    // What is no packet at all breaks the queue.
    site.rig.offer(TRANSMIT, &[(OUT, 43, 0)]);
    site.rig.serve();
    assert_ne!(site.rig.status() & NEEDS_RESET, 0);
    site.rig.bring_up();
    site.incoming(1, 8);
}

#[test]
fn a_successor_goes_on_with_everything_that_is_under_way() {
    let mut site = Site::new();
    let (mut program, ports) = site.incoming(0, 7);
    // Kept for a program that does not read, asked for, offered, and a refusal that is owed.
    let sent = site.fill(ports);
    site.packet(Operation::Request, (1, 80), &[]);
    let mut offered = site.hand(3, VsockOrder::Incoming { id: 3, port: 9 });
    offered.write_all(b"early").unwrap();
    site.packet(Operation::Data, (5, 5), b"to nobody");
    assert_eq!(site.link.deeds(false).len(), 1);
    let mut site = site.hand_over();

    let taken = site.drain(&mut program);
    assert!(taken == sent, "{} of {}", taken.len(), sent.len());
    let mut operations = Vec::new();
    while let Some((header, _)) = site.receive() {
        operations.push(header.operation);
        if header.operation == Operation::Request {
            let ports = (9, header.source.1);
            site.packet(Operation::Response, ports, &[]);
        }
    }
    for wanted in [Operation::Reset, Operation::Request, Operation::Data] {
        assert!(operations.contains(&wanted), "{operations:?}");
    }
    let mut answered = site.hand(4, VsockOrder::Connected { ticket: 0, id: 4 });
    site.expect(Operation::Response);
    site.packet(Operation::Data, (1, 80), b"hello");
    answered.read_exact(&mut [0; 5]).unwrap();
    // Its end comes from the guest's end, not from that of the worker.
    program.write_all(b"still there").unwrap();
    assert_eq!(site.expect(Operation::Data).1, b"still there");
}

#[test]
fn a_driver_that_begins_anew_has_no_connections() {
    let mut site = Site::new();
    let (mut program, _) = site.incoming(0, 7);
    site.packet(Operation::Request, (1, 80), &[]);
    site.rig.bring_up();
    let connect = VsockReport::Connect {
        ticket: 0,
        port: 80,
    };
    assert_eq!(
        site.link.deeds(false),
        [connect, VsockReport::Closed { id: 0 }]
    );
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // The broker's answer finds nobody.
    site.hand(1, VsockOrder::Connected { ticket: 0, id: 1 });
    site.rig.serve();
    assert_eq!(site.link.deeds(false), [VsockReport::Closed { id: 1 }]);
    assert!(site.receive().is_none());
}

#[test]
fn each_impossible_field_of_a_state_is_refused() {
    let (stream, _other) = UnixStream::pair().unwrap();
    let sockets = std::collections::BTreeMap::from([(0, Arc::new(OwnedFd::from(stream)))]);
    let connection = SavedConnection {
        ports: (7, 1 << 30),
        stage: SavedStage::Open(0),
        held: vec![1],
        freed: 0,
        told: 0,
        sent: 0,
        guest_room: 0,
        guest_freed: 0,
        guest_sent_all: false,
        guest_deaf: false,
        host_sent_all: false,
        host_deaf: false,
        ended: false,
        owes_request: false,
        owes_response: false,
        owes_credit: false,
        owes_shutdown: false,
    };
    let state = |change: &dyn Fn(&mut SavedVsock)| {
        let mut saved = SavedVsock {
            cid: CID,
            next_ticket: 0,
            next_port: 1 << 30,
            connections: vec![connection.clone()],
            resets: Vec::new(),
        };
        change(&mut saved);
        saved.restore(CID, &sockets).err()
    };
    assert_eq!(state(&|_| {}), None);
    let mut refused = Vec::new();
    type Change<'a> = &'a dyn Fn(&mut SavedVsock);
    let early = |change: &dyn Fn(&mut SavedConnection)| {
        let mut one = connection.clone();
        (one.stage, one.held) = (SavedStage::Asked(0), Vec::new());
        change(&mut one);
        vec![one]
    };
    let changes: [(&str, Change<'_>); 14] = [
        ("cid", &|saved| saved.cid = 4),
        ("next_port", &|saved| saved.next_port = 5),
        ("connections", &|saved| {
            let one = saved.connections[0].clone();
            saved.connections = vec![one; 65];
        }),
        ("stage", &|saved| {
            let mut other = saved.connections[0].clone();
            other.ports.0 = 8;
            saved.connections.push(other);
        }),
        ("ports", &|saved| {
            let mut other = saved.connections[0].clone();
            (other.stage, other.held) = (SavedStage::Asked(0), Vec::new());
            saved.connections.push(other);
        }),
        ("id", &|saved| {
            saved.connections[0].stage = SavedStage::Open(1)
        }),
        ("held", &|saved| {
            saved.connections[0].held = vec![0; VSOCK_CREDIT as usize + 1];
        }),
        ("ended", &|saved| saved.connections[0].ended = true),
        ("owes_request", &|saved| {
            saved.connections[0].owes_request = true
        }),
        ("held", &|saved| {
            saved.connections = early(&|one| one.held = vec![1])
        }),
        ("owes", &|saved| {
            saved.connections = early(&|one| one.owes_credit = true)
        }),
        ("owes", &|saved| {
            saved.connections = early(&|one| one.owes_response = true)
        }),
        ("owes", &|saved| {
            saved.connections = early(&|one| one.owes_shutdown = true)
        }),
        ("resets", &|saved| {
            let reset = SavedReset {
                cid: 2,
                kind: 1,
                ports: (1, 2),
            };
            saved.resets = vec![reset; MOST_RESETS + 1];
        }),
    ];
    for (name, change) in changes {
        match state(change) {
            Some(StateError::Field { name: found, .. }) if found == name => {}
            other => refused.push((name, other)),
        }
    }
    assert!(refused.is_empty(), "{refused:?}");
}

#[derive(Clone, Debug)]
enum Action {
    Driver(Hostility),
    /// A packet of these ports, for a connection that there may be.
    Packet(u16, u32, u32, u32, u32, usize),
    Offer(u64, u64, u32, u16),
    Incoming(u32),
    Answer(bool),
    /// The program with this number writes, reads or leaves.
    Program(usize, u8),
    BringUp,
    HandOver,
    Forge(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let ports = prop_oneof![Just(1_u32), Just(2), Just(1 << 30), Just((1 << 30) + 1)];
    let credit = prop_oneof![Just(0_u32), 0..9000_u32, any::<u32>()];
    prop_oneof![
        6 => hostility(3).prop_map(Action::Driver),
        12 => (0..9_u16, 1..3_u32, ports, credit.clone(), credit, 0..6000_usize)
            .prop_map(|(op, own, other, room, freed, length)| Action::Packet(op, own, other, room, freed, length)),
        4 => (0..3_u64, BUFFERS..RAM, 0..0x1_0000_u32, any::<bool>())
            .prop_map(|(queue, at, length, write)| Action::Offer(queue, at, length, if write { WRITE } else { 0 })),
        3 => (1..3_u32).prop_map(Action::Incoming),
        3 => any::<bool>().prop_map(Action::Answer),
        6 => (0..8_usize, 0..3_u8).prop_map(|(program, what)| Action::Program(program, what)),
        1 => Just(Action::BringUp),
        1 => Just(Action::HandOver),
        1 => any::<usize>().prop_map(Action::Forge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, nothing panics, every state that is saved can be loaded, and a driver that behaves is served.
    #[test]
    fn hostile_drivers_harm_nobody_but_themselves(actions in prop::collection::vec(action(), 1..80)) {
        let mut site = Site::new();
        let mut programs = Vec::new();
        let mut asked = Vec::new();
        let mut next = 0;
        for action in actions {
            match action {
                Action::Driver(hostility) => site.rig.suffer(hostility),
                Action::Packet(operation, own, other, room, freed, length) => {
                    let header = Header {
                        room,
                        freed,
                        flags: freed & 3,
                        ..header(operation.into(), (own, other))
                    };
                    site.send(header, &vec![7; length]);
                }
                Action::Offer(queue, at, length, flags) => {
                    site.rig.offer(queue, &[(at, length, flags)]);
                    site.rig.serve();
                }
                Action::Incoming(port) if site.handed.len() < 8 => {
                    next += 1;
                    programs.push(site.hand(next, VsockOrder::Incoming { id: next, port }));
                }
                Action::Answer(yes) => match asked.pop() {
                    Some(ticket) if yes && site.handed.len() < 8 => {
                        next += 1;
                        programs.push(site.hand(next, VsockOrder::Connected { ticket, id: next }));
                    }
                    Some(ticket) => site.link.order(VsockOrder::Refused { ticket }, None),
                    None => {}
                },
                Action::Program(number, what) => match (what, programs.get_mut(number)) {
                    (0, Some(program)) => drop(program.write(&[9; 3000])),
                    (1, Some(program)) => drop(program.read(&mut [0; 5000])),
                    (_, Some(_)) => drop(programs.swap_remove(number)),
                    (_, None) => {}
                },
                Action::Incoming(_) => {}
                Action::BringUp => site.rig.bring_up(),
                Action::HandOver => site = site.hand_over(),
                Action::Forge(bit) => {
                    site.link.settle();
                    let (forged, _link) = device(&site.handed);
                    site.rig.forge(bit, Box::new(forged));
                }
            }
            site.rig.serve();
            for said in site.link.deeds(false) {
                match said {
                    VsockReport::Connect { ticket, .. } => asked.push(ticket),
                    VsockReport::Closed { id } => site.handed.retain(|(own, _)| *own != id),
                }
            }
        }
        site.rig.bring_up();
        for ticket in asked {
            site.link.order(VsockOrder::Refused { ticket }, None);
        }
        site.rig.serve();
        site.link.deeds(false);
        let (mut program, ports) = site.incoming(1000, 77);
        site.packet(Operation::Data, ports, b"served");
        let mut data = [0; 6];
        program.read_exact(&mut data).unwrap();
        site.rig.transport.park(StartMode::CprTransfer).unwrap();
    }
}
