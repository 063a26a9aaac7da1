//! What is refused on the way to another broker, by whom, and in which words. The guest runs on, and nobody is used up by it.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work fails")]

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;

use baton_ipc::Channel;
use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::cpr::CprHeader;
use baton_ipc::transfer::GuestMachine;
use baton_ipc::transfer::Hotplugged;
use baton_ipc::transfer::Offer;
use baton_ipc::transfer::ToNew;
use baton_ipc::transfer::ToOld;
use baton_ipc::worker::Pages;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::RamRegion;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::Waiting;
use baton_tests::is_alive;
use baton_tests::transfer::channel;
use baton_tests::until;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use serde_json::json;

/// The log of a broker that waits, its refusals.
fn refusals(vm: &Vm) -> String {
    let path = format!(".audit/{}.incoming.jsonl", vm.site.name);
    let text = std::fs::read_to_string(vm.site.run_dir().join(path)).unwrap();
    let refused = text
        .lines()
        .filter(|line| line.contains("incoming-refused") || line.contains("\"failed\""));
    refused.collect()
}

#[test]
fn another_machine_is_refused_by_its_first_difference() {
    let mut vm = Builder::release().disk("root", 4, "").start();
    let (before, old) = (vm.witness(), vm.worker());
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    std::fs::copy(vm.site.path("root.img"), vm.site.path("copy.img")).unwrap();
    for (from, to, words) in [
        (
            "count = 1",
            "count = 2",
            "cpus.count: the running VM has 1, the new VM file 2",
        ),
        ("size = \"64M\"", "size = \"128M\"", "memory.size: "),
        ("[memory]", "hide = [\"xsave\"]\n[memory]", "cpus.hide: "),
        (
            "path = \"root.img\"",
            "path = \"root.img\"\nreadonly = true",
            "device 1: ",
        ),
        (
            "root.img",
            "copy.img",
            "disk root: the running VM has another file",
        ),
        ("period_ms", "period-ms", "boot.cmdline: "),
        (
            "kind = \"file\"\npath = \"console.log\"",
            "kind = \"pty\"",
            "console.kind: ",
        ),
    ] {
        assert!(file.contains(from), "{from}");
        vm.site.write("other.toml", file.replace(from, to));
        let waiting = vm.wait_from("other.toml", &[]);
        let mut qmp = Qmp::connect(&vm);
        let info = vm.migrate_to(&mut qmp, &waiting);
        assert_eq!(info["status"], "failed", "{info}");
        let reason = info["error-desc"].as_str().unwrap();
        assert!(reason.contains(words), "{reason}");
        assert!(!qmp.event_names().contains(&"STOP".to_owned()));
        vm.assert_nobody_waits(&waiting);
        vm.assert_only_runner(old);
        vm.assert_goes_on(&before);
    }
    vm.assert_transfers();
}

#[test]
fn the_same_devices_in_another_order_are_another_machine() {
    let mut vm = Builder::release().disk("a", 4, "").disk("b", 8, "").start();
    let (before, old) = (vm.witness(), vm.worker());
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let swapped = file
        .replace("\"a", "\"x")
        .replace("\"b", "\"a")
        .replace("\"x", "\"b");
    assert_ne!(swapped, file);
    vm.site.write("other.toml", swapped);
    let waiting = vm.wait_from("other.toml", &[]);
    let mut qmp = Qmp::connect(&vm);
    let info = vm.migrate_to(&mut qmp, &waiting);
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("device 1: the running VM has "), "{reason}");
    drop(qmp);
    vm.assert_nobody_waits(&waiting);
    vm.assert_only_runner(old);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}

