//! Somebody between two brokers, on the cpr socket, who hands one of a guest's descriptors on as another, with a description to
//! match: the workers see it on the main channel, which does not go through there.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

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
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::transfer::channel;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fs::MemfdFlags;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use serde_json::json;

/// What the one in the middle does with an entry of the CPR state: another descriptor, or none for the same.
type Swap = fn(&DescriptorKey, &Description, BorrowedFd<'_>) -> Option<OwnedFd>;

/// Stands between whoever connects to `here` and whoever listens at `there`, until both have hung up.
fn stand_between(here: &Path, there: &Path, swap: Swap) -> JoinHandle<u32> {
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
    mut change: impl FnMut(&[u8], BorrowedFd<'_>) -> Option<(Vec<u8>, OwnedFd)>,
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
                (bytes, descriptors) = (other, vec![descriptor]);
            }
        }
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if to.send(&bytes, &borrowed).is_err() {
            return false;
        }
    }
}

/// An entry with another descriptor, and a description that is true of that one.
fn substitute(bytes: &[u8], fd: BorrowedFd<'_>, swap: Swap) -> Option<(Vec<u8>, OwnedFd)> {
    // The first kind of record.
    let entry: (u32, DescriptorKey, Description) = baton_ipc::decode(bytes).ok()?;
    let (_, key, description) = &entry;
    let other = swap(key, description, fd)?;
    let described = Description::of(description.kind, other.as_fd()).unwrap();
    let bytes = baton_ipc::encode(&(0_u32, key, described)).unwrap();
    Some((bytes, other))
}

/// Guest RAM of the same size with the same seals, and everything that was in it when it was copied.
fn other_ram(
    key: &DescriptorKey,
    description: &Description,
    fd: BorrowedFd<'_>,
) -> Option<OwnedFd> {
    if key.name() != "ram" {
        return None;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let other = rustix::fs::memfd_create("ram", flags).unwrap();
    rustix::fs::ftruncate(&other, description.size).unwrap();
    let mut from = 0;
    let length = usize::try_from(description.size).unwrap();
    rustix::fs::sendfile(&other, fd, Some(&mut from), length).unwrap();
    rustix::fs::fcntl_add_seals(&other, RAM_SEALS).unwrap();
    Some(other)
}

/// A console of the one in the middle, who would read what the guest prints and type to it.
fn other_console(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Option<OwnedFd> {
    (key.name() == "console").then(|| {
        let (end, other) = UnixStream::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        std::mem::forget(other);
        end.into()
    })
}

/// `/dev/kvm` through another node than the host's own would pass; the same node is the same.
fn same_kvm(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Option<OwnedFd> {
    let open = || {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
    };
    (key.name() == "kvm").then(|| open().unwrap().into())
}

#[test]
fn a_descriptor_put_in_anothers_place_is_named_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let cases: [(&str, Swap); 2] = [("ram#0", other_ram), ("console#0", other_console)];
    for (name, swap) in cases {
        let waiting = vm.wait_for_guest();
        let between = vm.site.path(&format!("between-{}", &name[..3]));
        let middle = stand_between(&between, &waiting.cpr, swap);
        let mut qmp = Qmp::connect(&vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        let channels = [channel("main", &waiting.main), channel("cpr", &between)];
        qmp.done("migrate", json!({"channels": channels}));
        let info = qmp.migrated();
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        let words = format!("descriptor {name} is not the old worker's");
        assert!(reason.contains(&words), "{reason}");
        assert!(!qmp.event_names().contains(&"STOP".to_owned()));
        drop(qmp);
        vm.assert_nobody_waits(&waiting);
        assert_eq!(middle.join().unwrap(), 1);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn who_only_passes_things_on_is_not_in_the_way() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let waiting = vm.wait_for_guest();
    let between = vm.site.path("between");
    let middle = stand_between(&between, &waiting.cpr, same_kvm);
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let channels = [channel("main", &waiting.main), channel("cpr", &between)];
    qmp.done("migrate", json!({"channels": channels}));
    let info = qmp.migrated();
    assert_eq!(info["status"], "completed", "{info}");
    drop(qmp);
    vm.assert_taken_over(&waiting);
    assert_eq!(middle.join().unwrap(), 1);
    vm.assert_goes_on(&before);
}
