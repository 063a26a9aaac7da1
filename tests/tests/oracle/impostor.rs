//! Who may be on the cpr socket besides those whom it is for.

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;

use baton_tests::between;
use rustix::fs::MemfdFlags;
use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketType;

/// A socket at `path` that nobody accepts at, and what keeps it so. With `full`, nobody can connect either.
pub(crate) fn deaf(path: &Path, full: bool) -> Vec<OwnedFd> {
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut kept = vec![listener];
    if full {
        kept.push(UnixStream::connect(path).unwrap().into());
    }
    kept
}

/// What a QEMU of another kind than 10.0 begins with, after its magic: "QCPR", and a version.
pub(crate) fn say(path: &Path, words: &[u8]) {
    let mut stream = UnixStream::connect(path).unwrap();
    // Who takes nothing has hung up.
    drop(stream.write_all(words));
    drop(stream.shutdown(std::net::Shutdown::Write));
}

/// A CPR state of QEMU's with this version, cut off behind it.
pub(crate) fn header(version: u32) -> Vec<u8> {
    [*b"QCPR", version.to_be_bytes()].concat()
}

/// A whole one, of one entry, whose descriptor does not come.
pub(crate) fn without_descriptor() -> Vec<u8> {
    let name = b"ram0\0";
    let mut bytes = header(1);
    bytes.push(1);
    bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name);
    bytes.extend([0; 4]);
    // The end of the list.
    bytes.push(0);
    bytes
}

/// Stands between two of ours, or two of QEMU, and puts other memory in the place of guest RAM.
pub(crate) fn between(here: &Path, there: &Path, ours: bool) {
    if ours {
        drop(between::stand_between(here, there, between::other_ram));
        return;
    }
    let listener = UnixListener::bind(here).unwrap();
    let there = there.to_owned();
    std::thread::spawn(move || {
        let (old, _) = listener.accept().unwrap();
        let new = UnixStream::connect(there).unwrap();
        while pass_record(&old, &new) {}
        drop(new.shutdown(std::net::Shutdown::Write));
        // Until it hangs up, which is to be seen on the other side only then.
        let _ = rustix::io::read(&new, &mut [0; 1]);
    });
}

/// QEMU sends each record of its CPR state by itself, with its descriptor; `false` when there are no more.
fn pass_record(from: &UnixStream, to: &UnixStream) -> bool {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        from,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let count = received.map_or(0, |message| message.bytes);
    if count == 0 {
        return false;
    }
    let bytes = bytes.get(..count).unwrap();
    let mut descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .collect();
    if let ([ram], true) = (
        descriptors.as_slice(),
        bytes.windows(5).any(|name| name == b"ram0\0"),
    ) {
        let other = rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        let size = rustix::fs::fstat(ram).unwrap().st_size;
        rustix::fs::ftruncate(&other, u64::try_from(size).unwrap()).unwrap();
        descriptors = vec![other];
    }
    let borrowed: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    rustix::net::sendmsg(
        to,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .is_ok()
}
