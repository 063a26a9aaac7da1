//! The line between the SVM host and whoever started it: one virtio-serial port, on which the command's standard
//! output, standard error and exit code travel as frames, so that none is lost or mixed with the kernel's log.
//!
//! `wire inside PORT DIRECTORY` runs the command of DIRECTORY/argv in there; `wire outside STATUS` unpacks the frames
//! from its standard input, and writes the exit code to the file STATUS, which is absent if the host died before.
//!
//! A frame is one byte of kind, four of length (little-endian, at most [`LONGEST`]) and the payload.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;

/// The longest payload in bytes: what the kernel's virtio_console takes in one write, less the header's five.
const LONGEST: usize = 32 * 1024 - 5;

/// How long the output of processes that the command left behind is still sent, once it has exited itself.
const LINGER: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match *arguments.as_slice() {
        ["inside", port, directory] => inside(Path::new(port), Path::new(directory)),
        ["outside", status] => outside(Path::new(status)),
        _ => Err(io::Error::other(
            "usage: wire inside PORT DIRECTORY | wire outside STATUS",
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("svm-host: wire: {error}");
            ExitCode::FAILURE
        }
    }
}

type Port = Arc<Mutex<File>>;

fn send(port: &Port, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    port.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .write_all(&frame)
}

fn inside(port: &Path, directory: &Path) -> io::Result<()> {
    let port: Port = Arc::new(Mutex::new(OpenOptions::new().write(true).open(port)?));
    let argv = fs::read(directory.join("argv"))?;
    let mut argv = argv.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let program = argv.next().unwrap_or_default();
    // Every argument ends with a NUL, so the last piece is empty and no argument.
    let arguments: Vec<&OsStr> = argv.collect();
    let arguments = arguments.split_last().map_or(&[][..], |(_, before)| before);

    let mut child = match Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => {
            send(
                &port,
                STDERR,
                format!("svm-host: {}: {error}\n", Path::new(program).display()).as_bytes(),
            )?;
            let missing = error.kind() == io::ErrorKind::NotFound;
            return send(&port, EXIT, &[if missing { 127 } else { 126 }]);
        }
    };
    let (done, ends) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, STDOUT, &port, done.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, STDERR, &port, done);
    }
    let status = child.wait()?;
    let deadline = Instant::now() + LINGER;
    // The channel is disconnected when both streams have ended. A port that is taken has a slow reader, who is waited for.
    while ends.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        != Err(RecvTimeoutError::Disconnected)
        && (Instant::now() < deadline || matches!(port.try_lock(), Err(TryLockError::WouldBlock)))
    {
    }
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    send(&port, EXIT, &[u8::try_from(code).unwrap_or(u8::MAX)])
}

/// Sends what comes from `stream` until it ends; what is sent on `progress` says that it is still coming.
fn forward(
    mut stream: impl Read + Send + 'static,
    kind: u8,
    port: &Port,
    progress: mpsc::Sender<()>,
) {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; LONGEST];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            let Some(payload) = buffer.get(..length) else {
                break;
            };
            if send(&port, kind, payload).is_err() || progress.send(()).is_err() {
                break;
            }
        }
    });
}

fn outside(status: &Path) -> io::Result<()> {
    let mut stdin = io::stdin().lock();
    let mut payload = vec![0; LONGEST];
    loop {
        let mut header = [0; 5];
        if stdin.read(&mut header[..1])? == 0 {
            return Ok(());
        }
        stdin.read_exact(&mut header[1..])?;
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        let payload = payload
            .get_mut(..length)
            .ok_or_else(|| io::Error::other(format!("frame of {length} bytes")))?;
        stdin.read_exact(payload)?;
        match (kind, &*payload) {
            (STDOUT, bytes) => write_now(&mut io::stdout().lock(), bytes)?,
            (STDERR, bytes) => write_now(&mut io::stderr().lock(), bytes)?,
            (EXIT, [code]) => return fs::write(status, format!("{code}\n")),
            _ => {
                return Err(io::Error::other(format!(
                    "frame of kind {kind} and {length} bytes"
                )));
            }
        }
    }
}

fn write_now(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
