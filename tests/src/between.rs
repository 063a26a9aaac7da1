//! Somebody between two brokers, on the cpr socket, who hands a guest's descriptors on as they came, or not.

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Read as _;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::descriptor::RAM_SEALS;
use baton_ipc::transfer::PREAMBLE;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fs::MemfdFlags;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

/// What the one in the middle hands on of an entry of the CPR state.
#[derive(Debug)]
pub enum Handed {
    /// What came.
    Same,
    /// Another descriptor, with a description that is true of that one.
    Other(OwnedFd),
    /// Another descriptor, with a description that is true of that one, of another kind.
    OfKind(DescriptorKind, OwnedFd),
    /// Another descriptor, and the words that came.
    Under(OwnedFd),
    /// The words, and no descriptor.
    Nothing,
}

/// What becomes of an entry in the middle.
pub type Swap = fn(&DescriptorKey, &Description, BorrowedFd<'_>) -> Handed;

/// What becomes of a connection that somebody stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Both ends see a hang-up.
    Cut,
    /// Nothing comes any more; who hangs up is seen at the other end.
    Silence,
}

/// Where a connection breaks.
#[derive(Clone, Copy, Debug)]
pub struct Breach {
    /// So much goes over before: messages, or bytes.
    pub after: usize,
    /// How it breaks.
    pub how: Break,
}

/// Stands between whoever connects to `here` and whoever listens at `there`, until both have hung up; of how many entries it made
/// something else.
///
/// # Panics
///
/// When it cannot listen at `here`; in its thread, when nobody listens at `there`.
pub fn stand_between(here: &Path, there: &Path, swap: Swap) -> JoinHandle<u32> {
    stand(here, there, swap, None)
}

/// The same, changing nothing, until so many messages of the brokers' link have gone over.
///
/// # Panics
///
/// As [`stand_between`].
pub fn break_link(here: &Path, there: &Path, breach: Breach) -> JoinHandle<u32> {
    stand(here, there, |_, _, _| Handed::Same, Some(breach))
}

/// The same on the workers' connection, of whose bytes so many go over from whoever connects, or all; how many did.
///
/// # Panics
///
/// As [`stand_between`].
pub fn break_stream(here: &Path, there: &Path, breach: Option<Breach>) -> JoinHandle<usize> {
    let listener = UnixListener::bind(here).unwrap();
    let there = there.to_owned();
    std::thread::spawn(move || {
        let (mut old, _) = listener.accept().unwrap();
        let mut new = UnixStream::connect(there).unwrap();
        let mut back = (new.try_clone().unwrap(), old.try_clone().unwrap());
        let answers = std::thread::spawn(move || {
            // Who answers to nobody any more is hung up on below.
            drop(std::io::copy(&mut back.0, &mut back.1));
            drop(back.1.shutdown(Shutdown::Both));
        });
        let mut passed = 0;
        let mut bytes = [0; 4096];
        loop {
            let room = breach.map_or(bytes.len(), |breach| breach.after - passed);
            if room == 0 {
                if breach.is_some_and(|breach| breach.how == Break::Silence) {
                    until_one_hangs_up(&[old.as_fd(), new.as_fd()]);
                }
                break;
            }
            let room = room.min(bytes.len());
            let count = match old.read(bytes.get_mut(..room).unwrap()) {
                Ok(count @ 1..) => count,
                _ => break,
            };
            if new.write_all(bytes.get(..count).unwrap()).is_err() {
                break;
            }
            passed += count;
        }
        for end in [&old, &new] {
            drop(end.shutdown(Shutdown::Both));
        }
        answers.join().unwrap();
        passed
    })
}

/// Waits until somebody is gone at one of these connections.
fn until_one_hangs_up(ends: &[BorrowedFd<'_>]) {
    let mut fds: Vec<PollFd<'_>> = ends
        .iter()
        .map(|end| PollFd::from_borrowed_fd(*end, PollFlags::RDHUP))
        .collect();
    rustix::event::poll(&mut fds, None).unwrap();
}

fn stand(here: &Path, there: &Path, swap: Swap, breach: Option<Breach>) -> JoinHandle<u32> {
    let listener = UnixListener::bind(here).unwrap();
    let there = there.to_owned();
    std::thread::spawn(move || {
        let (old, _) = listener.accept().unwrap();
        let (preamble, [link, state]) = preamble_of(&old);
        let new = UnixStream::connect(there).unwrap();
        let (to_link, link_end) = FdSocket::pair().unwrap();
        let (to_state, state_end) = FdSocket::pair().unwrap();
        send_preamble(&new, &preamble, &[link_end.as_fd(), state_end.as_fd()]);
        drop((link_end, state_end));
        let (mut link, mut state) = (Some((link, to_link)), Some((state, to_state)));
        let (mut swapped, mut passed) = (0, 0);
        while let Some((old_link, new_link)) = &link {
            let ends = [&link, &state].into_iter().flatten();
            let mut fds: Vec<PollFd<'_>> = ends
                .flat_map(|(a, b)| [a, b])
                .map(|end| PollFd::new(end, PollFlags::IN))
                .collect();
            rustix::event::poll(&mut fds, None).unwrap();
            drop(fds);
            let mut pass = |_: &[u8], _: Option<BorrowedFd<'_>>| {
                if breach.is_some_and(|breach| breach.after == passed) {
                    return Next::Break;
                }
                passed += 1;
                Next::AsItCame
            };
            let mut flow = relay(old_link, new_link, &mut pass);
            if flow != Flow::Broken {
                // Also of one who is gone, which may have said why.
                let back = relay(new_link, old_link, &mut pass);
                flow = if flow == Flow::Over { flow } else { back };
            }
            if flow == Flow::Broken && breach.is_some_and(|breach| breach.how == Break::Silence) {
                until_one_hangs_up(&[old_link.as_fd(), new_link.as_fd()]);
            }
            if flow != Flow::Goes {
                link = None;
            }
            let mut change = |bytes: &[u8], fd: Option<BorrowedFd<'_>>| {
                let changed = fd.and_then(|fd| substitute(bytes, fd, swap));
                swapped += u32::from(changed.is_some());
                changed.map_or(Next::AsItCame, |(bytes, fd)| Next::Instead(bytes, fd))
            };
            let whole = state.as_ref().is_some_and(|(old, new)| {
                relay(old, new, &mut change) == Flow::Goes
                    && relay(new, old, |_, _| Next::AsItCame) == Flow::Goes
            });
            if !whole {
                state = None;
            }
        }
        swapped
    })
}

