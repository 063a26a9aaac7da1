//! A guest as a broker holds it: its configuration, its descriptors, and what it says of itself.

use super::PATIENCE;
use super::alone;
use super::filters;
use super::memfd;
use super::rand_id;
use super::tap;
use super::wire;
use super::worker::Worker;
use baton_guest::CommandLine;
use baton_guest::DiskReport;
use baton_guest::NetReport;
use baton_guest::layout;
use baton_ipc::DescriptorKey;
use baton_ipc::DescriptorKind;
use baton_ipc::Registry;
use baton_ipc::StartMode;
use baton_ipc::VmId;
use baton_ipc::cpr::CprHeader;
use baton_ipc::descriptor;
use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::Filters;
use baton_ipc::worker::NetConfig;
use baton_ipc::worker::Order;
use baton_ipc::worker::Pages;
use baton_ipc::worker::PanicAction;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::RamRegion;
use baton_ipc::worker::VirtioConfig;
use baton_ipc::worker::VirtioKind;
use baton_ipc::worker::WorkerConfig;
use baton_policy::Role;
use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

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
    held: Vec<Held>,
    _alone: File,
}

/// A device's descriptor, as a broker holds it.
struct Held {
    name: &'static str,
    id: u32,
    kind: DescriptorKind,
    fd: OwnedFd,
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
            backing: RamBacking::Shared,
            boot: [0; 16],
            cmdline: command_line.cpus(cpus.into()).to_string(),
            initrd: false,
            filters: Filters {
                control: steady(Role::Control),
                vcpu: steady(Role::Vcpu),
                io: steady(Role::Io),
            },
            virtio: Vec::new(),
            vfio: Vec::new(),
            io_threads: 1,
            drain_ms: 40,
            on_panic: PanicAction::default(),
            removable: 0,
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
            held: Vec::new(),
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
        let config = self.plug(VirtioKind::Block(block));
        self.hold(
            descriptor::DISK,
            config.slot.into(),
            DescriptorKind::Disk,
            file,
        );
    }

    /// Plugs a device in after all others.
    fn plug(&mut self, device: VirtioKind) -> VirtioConfig {
        let slot = u8::try_from(self.config.virtio.len() + 1).unwrap();
        let config = VirtioConfig { slot, device };
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        for queue in 0..config.device.queues() {
            let kick = rustix::event::eventfd(0, flags).unwrap();
            self.hold(
                descriptor::KICK,
                config.kick(queue),
                DescriptorKind::Eventfd,
                kick,
            );
        }
        self.config.virtio.push(config.clone());
        config
    }

    fn hold(&mut self, name: &'static str, id: u32, kind: DescriptorKind, fd: OwnedFd) {
        self.held.push(Held { name, id, kind, fd });
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
        let config = self.plug(VirtioKind::Net(net));
        for (queue, pair) in tap.queues.into_iter().zip(0..) {
            self.hold(
                descriptor::NET,
                config.tap(pair),
                DescriptorKind::Tap,
                queue,
            );
        }
        wire
    }

    /// A device's descriptor.
    pub(crate) fn held(&self, name: &str, id: u32) -> &OwnedFd {
        let mut all = self.held.iter();
        let found = all.find(|held| (held.name, held.id) == (name, id));
        &found.unwrap().fd
    }

    /// The disk in the first slot.
    pub(crate) fn disk(&self) -> &OwnedFd {
        self.held(descriptor::DISK, 1)
    }

    /// What the guest notifies the first queue of the device in the first slot by.
    pub(crate) fn first_kick(&self) -> &OwnedFd {
        self.held(descriptor::KICK, self.config.virtio[0].kick(0))
    }

    /// What the guest says of a device: `parse` of its report.
    pub(crate) fn says<T>(&self, parse: fn(&[u8]) -> T) -> T {
        let mut bytes = vec![0; layout::REPORT_SIZE];
        rustix::io::pread(&self.ram, &mut bytes, layout::REPORT_ADDRESS).unwrap();
        parse(&bytes)
    }

    #[track_caller]
    pub(crate) fn wait_until<T: std::fmt::Debug>(
        &self,
        parse: fn(&[u8]) -> T,
        what: &str,
        mut wanted: impl FnMut(&T) -> bool,
    ) -> T {
        let begun = Instant::now();
        loop {
            let report = self.says(parse);
            if wanted(&report) {
                return report;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the guest never came to: {what}; {report:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What the guest says of its network interface.
    pub(crate) fn net_report(&self) -> NetReport {
        self.says(NetReport::parse)
    }

    /// Waits until what the guest says of its network interface is as wanted.
    #[track_caller]
    pub(crate) fn wait_for_net(
        &self,
        what: &str,
        wanted: impl FnMut(&NetReport) -> bool,
    ) -> NetReport {
        self.wait_until(NetReport::parse, what, wanted)
    }

    /// What the guest says of its disk.
    pub(crate) fn disk_report(&self) -> DiskReport {
        self.says(DiskReport::parse)
    }

    /// Waits until what the guest says of its disk is as wanted.
    #[track_caller]
    pub(crate) fn wait_for_disk(
        &self,
        what: &str,
        wanted: impl FnMut(&DiskReport) -> bool,
    ) -> DiskReport {
        self.wait_until(DiskReport::parse, what, wanted)
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
        for Held { name, id, kind, fd } in &self.held {
            save_as(name, *id, *kind, fd.try_clone().unwrap());
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

    pub(super) fn header(&self, generation: u32) -> CprHeader {
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
