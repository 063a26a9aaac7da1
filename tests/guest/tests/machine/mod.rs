//! The least machine that boots the guest: KVM's own interrupt controllers, RAM, a serial port, and ears on the ports
//! that end it. Nothing of the project's VMM, so that a failing test here is the guest's fault.
#![expect(
    unsafe_code,
    reason = "a memory slot points KVM at this process's memory; vCPU threads are stopped by a signal"
)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test that cannot build its machine fails"
)]
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses its part of this module"
)]

use std::collections::VecDeque;
use std::io::Cursor;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use baton_guest::layout::{MAILBOX_OFFSET, REPORT_ADDRESS, REPORT_SIZE};
use baton_guest::{CommandLine, ConsoleLine, ELF, Report, StatusLog};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_msi, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{KernelLoader, elf::Elf};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where the boot data lie, in guest-physical bytes.
const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Long enough for an emulated ring on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    KeyboardReset,
    AcpiReset,
    AcpiOff,
    TripleFault,
}

#[derive(Default)]
struct Ports {
    output: Vec<u8>,
    input: VecDeque<u8>,
    end: Option<End>,
    unexpected: Vec<String>,
}

/// A running guest.
pub(crate) struct Machine {
    pub(crate) memory: GuestMemoryMmap<()>,
    ports: Arc<Mutex<Ports>>,
    stop: Arc<AtomicBool>,
    pause: Arc<AtomicBool>,
    paused: Arc<AtomicUsize>,
    vcpus: Vec<JoinHandle<()>>,
    vm: VmFd,
}

extern "C" fn interrupted(_: libc::c_int) {}

fn lock(ports: &Mutex<Ports>) -> MutexGuard<'_, Ports> {
    ports.lock().expect("no thread panicked with the ports")
}

/// Blank RAM in ranges of guest-physical address and length, in bytes.
pub(crate) fn blank_memory(ranges: &[(u64, u64)]) -> GuestMemoryMmap<()> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, bytes)| (GuestAddress(*start), usize::try_from(*bytes).unwrap()))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).expect("address space for the guest's RAM")
}

impl Machine {
    /// Boots the guest on that many bytes of blank RAM.
    pub(crate) fn boot(bytes: u64, vcpus: usize, line: CommandLine) -> Self {
        Self::boot_on(blank_memory(&[(0, bytes)]), vcpus, line)
    }

    /// Boots the guest on RAM that may hold what an earlier guest left there.
    pub(crate) fn boot_on(memory: GuestMemoryMmap<()>, vcpus: usize, line: CommandLine) -> Self {
        let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        for (slot, region) in memory.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(slot).unwrap(),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: memory.get_host_address(region.start_addr()).unwrap() as u64,
            };
            // SAFETY: the mapping outlives the VM: `Machine` drops its threads first, and holds the memory.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let mut vcpus: Vec<VcpuFd> = (0..vcpus as u64)
            .map(|id| vm.create_vcpu(id).unwrap())
            .collect();
        for vcpu in &vcpus {
            vcpu.set_cpuid2(&cpuid).unwrap();
        }
        let line = line.tsc_khz(vcpus[0].get_tsc_khz().unwrap());
        let entry = load(&memory, &line);
        set_registers(&mut vcpus[0], entry);

        // SAFETY: a handler that does nothing, so that a signal only interrupts KVM_RUN.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupted as *const () as usize;
            assert_eq!(
                libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        let mut machine = Self {
            memory,
            ports: Arc::default(),
            stop: Arc::default(),
            pause: Arc::default(),
            paused: Arc::default(),
            vcpus: Vec::new(),
            vm,
        };
        machine.vcpus = vcpus.into_iter().map(|vcpu| machine.spawn(vcpu)).collect();
        machine
    }

