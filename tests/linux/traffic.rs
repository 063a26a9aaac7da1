//! Keeps a guest and its host talking, and judges what arrived: streams of numbered, checksummed records in both directions,
//! datagrams that are echoed, and memory that is written and read again.
//!
//! ```text
//! traffic serve                     in the guest: streams on TCP and vsock port 7000, echoes on UDP port 7001, load on each CPU
//! traffic stream ADDRESS STOP       on the host: until the file STOP is there; ADDRESS is IP:PORT, or the path of a vsock's socket
//! traffic echo IP:PORT STOP PACE    on the host: one datagram each PACE milliseconds
//! ```
//!
//! On the host it prints `ok: ...` and exits with 0, or says what is wrong and exits with 1. In the guest it says on standard
//! output what is wrong, in a line that begins with `traffic: WRONG`, and goes on.
//!
//! A record has a number, how many records of the other side its sender has verified, and a checksum over all of it. So when a
//! stream ends the host knows what the guest got.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PORT: u16 = 7000;
const ECHO_PORT: u16 = 7001;
/// Bytes of a record: more than one segment of a TCP stream on Ethernet.
const RECORD: usize = 4096;
/// Bytes of a datagram: its number, and a checksum.
const DATAGRAM: usize = 16;
/// The number that says that no record follows.
const LAST: u64 = u64::MAX;
/// How far apart records are sent: an emulated processor has other work as well.
const PACE: Duration = Duration::from_millis(5);
/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that each thread of the load writes and reads again.
const LOAD: usize = 8 << 20;

/// FNV-1a of the words (Fowler, Noll, Vo; 64 bits), with the words as its octets.
fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x0100_0000_01b3)
    })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|chunk| {
        chunk
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    })
}

/// A record: its number, what was verified, the payload, the checksum.
fn record(number: u64, verified: u64) -> Vec<u8> {
    let payload = (2..RECORD as u64 / 8 - 1)
        .map(|index| number.rotate_left(17) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let all: Vec<u64> = [number, verified].into_iter().chain(payload).collect();
    let sum = checksum(all.iter().copied());
    all.into_iter()
        .chain([sum])
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// A stream's socket, whatever it is.
trait Socket: Read + Write + Send + Sized + 'static {
    fn twice(self) -> io::Result<(Self, Self)>;
}

impl Socket for TcpStream {
    fn twice(self) -> io::Result<(Self, Self)> {
        Ok((self.try_clone()?, self))
    }
}

impl Socket for UnixStream {
    fn twice(self) -> io::Result<(Self, Self)> {
        Ok((self.try_clone()?, self))
    }
}

impl Socket for File {
    fn twice(self) -> io::Result<(Self, Self)> {
        Ok((self.try_clone()?, self))
    }
}

/// Reads records until the last. `verified` counts them; gives how many of ours the other side had verified at its end.
fn receive(socket: &mut impl Read, verified: &AtomicU64) -> Result<u64, String> {
    let mut bytes = vec![0; RECORD];
    loop {
        let expected = verified.load(Ordering::Relaxed);
        socket
            .read_exact(&mut bytes)
            .map_err(|error| format!("the stream broke before record {expected}: {error}"))?;
        let mut found = words(&bytes);
        let (number, acknowledged) = (found.next().unwrap_or(0), found.next().unwrap_or(0));
        if number != LAST && number != expected {
            return Err(format!("record {number} came instead of record {expected}"));
        }
        if bytes != record(number, acknowledged) {
            return Err(format!("record {number} is not what was sent"));
        }
        if number == LAST {
            return Ok(acknowledged);
        }
        verified.fetch_add(1, Ordering::Relaxed);
    }
}

/// Sends records until `stopped`; gives how many.
fn send(
    socket: &mut impl Write,
    verified: &AtomicU64,
    stopped: impl Fn() -> bool,
) -> Result<u64, String> {
    let mut number = 0;
    while !stopped() {
        let bytes = record(number, verified.load(Ordering::Relaxed));
        socket
            .write_all(&bytes)
            .map_err(|error| format!("record {number} could not be sent: {error}"))?;
        number += 1;
        thread::sleep(PACE);
    }
    Ok(number)
}

fn send_last(socket: &mut impl Write, verified: &AtomicU64) -> Result<(), String> {
    let bytes = record(LAST, verified.load(Ordering::Relaxed));
    socket
        .write_all(&bytes)
        .map_err(|error| format!("the last record could not be sent: {error}"))
}

/// The guest's side of a stream: it sends until the host has sent its last record, and then says how many it got.
fn answer(socket: impl Socket) -> Result<(), String> {
    let (mut reader, mut writer) = socket.twice().map_err(|error| error.to_string())?;
    let verified = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&verified);
    let receiving = thread::spawn(move || receive(&mut reader, &counted));
    send(&mut writer, &verified, || receiving.is_finished())?;
    receiving
        .join()
        .map_err(|_| "the receiver panicked".to_owned())??;
    send_last(&mut writer, &verified)
}

