//! A worker that lies, floods, speaks out of turn and attempts what is forbidden. It runs only where a test's policy has
//! allowed its digest; it is never installed.
//!
//! Every mode is a name in [`MODE`], written there by `baton_tests::hostility`. What a mode attempts and survives it
//! confesses in `failed`, so that a test can tell a refusal from a success.
#![expect(
    unsafe_code,
    reason = "descriptor 0 is the control socket, a second one for it would be noticed at once"
)]

mod granted;

use std::fs::File;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::MAX_MESSAGE;
use baton_ipc::Received;
use baton_ipc::StateDigest;
use baton_ipc::state_stream::CONTAINER_VERSION;
use baton_ipc::state_stream::Frame;
use baton_ipc::state_stream::MAX_FRAME;
use baton_ipc::state_stream::Machine;
use baton_ipc::state_stream::Offer;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::GuestEvent;
use baton_ipc::worker::Order;
use baton_ipc::worker::PROTOCOL;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;

// As a worker does, or no broker would run it.
baton_policy::declare_needs!("hostile-worker", protocol 3);

/// Aligned, so that it is found quickly.
#[repr(align(64))]
struct Mode([u8; 59]);

#[used]
static MODE: Mode =
    Mode(*b"baton-tests: hostile mode: no-mode\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
const MARK: usize = 27;

type Broker = Channel<Report, Order>;

fn main() {
    let Mode(mode) = std::hint::black_box(&MODE);
    let name = mode.get(MARK..).unwrap_or_default();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    // SAFETY: descriptor 0 is open, as every worker's is, and nothing else in this process uses or closes it.
    let control = unsafe { rustix::stdio::take_stdin() };
    match name.split_once('.') {
        Some(("raw", what)) => raw(what, control),
        Some(("first", what)) => first_word(what, control),
        Some(("later", what)) => after_hello(what, control),
        Some(("call", what)) => forbidden_call(what, control),
        Some(("built", what)) => after_configure(what, control),
        Some(("granted", what)) => granted::granted(what, control),
        Some(("hoard", "memory")) => granted::hoard(control),
        Some(("running", what)) => granted::running(what, control),
        _ => {
            eprintln!("no mode {name:?}");
            std::process::exit(4);
        }
    }
}

/// Keeps everything open that is.
fn wait_for_the_end() {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Ends its process, or sends what is no message.
fn raw(what: &str, control: OwnedFd) {
    let socket = UnixDatagram::from(control);
    let send = |bytes: &[u8]| {
        // Whatever becomes of it: the broker is the one that is tested.
        drop(socket.send(bytes));
    };
    match what {
        "exit" => std::process::exit(7),
        "abort" => std::process::abort(),
        "silent" => {}
        "garbage" => send(&[0xff; 100]),
        "zeroes" => send(&[0; 4096]),
        "oversize" => send(&vec![0; MAX_MESSAGE + 1]),
        "huge" => send(&vec![0xff; 150 << 10]),
        "empty" => send(&[]),
        // A hello whose text claims to be 2^60 bytes long.
        "length" => send(&[0, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10]),
        "hang-up" => {
            drop(socket);
            wait_for_the_end();
        }
        _ => std::process::exit(4),
    }
    wait_for_the_end();
}

fn hello() -> Report {
    Report::Hello {
        protocol: PROTOCOL,
        build: "hostile".into(),
    }
}

fn report(name: &str) -> Report {
    match name {
        "agreed" => Report::Agreed,
        "ready" => Report::Ready(BuildTimes::default()),
        "parked" => Report::Parked {
            first_exit_ns: 0,
            parked_ns: u64::MAX,
        },
        "saved" => Report::Saved {
            digest: StateDigest([0; 32]),
            bytes: u64::MAX,
        },
        "loaded" => Report::Loaded {
            digest: StateDigest([0; 32]),
            changed: 0,
        },
        "running" => Report::Running,
        "first-run" => Report::FirstRun {
            last_run_ns: u64::MAX,
        },
        "resumed" => Report::Resumed,
        "paused" => Report::Paused,
        "shutdown" => Report::Guest(GuestEvent::Shutdown),
        _ => hello(),
    }
}

/// Says something else than hello, or says hello otherwise.
fn first_word(what: &str, control: OwnedFd) {
    // Planted: held on to over everything that follows.
    let _held = (what == "one-more").then(|| control.try_clone());
    let broker = Broker::new(FdSocket::from(control));
    let sent = match what {
        "protocol" => broker.send(&Report::Hello {
            protocol: PROTOCOL + 1,
            build: "\u{1b}[2J from the future".into(),
        }),
        "descriptors" => broker.send_with(&hello(), &[std::io::stderr().as_fd()]),
        "flood" => {
            // Until the broker has to read, and then on.
            for _ in 0..100_000 {
                if broker.send(&hello()).is_err() {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            Ok(())
        }
        other => broker.send(&report(other)),
    };
    drop(sent);
    wait_for_the_end();
}

/// Says hello, and more than it was asked.
fn after_hello(what: &str, control: OwnedFd) {
    let broker = Broker::new(FdSocket::from(control));
    drop(broker.send(&hello()));
    drop(broker.send(&report(what)));
    wait_for_the_end();
}

/// Attempts a system call that no worker may make, with arguments that would succeed outside.
fn forbidden_call(what: &str, control: OwnedFd) {
    let broker = Broker::new(FdSocket::from(control));
    let outcome = match what {
        "open" => File::open("/").map(drop),
        "create" => File::create("/file").map(drop),
        "read-dir" => std::fs::read_dir("/").map(drop),
        "tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "unix" => UnixStream::connect("/socket").map(drop),
        "pair" => UnixStream::pair().map(drop),
        "execute" => Command::new("/proc/self/exe").spawn().map(drop),
        "memfd" => rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::EXEC)
            .map(drop)
            .map_err(Into::into),
        "signal" => rustix::process::kill_process_group(
            rustix::process::Pid::INIT,
            rustix::process::Signal::USR1,
        )
        .map_err(Into::into),
        "mkdir" => std::fs::create_dir("/directory"),
        "hostname" => rustix::system::sethostname(b"mine").map_err(Into::into),
        "chroot" => rustix::process::chroot("/").map_err(Into::into),
        "parent" => {
            let _ = rustix::process::getppid();
            Ok(())
        }
        _ => std::process::exit(4),
    };
    let reason = format!("survived {what}: {outcome:?}");
    drop(broker.send(&hello()));
    drop(broker.send(&Report::Failed {
        step: "obey".into(),
        reason,
    }));
    wait_for_the_end();
}

/// Behaves until it is configured.
fn after_configure(what: &str, control: OwnedFd) {
    let mut broker = Broker::new(FdSocket::from(control));
    drop(broker.send(&hello()));
    let (config, descriptors) = loop {
        match broker.receive() {
            Ok(Received::Message(Order::Configure(config), descriptors)) => {
                break (config, descriptors);
            }
            Ok(Received::Empty) => std::thread::sleep(Duration::from_millis(1)),
            _ => std::process::exit(5),
        }
    };
    let mut descriptors = descriptors.into_iter();
    let (Some(cpr), Some(main)) = (descriptors.next(), descriptors.next()) else {
        std::process::exit(6);
    };
    let main = UnixStream::from(main);
    match what {
        // Claims to have built everything; it has not even its last filters.
        "ready" => {
            drop(broker.send(&Report::Ready(BuildTimes::default())));
            drop(cpr);
            wait_for_the_end();
        }
        "hang-up" => {
            drop(cpr);
            wait_for_the_end();
        }
        // The cpr channel goes one way.
        "answer" => {
            drop(FdSocket::from(cpr).send(b"more, please", &[]));
            wait_for_the_end();
        }
        "close-main" => {
            drop(main);
            wait_for_the_end();
        }
        "frame" => write(&main, &[0xff; 64]),
        "frame-flood" => write(&main, &vec![0xff; 4 * MAX_FRAME]),
        other => {
            let offer = offer(other, &config);
            write(&main, &Frame::encode(&offer).unwrap_or_default());
        }
    }
    wait_for_the_end();
}

fn write(mut main: &UnixStream, bytes: &[u8]) {
    // As much as the other side takes.
    drop(std::io::Write::write_all(&mut main, bytes));
}

/// An offer of another machine or another version than the guest's.
fn offer(what: &str, config: &WorkerConfig) -> Offer {
    let mut offer = Offer {
        container: CONTAINER_VERSION,
        sections: Vec::new(),
        machine: Machine {
            cpus: config.cpus,
            ram: config
                .ram
                .iter()
                .map(|ram| (ram.address, ram.size))
                .collect(),
            hidden: config.hide.iter().map(ToString::to_string).collect(),
            devices: Vec::new(),
        },
        build: "hostile".into(),
    };
    match what {
        "container" => offer.container = 0,
        "cpus" => offer.machine.cpus += 1,
        "ram" => offer.machine.ram.push((1 << 40, 1 << 40)),
        "hidden" => offer.machine.hidden.push("quantum".into()),
        "devices" => {}
        _ => std::process::exit(4),
    }
    offer
}
