//! A person's end of a guest's console: the terminal in raw mode, and bytes copied both ways.
//!
//! The terminal is given back on every way out: an ordinary return, a signal ([`Signals`]) and a panic.

use std::collections::VecDeque;
use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::Once;
use std::sync::PoisonError;

use baton_ipc::control::Refusal;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::termios::OptionalActions;
use rustix::termios::Termios;

use crate::failure::unfit;
use crate::signals::Signals;

/// Ctrl-], as in telnet(1): what a person types to get out.
const ESCAPE: u8 = 0x1d;

/// How many typed bytes may wait for a guest that does not read; keys beyond that are not taken.
const WAITING_MAX: usize = 64 * 1024;

/// Why the copying ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The person typed the escape.
    Escape,
    /// A signal came.
    Signal,
    /// The guest's end was closed.
    HungUp,
    /// The other descriptor became readable.
    Other,
}

/// An attached console.
#[derive(Debug)]
pub(crate) struct Console {
    stream: OwnedFd,
    raw: Option<RawMode>,
    to_guest: VecDeque<u8>,
    input_open: bool,
}

impl Console {
    /// Attaches standard input and output to `stream`.
    pub(crate) fn attach(stream: OwnedFd) -> Result<Self, Refusal> {
        let raw = if io::stdin().is_terminal() {
            let raw = RawMode::enter();
            Some(raw.map_err(|error| unfit(format!("cannot set the terminal: {error}"), ""))?)
        } else {
            None
        };
        Ok(Self {
            stream,
            raw,
            to_guest: VecDeque::new(),
            input_open: true,
        })
    }

    /// Copies until something ends it; may be called again after [`End::Escape`], [`End::Signal`] and [`End::Other`].
    pub(crate) fn copy(
        &mut self,
        signals: &Signals,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<End, Refusal> {
        self.copy_inner(signals, other)
            .map_err(|error| unfit(format!("the console broke: {error}"), ""))
    }

    fn copy_inner(&mut self, signals: &Signals, other: Option<BorrowedFd<'_>>) -> io::Result<End> {
        loop {
            let stdin = io::stdin();
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, !self.to_guest.is_empty());
            let listening = self.input_open && self.to_guest.len() < WAITING_MAX;
            let mut sources = vec![
                PollFd::new(&self.stream, wanted),
                PollFd::new(signals, PollFlags::IN),
            ];
            if listening {
                sources.push(PollFd::new(&stdin, PollFlags::IN));
            }
            if let Some(other) = other {
                sources.push(PollFd::from_borrowed_fd(other, PollFlags::IN));
            }
            match rustix::event::poll(&mut sources, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut ready = sources.iter().map(PollFd::revents);
            let stream = ready.next().unwrap_or(PollFlags::empty());
            let signalled = ready.next().unwrap_or(PollFlags::empty());
            let input = if listening {
                ready.next().unwrap_or(PollFlags::empty())
            } else {
                PollFlags::empty()
            };
            let other_ready = ready.next().is_some_and(|flags| !flags.is_empty());
            drop(sources);

            // What the guest has said comes before any end.
            if stream.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && !self.show()? {
                return Ok(End::HungUp);
            }
            if stream.contains(PollFlags::OUT) && !self.type_on()? {
                return Ok(End::HungUp);
            }
            if !signalled.is_empty() && signals.came() {
                return Ok(End::Signal);
            }
            if !input.is_empty() && self.listen(stdin.as_fd())? {
                return Ok(End::Escape);
            }
            if other_ready {
                return Ok(End::Other);
            }
        }
    }

    /// Guest to person; false at the end.
    fn show(&self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let count = match rustix::io::read(&self.stream, &mut buffer) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(false),
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let mut stdout = io::stdout().lock();
        let written = stdout
            .write_all(buffer.get(..count).unwrap_or_default())
            .and_then(|()| stdout.flush());
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Person to guest: as much as it takes now; false when it takes no more for ever.
    fn type_on(&mut self) -> io::Result<bool> {
        let (front, _) = self.to_guest.as_slices();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(&self.stream, front, flags) {
            Ok(count) => {
                self.to_guest.drain(..count.min(self.to_guest.len()));
                Ok(true)
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(true),
            Err(Errno::PIPE | Errno::CONNRESET) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what was typed; true for the escape.
    fn listen(&mut self, stdin: BorrowedFd<'_>) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        match rustix::io::read(stdin, &mut buffer) {
            // What is piped in may end before the guest has answered.
            Ok(0) => self.input_open = false,
            Ok(count) => {
                let typed = buffer.get(..count).unwrap_or_default();
                let escape = typed
                    .iter()
                    .position(|byte| *byte == ESCAPE)
                    .filter(|_| self.raw.is_some());
                let taken = escape.unwrap_or(count);
                self.to_guest.extend(typed.iter().take(taken).copied());
                return Ok(escape.is_some());
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // A terminal that has gone away.
            Err(Errno::IO) => self.input_open = false,
            Err(error) => return Err(error.into()),
        }
        Ok(false)
    }
}

/// The terminal's own settings while it is raw, for the panic hook: a panic aborts, and drops nothing.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal that hands every key on as it is, until this is dropped.
#[derive(Debug)]
struct RawMode {
    before: Termios,
}

impl RawMode {
    fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if let Ok(mut before) = BEFORE.try_lock() {
                    restore(before.take().as_ref());
                }
                next(panic);
            }));
        });
        let before = rustix::termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Guests end lines as they like; the terminal goes on turning LF into CR LF.
        raw.output_modes = before.output_modes;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before.clone());
        let mode = Self { before };
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore(Some(&self.before));
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn restore(before: Option<&Termios>) {
    if let Some(before) = before {
        // There is nobody to tell if the terminal has gone away.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Drain, before);
    }
}
