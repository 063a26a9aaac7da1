//! A console from one broker to the next: its end of the stream, the recent past, and whoever listens, with their
//! connections. What does not fit into the brokers' link is closed, so that its owner knows.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use baton_ipc::transfer::ConsolePart;
use baton_ipc::transfer::MAX_CONSOLE;
use rustix::net::AddressFamily;
use rustix::net::SocketType;

use super::Console;
use super::Listener;
use super::MAX_BEHIND;
use super::MAX_LISTENERS;
use super::Port;
use super::SCROLLBACK;
use super::file::ConsoleFile;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;

/// One message: a part, and what comes with it.
pub(crate) type Part = (ConsolePart, Vec<OwnedFd>);

impl Console {
    /// The broker's end of the stream.
    pub(crate) fn guest(&self) -> BorrowedFd<'_> {
        self.guest.as_fd()
    }

    /// Everything else, in the order in which it is taken.
    pub(crate) fn into_parts(self) -> Vec<Part> {
        let pieces = |bytes: Vec<u8>, part: fn(Vec<u8>) -> ConsolePart| -> Vec<Part> {
            bytes
                .chunks(MAX_CONSOLE)
                .map(|piece| (part(piece.to_vec()), Vec::new()))
                .collect()
        };
        let mut parts = pieces(self.scrollback.into(), ConsolePart::Scrollback);
        parts.extend(pieces(self.typed.into(), ConsolePart::Typed));
        for listener in self.listeners {
            let mut ends = vec![OwnedFd::from(listener.stream)];
            ends.extend(listener.terminal);
            parts.push((ConsolePart::Listener, ends));
            parts.extend(pieces(listener.behind.into(), ConsolePart::Behind));
        }
        parts
    }

    /// A console of this end of a stream, copied to this file.
    pub(crate) fn resume(port: Port, guest: OwnedFd, file: Option<ConsoleFile>) -> Result<Self> {
        let kind = rustix::net::sockopt::socket_type(&guest).ok();
        let domain = rustix::net::sockopt::socket_domain(&guest).ok();
        if kind != Some(SocketType::STREAM) || domain != Some(AddressFamily::UNIX) {
            return Err(unfit("what came as the console is no Unix stream", ""));
        }
        Ok(Self {
            port,
            guest: UnixStream::from(guest),
            file,
            listeners: Vec::new(),
            scrollback: std::collections::VecDeque::new(),
            typed: std::collections::VecDeque::new(),
        })
    }

    /// Takes a part. A pseudo-terminal is found in `directory` from now on.
    pub(crate) fn take_part(
        &mut self,
        part: ConsolePart,
        descriptors: Vec<OwnedFd>,
        directory: &Path,
    ) -> Result<()> {
        let fits = |held: usize, more: &[u8], most: usize| {
            if held + more.len() > most {
                return Err(unfit("more of the console came than there can be", ""));
            }
            Ok(())
        };
        match part {
            ConsolePart::Scrollback(bytes) => {
                fits(self.scrollback.len(), &bytes, SCROLLBACK)?;
                self.scrollback.extend(bytes);
            }
            ConsolePart::Typed(bytes) => {
                fits(self.typed.len(), &bytes, SCROLLBACK)?;
                self.typed.extend(bytes);
            }
            ConsolePart::Behind(bytes) => {
                if let Some(listener) = self.listeners.last_mut() {
                    fits(listener.behind.len(), &bytes, MAX_BEHIND)?;
                    listener.behind.extend(bytes);
                }
            }
            ConsolePart::Listener => {
                let mut ends = descriptors.into_iter();
                let (Some(stream), terminal) = (ends.next(), ends.next()) else {
                    return Err(unfit("a listener came without a stream", ""));
                };
                if self.listeners.len() >= MAX_LISTENERS {
                    return Err(unfit("more listeners came than there can be", ""));
                }
                if terminal.is_some() {
                    let name = rustix::pty::ptsname(&stream, Vec::new())
                        .doing("what came as a terminal is none")?;
                    let name = name.into_string().doing("a terminal has an odd name")?;
                    std::os::unix::fs::symlink(name, directory.join(self.port.link()))
                        .doing("cannot name the console's terminal")?;
                }
                self.listeners.push(Listener {
                    stream: File::from(stream),
                    behind: std::collections::VecDeque::new(),
                    terminal,
                });
            }
        }
        Ok(())
    }
}
