//! Somebody between two brokers, on the cpr socket, who hands a guest's descriptors on as they came, or not.

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
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
    /// The words, and no descriptor.
    Nothing,
}

/// What becomes of an entry in the middle.
pub type Swap = fn(&DescriptorKey, &Description, BorrowedFd<'_>) -> Handed;

/// Stands between whoever connects to `here` and whoever listens at `there`, until both have hung up; of how many entries it made
/// something else.
///
/// # Panics
///
/// When it cannot listen at `here`; in its thread, when nobody listens at `there`.
pub fn stand_between(here: &Path, there: &Path, swap: Swap) -> JoinHandle<u32> {
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
        let mut swapped = 0;
        while link.is_some() {
            let ends = [&link, &state].into_iter().flatten();
            let mut fds: Vec<PollFd<'_>> = ends
                .flat_map(|(a, b)| [a, b])
                .map(|end| PollFd::new(end, PollFlags::IN))
                .collect();
            rustix::event::poll(&mut fds, None).unwrap();
            drop(fds);
            let whole = link.as_ref().is_some_and(|(old, new)| {
                relay(old, new, |_, _| None) && relay(new, old, |_, _| None)
            });
            if !whole {
                link = None;
            }
            let whole = state.as_ref().is_some_and(|(old, new)| {
                relay(old, new, |bytes, fd| {
                    let changed = substitute(bytes, fd, swap);
                    swapped += u32::from(changed.is_some());
                    changed
                }) && relay(new, old, |_, _| None)
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

/// Passes on what has come, changed where `change` says so; `false` when there is nobody any more.
fn relay(
    from: &FdSocket,
    to: &FdSocket,
    mut change: impl FnMut(&[u8], BorrowedFd<'_>) -> Option<(Vec<u8>, Option<OwnedFd>)>,
) -> bool {
    let mut bytes = Vec::new();
    loop {
        let mut descriptors = match from.receive(&mut bytes) {
            Ok(Received::Message((), descriptors)) => descriptors,
            Ok(Received::Empty) => return true,
            Ok(Received::HungUp) | Err(_) => return false,
        };
        if let [only] = descriptors.as_slice() {
            if let Some((other, descriptor)) = change(&bytes, only.as_fd()) {
                (bytes, descriptors) = (other, descriptor.into_iter().collect());
            }
        }
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if to.send(&bytes, &borrowed).is_err() {
            return false;
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
        Handed::Other(other) => {
            let described = Description::of(description.kind, other.as_fd()).unwrap();
            let bytes = baton_ipc::encode(&(0_u32, key, described)).unwrap();
            Some((bytes, Some(other)))
        }
    }
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
