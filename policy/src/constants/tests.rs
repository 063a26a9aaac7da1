//! Each value computed again from its definition.

use super::*;
use kvm_bindings::*;
use std::collections::BTreeSet;
use std::mem::size_of;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const BOTH: u32 = 3;

/// `_IOC(dir, type, nr, size)` of `asm-generic/ioctl.h`.
fn ioc(direction: u32, kind: u32, number: u32, size: usize) -> u64 {
    let size = u32::try_from(size).unwrap();
    assert!(size < 1 << 14, "the size field has 14 bits");
    u64::from((direction << 30) | (size << 16) | (kind << 8) | number)
}

/// The definitions in `linux/kvm.h`, all of ioctl type `KVMIO`, 0xae: direction, number, structure.
fn kvm_definitions() -> Vec<(&'static str, u32, u32, usize)> {
    // struct kvm_pre_fault_memory { __u64 gpa, size, flags; __u64 padding[5]; } is newer than the bindings.
    vec![
        ("KVM_GET_API_VERSION", NONE, 0x00, 0),
        ("KVM_CREATE_VM", NONE, 0x01, 0),
        (
            "KVM_GET_MSR_INDEX_LIST",
            BOTH,
            0x02,
            size_of::<kvm_msr_list>(),
        ),
        ("KVM_CHECK_EXTENSION", NONE, 0x03, 0),
        ("KVM_GET_VCPU_MMAP_SIZE", NONE, 0x04, 0),
        (
            "KVM_GET_SUPPORTED_CPUID",
            BOTH,
            0x05,
            size_of::<kvm_cpuid2>(),
        ),
        (
            "KVM_GET_EMULATED_CPUID",
            BOTH,
            0x09,
            size_of::<kvm_cpuid2>(),
        ),
        (
            "KVM_GET_MSR_FEATURE_INDEX_LIST",
            BOTH,
            0x0a,
            size_of::<kvm_msr_list>(),
        ),
        ("KVM_CREATE_VCPU", NONE, 0x41, 0),
        ("KVM_GET_DIRTY_LOG", WRITE, 0x42, size_of::<kvm_dirty_log>()),
        (
            "KVM_SET_USER_MEMORY_REGION",
            WRITE,
            0x46,
            size_of::<kvm_userspace_memory_region>(),
        ),
        ("KVM_SET_TSS_ADDR", NONE, 0x47, 0),
        ("KVM_SET_IDENTITY_MAP_ADDR", WRITE, 0x48, size_of::<u64>()),
        (
            "KVM_SET_USER_MEMORY_REGION2",
            WRITE,
            0x49,
            size_of::<kvm_userspace_memory_region2>(),
        ),
        ("KVM_CREATE_IRQCHIP", NONE, 0x60, 0),
        ("KVM_IRQ_LINE", WRITE, 0x61, size_of::<kvm_irq_level>()),
        ("KVM_GET_IRQCHIP", BOTH, 0x62, size_of::<kvm_irqchip>()),
        ("KVM_SET_IRQCHIP", READ, 0x63, size_of::<kvm_irqchip>()),
        (
            "KVM_IRQ_LINE_STATUS",
            BOTH,
            0x67,
            size_of::<kvm_irq_level>(),
        ),
        (
            "KVM_SET_GSI_ROUTING",
            WRITE,
            0x6a,
            size_of::<kvm_irq_routing>(),
        ),
        ("KVM_REINJECT_CONTROL", NONE, 0x71, 0),
        ("KVM_IRQFD", WRITE, 0x76, size_of::<kvm_irqfd>()),
        ("KVM_CREATE_PIT2", WRITE, 0x77, size_of::<kvm_pit_config>()),
        ("KVM_SET_BOOT_CPU_ID", NONE, 0x78, 0),
        ("KVM_IOEVENTFD", WRITE, 0x79, size_of::<kvm_ioeventfd>()),
        ("KVM_SET_CLOCK", WRITE, 0x7b, size_of::<kvm_clock_data>()),
        ("KVM_GET_CLOCK", READ, 0x7c, size_of::<kvm_clock_data>()),
        ("KVM_GET_PIT2", READ, 0x9f, size_of::<kvm_pit_state2>()),
        ("KVM_SET_PIT2", WRITE, 0xa0, size_of::<kvm_pit_state2>()),
        ("KVM_ENABLE_CAP", WRITE, 0xa3, size_of::<kvm_enable_cap>()),
        ("KVM_SIGNAL_MSI", WRITE, 0xa5, size_of::<kvm_msi>()),
        (
            "KVM_CLEAR_DIRTY_LOG",
            BOTH,
            0xc0,
            size_of::<kvm_clear_dirty_log>(),
        ),
        (
            "KVM_CREATE_DEVICE",
            BOTH,
            0xe0,
            size_of::<kvm_create_device>(),
        ),
        (
            "KVM_CREATE_GUEST_MEMFD",
            BOTH,
            0xd4,
            size_of::<kvm_create_guest_memfd>(),
        ),
        ("KVM_RUN", NONE, 0x80, 0),
        ("KVM_GET_REGS", READ, 0x81, size_of::<kvm_regs>()),
        ("KVM_SET_REGS", WRITE, 0x82, size_of::<kvm_regs>()),
        ("KVM_GET_SREGS", READ, 0x83, size_of::<kvm_sregs>()),
        ("KVM_SET_SREGS", WRITE, 0x84, size_of::<kvm_sregs>()),
        ("KVM_TRANSLATE", BOTH, 0x85, size_of::<kvm_translation>()),
        ("KVM_INTERRUPT", WRITE, 0x86, size_of::<kvm_interrupt>()),
        ("KVM_GET_MSRS", BOTH, 0x88, size_of::<kvm_msrs>()),
        ("KVM_SET_MSRS", WRITE, 0x89, size_of::<kvm_msrs>()),
        (
            "KVM_SET_SIGNAL_MASK",
            WRITE,
            0x8b,
            size_of::<kvm_signal_mask>(),
        ),
        ("KVM_GET_FPU", READ, 0x8c, size_of::<kvm_fpu>()),
        ("KVM_SET_FPU", WRITE, 0x8d, size_of::<kvm_fpu>()),
        ("KVM_GET_LAPIC", READ, 0x8e, size_of::<kvm_lapic_state>()),
        ("KVM_SET_LAPIC", WRITE, 0x8f, size_of::<kvm_lapic_state>()),
        ("KVM_SET_CPUID2", WRITE, 0x90, size_of::<kvm_cpuid2>()),
        ("KVM_GET_CPUID2", BOTH, 0x91, size_of::<kvm_cpuid2>()),
        ("KVM_GET_MP_STATE", READ, 0x98, size_of::<kvm_mp_state>()),
        ("KVM_SET_MP_STATE", WRITE, 0x99, size_of::<kvm_mp_state>()),
        ("KVM_NMI", NONE, 0x9a, 0),
        (
            "KVM_SET_GUEST_DEBUG",
            WRITE,
            0x9b,
            size_of::<kvm_guest_debug>(),
        ),
        ("KVM_X86_SETUP_MCE", WRITE, 0x9c, size_of::<u64>()),
        (
            "KVM_X86_GET_MCE_CAP_SUPPORTED",
            READ,
            0x9d,
            size_of::<u64>(),
        ),
        (
            "KVM_GET_VCPU_EVENTS",
            READ,
            0x9f,
            size_of::<kvm_vcpu_events>(),
        ),
        (
            "KVM_SET_VCPU_EVENTS",
            WRITE,
            0xa0,
            size_of::<kvm_vcpu_events>(),
        ),
        ("KVM_GET_DEBUGREGS", READ, 0xa1, size_of::<kvm_debugregs>()),
        ("KVM_SET_DEBUGREGS", WRITE, 0xa2, size_of::<kvm_debugregs>()),
        ("KVM_SET_TSC_KHZ", NONE, 0xa2, 0),
        ("KVM_GET_TSC_KHZ", NONE, 0xa3, 0),
        ("KVM_GET_XSAVE", READ, 0xa4, size_of::<kvm_xsave>()),
        ("KVM_SET_XSAVE", WRITE, 0xa5, size_of::<kvm_xsave>()),
        ("KVM_GET_XCRS", READ, 0xa6, size_of::<kvm_xcrs>()),
        ("KVM_SET_XCRS", WRITE, 0xa7, size_of::<kvm_xcrs>()),
        ("KVM_KVMCLOCK_CTRL", NONE, 0xad, 0),
        ("KVM_GET_ONE_REG", WRITE, 0xab, size_of::<kvm_one_reg>()),
        ("KVM_SET_ONE_REG", WRITE, 0xac, size_of::<kvm_one_reg>()),
        ("KVM_SMI", NONE, 0xb7, 0),
        ("KVM_GET_NESTED_STATE", BOTH, 0xbe, 128),
        ("KVM_SET_NESTED_STATE", WRITE, 0xbf, 128),
        ("KVM_GET_SREGS2", READ, 0xcc, size_of::<kvm_sregs2>()),
        ("KVM_SET_SREGS2", WRITE, 0xcd, size_of::<kvm_sregs2>()),
        ("KVM_GET_STATS_FD", NONE, 0xce, 0),
        ("KVM_GET_XSAVE2", READ, 0xcf, size_of::<kvm_xsave>()),
        ("KVM_PRE_FAULT_MEMORY", BOTH, 0xd5, 64),
        (
            "KVM_SET_DEVICE_ATTR",
            WRITE,
            0xe1,
            size_of::<kvm_device_attr>(),
        ),
        (
            "KVM_GET_DEVICE_ATTR",
            WRITE,
            0xe2,
            size_of::<kvm_device_attr>(),
        ),
        (
            "KVM_HAS_DEVICE_ATTR",
            WRITE,
            0xe3,
            size_of::<kvm_device_attr>(),
        ),
    ]
}