#[test]
fn a_probe_and_noise_are_refused_by_name_and_the_waiting_goes_on() {
    let mut vm = Builder::release().start();
    let waiting = vm.wait_for_guest();
    for (bytes, words) in [
        (&b"HELO\0\0\0\x01"[..], "bad magic 48454c4f"),
        (b"BCPR\x09\0\0\0", "version 9"),
        (b"BCPR\x02\0\0\0", "link did not come"),
        (b"BC", "too short"),
        (b"", "without a word"),
    ] {
        let mut stream = UnixStream::connect(&waiting.cpr).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // It hangs up in answer.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
        until("it is refused", || {
            refusals(&vm).contains(words).then_some(())
        });
    }
    let mut qmp = Qmp::connect(&vm);
    assert_eq!(vm.migrate_to(&mut qmp, &waiting)["status"], "completed");
    drop(qmp);
    vm.assert_taken_over(&waiting);
}

#[test]
fn who_is_not_there_or_does_not_answer_is_named() {
    let mut vm = Builder::release().slowness(1).start();
    let before = vm.witness();
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-transfer"}));
    let main = channel("main", &vm.site.path("no-main"));
    let to = |path: &Path| json!({"channels": [main, channel("cpr", path)]});

    let nobody = vm.site.path("nobody");
    assert_eq!(
        qmp.refused("migrate", to(&nobody)),
        format!(
            "Failed to connect to '{}': No such file or directory",
            nobody.display()
        )
    );

    // A QEMU that waits reads, and says nothing; what it gets is not what it knows, and it leaves.
    let silent = vm.site.path("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    qmp.done("migrate", to(&silent));
    let (mut stream, _) = listener.accept().unwrap();
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"BCPR", "and no descriptor of the guest yet");
    drop(stream);
    let info = qmp.migrated();
    assert!(
        info["error-desc"].as_str().unwrap().contains("QEMU"),
        "{info}"
    );

    // One that accepts and neither reads nor leaves.
    qmp.done("migrate", to(&silent));
    let (stream, _) = listener.accept().unwrap();
    let info = qmp.migrated();
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("hello did not come in time"), "{info}");
    drop(stream);

    // Nobody accepts, and nobody waits for that.
    rustix::net::listen(&listener, 0).unwrap();
    let _waits: Vec<_> = std::iter::from_fn(|| try_connect(&silent)).collect();
    let full = qmp.refused("migrate", to(&silent));
    assert!(full.contains("its backlog is full"), "{full}");

    let link = vm.site.path("link");
    std::os::unix::fs::symlink(&silent, &link).unwrap();
    let symbolic = qmp.refused("migrate", to(&link));
    assert!(
        symbolic.contains("a symbolic link lies in the path"),
        "{symbolic}"
    );
    assert_eq!(qmp.status(), "running");
    assert!(!qmp.event_names().contains(&"STOP".to_owned()));
    drop(qmp);
    vm.assert_goes_on(&before);
    vm.assert_transfers();
}

/// Connects without waiting, if the backlog has room.
fn try_connect(path: &Path) -> Option<OwnedFd> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let address = rustix::net::SocketAddrUnix::new(path).unwrap();
    rustix::net::connect(&socket, &address)
        .ok()
        .map(|()| socket)
}

#[test]
fn two_brokers_cannot_wait_for_one_guest_or_listen_at_one_path() {
    let mut vm = Builder::release().start();
    let waiting = vm.wait_for_guest();
    let (second, _) = vm.try_to_wait("vm.toml", &[]);
    let second = second.expect(3);
    assert!(second.stderr.contains("waits for"), "{second:?}");
    let taken = vm.site.path("taken");
    vm.site.write("taken", "");
    let ended = vm
        .site
        .baton(["stop", "--force", &format!("{}.incoming", vm.site.name)]);
    ended.expect(0);
    vm.assert_nobody_waits(&waiting);
    assert!(!waiting.cpr.exists() && !waiting.main.exists());
    let (bound, _) = vm.try_to_wait(
        "vm.toml",
        &["--incoming", &format!("unix:{}", taken.display())],
    );
    let bound = bound.expect(3);
    assert!(bound.stderr.contains("Address already in use"), "{bound:?}");
    assert!(taken.exists(), "nobody removes what is not theirs");
    vm.assert_transfers();
}

