//! What a Linux guest under test runs: says each 100 ms that it is alive and what its clocks read, watches that they
//! neither step back nor jump, and obeys its console. A machine that was paused, moved or upgraded badly shows here.
//!
//! Prints `tick N monotonic SECONDS realtime SECONDS` with N counting from 1 without gaps, and a line that begins with
//! `CLOCK-ERROR` for each fault. One watcher per processor reads the clocks as well, so that processors which disagree
//! are caught. Reads one command a line: see `HELP`. `ticks=N` among the variables (the kernel's command line) stops it like
//! `stop N`.

use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const HELP: &str = "commands: poweroff | reboot | stop [N] (power off after tick N, or now) | quiet | loud | \
                    cpus | sh COMMAND (prints its output, then 'exit CODE')";

const TICK: Duration = Duration::from_millis(100);
const WATCH: Duration = Duration::from_millis(10);

/// The longest step forward between two readings that is no fault: more than ten ticks and what a loaded emulator
/// adds, less than a pause that a guest should not see.
const LONGEST_STEP: Duration = Duration::from_millis(1300);

struct Readings {
    started: Instant,
    monotonic: Instant,
    realtime: SystemTime,
}

/// The clocks as last read by any thread. They are read under the lock, so the order of readings is known.
struct Clocks(Mutex<Readings>);

impl Clocks {
    fn new() -> Self {
        let (now, realtime) = (Instant::now(), SystemTime::now());
        Self(Mutex::new(Readings {
            started: now,
            monotonic: now,
            realtime,
        }))
    }

    /// Reads both clocks, reports faults since the last reading, and returns time since the start and since 1970.
    fn read(&self) -> (Duration, Duration) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (monotonic, realtime) = (Instant::now(), SystemTime::now());
        let back = |by: Duration, clock: &str| {
            say(format_args!("CLOCK-ERROR {clock} stepped back by {by:?}"))
        };
        let forward = |by: Duration, clock: &str| {
            if by > LONGEST_STEP {
                say(format_args!("CLOCK-ERROR {clock} jumped by {by:?}"));
            }
        };
        match monotonic.checked_duration_since(last.monotonic) {
            Some(step) => forward(step, "monotonic"),
            None => back(last.monotonic.duration_since(monotonic), "monotonic"),
        }
        match realtime.duration_since(last.realtime) {
            Ok(step) => forward(step, "realtime"),
            Err(error) => back(error.duration(), "realtime"),
        }
        last.monotonic = monotonic;
        last.realtime = realtime;
        (
            monotonic.duration_since(last.started),
            realtime.duration_since(UNIX_EPOCH).unwrap_or_default(),
        )
    }
}

/// Writes one line at once, so that lines of different threads do not mix.
fn say(line: impl Display) {
    let mut stdout = io::stdout().lock();
    // A console that cannot be written to leaves nobody to tell.
    let _ = stdout
        .write_all(format!("{line}\n").as_bytes())
        .and_then(|()| stdout.flush());
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| error.to_string())
        .trim()
        .to_owned()
}

fn say_cpus() -> usize {
    let online = read("/sys/devices/system/cpu/online");
    let count = thread::available_parallelism().map_or(1, usize::from);
    say(format_args!("cpus {count} online {online}"));
    count
}

/// Runs one of busybox's, and says what came of it if it came back.
fn leave(how: &str) {
    say(format_args!("guest: {how}"));
    let result = Command::new(how).arg("-f").status();
    say(format_args!("guest: {how} failed: {result:?}"));
}

struct Orders {
    quiet: AtomicBool,
    /// The tick to power off after.
    last: AtomicU64,
}

fn obey(line: &str, orders: &Orders) {
    let (command, argument) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    match (command, argument) {
        ("", _) => {}
        ("poweroff" | "reboot", _) => leave(command),
        ("stop", "") => leave("poweroff"),
        ("stop", n) => match n.parse() {
            Ok(n) => orders.last.store(n, Ordering::Relaxed),
            Err(error) => say(format_args!("guest: stop {n}: {error}")),
        },
        ("quiet" | "loud", _) => orders.quiet.store(command == "quiet", Ordering::Relaxed),
        ("cpus", _) => {
            say_cpus();
        }
        ("sh", script) => {
            match Command::new("/bin/sh")
                .args(["-c", script])
                .stdin(Stdio::null())
                .output()
            {
                Ok(output) => {
                    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                    text.push_str(&String::from_utf8_lossy(&output.stderr));
                    text.lines().for_each(say);
                    say(format_args!("exit {}", output.status.code().unwrap_or(-1)));
                }
                Err(error) => say(format_args!("guest: sh: {error}")),
            }
        }
        _ => say(format_args!("guest: {line}: unknown; {HELP}")),
    }
}

fn main() {
    let release = read("/proc/sys/kernel/osrelease");
    let clocksource = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    say(format_args!(
        "guest: up, linux {release}, clocksource {clocksource}"
    ));
    let cpus = say_cpus();

    let clocks = Arc::new(Clocks::new());
    for _ in 0..cpus {
        let clocks = Arc::clone(&clocks);
        thread::spawn(move || {
            loop {
                clocks.read();
                thread::sleep(WATCH);
            }
        });
    }
    let last = std::env::var("ticks")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(u64::MAX);
    let orders = Arc::new(Orders {
        quiet: AtomicBool::new(false),
        last: AtomicU64::new(last),
    });
    let obeying = Arc::clone(&orders);
    thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            match line {
                Ok(line) => obey(&line, &obeying),
                Err(error) => return say(format_args!("guest: cannot read the console: {error}")),
            }
        }
    });

    for tick in 1_u64.. {
        let (monotonic, realtime) = clocks.read();
        if !orders.quiet.load(Ordering::Relaxed) {
            say(format_args!(
                "tick {tick} monotonic {}.{:09} realtime {}.{:09}",
                monotonic.as_secs(),
                monotonic.subsec_nanos(),
                realtime.as_secs(),
                realtime.subsec_nanos()
            ));
        }
        if tick >= orders.last.load(Ordering::Relaxed) {
            leave("poweroff");
        }
        thread::sleep(TICK);
    }
}