fn preamble_of(stream: &UnixStream) -> ([u8; PREAMBLE], [FdSocket; 2]) {
    let mut bytes = [0; PREAMBLE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(stream, &mut parts, &mut control, flags).unwrap();
    let ends: Vec<FdSocket> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .map(FdSocket::from)
        .collect();
    (bytes, ends.try_into().unwrap())
}

fn send_preamble(stream: &UnixStream, preamble: &[u8], ends: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(ends)));
    let parts = [IoSlice::new(preamble)];
    rustix::net::sendmsg(stream, &parts, &mut control, SendFlags::empty()).unwrap();
}

/// What is done with a message.
enum Next {
    AsItCame,
    Instead(Vec<u8>, Option<OwnedFd>),
    Break,
}

#[derive(PartialEq, Eq)]
enum Flow {
    Goes,
    /// There is nobody any more.
    Over,
    Broken,
}

/// Passes on what has come, as `next` says; that sees the descriptor of a message that has one.
fn relay(
    from: &FdSocket,
    to: &FdSocket,
    mut next: impl FnMut(&[u8], Option<BorrowedFd<'_>>) -> Next,
) -> Flow {
    let mut bytes = Vec::new();
    loop {
        let mut descriptors = match from.receive(&mut bytes) {
            Ok(Received::Message((), descriptors)) => descriptors,
            Ok(Received::Empty) => return Flow::Goes,
            Ok(Received::HungUp) | Err(_) => return Flow::Over,
        };
        let only = match descriptors.as_slice() {
            [only] => Some(only.as_fd()),
            _ => None,
        };
        match next(&bytes, only) {
            Next::AsItCame => {}
            Next::Instead(other, descriptor) => {
                (bytes, descriptors) = (other, descriptor.into_iter().collect());
            }
            Next::Break => return Flow::Broken,
        }
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if to.send(&bytes, &borrowed).is_err() {
            return Flow::Over;
        }
    }
}

/// An entry as it is handed on, if that is another than came.
fn substitute(bytes: &[u8], fd: BorrowedFd<'_>, swap: Swap) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    // The first kind of record.
    let entry: (u32, DescriptorKey, Description) = baton_ipc::decode(bytes).ok()?;
    let (_, key, description) = &entry;
    match swap(key, description, fd) {
        Handed::Same => None,
        Handed::Nothing => Some((bytes.to_vec(), None)),
        Handed::Under(other) => Some((bytes.to_vec(), Some(other))),
        Handed::Other(other) => Some(described(key, description.kind, other)),
        Handed::OfKind(kind, other) => Some(described(key, kind, other)),
    }
}

fn described(key: &DescriptorKey, kind: DescriptorKind, fd: OwnedFd) -> (Vec<u8>, Option<OwnedFd>) {
    let description = Description::of(kind, fd.as_fd()).unwrap();
    let bytes = baton_ipc::encode(&(0_u32, key, description)).unwrap();
    (bytes, Some(fd))
}

/// Guest RAM of the same size with the same seals, and everything that was in it when it was copied.
///
/// # Panics
///
/// When there is no memory for it.
#[must_use]
pub fn other_ram(key: &DescriptorKey, description: &Description, fd: BorrowedFd<'_>) -> Handed {
    if key.name() != "ram" {
        return Handed::Same;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let other = rustix::fs::memfd_create("ram", flags).unwrap();
    rustix::fs::ftruncate(&other, description.size).unwrap();
    let mut from = 0;
    let length = usize::try_from(description.size).unwrap();
    rustix::fs::sendfile(&other, fd, Some(&mut from), length).unwrap();
    rustix::fs::fcntl_add_seals(&other, RAM_SEALS).unwrap();
    Handed::Other(other)
}

/// No guest RAM.
#[must_use]
pub fn no_ram(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if key.name() == "ram" {
        Handed::Nothing
    } else {
        Handed::Same
    }
}