#[test]
fn every_kvm_request_is_its_encoding() {
    let mut seen = BTreeSet::new();
    for (name, direction, number, size) in kvm_definitions() {
        assert_eq!(
            value(Family::Ioctl, name),
            Some(ioc(direction, 0xae, number, size)),
            "{name}"
        );
        seen.insert(name);
    }
    for (name, _) in of_family(Family::Ioctl).filter(|(name, _)| name.starts_with("KVM_")) {
        assert!(seen.contains(name), "{name} is not recomputed");
    }
}

#[test]
fn every_other_request_is_its_encoding() {
    let int = size_of::<libc::c_int>();
    let definitions = [
        ("TUNSETIFF", ioc(WRITE, u32::from(b'T'), 202, int)),
        ("TUNSETOFFLOAD", ioc(WRITE, u32::from(b'T'), 208, int)),
        ("TUNGETIFF", ioc(READ, u32::from(b'T'), 210, int)),
        ("TUNSETVNETHDRSZ", ioc(WRITE, u32::from(b'T'), 216, int)),
        ("BLKSSZGET", ioc(NONE, 0x12, 104, 0)),
        (
            "BLKGETSIZE64",
            ioc(READ, 0x12, 114, size_of::<libc::size_t>()),
        ),
        ("BLKDISCARD", ioc(NONE, 0x12, 119, 0)),
        ("BLKZEROOUT", ioc(NONE, 0x12, 127, 0)),
        ("VFIO_DEVICE_SET_IRQS", ioc(NONE, u32::from(b';'), 110, 0)),
        ("VFIO_DEVICE_RESET", ioc(NONE, u32::from(b';'), 111, 0)),
        ("VFIO_IOMMU_MAP_DMA", ioc(NONE, u32::from(b';'), 113, 0)),
        ("VFIO_IOMMU_UNMAP_DMA", ioc(NONE, u32::from(b';'), 114, 0)),
        ("FIONBIO", libc::FIONBIO),
        ("TIOCGPTN", libc::TIOCGPTN),
    ];
    for (name, expected) in definitions {
        assert_eq!(value(Family::Ioctl, name), Some(expected), "{name}");
    }
    let others = of_family(Family::Ioctl)
        .filter(|(name, _)| !name.starts_with("KVM_"))
        .count();
    assert_eq!(
        others,
        definitions.len(),
        "an ioctl outside KVM is not recomputed"
    );
}

