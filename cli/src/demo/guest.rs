//! The embedded guest as it shows itself on its console: it counts turns, goes through its memory, and says now and then
//! how far it is and what it noticed.

use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use baton_guest::ConsoleError;
use baton_guest::ConsoleLine;
use baton_guest::StatusLine;
use baton_guest::StatusLog;
use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::failure::failure;
use crate::failure::unfit;
use crate::signals::Signals;

/// How often it says how it is, in milliseconds.
pub(super) const PERIOD_MS: u64 = 50;

/// How long it may be silent.
const SILENCE: Duration = Duration::from_secs(20);

/// More than any line of it has, in bytes.
const LINE_MAX: usize = 4096;

/// The guest's console.
#[derive(Debug)]
pub(super) struct Guest {
    stream: OwnedFd,
    unread: Vec<u8>,
    log: StatusLog,
    cleared: u64,
    /// The TSC's frequency as the worker says it. The guest's own idea may be an assumption.
    tsc_khz: u32,
}

/// How the guest is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Health {
    /// Chosen by the guest when it booted.
    pub(crate) nonce: u64,
    /// Lines it has printed.
    pub(crate) lines: u64,
    /// Turns it has counted.
    pub(crate) sequence: u64,
    /// How often it went through all its memory.
    pub(crate) sweeps: u64,
    /// Pages and registers that it found to be wrong.
    pub(crate) errors: u64,
    /// How often its clock went backwards.
    pub(crate) backwards: u64,
}

impl Guest {
    pub(super) fn attach(stream: OwnedFd, tsc_khz: u32) -> Self {
        Self {
            stream,
            unread: Vec::new(),
            log: StatusLog::default(),
            cleared: 0,
            tsc_khz,
        }
    }

    /// Waits until it has gone through all its memory once.
    pub(super) fn wait_for_sweep(
        &mut self,
        signals: &Signals,
        patience: Duration,
    ) -> Result<(), Refusal> {
        self.wait(signals, patience, "to go through its memory", |guest| {
            guest.log.lines.last().is_some_and(|line| line.sweeps > 0)
        })
    }

    /// Has it forget the gaps that it has seen.
    pub(super) fn clear_gap(&mut self, signals: &Signals) -> Result<(), Refusal> {
        let before = self.cleared;
        let sent = rustix::net::send(
            &self.stream,
            b"clear\n",
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        );
        sent.map_err(|error| unfit(format!("cannot type into the guest's console: {error}"), ""))?;
        self.wait(signals, SILENCE, "to take a command", |guest| {
            guest.cleared > before
        })
    }

    /// The longest time between two of its turns since it forgot the others, in microseconds, as it says in the last of
    /// so many lines from now on. Checks that it is well.
    pub(super) fn largest_gap_us(
        &mut self,
        signals: &Signals,
        lines: usize,
    ) -> Result<u64, Refusal> {
        self.take_lines()?;
        let enough = self.log.lines.len() + lines;
        self.wait(signals, SILENCE, "to print", |guest| {
            guest.log.lines.len() >= enough
        })?;
        self.health()?;
        let ticks = self.last()?.max_gap_ticks;
        Ok(
            u64::try_from(u128::from(ticks) * 1000 / u128::from(self.tsc_khz.max(1)))
                .unwrap_or(u64::MAX),
        )
    }

    /// How it is, if it is the guest that booted and has noticed nothing but the time.
    pub(super) fn health(&self) -> Result<Health, Refusal> {
        let noticed =
            |what: String| failure(Exit::Findings, format!("the guest noticed: {what}"), "");
        let last = self.last()?;
        let first = self.log.lines.first().unwrap_or(last);
        if (last.nonce, last.boots) != (first.nonce, first.boots) {
            return Err(noticed("it was booted again".to_owned()));
        }
        if last.errors > 0 {
            return Err(noticed(format!(
                "{} pages or registers were not as it had left them",
                last.errors
            )));
        }
        if last.backwards > 0 {
            return Err(noticed(format!(
                "its clock went backwards {} times",
                last.backwards
            )));
        }
        Ok(Health {
            nonce: last.nonce,
            lines: last.line,
            sequence: last.sequence,
            sweeps: last.sweeps,
            errors: last.errors,
            backwards: last.backwards,
        })
    }

    fn last(&self) -> Result<&StatusLine, Refusal> {
        self.log
            .lines
            .last()
            .ok_or_else(|| unfit("the guest has printed nothing", "more with --log"))
    }

    fn wait(
        &mut self,
        signals: &Signals,
        patience: Duration,
        what: &str,
        condition: impl Fn(&Self) -> bool,
    ) -> Result<(), Refusal> {
        let deadline = Instant::now() + patience;
        loop {
            self.take_lines()?;
            if condition(self) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(unfit(
                    format!(
                        "waited {} s in vain for the guest {what}",
                        patience.as_secs()
                    ),
                    "the host may be overloaded; more with --log",
                ));
            }
            let timeout =
                Timespec::try_from(left).map_err(|error| unfit(format!("poll: {error}"), ""))?;
            let mut sources = [
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            match rustix::event::poll(&mut sources, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(unfit(format!("poll: {error}"), "")),
            }
            if signals.came() {
                return Err(interrupted());
            }
        }
    }

