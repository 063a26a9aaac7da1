//! Somebody between two brokers, on the cpr socket, who hands one of a guest's descriptors on as another, with a description to
//! match: the workers see it on the main channel, which does not go through there.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use baton_guest::CommandLine;
use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_policy::kernel;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::between::Handed;
use baton_tests::between::Swap;
use baton_tests::between::no_ram;
use baton_tests::between::other_ram;
use baton_tests::between::stand_between;
use baton_tests::impostor::impostor;
use baton_tests::impostor::well_meant;
use baton_tests::transfer::Waiting;
use baton_tests::transfer::channel;
use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use serde_json::Value;
use serde_json::json;

/// A console of the one in the middle, who would read what the guest prints and type to it.
fn other_console(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if key.name() != "console" {
        return Handed::Same;
    }
    let (end, other) = UnixStream::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    std::mem::forget(other);
    Handed::Other(end.into())
}

/// `/dev/kvm` through another node than the host's own would pass; the same node is the same.
fn same_kvm(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if key.name() != "kvm" {
        return Handed::Same;
    }
    let mut options = File::options();
    let kvm = options.read(true).write(true).open("/dev/kvm");
    Handed::Other(kvm.unwrap().into())
}

/// The kernel's file, which may be written to by this one.
fn writable_kernel(fd: BorrowedFd<'_>) -> OwnedFd {
    let mut options = File::options();
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    options.read(true).write(true).open(path).unwrap().into()
}

fn some_file() -> OwnedFd {
    File::open("/proc/self/exe").unwrap().into()
}

/// What is not of the kind that it is said to be.
fn a_file_for_ram(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    match key.name() {
        "ram" => Handed::Under(some_file()),
        _ => Handed::Same,
    }
}

/// What is, and says so, of another kind than it has to be.
fn an_image_for_ram(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    match key.name() {
        "ram" => Handed::OfKind(DescriptorKind::Image, some_file()),
        _ => Handed::Same,
    }
}

/// What can be more than it is said to be able to.
fn a_kernel_that_can_be_written(
    key: &DescriptorKey,
    _: &Description,
    fd: BorrowedFd<'_>,
) -> Handed {
    match key.name() {
        "kernel" => Handed::Under(writable_kernel(fd)),
        _ => Handed::Same,
    }
}

/// What can, and says so, be more than it should.
fn a_kernel_that_is_said_to_be_writable(
    key: &DescriptorKey,
    _: &Description,
    fd: BorrowedFd<'_>,
) -> Handed {
    match key.name() {
        "kernel" => Handed::Other(writable_kernel(fd)),
        _ => Handed::Same,
    }
}

/// A transfer whose cpr connection goes through the one in the middle.
struct Swapped {
    waiting: Waiting,
    /// What the old side says of it in the end.
    info: Value,
    /// What it told.
    events: Vec<String>,
    /// Of how many entries something else was made.
    entries: u32,
}

impl Swapped {
    fn transfer(vm: &Vm, swap: Swap) -> Self {
        let waiting = vm.wait_for_guest();
        let between = waiting.cpr.with_extension("between");
        let middle = stand_between(&between, &waiting.cpr, swap);
        let mut qmp = Qmp::connect(vm);
        qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
        let channels = [channel("main", &waiting.main), channel("cpr", &between)];
        qmp.done("migrate", json!({"channels": channels}));
        let info = qmp.migrated();
        let events = qmp.event_names();
        drop(qmp);
        Self {
            waiting,
            info,
            events,
            entries: middle.join().unwrap(),
        }
    }

    /// It failed for this reason, and the guest runs on where it was.
    #[track_caller]
    fn assert_failed(&self, vm: &Vm, old: i32, words: &str) {
        let info = &self.info;
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(reason.contains(words), "{reason}");
        assert_eq!(self.entries, 1);
        vm.assert_nobody_waits(&self.waiting);
        vm.assert_only_runner(old);
    }
}

