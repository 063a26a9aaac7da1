//! The part of a broker that tests need: it makes a guest's descriptors, executes the worker under the policy's filters,
//! and speaks the protocol. Every step is a call of its own, so that a test can leave one out or put a fault between two.
#![expect(
    unsafe_code,
    reason = "the worker is executed from its descriptor, in the child, under its filters"
)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(dead_code, reason = "each test file uses a part of this")]

pub(crate) mod tap;
#[path = "../../../tests/src/wire.rs"]
#[expect(unreachable_pub, reason = "it is a library's module elsewhere")]
pub(crate) mod wire;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;
use std::time::Instant;

use baton_guest::CommandLine;
use baton_guest::layout;
use baton_ipc::Channel;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::StateDigest;
use baton_ipc::VmId;
use baton_ipc::cpr;
use baton_ipc::cpr::CprHeader;
use baton_ipc::descriptor;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::BuildTimes;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::Filters;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::Order;
use baton_ipc::worker::PROTOCOL;
use baton_ipc::worker::Pages;
use baton_ipc::worker::RamRegion;
use baton_ipc::worker::Report;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Compiled;
use baton_policy::Policy;
use baton_policy::Program;
use baton_policy::Role;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::MemfdFlags;

/// No step of a healthy worker takes nearly as long, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

fn filters() -> &'static Compiled {
    static FILTERS: OnceLock<Compiled> = OnceLock::new();
    FILTERS.get_or_init(|| Policy::builtin().unwrap().compile().unwrap())
}

/// What a guest is made of, as a broker holds it over all generations of its worker.
pub(crate) struct Vm {
    pub(crate) config: WorkerConfig,
    pub(crate) ram: OwnedFd,
    pub(crate) kernel: OwnedFd,
    pub(crate) kvm: OwnedFd,
    /// The broker's end of the console.
    pub(crate) console: UnixStream,
    worker_console: UnixStream,
    high_ram: Option<OwnedFd>,
    disks: Vec<Disk>,
    nets: Vec<Net>,
    _alone: File,
}

/// A disk, as a broker holds it.
pub(crate) struct Disk {
    pub(crate) file: OwnedFd,
    /// What the guest notifies its queues by.
    pub(crate) kicks: Vec<OwnedFd>,
}

/// A network interface, as a broker holds it.
struct Net {
    device: VirtioConfig,
    tap: tap::Tap,
    kicks: Vec<OwnedFd>,
}

/// One guest at a time, over all test processes: two busy ones on a small machine miss the deadlines of a pause.
fn alone() -> File {
    // It is not there on another machine than the one that built this.
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/one-guest-at-a-time");
    let lock = File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    lock
}

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap()
}

impl Vm {
    /// A guest of the embedded image.
    pub(crate) fn new(cpus: u8, mib: u64, command_line: CommandLine) -> Self {
        Self::with_kernel(baton_guest::ELF, cpus, mib, command_line)
    }

    /// A guest of another kernel.
    pub(crate) fn with_kernel(elf: &[u8], cpus: u8, mib: u64, command_line: CommandLine) -> Self {
        let size = mib << 20;
        let ram = Self::ram_of(size);
        let mut kernel = File::from(memfd("kernel"));
        kernel.write_all(elf).unwrap();
        let (console, worker_console) = UnixStream::pair().unwrap();
        console.set_nonblocking(true).unwrap();
        worker_console.set_nonblocking(true).unwrap();
        let steady = |role| filters().roles.get(&role).unwrap().as_bytes().to_vec();
        let config = WorkerConfig {
            vm: VmId(rand_id()),
            generation: 1,
            mode: StartMode::None,
            cpus,
            hide: Vec::new(),
            ram: vec![RamRegion { address: 0, size }],
            pages: Pages::Small,
            cmdline: command_line.cpus(cpus.into()).to_string(),
            initrd: false,
            filters: Filters {
                control: steady(Role::Control),
                vcpu: steady(Role::Vcpu),
                io: steady(Role::Io),
            },
            virtio: Vec::new(),
            io_threads: 1,
            drain_ms: 40,
        };
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("these tests need /dev/kvm");
        Self {
            config,
            ram,
            kernel: kernel.into(),
            kvm: kvm.into(),
            console,
            worker_console,
            high_ram: None,
            disks: Vec::new(),
            nets: Vec::new(),
            _alone: alone(),
        }
    }

