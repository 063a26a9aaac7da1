//! Runs in the SVM host, for `check`: boots a guest of three instructions by KVM and prints what the kernel says of
//! itself. Fails if the guest did not run.

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

unsafe extern "C" {
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn mmap(
        at: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn syscall(number: c_long, ...) -> c_long;
}

// linux/kvm.h
const KVM_GET_API_VERSION: c_ulong = 0xae00;
const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_RUN: c_ulong = 0xae80;
const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HLT: u32 = 5;
/// Offsets in `struct kvm_run` of `exit_reason` and `io.data_offset`.
const EXIT_REASON: usize = 8;
const IO_DATA_OFFSET: usize = 40;

const CAPABILITIES: [(&str, c_ulong); 7] = [
    ("KVM_CAP_NR_MEMSLOTS", 10),
    ("KVM_CAP_MAX_VCPUS", 66),
    ("KVM_CAP_NESTED_STATE", 157),
    ("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", 223),
    ("KVM_CAP_XSAVE2", 208),
    ("KVM_CAP_SYS_ATTRIBUTES", 209),
    ("KVM_CAP_PRE_FAULT_MEMORY", 236),
];

const SYS_LANDLOCK_CREATE_RULESET: c_long = 444;
const LANDLOCK_CREATE_RULESET_VERSION: c_ulong = 1;

const PAGE: usize = 4096;

fn call(fd: &impl AsRawFd, request: c_ulong, argument: c_ulong) -> io::Result<c_int> {
    // SAFETY: the requests used here read their argument or, with an address, the structure below that lives across
    // the call.
    match unsafe { ioctl(fd.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn open(fd: c_int) -> OwnedFd {
    // SAFETY: KVM has just given us this descriptor.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn map(length: usize, flags: c_int, fd: c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping, at an address of the kernel's choice, readable and writable.
    let at = unsafe { mmap(ptr::null_mut(), length, 1 | 2, flags, fd, 0) };
    if at.addr() == usize::MAX {
        Err(io::Error::last_os_error())
    } else {
        Ok(at.cast())
    }
}

fn main() -> io::Result<()> {
    // SAFETY: without attributes and with this flag the call only returns a number.
    let abi = unsafe {
        syscall(
            SYS_LANDLOCK_CREATE_RULESET,
            ptr::null::<c_void>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    println!("landlock ABI {abi}");

    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    println!("KVM API {}", call(&kvm, KVM_GET_API_VERSION, 0)?);
    let vm = open(call(&kvm, KVM_CREATE_VM, 0)?);
    for (name, number) in CAPABILITIES {
        println!("{name} {}", call(&vm, KVM_CHECK_EXTENSION, number)?);
    }

    // One page under 4 GiB, where a processor starts: mov al, 42; out 0x10, al; hlt.
    let page = map(PAGE, 0x01 | 0x20, -1)?;
    for (offset, byte) in [0xb0, 0x2a, 0xe6, 0x10, 0xf4].into_iter().enumerate() {
        // SAFETY: 0xff4 lies in the page.
        unsafe { page.add(0xff0 + offset).write(byte) };
    }
    // struct kvm_userspace_memory_region: slot and flags, guest address, size, our address.
    let region: [u64; 4] = [0, 0xffff_f000, PAGE as u64, page.addr() as u64];
    call(
        &vm,
        KVM_SET_USER_MEMORY_REGION,
        region.as_ptr().addr() as c_ulong,
    )?;
    let vcpu = open(call(&vm, KVM_CREATE_VCPU, 0)?);
    let length =
        usize::try_from(call(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?).map_err(io::Error::other)?;
    let run = map(length, 0x01, vcpu.as_raw_fd())?;
    // SAFETY: within the mapping, aligned, and written by the kernel only while KVM_RUN runs.
    let reason = || unsafe { run.add(EXIT_REASON).cast::<u32>().read_volatile() };

    call(&vcpu, KVM_RUN, 0)?;
    assert_eq!(reason(), KVM_EXIT_IO, "the guest's first exit");
    // SAFETY: as above; the kernel's offset is within the mapping.
    let written = unsafe {
        run.add(run.add(IO_DATA_OFFSET).cast::<u64>().read_volatile() as usize)
            .read_volatile()
    };
    call(&vcpu, KVM_RUN, 0)?;
    assert_eq!(reason(), KVM_EXIT_HLT, "the guest's second exit");
    println!("guest wrote {written}");
    Ok(())
}
