//! What a guest, a control thread and a hostile state can do to the serial port.

use std::sync::atomic::AtomicUsize;

use super::*;

const CPR: StartMode = StartMode::CprTransfer;
const DATA: u64 = 0;
const ENABLE: u64 = 1;
const IDENTIFY: u64 = 2;
const LINE_STATUS: u64 = 5;

struct Bench {
    port: SerialPort,
    irqs: Arc<AtomicUsize>,
    wakes: Arc<AtomicUsize>,
}

fn counter() -> (Arc<AtomicUsize>, Arc<dyn Trigger>) {
    let count = Arc::new(AtomicUsize::new(0));
    let trigger = Arc::clone(&count);
    (
        count,
        Arc::new(move || {
            trigger.fetch_add(1, Ordering::SeqCst);
        }),
    )
}

fn parked() -> Bench {
    let (irqs, irq) = counter();
    let (wakes, wake) = counter();
    let mut port = SerialPort::new(0, irq, wake);
    port.setup(StartMode::None).unwrap();
    Bench { port, irqs, wakes }
}

fn running() -> Bench {
    let mut bench = parked();
    bench.port.resume(StartMode::None).unwrap();
    bench.wakes.store(0, Ordering::SeqCst);
    bench
}

impl Bench {
    fn irqs(&self) -> usize {
        self.irqs.swap(0, Ordering::SeqCst)
    }
    fn wakes(&self) -> usize {
        self.wakes.swap(0, Ordering::SeqCst)
    }
    fn read(&mut self, offset: u64) -> u8 {
        let mut byte = [0];
        self.port.read(offset, &mut byte);
        byte[0]
    }
    fn print(&mut self, text: &[u8]) {
        for byte in text {
            self.port.write(DATA, &[*byte]);
        }
    }
    fn drained(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.port
            .drain(|chunk| {
                bytes.extend_from_slice(chunk);
                Ok(chunk.len())
            })
            .unwrap();
        bytes
    }
}

#[test]
fn output_wakes_the_reader_once() {
    let mut bench = running();
    bench.print(b"login: ");
    assert_eq!((bench.wakes(), bench.port.has_output()), (1, true));
    assert_eq!(bench.drained(), b"login: ");
    assert!(!bench.port.has_output());
    bench.port.write(DATA, b"x");
    assert_eq!(bench.wakes(), 1);
}

#[test]
fn a_reader_that_is_gone_never_stops_the_guest() {
    let mut bench = running();
    for i in 0..CONSOLE_OUT_MAX + 7 {
        bench.port.write(DATA, &[(i % 256) as u8]);
    }
    assert_eq!(bench.port.dropped(), 7);
    assert_eq!(
        bench.read(LINE_STATUS) & 0x20,
        0x20,
        "the transmitter is ready"
    );
    assert_eq!(bench.drained().len(), CONSOLE_OUT_MAX);
}

#[test]
fn input_is_taken_as_it_fits() {
    let mut bench = running();
    bench.port.write(ENABLE, &[1]);
    bench.irqs();
    let input: Vec<u8> = (0..100).collect();
    assert_eq!(bench.port.receive_room(), 64);
    assert_eq!(bench.port.feed(&input), 64);
    assert_eq!(
        (bench.port.feed(&input[64..]), bench.irqs(), bench.wakes()),
        (0, 1, 0)
    );

    let mut seen = Vec::new();
    assert_eq!(bench.read(IDENTIFY) & 0xF, 4);
    seen.push(bench.read(DATA));
    assert_eq!(bench.wakes(), 1, "there is room");
    while bench.read(LINE_STATUS) & 1 != 0 {
        seen.push(bench.read(DATA));
    }
    assert_eq!(bench.port.feed(&input[64..]), 36);
    while bench.read(LINE_STATUS) & 1 != 0 {
        seen.push(bench.read(DATA));
    }
    assert_eq!(seen, input);
}

#[test]
fn loopback_takes_no_input_from_outside() {
    let mut bench = running();
    bench.port.write(MODEM_CONTROL.into(), &[LOOPBACK]);
    assert_eq!((bench.port.receive_room(), bench.port.feed(b"x")), (0, 0));
    bench.port.write(DATA, b"y");
    assert_eq!((bench.read(DATA), bench.drained()), (b'y', vec![]));
    bench.wakes();
    bench.port.write(MODEM_CONTROL.into(), &[0]);
    assert_eq!((bench.wakes(), bench.port.receive_room()), (1, 64));
}

#[test]
fn a_parked_port_is_still() {
    let mut bench = running();
    bench.port.write(DATA, b"x");
    bench.port.park(CPR).unwrap();
    assert_eq!(
        (bench.port.receive_room(), bench.port.feed(b"input")),
        (0, 0)
    );
    assert_eq!((bench.drained(), bench.port.has_output()), (vec![], false));
    bench.irqs();
    // The transmitter's interrupt becomes due while parked, and is raised when the port goes on.
    bench.port.write(ENABLE, &[2]);
    assert_eq!(bench.irqs(), 0);
    bench.port.failed(CPR);
    bench.port.resume(CPR).unwrap();
    assert_eq!((bench.irqs(), bench.drained()), (1, b"x".to_vec()));
    // Once is enough.
    bench.port.park(CPR).unwrap();
    bench.port.resume(CPR).unwrap();
    assert_eq!(bench.irqs(), 0);
}