/// The host's side: sends and receives until `stop` is there.
fn drive(socket: impl Socket, stop: &Path) -> Result<String, String> {
    let (mut reader, mut writer) = socket.twice().map_err(|error| error.to_string())?;
    let verified = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&verified);
    let receiving = thread::spawn(move || receive(&mut reader, &counted));
    let sent = send(&mut writer, &verified, || {
        stop.exists() || receiving.is_finished()
    })?;
    send_last(&mut writer, &verified)?;
    let arrived = receiving
        .join()
        .map_err(|_| "the receiver panicked".to_owned())??;
    if arrived != sent {
        return Err(format!(
            "{sent} records were sent, and the guest verified {arrived}"
        ));
    }
    let received = verified.load(Ordering::Relaxed);
    if sent == 0 || received == 0 {
        return Err(format!("{sent} records were sent and {received} received"));
    }
    Ok(format!(
        "{sent} records to the guest and {received} from it, none lost, damaged or out of order"
    ))
}

/// Connects to port [`PORT`] of a guest through its vsock's socket, by Firecracker's convention.
fn through_vsock(path: &Path) -> io::Result<UnixStream> {
    let mut socket = UnixStream::connect(path)?;
    socket.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        socket.read_exact(&mut byte)?;
        line.extend(byte);
    }
    if line.starts_with(b"OK ") {
        Ok(socket)
    } else {
        Err(io::Error::other("the guest did not accept"))
    }
}

#[derive(Debug, Default, PartialEq)]
struct Echoes {
    sent: u64,
    came: u64,
    twice: u64,
    reordered: u64,
    longest_gap: Duration,
}

/// What came back of numbered datagrams.
#[derive(Default)]
struct Tally {
    echoes: Echoes,
    /// The last numbers that came, the newest last.
    recent: VecDeque<u64>,
    highest: Option<u64>,
}

impl Tally {
    fn came(&mut self, number: u64) {
        if self.recent.contains(&number) {
            self.echoes.twice += 1;
            return;
        }
        self.echoes.came += 1;
        if self.highest.is_some_and(|highest| number < highest) {
            self.echoes.reordered += 1;
        }
        self.highest = self.highest.max(Some(number));
        self.recent.push_back(number);
        if self.recent.len() > 4096 {
            self.recent.pop_front();
        }
    }
}

fn datagram(number: u64) -> [u8; DATAGRAM] {
    let mut bytes = [0; DATAGRAM];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&checksum([number].into_iter()).to_le_bytes());
    bytes
}

