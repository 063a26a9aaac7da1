//! vCPUs of a real VM, stopped at chosen moments.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;

use kvm_bindings::CpuId;
use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::devices::Bus;
use crate::devices::bus::BusDevice;
use crate::devices::power::PowerEvent;
use crate::devices::power::PowerLatch;
use crate::vm;

const CODE: u64 = 0x1000;
/// Longer than any stop takes here.
const LONG: Duration = Duration::from_secs(30);

/// A device that says when it is accessed, and does not answer before it is told to.
struct Slow {
    accessed: Sender<()>,
    answer: Receiver<u8>,
}

impl BusDevice for Slow {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.accessed.send(()).unwrap();
        data.fill(self.answer.recv().unwrap());
    }

    fn write(&mut self, _: u64, _: &[u8]) {
        self.accessed.send(()).unwrap();
        self.answer.recv().unwrap();
    }
}

struct Machine {
    vcpus: Vcpus,
    power: Arc<PowerLatch>,
    accessed: Receiver<()>,
    answer: Sender<u8>,
}

/// A vCPU in real mode before `code`, with a slow device on port 0x10 and at 0xd0000000.
fn machine(code: &[u8]) -> Machine {
    signals::install_kick().unwrap();
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("this test needs /dev/kvm");
    let (vm, host) = vm::create(OwnedFd::from(kvm)).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    vm::add_memory(&vm, Box::leak(Box::new(memory))).unwrap();
    let fds = vm::add_processors(&vm, 1).unwrap();
    fds[0]
        .set_cpuid2(&CpuId::from_entries(&host.cpuid).unwrap())
        .unwrap();
    let inventory = Arc::new(Inventory::of(&fds[0], &host.msrs, host.xsave).unwrap());

    let ((accessed_by, accessed), (answer, answered)) = (mpsc::channel(), mpsc::channel());
    let slow = Arc::new(Mutex::new(Slow {
        accessed: accessed_by,
        answer: answered,
    }));
    let (mut ports, mut mmio) = (Bus::new(), Bus::new());
    ports.insert(0x10, 8, slow.clone()).unwrap();
    mmio.insert(0xd000_0000, 0x1000, slow).unwrap();
    let power = PowerLatch::new(Arc::new(|| {}));
    let exits = Exits {
        ports: Arc::new(ports),
        mmio: Arc::new(mmio),
        power: Arc::clone(&power),
    };
    let rendezvous = Rendezvous::new(Arc::new(|| {}));
    let mut vcpus = Vcpus::spawn(fds, &inventory, &exits, rendezvous).unwrap();
    let mut states = vcpus.save().unwrap();
    let state = &mut states[0];
    (state.sregs.cs.base, state.sregs.cs.selector, state.regs.rip) = (0, 0, CODE);
    // Flat real mode, so that 32-bit addresses reach the device.
    (state.sregs.ds.limit, state.sregs.ds.g) = (u32::MAX, 1);
    vcpus.load(states, Purpose::Transfer).unwrap();
    // The VM lives as long as its vCPUs' threads, which is for ever.
    std::mem::forget(vm);
    Machine {
        vcpus,
        power,
        accessed,
        answer,
    }
}

/// Runs until the device is accessed, kicks the vCPU while it is, and then lets the device answer.
fn stop_within_an_access(machine: &mut Machine, answer: u8) {
    machine.vcpus.release(false);
    machine.accessed.recv_timeout(LONG).unwrap();
    let device = machine.answer.clone();
    let page = Arc::clone(&machine.vcpus.handles[0].page);
    let answering = std::thread::spawn(move || {
        while !page.immediate_exit() {
            std::thread::yield_now();
        }
        device.send(answer).unwrap();
    });
    machine.vcpus.stop(LONG).unwrap();
    answering.join().unwrap();
}

#[test]
fn a_read_that_is_under_way_is_completed_before_the_stop() {
    // in al, 0x10; jmp $
    let mut machine = machine(&[0xe4, 0x10, 0xeb, 0xfe]);
    stop_within_an_access(&mut machine, 0x5a);
    let state = &machine.vcpus.save().unwrap()[0];
    assert_eq!((state.regs.rax & 0xff, state.regs.rip), (0x5a, CODE + 2));
    assert!(
        machine.accessed.try_recv().is_err(),
        "the access was made twice"
    );
}

#[test]
fn a_memory_read_that_is_under_way_is_completed_before_the_stop() {
    // mov ebx, 0xd0000000; mov al, [ebx]; jmp $
    let mut machine = machine(&[0x66, 0xbb, 0, 0, 0, 0xd0, 0x67, 0x8a, 0x03, 0xeb, 0xfe]);
    stop_within_an_access(&mut machine, 0xa5);
    let state = &machine.vcpus.save().unwrap()[0];
    assert_eq!((state.regs.rax & 0xff, state.regs.rip), (0xa5, CODE + 9));
}

#[test]
fn an_instruction_with_several_accesses_is_stopped_between_them_or_after() {
    // cld; mov ecx, 4; mov di, 0x2000; mov dx, 0x10; rep insb; jmp $
    let mut machine = machine(&[
        0xfc, 0x66, 0xb9, 4, 0, 0, 0, 0xbf, 0, 0x20, 0xba, 0x10, 0, 0xf3, 0x6c, 0xeb, 0xfe,
    ]);
    for _ in 0..3 {
        machine.answer.send(7).unwrap();
    }
    stop_within_an_access(&mut machine, 7);
    let left = machine.vcpus.save().unwrap()[0].regs.rcx;
    let (made, under_way) = (4 - left, machine.accessed.try_iter().count() as u64 + 1);
    assert_eq!(
        made, under_way,
        "every access that was made shows in the registers"
    );
}

#[test]
fn a_guest_that_asks_for_its_end_executes_nothing_more() {
    // in al, 0x10; inc bx; jmp $: the device raises the event within the access.
    let mut machine = machine(&[0xe4, 0x10, 0x43, 0xeb, 0xfe]);
    machine.vcpus.release(false);
    machine.accessed.recv_timeout(LONG).unwrap();
    machine.power.raise(PowerEvent::Reset);
    machine.answer.send(1).unwrap();
    let begun = Instant::now();
    while machine.vcpus.handles[0].running {
        machine.vcpus.notice();
        assert!(begun.elapsed() < LONG);
    }
    let state = &machine.vcpus.save().unwrap()[0];
    assert_eq!((state.regs.rip, state.regs.rbx), (CODE + 2, 0));
}

#[test]
fn a_vcpu_that_stops_late_is_waited_for_again() {
    let mut machine = machine(&[0xe4, 0x10, 0xeb, 0xfe]);
    machine.vcpus.release(false);
    machine.accessed.recv_timeout(LONG).unwrap();
    let timeout = Duration::from_millis(20);
    let error = machine.vcpus.stop(timeout).unwrap_err();
    assert!(
        matches!(error, VcpuError::Silent { index: 0, .. }),
        "{error}"
    );
    machine.answer.send(3).unwrap();
    machine.vcpus.stop(LONG).unwrap();
    assert_eq!(machine.vcpus.save().unwrap()[0].regs.rax & 0xff, 3);
    // And it can be released, and stopped, as if nothing had been.
    for _ in 0..100 {
        machine.vcpus.release(true);
        machine.vcpus.stop(LONG).unwrap();
    }
}