#[test]
fn a_new_worker_goes_on_where_the_old_one_stopped() {
    let mut old = running();
    old.port.write(ENABLE, &[3]);
    old.read(IDENTIFY);
    old.print(b"half a li");
    old.port.feed(b"typed");
    old.port.write(7, &[0x5A]);
    old.port.park(CPR).unwrap();
    let section = old.port.save(CPR).unwrap();

    let mut new = parked();
    new.port.load(CPR, &section).unwrap();
    assert_eq!(
        (new.irqs(), new.wakes(), new.drained()),
        (0, 0, vec![]),
        "nothing before the commit"
    );
    assert_eq!(new.port.save(CPR).unwrap(), section);
    new.port.resume(CPR).unwrap();
    assert_ne!(new.irqs(), 0, "what was pending is raised again");
    assert_ne!(new.wakes(), 0);
    assert_eq!(new.drained(), b"half a li");
    assert_eq!(
        (new.read(7), new.read(DATA), new.read(DATA)),
        (0x5A, b't', b'y')
    );
}

#[test]
fn a_reset_keeps_the_output_and_nothing_else() {
    let mut bench = running();
    bench.print(b"rebooting");
    bench.port.write(ENABLE, &[3]);
    bench.port.write(MODEM_CONTROL.into(), &[LOOPBACK]);
    bench.port.park(StartMode::None).unwrap();
    // An interrupt of the old guest's, which the new one shall not see.
    bench.read(IDENTIFY);
    bench.port.write(ENABLE, &[2]);
    bench.irqs();
    bench.port.setup(StartMode::None).unwrap();
    bench.port.resume(StartMode::None).unwrap();
    assert_eq!(
        (bench.irqs(), bench.read(ENABLE), bench.port.receive_room()),
        (0, 0, 64)
    );
    assert_eq!(bench.drained(), b"rebooting");
}

/// A state that is in order.
fn good() -> SavedSerial {
    SavedSerial::of(SerialState::default(), &ConsoleOut::new())
}

fn loaded(saved: &SavedSerial) -> Result<(), DeviceError> {
    let mut port = parked().port;
    let section = state::encode(port.id(), VERSION, saved).unwrap();
    port.load(CPR, &section)
}

#[test]
fn every_impossible_field_is_named() {
    loaded(&good()).unwrap();
    let full = SavedSerial {
        in_buffer: vec![0; 64],
        line_status: 0x61,
        out: vec![0; CONSOLE_OUT_MAX],
        ..good()
    };
    loaded(&full).unwrap();
    let cases = [
        (
            SavedSerial {
                interrupt_enable: 0x10,
                ..good()
            },
            "interrupt_enable",
            0x10,
        ),
        (
            SavedSerial {
                interrupt_identification: 0,
                ..good()
            },
            "interrupt_identification",
            0,
        ),
        (
            SavedSerial {
                interrupt_identification: 3,
                ..good()
            },
            "interrupt_identification",
            3,
        ),
        (
            SavedSerial {
                interrupt_identification: 8,
                ..good()
            },
            "interrupt_identification",
            8,
        ),
        (
            SavedSerial {
                in_buffer: vec![0; 65],
                line_status: 0x61,
                ..good()
            },
            "in_buffer",
            65,
        ),
        (
            SavedSerial {
                line_status: 0x61,
                ..good()
            },
            "line_status",
            0x61,
        ),
        (
            SavedSerial {
                in_buffer: vec![1],
                ..good()
            },
            "line_status",
            0x60,
        ),
        (
            SavedSerial {
                line_status: 0,
                ..good()
            },
            "line_status",
            0,
        ),
        (
            SavedSerial {
                modem_status: 0xB1,
                ..good()
            },
            "modem_status",
            0xB1,
        ),
        (
            SavedSerial {
                out: vec![0; CONSOLE_OUT_MAX + 1],
                ..good()
            },
            "out",
            65537,
        ),
    ];
    for (saved, field, bad) in cases {
        match loaded(&saved) {
            Err(DeviceError::State(StateError::Field { name, value, .. })) => {
                assert_eq!((name, value), (field, bad));
            }
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn sections_are_exact() {
    let mut port = parked().port;
    let section = port.save(CPR).unwrap();
    let with = |bytes: Vec<u8>, version| SavedSection {
        bytes,
        version,
        ..section.clone()
    };
    let longer = [&section.bytes[..], &[0]].concat();
    assert!(matches!(
        port.load(CPR, &with(longer, VERSION)),
        Err(DeviceError::State(StateError::Trailing(1)))
    ));
    for len in 0..section.bytes.len() {
        let cut = section.bytes[..len].to_vec();
        assert!(matches!(
            port.load(CPR, &with(cut, VERSION)),
            Err(DeviceError::State(StateError::Malformed(_)))
        ));
    }
    assert!(matches!(
        port.load(CPR, &with(section.bytes.clone(), 2)),
        Err(DeviceError::State(StateError::Version {
            found: 2,
            supported: 1
        }))
    ));
    // A length that no memory could hold.
    let mut huge = section.bytes[..9].to_vec();
    huge.extend([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01]);
    assert!(port.load(CPR, &with(huge, VERSION)).is_err());
}
