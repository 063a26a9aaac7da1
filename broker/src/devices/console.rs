//! A console: one stream socket to the worker, which stays the same over every generation, and whoever listens here.
//!
//! The broker relays, so a worker holds neither a file nor a terminal, attached people keep their connection over an upgrade,
//! and a guest that floods its console harms only itself: every buffer is bounded, and a listener that does not read is
//! dropped.

pub(crate) mod file;
pub(crate) mod handover;

use std::collections::VecDeque;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use baton_ipc::descriptor;
use baton_policy::Policy;
use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;

use crate::devices::console::file::ConsoleFile;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::busy;
use crate::vm_file::Console as Kind;
use crate::vm_file::VmFile;

/// How much of the past an attaching person is shown, in bytes.
const SCROLLBACK: usize = 64 << 10;
/// How far a listener may fall behind, in bytes.
const MAX_BEHIND: usize = 256 << 10;
/// The most attached listeners.
const MAX_LISTENERS: usize = 16;

/// Which console of a VM: the serial port's, or the virtio device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Serial,
    Virtio,
}

impl Port {
    /// The consoles that a VM file has, in their order everywhere.
    pub(crate) fn of(vm: &VmFile) -> impl Iterator<Item = (Self, &Kind)> {
        let other = vm.virtio_console.as_ref();
        std::iter::once((Self::Serial, &vm.console)).chain(other.map(|kind| (Self::Virtio, kind)))
    }

    /// The id of its stream's descriptor.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Serial => descriptor::SERIAL_CONSOLE,
            Self::Virtio => descriptor::VIRTIO_CONSOLE,
        }
    }

    /// Its table in the VM file.
    pub(crate) fn table(self) -> &'static str {
        match self {
            Self::Serial => "console",
            Self::Virtio => "virtio_console",
        }
    }

    /// What people call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Serial => "console",
            Self::Virtio => "virtio console",
        }
    }

    /// What leads to its pseudo-terminal, in the VM's directory.
    pub(crate) fn link(self) -> &'static str {
        match self {
            Self::Serial => "console.pty",
            Self::Virtio => "virtio-console.pty",
        }
    }
}

/// One who reads the console, and types into it.
#[derive(Debug)]
struct Listener {
    stream: File,
    behind: VecDeque<u8>,
    /// The other end of a pseudo-terminal, held so that it never reports a hang-up. Such a listener stays.
    terminal: Option<OwnedFd>,
}

/// A console of a VM.
#[derive(Debug)]
pub(crate) struct Console {
    port: Port,
    /// The broker's end of the stream whose other end the workers hold.
    guest: UnixStream,
    file: Option<ConsoleFile>,
    listeners: Vec<Listener>,
    scrollback: VecDeque<u8>,
    /// Typed, and not yet taken by the worker.
    typed: VecDeque<u8>,
}

impl Console {
    /// Makes the console, and the end of it that is for the worker.
    pub(crate) fn open(
        port: Port,
        kind: &Kind,
        directory: &Path,
        policy: &Policy,
    ) -> Result<(Self, OwnedFd)> {
        let (guest, worker) = UnixStream::pair().doing("cannot make the console")?;
        for end in [&guest, &worker] {
            // Final flags: the workers share the open file, so none of them may set any.
            end.set_nonblocking(true).doing("cannot make the console")?;
        }
        let mut console = Self {
            port,
            guest,
            file: None,
            listeners: Vec::new(),
            scrollback: VecDeque::new(),
            typed: VecDeque::new(),
        };
        match kind {
            Kind::Socket | Kind::Stdio => {}
            Kind::File { path } => {
                console.file = Some(ConsoleFile::open(port, path, policy.io.console_file)?)
            }
            Kind::Pty => {
                let (master, terminal) = open_pty(&directory.join(port.link()))?;
                console.listeners.push(Listener {
                    stream: master,
                    behind: VecDeque::new(),
                    terminal: Some(terminal),
                });
            }
        }
        Ok((console, worker.into()))
    }

    /// Which one it is.
    pub(crate) fn port(&self) -> Port {
        self.port
    }

    /// Attaches a listener: the end of a stream that is for it, with the recent past in it.
    pub(crate) fn attach(&mut self) -> Result<OwnedFd> {
        if self.listeners.len() >= MAX_LISTENERS {
            return Err(busy(format_args!(
                "{MAX_LISTENERS} are attached to this console already"
            )));
        }
        let (ours, theirs) = UnixStream::pair().doing("cannot attach to the console")?;
        ours.set_nonblocking(true)
            .doing("cannot attach to the console")?;
        let mut listener = Listener {
            stream: File::from(OwnedFd::from(ours)),
            behind: self.scrollback.clone(),
            terminal: None,
        };
        listener.flush();
        self.listeners.push(listener);
        Ok(theirs.into())
    }