fn echo(address: &str, stop: &Path, pace: Duration) -> Result<String, String> {
    let failed = |error: io::Error| error.to_string();
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    socket.connect(address).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    let mut tally = Tally::default();
    let (mut next, mut last) = (Instant::now(), Instant::now());
    let mut ended = None;
    // What is still under way at the end has a second.
    while ended.is_none_or(|ended: Instant| ended.elapsed() < Duration::from_secs(1)) {
        if ended.is_none() && stop.exists() {
            ended = Some(Instant::now());
        }
        if ended.is_none() && Instant::now() >= next {
            // A queue that is full loses it, as a network may.
            let _ = socket.send(&datagram(tally.echoes.sent));
            tally.echoes.sent += 1;
            next = (next + pace).max(Instant::now() - pace * 20);
        }
        let mut bytes = [0; DATAGRAM + 1];
        while let Ok(length) = socket.recv(&mut bytes) {
            let number = words(&bytes[..8]).next().unwrap_or(0);
            if bytes[..length] != datagram(number) {
                return Err(format!(
                    "a datagram of {length} bytes is not what was sent: {bytes:?}"
                ));
            }
            tally.came(number);
            tally.echoes.longest_gap = tally.echoes.longest_gap.max(last.elapsed());
            last = Instant::now();
        }
        thread::sleep(
            next.saturating_duration_since(Instant::now())
                .min(Duration::from_millis(1)),
        );
    }
    let Echoes {
        sent,
        came,
        twice,
        reordered,
        longest_gap,
    } = tally.echoes;
    let report = format!(
        "{sent} datagrams, {came} came back ({} lost), {twice} twice, {reordered} out of order, longest gap {} ms",
        sent - came.min(sent),
        longest_gap.as_millis()
    );
    if came == 0 || twice > 0 || reordered > 0 {
        Err(report)
    } else {
        Ok(report)
    }
}

/// Says what is wrong where the console shows it.
fn wrong(what: impl Display) {
    println!("traffic: WRONG {what}");
}

/// Writes memory, computes, and reads it again, for ever, half of the time.
fn load(seed: u64) {
    let mut memory = vec![0_u64; LOAD / 8];
    for turn in seed.. {
        let started = Instant::now();
        let value = |index: u64| {
            (index ^ turn)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(23)
        };
        for (word, index) in memory.iter_mut().zip(0..) {
            *word = value(index);
        }
        let sum = checksum((0..memory.len() as u64).map(value));
        if checksum(memory.iter().copied()) != sum {
            let bad = memory
                .iter()
                .zip(0..)
                .find(|(word, index)| **word != value(*index));
            wrong(format_args!("memory of turn {turn}: {bad:?}"));
        }
        thread::sleep(started.elapsed());
    }
}