/// An old broker that is a test's own.
struct Impostor {
    link: Channel<ToNew, ToOld>,
    cpr: FdSocket,
}

impl Impostor {
    fn connect(waiting: &Waiting) -> Self {
        let stream = UnixStream::connect(&waiting.cpr).unwrap();
        let (link, link_end) = FdSocket::pair().unwrap();
        let (cpr, cpr_end) = FdSocket::pair().unwrap();
        let ends = [link_end.as_fd(), cpr_end.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&ends)));
        let preamble = baton_ipc::transfer::preamble();
        let bytes = [std::io::IoSlice::new(&preamble)];
        rustix::net::sendmsg(&stream, &bytes, &mut control, SendFlags::empty()).unwrap();
        let mut impostor = Self {
            link: Channel::new(link),
            cpr,
        };
        assert!(matches!(impostor.hears(), Some(ToOld::Hello { .. })));
        impostor
    }

    /// What the new broker says next; none when it has hung up.
    fn hears(&mut self) -> Option<ToOld> {
        until("the new broker speaks", || match self.link.receive() {
            Ok(Received::Message(said, _)) => Some(Some(said)),
            Ok(Received::Empty) => None,
            Ok(Received::HungUp) | Err(_) => Some(None),
        })
    }

    /// Offers a machine of 64 MiB with this memory.
    fn offers(&mut self, vm: &Vm, ram: OwnedFd) {
        self.offers_with(vm, ram, Vec::new());
    }

    /// The same, with disks that are said to have come while it ran.
    fn offers_with(&mut self, vm: &Vm, ram: OwnedFd, hotplugged: Vec<Hotplugged>) {
        let machine = GuestMachine {
            name: vm.site.name.clone(),
            cpus: 1,
            hide: Vec::new(),
            ram: vec![RamRegion {
                address: 0,
                size: 64 << 20,
            }],
            pages: Pages::Small,
            backing: RamBacking::Shared,
            cmdline: cmdline(vm),
            initrd: false,
            console: "file".into(),
            virtio: vec![VirtioConfig {
                slot: 31,
                device: VirtioKind::Entropy,
            }],
        };
        let offer = Offer {
            nonce: [7; 32],
            vm: VmId([1; 16]),
            generation: 2,
            machine,
            hotplugged,
        };
        self.link.send(&ToNew::Offer(Box::new(offer))).unwrap();
        let mut registry = Registry::default();
        let mut save = |name: &str, id, kind, fd: OwnedFd| {
            let key = DescriptorKey::new(name, id).unwrap();
            registry.save(key, kind, fd).unwrap();
        };
        let open = |path: &Path| File::options().read(true).open(path).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        save("kvm", 0, DescriptorKind::Kvm, kvm.unwrap().into());
        let kernel = open(&vm.site.path("guest.elf"));
        save("kernel", 0, DescriptorKind::Image, kernel.into());
        let (console, _) = UnixStream::pair().unwrap();
        console.set_nonblocking(true).unwrap();
        save("console", 0, DescriptorKind::Stream, console.into());
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let kick = rustix::event::eventfd(0, flags).unwrap();
        save("kick", 31 * 32, DescriptorKind::Eventfd, kick);
        save("ram", 0, DescriptorKind::GuestRam, ram);
        let header = CprHeader {
            mode: StartMode::CprTransfer,
            vm: VmId([1; 16]),
            generation: 2,
        };
        baton_ipc::cpr::send(&self.cpr, &header, &registry).unwrap();
    }
}

fn cmdline(vm: &Vm) -> String {
    let file = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let line = file
        .lines()
        .find_map(|line| line.strip_prefix("cmdline = "));
    line.unwrap().trim_matches('"').to_owned()
}

fn memory(size: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("ram", flags).unwrap();
    rustix::fs::ftruncate(&memfd, size).unwrap();
    rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
    memfd
}