#[test]
fn a_descriptor_put_in_anothers_place_is_named_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let cases: [(&str, Swap); 2] = [("ram#0", other_ram), ("console#0", other_console)];
    for (name, swap) in cases {
        let swapped = Swapped::transfer(&vm, swap);
        let words = format!("descriptor {name} is not the old worker's");
        swapped.assert_failed(&vm, old, &words);
        assert!(!swapped.events.contains(&"STOP".to_owned()));
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn a_descriptor_of_another_kind_or_access_is_refused_before_there_is_a_worker() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let cases: [(&str, Swap); 4] = [
        ("ram#0: expected GuestRam, found no memfd", a_file_for_ram),
        ("ram#0", an_image_for_ram),
        (
            "kernel#0: expected access Read",
            a_kernel_that_can_be_written,
        ),
        (
            "policy default does not grant kernel#0: kernel.0 is open for read-write",
            a_kernel_that_is_said_to_be_writable,
        ),
    ];
    for (words, swap) in cases {
        let swapped = Swapped::transfer(&vm, swap);
        swapped.assert_failed(&vm, old, words);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn who_only_passes_things_on_is_not_in_the_way() {
    let mut vm = Builder::release().start();
    let before = vm.witness();
    let swapped = Swapped::transfer(&vm, same_kvm);
    assert_eq!(swapped.info["status"], "completed", "{}", swapped.info);
    vm.assert_taken_over(&swapped.waiting);
    assert_eq!(swapped.entries, 1);
    vm.assert_goes_on(&before);
}

#[test]
fn who_drops_a_descriptor_ends_the_transfer_and_the_guest_runs_on() {
    let mut vm = Builder::release().start();
    let (before, old) = (vm.witness(), vm.worker());
    let swapped = Swapped::transfer(&vm, no_ram);
    swapped.assert_failed(&vm, old, "0 descriptors came with entry ram#0");
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}

/// Which descriptor the ones in the middle below take for themselves.
static TARGET: Mutex<&str> = Mutex::new("");

/// Another descriptor of this kind, which is open for reading and writing, blocking or not.
fn another(kind: DescriptorKind, blocking: bool) -> OwnedFd {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    match kind {
        DescriptorKind::Tap => {
            let mut options = File::options();
            options.read(true).write(true);
            let flags = if blocking { 0 } else { nonblocking };
            let queue = options.custom_flags(flags).open("/dev/net/tun").unwrap();
            let flags = kernel::IFF_TAP | kernel::IFF_NO_PI | kernel::IFF_VNET_HDR;
            kernel::tun_set_iff(queue.as_fd(), &tap("o"), flags).unwrap();
            queue.into()
        }
        DescriptorKind::Eventfd => {
            let flags = EventfdFlags::CLOEXEC;
            let more = if blocking {
                EventfdFlags::empty()
            } else {
                EventfdFlags::NONBLOCK
            };
            rustix::event::eventfd(0, flags | more).unwrap()
        }
        _ => {
            let (end, other) = UnixStream::pair().unwrap();
            end.set_nonblocking(!blocking).unwrap();
            std::mem::forget(other);
            end.into()
        }
    }
}

fn is_target(key: &DescriptorKey) -> bool {
    key.to_string() == *TARGET.lock().unwrap()
}

fn one_that_blocks(key: &DescriptorKey, is: &Description, _: BorrowedFd<'_>) -> Handed {
    if is_target(key) {
        Handed::Under(another(is.kind, true))
    } else {
        Handed::Same
    }
}

fn one_of_another_kind(key: &DescriptorKey, _: &Description, _: BorrowedFd<'_>) -> Handed {
    if is_target(key) {
        Handed::Under(some_file())
    } else {
        Handed::Same
    }
}

fn another_of_its_kind(key: &DescriptorKey, is: &Description, _: BorrowedFd<'_>) -> Handed {
    if is_target(key) {
        Handed::Other(another(is.kind, false))
    } else {
        Handed::Same
    }
}

fn tap(which: &str) -> String {
    format!("b{which}{}", std::process::id())
}

/// A guest with a tap, a disk of another process, a virtio console and a connection of its vsock.
fn with_everything() -> (Vm, UnixStream) {
    let vhost_user = "[[vhost_user]]\nid = \"data\"\nkind = \"blk\"\nsocket = \"d.sock\"\n";
    let console = "[virtio_console]\nkind = \"socket\"\n";
    let line = CommandLine::new().vsock(52).console().period_ms(50);
    let mut listener = None;
    let vm = Builder::release()
        .line(line)
        .net(&tap("s"), "")
        .vsock()
        .tables(&format!("{vhost_user}{console}"))
        .start_in(|site| {
            impostor(&site.path("d.sock"), |request| Some(well_meant(request)));
            listener = Some(UnixListener::bind(site.path("v_52")).unwrap());
        });
    let (connection, _) = listener.unwrap().accept().unwrap();
    (vm, connection)
}

#[test]
fn a_stream_or_tap_that_is_not_the_guests_is_refused_by_name() {
    let (vm, _connection) = with_everything();
    let (before, old) = (vm.witness(), vm.worker());
    let audit = vm.ask("audit").expect(0).json();
    let listed = audit["descriptors"].as_array().unwrap();
    let grants: Vec<&str> = listed
        .iter()
        .filter_map(|one| one["grant"].as_str())
        .collect();
    // How one is refused that is of its kind, and well described.
    for (name, kind, other) in [
        ("net#", "Tap", "the running VM has the tap"),
        (
            "vhost-user#",
            "Stream",
            "vhost_user data: the running VM's process does not listen at",
        ),
        (
            "console#0",
            "Stream",
            "descriptor console#0 is not the old worker's",
        ),
        (
            "console#1",
            "Stream",
            "descriptor console#1 is not the old worker's",
        ),
        ("vsock#", "Stream", "is not the old worker's"),
        ("kick#", "Eventfd", ""),
    ] {
        let key = *grants.iter().find(|grant| grant.starts_with(name)).unwrap();
        *TARGET.lock().unwrap() = key.to_owned().leak();
        let blocking = format!("{key}: expected {kind} that is open with O_NONBLOCK");
        let wrong = format!("{key}: expected {kind}, found RegularFile");
        let mut cases: Vec<(&str, Swap)> =
            vec![(&blocking, one_that_blocks), (&wrong, one_of_another_kind)];
        // One eventfd is as good as another to fstat(2).
        if !other.is_empty() {
            cases.push((other, another_of_its_kind));
        }
        for (words, swap) in cases {
            Swapped::transfer(&vm, swap).assert_failed(&vm, old, words);
            vm.assert_goes_on(&before);
        }
    }
    vm.assert_upgrades();
}