/// Serves each connection in a thread.
fn serve<S: Socket>(what: &'static str, accept: impl Fn() -> io::Result<S>) {
    loop {
        match accept() {
            Ok(socket) => drop(thread::spawn(move || {
                answer(socket).unwrap_or_else(|error| wrong(format_args!("{what}: {error}")))
            })),
            Err(error) => {
                wrong(format_args!("{what}: {error}"));
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn bind(socket: i32, address: *const VsockAddress, length: u32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
    fn accept(socket: i32, address: *mut VsockAddress, length: *mut u32) -> i32;
}

/// AF_VSOCK (linux/socket.h), SOCK_STREAM with SOCK_CLOEXEC (linux/net.h), VMADDR_CID_ANY (linux/vm_sockets.h).
const AF_VSOCK: i32 = 40;
const SOCK_STREAM_CLOEXEC: i32 = 1 | 0o2_000_000;
const VMADDR_CID_ANY: u32 = u32::MAX;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

/// A listening vsock: the standard library has none.
fn vsock_listener() -> io::Result<i32> {
    let address = VsockAddress {
        family: AF_VSOCK as u16,
        reserved: 0,
        port: PORT.into(),
        cid: VMADDR_CID_ANY,
        rest: [0; 4],
    };
    let checked = |result: i32| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: takes numbers only.
    let listener = checked(unsafe { socket(AF_VSOCK, SOCK_STREAM_CLOEXEC, 0) })?;
    // SAFETY: `address` lives over the call, and its size is the one that is said.
    checked(unsafe {
        bind(
            listener,
            &raw const address,
            size_of::<VsockAddress>() as u32,
        )
    })?;
    // SAFETY: takes numbers only.
    checked(unsafe { listen(listener, 8) })?;
    Ok(listener)
}

fn accept_vsock(listener: i32) -> io::Result<File> {
    // SAFETY: accept(2) takes null for an address that is not wanted.
    let socket = unsafe { accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is a descriptor of this process that nobody else owns yet.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(socket) }))
}

fn serve_all() -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let tcp = TcpListener::bind(("0.0.0.0", PORT)).map_err(failed)?;
    let udp = UdpSocket::bind(("0.0.0.0", ECHO_PORT)).map_err(failed)?;
    let vsock = vsock_listener().map_err(failed)?;
    let cpus = thread::available_parallelism().map_err(failed)?.get() as u64;
    println!("traffic: serving on {cpus} processors");
    for cpu in 0..cpus {
        thread::spawn(move || load(cpu << 32));
    }
    thread::spawn(move || serve("vsock", || accept_vsock(vsock)));
    thread::spawn(move || serve("TCP", || tcp.accept().map(|(socket, _)| socket)));
    let mut bytes = [0; 2048];
    loop {
        let (length, from) = udp.recv_from(&mut bytes).map_err(failed)?;
        let _ = udp.send_to(&bytes[..length], from);
    }
}

fn run() -> Result<String, String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve"] => serve_all().map(|()| String::new()),
        ["echo", address, stop, pace] => {
            let pace = pace.parse().map_err(|error| format!("{pace}: {error}"))?;
            echo(address, &PathBuf::from(stop), Duration::from_millis(pace))
        }
        ["stream", path, stop] if path.starts_with('/') => {
            let socket =
                through_vsock(Path::new(path)).map_err(|error| format!("{path}: {error}"))?;
            socket
                .set_read_timeout(Some(PATIENCE))
                .map_err(|error| error.to_string())?;
            drive(socket, &PathBuf::from(stop))
        }
        ["stream", address, stop] => {
            let socket =
                TcpStream::connect(address).map_err(|error| format!("{address}: {error}"))?;
            socket
                .set_read_timeout(Some(PATIENCE))
                .map_err(|error| error.to_string())?;
            drive(socket, &PathBuf::from(stop))
        }
        _ => Err("usage: traffic serve | stream ADDRESS STOP | echo IP:PORT STOP PACE".to_owned()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(verdict) => {
            println!("ok: {verdict}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use super::*;

    fn received(bytes: &[u8]) -> Result<u64, String> {
        receive(&mut &*bytes, &AtomicU64::new(0))
    }

    fn stream(numbers: &[u64]) -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| record(*number, 7))
            .collect()
    }

    #[test]
    fn a_whole_stream_is_right() {
        assert_eq!(received(&stream(&[0, 1, 2, LAST])), Ok(7));
    }

    #[test]
    fn what_is_lost_doubled_damaged_or_cut_off_is_found() {
        for numbers in [&[0, 2, LAST][..], &[0, 0, LAST], &[1, 0, LAST], &[0, 1]] {
            received(&stream(numbers)).unwrap_err();
        }
        for at in [0, 9, 500, RECORD - 1, RECORD + 3] {
            let mut bytes = stream(&[0, 1, LAST]);
            bytes[at] ^= 4;
            received(&bytes).unwrap_err();
        }
    }

    #[test]
    fn both_sides_agree_on_what_arrived() {
        let stop = std::env::temp_dir().join(format!("traffic-{}", std::process::id()));
        let (here, there) = UnixStream::pair().unwrap();
        let answering = thread::spawn(|| answer(there));
        let waiting = stop.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            File::create(waiting).unwrap();
        });
        let verdict = drive(here, &stop);
        std::fs::remove_file(stop).unwrap();
        assert!(verdict.unwrap().contains("none lost"));
        answering.join().unwrap().unwrap();
    }

    #[test]
    fn a_side_that_hangs_up_is_found() {
        let (here, there) = UnixStream::pair().unwrap();
        there.shutdown(Shutdown::Write).unwrap();
        drive(here, Path::new("/nowhere")).unwrap_err();
        drop(there);
    }

    #[test]
    fn datagrams_are_counted_as_they_come() {
        let mut tally = Tally::default();
        for number in [0, 1, 3, 2, 3, 5] {
            tally.came(number);
        }
        let Echoes {
            came,
            twice,
            reordered,
            ..
        } = tally.echoes;
        assert_eq!((came, twice, reordered), (5, 1, 1));
    }
}