const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

#[test]
fn a_descriptor_of_another_size_is_refused_and_a_right_one_is_not() {
    let mut vm = Builder::release().start();
    let waiting = vm.wait_for_guest();
    let mut impostor = Impostor::connect(&waiting);
    impostor.offers(&vm, memory(32 << 20, SEALS));
    let said = impostor.hears();
    let Some(ToOld::Failed(reason)) = &said else {
        panic!("{said:?}");
    };
    assert!(
        reason.contains("ram#0: the CPR state has 33554432 bytes"),
        "{reason}"
    );
    vm.assert_nobody_waits(&waiting);

    // The same with memory of the right size goes on to the main channel: the size was the reason.
    let waiting = vm.wait_for_guest();
    let mut impostor = Impostor::connect(&waiting);
    impostor.offers(&vm, memory(64 << 20, SEALS));
    assert_eq!(impostor.hears(), Some(ToOld::Listening));
    // On main, whoever has another number is not taken, and leaves nothing behind.
    let mut main = UnixStream::connect(&waiting.main).unwrap();
    main.write_all(&[8; 32]).unwrap();
    let mut rest = Vec::new();
    assert_eq!(main.read_to_end(&mut rest).unwrap_or(0), 0);
    assert!(is_alive(waiting.broker));
    drop(impostor);
    vm.assert_nobody_waits(&waiting);
    vm.assert_transfers();
}

#[test]
fn devices_that_are_said_to_have_come_and_are_none_are_refused() {
    let vm = Builder::release().start();
    for (id, slot, words) in [
        ("d", 31, "device d is no disk"),
        ("d", 4, "device d is no disk"),
        ("d", 255, "device d is no disk"),
        ("", 4, "expects an identifier"),
        ("../d", 4, "expects an identifier"),
    ] {
        let waiting = vm.wait_for_guest();
        let mut impostor = Impostor::connect(&waiting);
        let disk = Hotplugged {
            id: id.to_owned(),
            backing: "n".to_owned(),
            slot,
            asked: false,
        };
        impostor.offers_with(&vm, memory(64 << 20, SEALS), vec![disk]);
        let said = impostor.hears();
        let Some(ToOld::Failed(reason)) = &said else {
            panic!("{said:?}");
        };
        assert!(reason.contains(words), "{reason}");
        vm.assert_nobody_waits(&waiting);
    }
}

#[test]
fn substituted_and_unsealed_memory_is_refused() {
    for (substitute, words) in [
        (
            memory(64 << 20, SEALS),
            "another object than the one announced",
        ),
        (memory(64 << 20, SealFlags::SHRINK), "is not sealed"),
    ] {
        let vm = Builder::release().start();
        let waiting = vm.wait_for_guest();
        let mut impostor = Impostor::connect(&waiting);
        // Announced is one memory, on the way it is another.
        let announced = memory(64 << 20, SEALS);
        let description = Description::of(DescriptorKind::GuestRam, announced.as_fd()).unwrap();
        let key = DescriptorKey::new("ram", 0).unwrap();
        let header = CprHeader {
            mode: StartMode::CprTransfer,
            vm: VmId([1; 16]),
            generation: 2,
        };
        let mut start = Vec::from(baton_ipc::cpr::MAGIC);
        start.extend(baton_ipc::cpr::VERSION.to_le_bytes());
        start.extend(baton_ipc::encode(&header).unwrap());
        impostor.cpr.send(&start, &[]).unwrap();
        // The first kind of record: an entry.
        let entry = baton_ipc::encode(&(0_u32, key, description)).unwrap();
        impostor.cpr.send(&entry, &[substitute.as_fd()]).unwrap();
        let said = impostor.hears();
        let Some(ToOld::Failed(reason)) = &said else {
            panic!("{said:?}");
        };
        assert!(reason.contains(words), "{reason}");
        vm.assert_nobody_waits(&waiting);
    }
}