#[test]
fn values_agree_with_libc() {
    let same = [
        (Family::Fcntl, "F_GETFL", libc::F_GETFL),
        (Family::Fcntl, "F_SETFL", libc::F_SETFL),
        (Family::Fcntl, "F_GETFD", libc::F_GETFD),
        (Family::Fcntl, "F_SETFD", libc::F_SETFD),
        (Family::Fcntl, "F_OFD_SETLK", libc::F_OFD_SETLK),
        (Family::Fcntl, "F_OFD_GETLK", libc::F_OFD_GETLK),
        (Family::Fcntl, "F_DUPFD", libc::F_DUPFD),
        (Family::Fcntl, "F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC),
        (Family::Fcntl, "F_ADD_SEALS", libc::F_ADD_SEALS),
        (Family::Fcntl, "F_GET_SEALS", libc::F_GET_SEALS),
        (Family::Prot, "PROT_EXEC", libc::PROT_EXEC),
        (Family::Map, "MAP_PRIVATE", libc::MAP_PRIVATE),
        (Family::Map, "MAP_ANONYMOUS", libc::MAP_ANONYMOUS),
        (Family::Map, "MAP_SHARED", libc::MAP_SHARED),
        (Family::Map, "MAP_FIXED", libc::MAP_FIXED),
        (Family::Map, "MAP_NORESERVE", libc::MAP_NORESERVE),
        (Family::Map, "MAP_STACK", libc::MAP_STACK),
        (Family::Map, "MAP_DROPPABLE", libc::MAP_DROPPABLE),
        (Family::Madvise, "MADV_DONTNEED", libc::MADV_DONTNEED),
        (Family::Madvise, "MADV_FREE", libc::MADV_FREE),
        (Family::Madvise, "MADV_REMOVE", libc::MADV_REMOVE),
        (Family::Madvise, "MADV_DONTFORK", libc::MADV_DONTFORK),
        (Family::Madvise, "MADV_HUGEPAGE", libc::MADV_HUGEPAGE),
        (Family::Madvise, "MADV_NOHUGEPAGE", libc::MADV_NOHUGEPAGE),
        (Family::Madvise, "MADV_DONTDUMP", libc::MADV_DONTDUMP),
        (
            Family::Madvise,
            "MADV_POPULATE_READ",
            libc::MADV_POPULATE_READ,
        ),
        (
            Family::Madvise,
            "MADV_POPULATE_WRITE",
            libc::MADV_POPULATE_WRITE,
        ),
        (Family::Clone, "CLONE_VM", libc::CLONE_VM),
        (Family::Clone, "CLONE_FS", libc::CLONE_FS),
        (Family::Clone, "CLONE_FILES", libc::CLONE_FILES),
        (Family::Clone, "CLONE_SIGHAND", libc::CLONE_SIGHAND),
        (Family::Clone, "CLONE_THREAD", libc::CLONE_THREAD),
        (Family::Clone, "CLONE_SYSVSEM", libc::CLONE_SYSVSEM),
        (Family::Clone, "CLONE_SETTLS", libc::CLONE_SETTLS),
        (
            Family::Clone,
            "CLONE_PARENT_SETTID",
            libc::CLONE_PARENT_SETTID,
        ),
        (
            Family::Clone,
            "CLONE_CHILD_CLEARTID",
            libc::CLONE_CHILD_CLEARTID,
        ),
        (Family::Futex, "FUTEX_WAIT_BITSET", libc::FUTEX_WAIT_BITSET),
        (Family::Futex, "FUTEX_WAKE_BITSET", libc::FUTEX_WAKE_BITSET),
        (
            Family::Futex,
            "FUTEX_WAIT_PRIVATE",
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
        ),
        (
            Family::Futex,
            "FUTEX_WAKE_PRIVATE",
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
        ),
        (
            Family::Futex,
            "FUTEX_WAIT_BITSET_PRIVATE",
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
        ),
        (
            Family::Futex,
            "FUTEX_WAKE_BITSET_PRIVATE",
            libc::FUTEX_WAKE_BITSET | libc::FUTEX_PRIVATE_FLAG,
        ),
        (
            Family::Futex,
            "FUTEX_CLOCK_REALTIME",
            libc::FUTEX_CLOCK_REALTIME,
        ),
        (Family::Prctl, "PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG),
        (Family::Prctl, "PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE),
        (Family::Prctl, "PR_SET_NAME", libc::PR_SET_NAME),
        (Family::Prctl, "PR_GET_NAME", libc::PR_GET_NAME),
        (Family::Prctl, "PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK),
        (
            Family::Prctl,
            "PR_SET_NO_NEW_PRIVS",
            libc::PR_SET_NO_NEW_PRIVS,
        ),
        (
            Family::Prctl,
            "PR_GET_NO_NEW_PRIVS",
            libc::PR_GET_NO_NEW_PRIVS,
        ),
        (Family::At, "AT_EMPTY_PATH", libc::AT_EMPTY_PATH),
        (Family::At, "AT_SYMLINK_NOFOLLOW", libc::AT_SYMLINK_NOFOLLOW),
        (Family::At, "AT_NO_AUTOMOUNT", libc::AT_NO_AUTOMOUNT),
        (Family::Signal, "SIGSYS", libc::SIGSYS),
        (Family::Signal, "SIGCONT", libc::SIGCONT),
        (Family::Whence, "SEEK_DATA", libc::SEEK_DATA),
        (Family::Whence, "SEEK_HOLE", libc::SEEK_HOLE),
        (
            Family::Fallocate,
            "FALLOC_FL_KEEP_SIZE",
            libc::FALLOC_FL_KEEP_SIZE,
        ),
        (
            Family::Fallocate,
            "FALLOC_FL_PUNCH_HOLE",
            libc::FALLOC_FL_PUNCH_HOLE,
        ),
        (
            Family::Fallocate,
            "FALLOC_FL_ZERO_RANGE",
            libc::FALLOC_FL_ZERO_RANGE,
        ),
        (Family::Message, "MSG_PEEK", libc::MSG_PEEK),
        (Family::Message, "MSG_DONTWAIT", libc::MSG_DONTWAIT),
        (Family::Message, "MSG_EOR", libc::MSG_EOR),
        (Family::Message, "MSG_WAITALL", libc::MSG_WAITALL),
        (Family::Message, "MSG_NOSIGNAL", libc::MSG_NOSIGNAL),
        (Family::Message, "MSG_CMSG_CLOEXEC", libc::MSG_CMSG_CLOEXEC),
        (Family::Socket, "AF_UNIX", libc::AF_UNIX),
        (Family::Socket, "SOL_SOCKET", libc::SOL_SOCKET),
        (Family::Socket, "SO_TYPE", libc::SO_TYPE),
        (Family::Socket, "SO_ERROR", libc::SO_ERROR),
        (Family::Socket, "SO_DOMAIN", libc::SO_DOMAIN),
    ];
    for (family, name, expected) in same {
        assert_eq!(value(family, name), u64::try_from(expected).ok(), "{name}");
    }
}
