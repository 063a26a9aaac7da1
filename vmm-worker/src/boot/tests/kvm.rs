//! Small kernels, run by KVM over the real buses and devices. They run at CPL 0, which kvm-pvm emulates: slowly, and
//! that is enough for a few instructions.
#![expect(
    unsafe_code,
    reason = "a memory slot points KVM at this process's memory"
)]

use std::sync::Arc;
use std::sync::Mutex;

use baton_ipc::StartMode;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryRegion as _;

use super::*;
use crate::boot::layout;
use crate::boot::registers;
use crate::devices::Bus;
use crate::devices::Device as _;
use crate::devices::i8042::I8042;
use crate::devices::power::Power;
use crate::devices::power::PowerEvent;
use crate::devices::power::PowerLatch;
use crate::devices::serial::SerialPort;

/// `mov dx, 0x3F8`, which is the same in 32-bit and 64-bit mode.
const DX_COM1: [u8; 4] = [0x66, 0xBA, 0xF8, 0x03];
/// `out dx, al`
const OUT: [u8; 1] = [0xEE];
/// `mov al, 0xFE; out 0x64, al`: reset.
const RESET: [u8; 4] = [0xB0, 0xFE, 0xE6, 0x64];

/// Boots `kernel` on `mem`, runs it until it resets, and says what it wrote to the console.
fn run(mem: &GuestMemoryMmap, kernel: &[u8]) -> Vec<u8> {
    let loaded = boot(mem, kernel).unwrap();

    let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
    let vm = kvm.create_vm().unwrap();
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .unwrap();
    vm.set_tss_address(layout::KVM_TSS as usize).unwrap();
    for (slot, region) in mem.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: mem.get_host_address(region.start_addr()).unwrap() as u64,
        };
        // SAFETY: `mem` is borrowed for longer than the VM lives, and nobody else maps it.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let (regs, sregs) = registers(&loaded.entry, vcpu.get_sregs().unwrap());
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&regs).unwrap();

    let power = PowerLatch::new(Arc::new(|| {}));
    Power::new(Arc::clone(&power))
        .resume(StartMode::None)
        .unwrap();
    let mut serial = SerialPort::new(0, Arc::new(|| {}), Arc::new(|| {}));
    serial.setup(StartMode::None).unwrap();
    serial.resume(StartMode::None).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let i8042 = Arc::new(Mutex::new(I8042::new(Arc::clone(&power))));
    let mut ports = Bus::new();
    ports
        .insert(
            layout::COM1_PORT.into(),
            layout::COM1_PORTS.into(),
            serial.clone(),
        )
        .unwrap();
    ports
        .insert(layout::I8042_PORT.into(), layout::I8042_PORTS.into(), i8042)
        .unwrap();

    for _ in 0..1000 {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(port, data) => {
                assert!(ports.write(port.into(), data), "port {port:#x}")
            }
            VcpuExit::IoIn(port, data) => ports.read(port.into(), data),
            other => panic!("{other:?}"),
        }
        match power.take() {
            Some(PowerEvent::Reset) => {
                let mut output = Vec::new();
                let drained = serial.lock().unwrap().drain(|bytes| {
                    output.extend_from_slice(bytes);
                    Ok(bytes.len())
                });
                assert_eq!(drained.unwrap(), output.len());
                return output;
            }
            Some(other) => panic!("{other:?}"),
            None => {}
        }
    }
    panic!("no reset");
}

/// Code for a 64-bit entry: prints a byte of the zero page, one that went over the stack, and one that went through RAM
/// above 4 GiB.
fn long_code() -> Vec<u8> {
    let mut code = DX_COM1.to_vec();
    // mov al, [rsi + 0x202]
    code.extend([0x8A, 0x86, 0x02, 0x02, 0, 0]);
    code.extend(OUT);
    // push 'S'; pop rax
    code.extend([0x6A, b'S', 0x58]);
    code.extend(OUT);
    // mov rcx, 1 << 32; mov byte [rcx], 'h'; mov al, [rcx]
    code.extend([
        0x48, 0xB9, 0, 0, 0, 0, 1, 0, 0, 0, 0xC6, 0x01, b'h', 0x8A, 0x01,
    ]);
    code.extend(OUT);
    code.extend(RESET);
    code
}

fn split_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 64 << 20),
        (GuestAddress(layout::HIGH_RAM_START), 2 << 20),
    ])
    .unwrap()
}

#[test]
fn a_64_bit_elf_runs() {
    let kernel = ElfFile::new(0x20_0000, &long_code());
    assert_eq!(run(&split_memory(), &kernel.build()), b"HSh");
}

#[test]
fn a_bzimage_runs() {
    assert_eq!(run(&split_memory(), &bz_image(&long_code())), b"HSh");
}

#[test]
fn a_pvh_kernel_runs() {
    let mut code = DX_COM1.to_vec();
    // mov al, [ebx]: the low byte of the start info's magic number
    code.extend([0x8A, 0x03]);
    code.extend(OUT);
    // mov al, 'V'
    code.extend([0xB0, b'V']);
    code.extend(OUT);
    code.extend(RESET);
    // The ELF entry is a trap: only the note's may be taken.
    let kernel = ElfFile::new(0x20_0000, &[0x0F, 0x0B])
        .segment(0x30_0000, &code, 0x1000)
        .pvh(0x30_0000);
    assert_eq!(run(&guest_memory(64), &kernel.build()), b"xV");
}