    /// Takes what it has printed so far.
    fn take_lines(&mut self) -> Result<(), Refusal> {
        let mut buffer = [0; 4096];
        loop {
            let flags = rustix::net::RecvFlags::DONTWAIT;
            match rustix::net::recv(&self.stream, &mut buffer, flags) {
                Ok((0, _)) | Err(Errno::CONNRESET) => {
                    return Err(unfit(
                        "the broker closed the guest's console",
                        "more with --log",
                    ));
                }
                Ok((count, _)) => self.take(buffer.get(..count).unwrap_or_default())?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(unfit(format!("cannot read the console: {error}"), ""));
                }
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        for byte in bytes {
            if *byte != b'\n' {
                self.unread.push(*byte);
                if self.unread.len() > LINE_MAX {
                    self.unread.clear();
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.unread).into_owned();
            self.unread.clear();
            match ConsoleLine::parse(&line).map_err(|error| broken(&error))? {
                Some(ConsoleLine::Status(status)) => {
                    self.log.push(status).map_err(|error| broken(&error))?;
                }
                Some(ConsoleLine::Command(word)) if word == "clear" => self.cleared += 1,
                _ => {}
            }
        }
        Ok(())
    }
}

/// A line is missing, doubled or garbled: something was lost on the way from one worker to the next.
fn broken(error: &ConsoleError) -> Refusal {
    failure(
        Exit::Findings,
        format!("the guest's console is broken: {error}"),
        "",
    )
}

pub(super) fn interrupted() -> Refusal {
    unfit("interrupted; everything was ended and removed", "")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn line(number: u64, rest: &str) -> String {
        format!(
            "baton-guest nonce=00000000000000ab boot=1 line={number} seq={number}00 sweeps=1 {rest} tsc_khz=1\n"
        )
    }

    fn guest(text: &str) -> Result<Guest, Refusal> {
        let (theirs, ours) = UnixStream::pair().unwrap();
        (&theirs).write_all(text.as_bytes()).unwrap();
        let mut guest = Guest::attach(ours.into(), 2_000_000);
        guest.take_lines().map(|()| guest)
    }

    const WELL: &str = "errors=0 back=0 maxgap_ticks=5000";

    #[test]
    fn a_line_that_is_being_printed_is_waited_for() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let mut guest = Guest::attach(ours.into(), 1);
        let whole = line(2, WELL);
        let (begin, end) = whole.split_at(40);
        let text = format!("noise\n{}baton-guest command=clear\n{begin}", line(1, WELL));
        (&theirs).write_all(text.as_bytes()).unwrap();
        guest.take_lines().unwrap();
        assert_eq!((guest.cleared, guest.health().unwrap().lines), (1, 1));
        (&theirs).write_all(end.as_bytes()).unwrap();
        guest.take_lines().unwrap();
        let health = guest.health().unwrap();
        assert_eq!(
            (health.nonce, health.lines, health.sequence),
            (0xab, 2, 200)
        );
    }

    #[test]
    fn ticks_become_microseconds_by_the_workers_frequency() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let mut guest = Guest::attach(ours.into(), 2_500_000);
        let signals = Signals::take().unwrap();
        // Prints until nobody listens any more.
        std::thread::spawn(move || {
            (1..).all(|number| theirs.write_all(line(number, WELL).as_bytes()).is_ok())
        });
        assert_eq!(guest.largest_gap_us(&signals, 2).unwrap(), 2);
    }

    #[test]
    fn what_the_guest_notices_is_not_passed_over() {
        for (rest, words) in [
            ("errors=1 back=0 maxgap_ticks=5", "not as it had left them"),
            ("errors=0 back=1 maxgap_ticks=5", "backwards"),
        ] {
            let text = line(1, WELL) + &line(2, rest);
            let error = guest(&text).unwrap().health().unwrap_err();
            assert_eq!(error.exit, Exit::Findings);
            assert!(error.reason.contains(words), "{error}");
        }
        let again = line(1, WELL)
            .replace("boot=1", "boot=2")
            .replace("00ab", "00ac");
        let error = guest(&(line(1, WELL) + &again))
            .unwrap()
            .health()
            .unwrap_err();
        assert!(error.reason.contains("booted again"), "{error}");
    }

    #[test]
    fn a_lost_or_doubled_line_is_an_error() {
        for number in [1, 3] {
            let error = guest(&(line(1, WELL) + &line(number, WELL))).unwrap_err();
            assert_eq!(error.exit, Exit::Findings);
        }
        assert!(guest("baton-guest nonsense\n").is_err());
    }
}