    fn spawn(&self, mut vcpu: VcpuFd) -> JoinHandle<()> {
        let (ports, stop) = (Arc::clone(&self.ports), Arc::clone(&self.stop));
        let (pause, paused) = (Arc::clone(&self.pause), Arc::clone(&self.paused));
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                if pause.load(Ordering::SeqCst) {
                    paused.fetch_add(1, Ordering::SeqCst);
                    while pause.load(Ordering::SeqCst) && !stop.load(Ordering::SeqCst) {
                        thread::sleep(Duration::from_micros(200));
                    }
                    paused.fetch_sub(1, Ordering::SeqCst);
                }
                match vcpu.run() {
                    Ok(VcpuExit::Intr) => {}
                    Ok(exit) => {
                        if !lock(&ports).serve(exit) {
                            stop.store(true, Ordering::SeqCst);
                        }
                    }
                    Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                    Err(error) => {
                        lock(&ports).unexpected.push(format!("KVM_RUN: {error}"));
                        stop.store(true, Ordering::SeqCst);
                    }
                }
            }
        })
    }

    fn kick(&self) {
        for vcpu in self.vcpus.iter().filter(|vcpu| !vcpu.is_finished()) {
            // SAFETY: the thread is not joined yet, so its id is still its own.
            unsafe { libc::pthread_kill(vcpu.as_pthread_t(), libc::SIGUSR1) };
        }
    }

    /// Interrupts a vCPU as a device would.
    pub(crate) fn interrupt(&self, vcpu: u32, vector: u32) {
        let message = kvm_msi {
            address_lo: 0xfee0_0000 | vcpu << 12,
            data: vector,
            ..Default::default()
        };
        assert_eq!(self.vm.signal_msi(message).unwrap(), 1, "not delivered");
    }

    /// Holds every vCPU outside the guest while `during` runs.
    pub(crate) fn paused<T>(&self, during: impl FnOnce() -> T) -> T {
        self.pause.store(true, Ordering::SeqCst);
        self.until("the vCPUs stop", |machine| {
            machine.kick();
            (machine.paused.load(Ordering::SeqCst) == machine.vcpus.len()).then_some(())
        });
        let result = during();
        self.pause.store(false, Ordering::SeqCst);
        self.until("the vCPUs go on", |machine| {
            (machine.paused.load(Ordering::SeqCst) == 0).then_some(())
        });
        result
    }

    /// Asks `condition` until it answers.
    pub(crate) fn until<T>(&self, what: &str, mut condition: impl FnMut(&Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(answer) = condition(self) {
                return answer;
            }
            let ports = lock(&self.ports);
            assert!(
                ports.unexpected.is_empty(),
                "while waiting until {what}: {:?}",
                ports.unexpected
            );
            let output = String::from_utf8_lossy(&ports.output).into_owned();
            drop(ports);
            assert!(
                start.elapsed() < PATIENCE,
                "waited in vain until {what}; report {:?}; console:\n{output}",
                self.report()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the guest reports now.
    pub(crate) fn report(&self) -> Option<Report> {
        let mut bytes = [0; REPORT_SIZE];
        self.memory
            .read_slice(&mut bytes, GuestAddress(REPORT_ADDRESS))
            .unwrap();
        Report::parse(&bytes).ok()
    }

    /// What the guest reports while no vCPU runs.
    pub(crate) fn stopped_report(&self) -> Report {
        self.paused(|| self.report()).expect("the guest has booted")
    }

    /// Waits for a report that `condition` likes.
    pub(crate) fn report_when(
        &self,
        what: &str,
        mut condition: impl FnMut(&Report) -> bool,
    ) -> Report {
        self.until(what, |machine| machine.report().filter(&mut condition))
    }

    pub(crate) fn mail(&self, command: u64) {
        self.memory
            .write_obj(
                command,
                GuestAddress(REPORT_ADDRESS + MAILBOX_OFFSET as u64),
            )
            .unwrap();
    }

    pub(crate) fn type_in(&self, text: &str) {
        lock(&self.ports).input.extend(text.bytes());
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8(lock(&self.ports).output.clone()).expect("the guest prints ASCII")
    }

    pub(crate) fn lines(&self) -> Vec<ConsoleLine> {
        ConsoleLine::parse_all(&self.console()).unwrap()
    }

    pub(crate) fn status_lines(&self) -> StatusLog {
        StatusLog::parse(&self.console()).unwrap()
    }

    /// Waits for the guest's end.
    pub(crate) fn end(&self) -> End {
        self.until("the guest ends", |machine| lock(&machine.ports).end)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while self.vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
            self.kick();
            thread::sleep(Duration::from_millis(1));
        }
        for vcpu in self.vcpus.drain(..) {
            let _ = vcpu.join();
        }
    }
}

impl Ports {
    /// Answers an exit; false when it ends the machine.
    fn serve(&mut self, exit: VcpuExit<'_>) -> bool {
        match exit {
            VcpuExit::IoOut(0x3f8, data) => self.output.extend(data),
            VcpuExit::IoOut(0x3f9..=0x3ff, _) => {}
            VcpuExit::IoIn(0x3fd, data) => data.fill(0x60 | u8::from(!self.input.is_empty())),
            VcpuExit::IoIn(0x3fa, data) => data.fill(0xc1),
            VcpuExit::IoIn(0x3f8, data) => data.fill(self.input.pop_front().unwrap_or_default()),
            VcpuExit::IoOut(0x64, [0xfe]) => self.end = Some(End::KeyboardReset),
            VcpuExit::IoOut(0x612, [1]) => self.end = Some(End::AcpiReset),
            VcpuExit::IoOut(0x604, [0x00, 0x34]) => self.end = Some(End::AcpiOff),
            VcpuExit::Shutdown => self.end = Some(End::TripleFault),
            other => self.unexpected.push(format!("{other:?}")),
        }
        self.end.is_none() && self.unexpected.is_empty()
    }
}

/// Puts image, zero page, command line and tables into RAM; says where to enter.
fn load(memory: &GuestMemoryMmap<()>, line: &CommandLine) -> u64 {
    let loaded =
        Elf::load(memory, None, &mut Cursor::new(ELF), None).expect("linux-loader takes the image");

    let line = format!("{line}\0");
    memory
        .write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))
        .unwrap();
    memory
        .write_slice(&[0; 4096], GuestAddress(ZERO_PAGE))
        .unwrap();
    memory
        .write_obj(
            u32::try_from(COMMAND_LINE).unwrap(),
            GuestAddress(ZERO_PAGE + 0x228),
        )
        .unwrap();
    let mut entries = vec![(0, 0x9_fc00, 1_u32), (0x9_fc00, 0x6_0400, 2)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(0x10_0000);
        entries.push((start, region.start_addr().0 + region.len() - start, 1));
    }
    memory
        .write_obj(
            u8::try_from(entries.len()).unwrap(),
            GuestAddress(ZERO_PAGE + 0x1e8),
        )
        .unwrap();
    for (index, (address, length, kind)) in (0..).zip(entries) {
        let entry = ZERO_PAGE + 0x2d0 + 20 * index;
        memory
            .write_obj::<u64>(address, GuestAddress(entry))
            .unwrap();
        memory
            .write_obj::<u64>(length, GuestAddress(entry + 8))
            .unwrap();
        memory
            .write_obj::<u32>(kind, GuestAddress(entry + 16))
            .unwrap();
    }

    // One PML4, one PDPT, four directories of 2 MiB pages, without the user bit.
    memory
        .write_obj(PAGE_TABLES + 0x1003, GuestAddress(PAGE_TABLES))
        .unwrap();
    for gib in 0..4 {
        let directory = PAGE_TABLES + 0x2000 + gib * 0x1000;
        memory
            .write_obj(directory | 3, GuestAddress(PAGE_TABLES + 0x1000 + 8 * gib))
            .unwrap();
        for page in 0..512_u64 {
            memory
                .write_obj(
                    gib << 30 | page << 21 | 0x83,
                    GuestAddress(directory + 8 * page),
                )
                .unwrap();
        }
    }
    for (index, descriptor) in (0..).zip([0_u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]) {
        memory
            .write_obj(descriptor, GuestAddress(GDT + 8 * index))
            .unwrap();
    }
    loaded.kernel_load.0
}

/// Registers of the 64-bit boot protocol, and nothing more.
fn set_registers(vcpu: &mut VcpuFd, entry: u64) {
    let segment = |selector, type_, long| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    let mut special = vcpu.get_sregs().unwrap();
    let data = segment(0x18, 3, 0);
    special.cs = segment(0x10, 11, 1);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    (special.gdt.base, special.gdt.limit) = (GDT, 31);
    (special.cr0, special.cr3, special.cr4, special.efer) = (0x8000_0011, PAGE_TABLES, 0x20, 0x500);
    vcpu.set_sregs(&special).unwrap();
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    })
    .unwrap();
}