    /// Blank guest RAM.
    pub(crate) fn ram_of(size: u64) -> OwnedFd {
        let ram = memfd("ram");
        rustix::fs::ftruncate(&ram, size).unwrap();
        rustix::fs::fcntl_add_seals(&ram, descriptor::RAM_SEALS).unwrap();
        ram
    }

    /// Plugs a blank disk in, with the configuration changed by `change`.
    pub(crate) fn add_disk(&mut self, mib: u64, change: impl FnOnce(&mut BlockConfig)) {
        let file = memfd("disk");
        rustix::fs::ftruncate(&file, mib << 20).unwrap();
        let mut block = BlockConfig {
            bytes: mib << 20,
            device: false,
            readonly: false,
            direct: false,
            block_size: 512,
            queues: 1,
            serial: "test".to_owned(),
            limits: DeviceLimits::default(),
        };
        change(&mut block);
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        let kicks = (0..block.queues)
            .map(|_| rustix::event::eventfd(0, flags).unwrap())
            .collect();
        self.disks.push(Disk { file, kicks });
        let slot = u8::try_from(self.disks.len()).unwrap();
        let device = VirtioKind::Block(block);
        self.config.virtio.push(VirtioConfig { slot, device });
    }

    /// Plugs a network interface in, with the configuration changed by `change`; what is at the other end of it. After
    /// all disks.
    pub(crate) fn add_net(
        &mut self,
        queues: u8,
        change: impl FnOnce(&mut NetConfig),
    ) -> wire::Wire {
        let tap = tap::Tap::new(queues);
        let wire = wire::Wire::new(&tap.name);
        let mut net = NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queues,
            limits: DeviceLimits::default(),
        };
        change(&mut net);
        let device = VirtioConfig {
            slot: u8::try_from(self.config.virtio.len() + 1).unwrap(),
            device: VirtioKind::Net(net),
        };
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        let kicks = (0..device.device.queues())
            .map(|_| rustix::event::eventfd(0, flags).unwrap())
            .collect();
        self.config.virtio.push(device.clone());
        self.nets.push(Net { device, tap, kicks });
        wire
    }

    /// What the guest says of its network interface.
    pub(crate) fn net_report(&self) -> baton_guest::NetReport {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        rustix::io::pread(&self.ram, &mut bytes, layout::REPORT_ADDRESS).unwrap();
        baton_guest::NetReport::parse(&bytes)
    }

    /// Waits until what the guest says of its network interface is as wanted.
    #[track_caller]
    pub(crate) fn wait_for_net(
        &self,
        what: &str,
        mut wanted: impl FnMut(&baton_guest::NetReport) -> bool,
    ) -> baton_guest::NetReport {
        let begun = Instant::now();
        loop {
            let report = self.net_report();
            if wanted(&report) {
                return report;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the guest's network never came to: {what}; {report:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A disk, by its number from 0.
    pub(crate) fn disk(&self, number: usize) -> &Disk {
        &self.disks[number]
    }

    /// What the guest says of its disk.
    pub(crate) fn disk_report(&self) -> baton_guest::DiskReport {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        rustix::io::pread(&self.ram, &mut bytes, layout::REPORT_ADDRESS).unwrap();
        baton_guest::DiskReport::parse(&bytes)
    }

    /// Waits until what the guest says of its disk is as wanted.
    #[track_caller]
    pub(crate) fn wait_for_disk(
        &self,
        what: &str,
        mut wanted: impl FnMut(&baton_guest::DiskReport) -> bool,
    ) -> baton_guest::DiskReport {
        let begun = Instant::now();
        loop {
            let report = self.disk_report();
            if wanted(&report) {
                return report;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the guest's disk never came to: {what}; {report:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Adds RAM above 4 GiB.
    pub(crate) fn add_high_ram(&mut self, mib: u64) {
        let size = mib << 20;
        self.config.ram.push(RamRegion {
            address: 4 << 30,
            size,
        });
        self.high_ram = Some(Self::ram_of(size));
    }

    /// The configuration of the worker of `generation`.
    pub(crate) fn config(&self, generation: u32) -> WorkerConfig {
        let mode = if generation == 1 {
            StartMode::None
        } else {
            StartMode::CprTransfer
        };
        WorkerConfig {
            generation,
            mode,
            ..self.config.clone()
        }
    }

    /// Every descriptor, as a broker would hand it over.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        let mut save_as = |name, id, kind, fd: OwnedFd| {
            registry
                .save(DescriptorKey::new(name, id).unwrap(), kind, fd)
                .unwrap()
        };
        if let Some(ram) = &self.high_ram {
            save_as(
                descriptor::RAM,
                1,
                DescriptorKind::GuestRam,
                ram.try_clone().unwrap(),
            );
        }
        for (disk, device) in self.disks.iter().zip(&self.config.virtio) {
            save_as(
                descriptor::DISK,
                device.slot.into(),
                DescriptorKind::Disk,
                disk.file.try_clone().unwrap(),
            );
            for (kick, queue) in disk.kicks.iter().zip(0..) {
                save_as(
                    descriptor::KICK,
                    device.kick(queue),
                    DescriptorKind::Eventfd,
                    kick.try_clone().unwrap(),
                );
            }
        }
        for Net { device, tap, kicks } in &self.nets {
            let taps = tap.queues.iter().zip((0..).map(|pair| device.tap(pair)));
            let kicks = kicks.iter().zip((0..).map(|queue| device.kick(queue)));
            for (tap, id) in taps {
                let copy = tap.try_clone().unwrap();
                save_as(descriptor::NET, id, DescriptorKind::Tap, copy);
            }
            for (kick, id) in kicks {
                let copy = kick.try_clone().unwrap();
                save_as(descriptor::KICK, id, DescriptorKind::Eventfd, copy);
            }
        }
        let mut save = |name, kind, fd| save_as(name, 0, kind, fd);
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        save(descriptor::KVM, DescriptorKind::Kvm, copy(&self.kvm));
        save(descriptor::RAM, DescriptorKind::GuestRam, copy(&self.ram));
        save(
            descriptor::KERNEL,
            DescriptorKind::Image,
            copy(&self.kernel),
        );
        save(
            descriptor::CONSOLE,
            DescriptorKind::Stream,
            self.worker_console.as_fd().try_clone_to_owned().unwrap(),
        );
        registry
    }

    fn header(&self, generation: u32) -> CprHeader {
        let config = self.config(generation);
        CprHeader {
            mode: config.mode,
            vm: config.vm,
            generation,
        }
    }

    /// The guest's report, from its RAM.
    pub(crate) fn report(&self) -> Result<baton_guest::Report, baton_guest::ReportError> {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        rustix::io::pread(&self.ram, &mut bytes, layout::REPORT_ADDRESS).unwrap();
        baton_guest::Report::parse(&bytes)
    }

    /// Waits until the guest's report is as wanted.
    #[track_caller]
    pub(crate) fn wait_for(
        &self,
        what: &str,
        mut wanted: impl FnMut(&baton_guest::Report) -> bool,
    ) -> baton_guest::Report {
        let begun = Instant::now();
        loop {
            if let Ok(report) = self.report() {
                if wanted(&report) {
                    return report;
                }
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the guest never came to: {what}; {:?}",
                self.report()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until every vCPU has taken turns, and some more.
    #[track_caller]
    pub(crate) fn wait_for_turns(&self) -> baton_guest::Report {
        let cpus = usize::from(self.config.cpus);
        let first = self.wait_for("all vCPUs run", |report| report.vcpus_running == cpus);
        self.wait_for("all vCPUs take turns", |report| {
            report
                .slots
                .iter()
                .zip(&first.slots)
                .all(|(now, then)| now.sequence > then.sequence + 1000)
        })
    }

    /// What the console has now.
    pub(crate) fn read_console(&self) -> String {
        String::from_utf8_lossy(&self.read_console_bytes()).into_owned()
    }

    /// What the console has now.
    pub(crate) fn read_console_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = (&self.console).read_to_end(&mut bytes);
        bytes
    }

    /// What was written to the console and no worker has read, without reading it.
    pub(crate) fn unread_console_input(&self) -> Vec<u8> {
        let mut bytes = [0; 256];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        let count = rustix::net::recv(&self.worker_console, &mut bytes[..], flags)
            .map_or(0, |(_, count)| count);
        bytes[..count].to_vec()
    }

    /// All of guest RAM.
    pub(crate) fn ram_bytes(&self) -> Vec<u8> {
        let size = usize::try_from(self.config.ram[0].size).unwrap();
        let mut bytes = vec![0; size];
        rustix::io::pread(&self.ram, &mut bytes, 0).unwrap();
        bytes
    }

    /// Writes a command for the guest.
    pub(crate) fn command(&self, command: u64) {
        rustix::io::pwrite(
            &self.ram,
            &command.to_le_bytes(),
            layout::REPORT_ADDRESS + u64::try_from(layout::MAILBOX_OFFSET).unwrap(),
        )
        .unwrap();
    }

    /// A worker of generation 1 in which the guest runs.
    #[track_caller]
    pub(crate) fn start(&self) -> Worker {
        let mut worker = Worker::spawn();
        worker.expect_hello();
        worker.build_cold(self);
        worker.order(&Order::Start);
        worker.expect_running();
        worker
    }
}

fn rand_id() -> [u8; 16] {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut id)
        .unwrap();
    id
}

/// An ELF kernel of this code, entered in 64-bit mode at 2 MiB.
pub(crate) fn kernel_of(code: &[u8]) -> Vec<u8> {
    const ENTRY: u64 = 2 << 20;
    let length = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1; entry, program headers at 64, no sections; flags, sizes and counts.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ENTRY, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // One loaded segment: readable, writable, executable.
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, ENTRY, ENTRY, length, length, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Whether a guest that another worker was to take over goes on in the old one, as itself.
#[track_caller]
pub(crate) fn assert_goes_on(vm: &Vm, before: &baton_guest::Report) {
    let after = vm.wait_for_turns();
    assert_eq!(
        (after.nonce, after.boots, after.faults()),
        (before.nonce, before.boots, 0)
    );
}

/// A worker's process. Killed when dropped.
pub(crate) struct Worker {
    pub(crate) child: Child,
    control: Option<Channel<Order, Report>>,
    cpr: Option<FdSocket>,
}

impl Worker {
    /// Executes the worker as a launcher does: from a descriptor, without arguments and environment, under the build
    /// filters.
    pub(crate) fn spawn() -> Self {
        let (ours, theirs) = FdSocket::pair().unwrap();
        let binary = File::open(env!("CARGO_BIN_EXE_baton-worker")).unwrap();
        let name = CString::new("baton-worker").unwrap();
        let mut command = Command::new("/nonexistent");
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        command.stdout(Stdio::null());
        let install: Vec<Program> = filters().build.clone();
        // SAFETY: the closure runs in the forked child. It installs filters and executes; both use memory of their own.
        // No other thread of the test holds a lock that it needs: it allocates, which glibc makes safe after fork.
        unsafe {
            command.pre_exec(move || {
                baton_policy::no_new_privs()?;
                for filter in &install {
                    filter.install()?;
                }
                let (argv, envp) = (
                    [name.as_ptr(), std::ptr::null()],
                    [std::ptr::null::<libc::c_char>()],
                );
                libc::syscall(
                    libc::SYS_execveat,
                    binary.as_raw_fd(),
                    c"".as_ptr(),
                    argv.as_ptr(),
                    envp.as_ptr(),
                    libc::AT_EMPTY_PATH,
                );
                Err(io::Error::last_os_error())
            });
        }
        let child = command.spawn().unwrap();
        Self {
            child,
            control: Some(Channel::new(ours)),
            cpr: None,
        }
    }

    #[track_caller]
    pub(crate) fn order(&self, order: &Order) {
        self.control.as_ref().unwrap().send(order).unwrap();
    }

    /// Sends an order to a worker that may be slow to read.
    #[track_caller]
    pub(crate) fn order_when_possible(&self, order: &Order) {
        let begun = Instant::now();
        while self.control.as_ref().unwrap().send(order).is_err() {
            assert!(begun.elapsed() < PATIENCE, "the worker does not read");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next report, or `None` when the worker has closed.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Option<Report> {
        let begun = Instant::now();
        let control = self.control.as_mut().unwrap();
        loop {
            match control.receive().unwrap() {
                Received::Message(report, descriptors) => {
                    assert!(descriptors.is_empty());
                    return Some(report);
                }
                Received::HungUp => return None,
                Received::Empty => {
                    assert!(begun.elapsed() < PATIENCE, "the worker says nothing");
                    let mut fds = [PollFd::new(control, PollFlags::IN)];
                    let _ = rustix::event::poll(
                        &mut fds,
                        Some(&Timespec {
                            tv_sec: 1,
                            tv_nsec: 0,
                        }),
                    );
                }
            }
        }
    }

    /// The next report, which must be as `take` wants it.
    #[track_caller]
    pub(crate) fn expect<T>(
        &mut self,
        what: &str,
        take: impl FnOnce(Report) -> Result<T, Report>,
    ) -> T {
        match self.next() {
            None => panic!(
                "expected {what}, the worker has closed: {:?}",
                self.child.wait()
            ),
            Some(report) => match take(report) {
                Ok(value) => value,
                Err(other) => panic!("expected {what}, got {other:?}"),
            },
        }
    }

    #[track_caller]
    pub(crate) fn expect_hello(&mut self) {
        self.expect("hello", |report| match report {
            Report::Hello {
                protocol: PROTOCOL, ..
            } => Ok(()),
            other => Err(other),
        });
    }

    #[track_caller]
    pub(crate) fn expect_failed(&mut self, wanted: &str) -> String {
        self.expect("failed", |report| match report {
            Report::Failed { step, reason } if step == wanted => Ok(reason),
            other => Err(other),
        })
    }

    /// "Running", and then "first run".
    #[track_caller]
    pub(crate) fn expect_running(&mut self) -> u64 {
        self.expect("running", |report| {
            if report == Report::Running {
                Ok(())
            } else {
                Err(report)
            }
        });
        self.expect("first run", |report| match report {
            Report::FirstRun { last_run_ns } => Ok(last_run_ns),
            other => Err(other),
        })
    }

    #[track_caller]
    pub(crate) fn expect_resumed(&mut self) {
        self.expect("resumed", |report| {
            if report == Report::Resumed {
                Ok(())
            } else {
                Err(report)
            }
        });
    }

    /// Sends the configuration, with the cpr socket and, of a new worker, the main channel.
    pub(crate) fn configure(&mut self, config: WorkerConfig, main: Option<&OwnedFd>) {
        let (ours, theirs) = FdSocket::pair().unwrap();
        let mut descriptors = vec![theirs.as_fd()];
        descriptors.extend(main.map(|main| main.as_fd()));
        let order = Order::Configure(Box::new(config));
        self.control
            .as_ref()
            .unwrap()
            .send_with(&order, &descriptors)
            .unwrap();
        self.cpr = Some(ours);
    }

    /// Hands the descriptors over.
    pub(crate) fn hand_over(&self, header: &CprHeader, registry: &Registry) {
        cpr::send(self.cpr.as_ref().unwrap(), header, registry).unwrap();
    }

    /// Hands over what belongs to the worker of `generation`.
    pub(crate) fn hand_over_to(&self, vm: &Vm, generation: u32) {
        self.hand_over(&vm.header(generation), &vm.registry());
    }

    /// Whether the worker lives and says nothing for a while.
    pub(crate) fn says_nothing(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(100));
        let silent = matches!(
            self.control.as_mut().unwrap().receive(),
            Ok(Received::Empty)
        );
        silent && self.child.try_wait().unwrap().is_none()
    }

    /// Waits until all threads of the worker are stopped.
    pub(crate) fn wait_stopped(&self) {
        let begun = Instant::now();
        let tasks = format!("/proc/{}/task", self.child.id());
        let stopped = |entry: io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(entry.unwrap().path().join("stat")).unwrap();
            let state = stat.rsplit(')').next().unwrap().trim_start();
            state.starts_with('T')
        };
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            assert!(begun.elapsed() < PATIENCE, "the worker does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// "Ready", and then the hang-up.
    #[track_caller]
    pub(crate) fn expect_ready(&mut self) -> BuildTimes {
        let times = self.expect("ready", |report| match report {
            Report::Ready(times) => Ok(times),
            other => Err(other),
        });
        let cpr = self.cpr.take().unwrap();
        let mut buffer = Vec::new();
        let begun = Instant::now();
        loop {
            match cpr.receive(&mut buffer).unwrap() {
                Received::HungUp => return times,
                Received::Empty => assert!(begun.elapsed() < PATIENCE),
                Received::Message((), _) => panic!("the worker speaks on the cpr channel"),
            }
        }
    }

    #[track_caller]
    pub(crate) fn build_cold(&mut self, vm: &Vm) -> BuildTimes {
        self.configure(vm.config(1), None);
        self.hand_over(&vm.header(1), &vm.registry());
        self.expect_ready()
    }

    /// The worker is to take this channel's place, in an upgrade's step S3.
    pub(crate) fn transfer(&self, main: &OwnedFd) {
        self.control
            .as_ref()
            .unwrap()
            .send_with(&Order::Transfer, &[main.as_fd()])
            .unwrap();
    }

    /// Sends bytes that are no order.
    pub(crate) fn send_raw(&self, bytes: &[u8]) {
        let control = self
            .control
            .as_ref()
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .unwrap();
        FdSocket::from(control).send(bytes, &[]).unwrap();
    }

    /// The broker dies, as far as this worker sees.
    pub(crate) fn abandon(&mut self) {
        self.control = None;
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the worker does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the worker has ended without a signal, and with what status.
    pub(crate) fn exit_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("ended by signal {:?}", status.signal()))
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: signals a child that has not been waited for, so the number is still its own.
        unsafe { libc::kill(i32::try_from(self.child.id()).unwrap(), signal) };
    }

    /// A number out of `/proc/<pid>/status`, in its own unit.
    pub(crate) fn status_field(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A main channel's two ends: the old worker's and the new one's.
pub(crate) fn main_channel() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    (a.into(), b.into())
}

/// The middle of a main channel, from which a test can cut, bend or forge what goes over it.
pub(crate) struct Tap {
    old: UnixStream,
    new: UnixStream,
}

impl Tap {
    /// A tap, and the two ends for the workers.
    fn new() -> (Self, OwnedFd, OwnedFd) {
        let ((old, old_end), (new, new_end)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for end in [&old_end, &new_end] {
            end.set_nonblocking(true).unwrap();
        }
        for end in [&old, &new] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (Self { old, new }, old_end.into(), new_end.into())
    }

    fn relay_frame(mut from: &UnixStream, mut to: &UnixStream) {
        let mut length = [0; 4];
        from.read_exact(&mut length).unwrap();
        let mut payload = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
        from.read_exact(&mut payload).unwrap();
        to.write_all(&length).unwrap();
        to.write_all(&payload).unwrap();
    }

    /// The old worker's state stream.
    pub(crate) fn stream(&self, saved: &Saved) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(saved.bytes).unwrap()];
        (&self.old).read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Sends the new worker something.
    pub(crate) fn send(&self, bytes: &[u8]) {
        (&self.new).write_all(bytes).unwrap();
    }
}

/// An upgrade under way, step by step.
pub(crate) struct Upgrade {
    pub(crate) new: Worker,
    pub(crate) generation: u32,
}

/// What the old worker said in the pause.
pub(crate) struct Saved {
    pub(crate) first_exit_ns: u64,
    pub(crate) parked_ns: u64,
    pub(crate) digest: StateDigest,
    pub(crate) bytes: u64,
}

impl Upgrade {
    /// S2 and S3: a new worker that both workers agree on.
    #[track_caller]
    pub(crate) fn agree(vm: &Vm, old: &mut Worker, generation: u32) -> Self {
        let mut upgrade = Self {
            new: Worker::spawn(),
            generation,
        };
        upgrade.new.expect_hello();
        let (old_end, new_end) = main_channel();
        upgrade.new.configure(vm.config(generation), Some(&new_end));
        drop(new_end);
        old.transfer(&old_end);
        drop(old_end);
        old.expect("agreed", |report| {
            if report == Report::Agreed {
                Ok(())
            } else {
                Err(report)
            }
        });
        upgrade
    }

    /// S2 and S3, with a tap in the main channel.
    #[track_caller]
    pub(crate) fn agree_tapped(vm: &Vm, old: &mut Worker, generation: u32) -> (Self, Tap) {
        let mut upgrade = Self {
            new: Worker::spawn(),
            generation,
        };
        upgrade.new.expect_hello();
        let (tap, old_end, new_end) = Tap::new();
        upgrade.new.configure(vm.config(generation), Some(&new_end));
        old.transfer(&old_end);
        drop((old_end, new_end));
        Tap::relay_frame(&tap.new, &tap.old);
        Tap::relay_frame(&tap.old, &tap.new);
        old.expect("agreed", |report| {
            if report == Report::Agreed {
                Ok(())
            } else {
                Err(report)
            }
        });
        (upgrade, tap)
    }

    /// S4 and S5.
    #[track_caller]
    pub(crate) fn build(&mut self, vm: &Vm) -> BuildTimes {
        self.new
            .hand_over(&vm.header(self.generation), &vm.registry());
        self.new.expect_ready()
    }

    /// S6 and S7.
    #[track_caller]
    pub(crate) fn park(old: &mut Worker) -> Saved {
        old.order(&Order::Park);
        let (first_exit_ns, parked_ns) = old.expect("parked", |report| match report {
            Report::Parked {
                first_exit_ns,
                parked_ns,
            } => Ok((first_exit_ns, parked_ns)),
            other => Err(other),
        });
        old.expect("saved", |report| match report {
            Report::Saved { digest, bytes } => Ok(Saved {
                first_exit_ns,
                parked_ns,
                digest,
                bytes,
            }),
            other => Err(other),
        })
    }

    /// S8.
    #[track_caller]
    pub(crate) fn expect_loaded(&mut self) -> StateDigest {
        self.new.expect("loaded", |report| match report {
            Report::Loaded { digest, .. } => Ok(digest),
            other => Err(other),
        })
    }

    /// All of it; the old worker is killed. The new one, and the blackout in nanoseconds.
    #[track_caller]
    pub(crate) fn complete(vm: &Vm, mut old: Worker, generation: u32) -> (Worker, u64) {
        let mut upgrade = Self::agree(vm, &mut old, generation);
        upgrade.build(vm);
        let saved = Self::park(&mut old);
        assert_eq!(upgrade.expect_loaded(), saved.digest);
        old.order(&Order::Ceded);
        upgrade.new.order(&Order::Commit);
        let last_run_ns = upgrade.new.expect_running();
        assert!(saved.first_exit_ns <= saved.parked_ns && saved.parked_ns < last_run_ns);
        (upgrade.new, last_run_ns - saved.first_exit_ns)
    }
}