    /// What to poll: the guest first, then every listener.
    pub(crate) fn sources(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let guest = (self.guest.as_fd(), wants(!self.typed.is_empty()));
        // A guest that does not read keeps those who type waiting, not the broker awake.
        let full = self.typed.len() >= SCROLLBACK;
        let listeners = self.listeners.iter().map(move |listener| {
            let mut flags = wants(!listener.behind.is_empty());
            flags.set(PollFlags::IN, !full);
            (listener.stream.as_fd(), flags)
        });
        std::iter::once(guest).chain(listeners)
    }

    /// Moves what can be moved. Called when any source is ready; a bounded amount, so that nobody else starves.
    pub(crate) fn pump(&mut self) {
        let mut buffer = [0; 16 << 10];
        if let Ok(count) = self.guest.read(&mut buffer) {
            self.spread(buffer.get(..count).unwrap_or_default());
        }
        let mut index = 0;
        while let Some(listener) = self.listeners.get_mut(index) {
            let room = SCROLLBACK
                .saturating_sub(self.typed.len())
                .min(buffer.len());
            let typed = listener
                .stream
                .read(buffer.get_mut(..room).unwrap_or_default());
            listener.flush();
            let keep = match typed {
                Ok(0) if room > 0 => listener.terminal.is_some(),
                Ok(count) => {
                    self.typed.extend(buffer.iter().take(count));
                    true
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    true
                }
                Err(_) => listener.terminal.is_some(),
            };
            if keep && listener.behind.len() <= MAX_BEHIND {
                index += 1;
            } else if listener.terminal.is_some() {
                listener.behind.clear();
                index += 1;
            } else {
                self.listeners.swap_remove(index);
            }
        }
        drain_into(&mut self.typed, &mut self.guest);
    }

    fn spread(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file {
            file.append(bytes);
        }
        self.scrollback.extend(bytes);
        let excess = self.scrollback.len().saturating_sub(SCROLLBACK);
        self.scrollback.drain(..excess);
        for listener in &mut self.listeners {
            listener.behind.extend(bytes);
            listener.flush();
        }
    }
}

impl Listener {
    fn flush(&mut self) {
        drain_into(&mut self.behind, &mut self.stream);
    }
}

fn wants(output: bool) -> PollFlags {
    if output {
        PollFlags::IN | PollFlags::OUT
    } else {
        PollFlags::IN
    }
}

fn drain_into(queue: &mut VecDeque<u8>, to: &mut impl Write) {
    while !queue.is_empty() {
        match to.write(queue.as_slices().0) {
            Ok(count) if count > 0 => drop(queue.drain(..count)),
            _ => return,
        }
    }
}

fn open_pty(link: &Path) -> Result<(File, OwnedFd)> {
    let failed = "cannot make the console's terminal";
    let master =
        rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .doing(failed)?;
    rustix::pty::grantpt(&master).doing(failed)?;
    rustix::pty::unlockpt(&master).doing(failed)?;
    let mut attributes = rustix::termios::tcgetattr(&master).doing(failed)?;
    attributes.make_raw();
    rustix::termios::tcsetattr(&master, rustix::termios::OptionalActions::Now, &attributes)
        .doing(failed)?;
    rustix::io::ioctl_fionbio(&master, true).doing(failed)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).doing(failed)?;
    let name = name.into_string().doing(failed)?;
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(OFlags::NOCTTY.bits()).unwrap_or(0))
        .open(&name)
        .doing(failed)?;
    std::os::unix::fs::symlink(name, link).doing(failed)?;
    Ok((File::from(master), terminal.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (Console, UnixStream) {
        let (console, worker) = {
            let policy = Policy::builtin().unwrap();
            Console::open(Port::Serial, &Kind::Socket, Path::new("/"), &policy).unwrap()
        };
        (console, UnixStream::from(worker))
    }

    #[test]
    fn a_late_listener_sees_the_past_and_types() {
        let (mut console, mut worker) = console();
        worker.write_all(b"booting\n").unwrap();
        console.pump();
        let mut person = UnixStream::from(console.attach().unwrap());
        let mut seen = [0; 8];
        person.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"booting\n");
        person.write_all(b"root\n").unwrap();
        console.pump();
        let mut typed = [0; 5];
        worker.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"root\n");
    }

    #[test]
    fn a_listener_that_does_not_read_is_dropped_and_the_guest_goes_on() {
        let (mut console, mut worker) = console();
        let _lazy = console.attach().unwrap();
        for _ in 0..64 {
            worker.write_all(&[b'x'; 16 << 10]).unwrap();
            console.pump();
        }
        assert!(console.listeners.is_empty());
        assert_eq!(console.scrollback.len(), SCROLLBACK);
    }

    #[test]
    fn a_listener_that_leaves_is_forgotten() {
        let (mut console, _worker) = console();
        drop(console.attach().unwrap());
        console.pump();
        assert!(console.listeners.is_empty());
    }
}
