//! The symbolic values that a rule may name: ioctl requests, flags, commands.
//!
//! A policy says `KVM_RUN`, never `0xae80`. Each constant belongs to a [`Family`], and an argument accepts only
//! its own family, so that `PROT_EXEC` cannot be written where an ioctl request is meant. Values come from the
//! kernel's UAPI headers; ioctl requests are written out as numbers and the tests compute each of them again from
//! its direction, type, number and the size of the structure it moves (`include/uapi/asm-generic/ioctl.h`).

/// What an argument's constants are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Numbers only.
    Number,
    /// Requests of `ioctl` (`linux/kvm.h`, `linux/if_tun.h`, `linux/fs.h`).
    Ioctl,
    /// Commands of `fcntl`.
    Fcntl,
    /// `PROT_*`.
    Prot,
    /// `MAP_*`.
    Map,
    /// `MADV_*`.
    Madvise,
    /// `CLONE_*`.
    Clone,
    /// `FUTEX_*`.
    Futex,
    /// `PR_*`.
    Prctl,
    /// `ARCH_*`.
    ArchPrctl,
    /// Operations of `seccomp`.
    Seccomp,
    /// `AT_*`.
    At,
    /// Signals.
    Signal,
    /// `SEEK_*`.
    Whence,
    /// `FALLOC_FL_*`.
    Fallocate,
    /// `MSG_*`.
    Message,
    /// `AF_*`, `SOL_*` and `SO_*`.
    Socket,
}

const TABLE: &[(Family, &str, u64)] = &[
    // KVM, the system descriptor.
    (Family::Ioctl, "KVM_GET_API_VERSION", 0xae00),
    (Family::Ioctl, "KVM_CREATE_VM", 0xae01),
    (Family::Ioctl, "KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
    (Family::Ioctl, "KVM_CHECK_EXTENSION", 0xae03),
    (Family::Ioctl, "KVM_GET_VCPU_MMAP_SIZE", 0xae04),
    (Family::Ioctl, "KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
    (Family::Ioctl, "KVM_GET_EMULATED_CPUID", 0xc008_ae09),
    (Family::Ioctl, "KVM_GET_MSR_FEATURE_INDEX_LIST", 0xc004_ae0a),
    // KVM, the VM's descriptor.
    (Family::Ioctl, "KVM_CREATE_VCPU", 0xae41),
    (Family::Ioctl, "KVM_GET_DIRTY_LOG", 0x4010_ae42),
    (Family::Ioctl, "KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    (Family::Ioctl, "KVM_SET_TSS_ADDR", 0xae47),
    (Family::Ioctl, "KVM_SET_IDENTITY_MAP_ADDR", 0x4008_ae48),
    (Family::Ioctl, "KVM_SET_USER_MEMORY_REGION2", 0x40a0_ae49),
    (Family::Ioctl, "KVM_CREATE_IRQCHIP", 0xae60),
    (Family::Ioctl, "KVM_IRQ_LINE", 0x4008_ae61),
    (Family::Ioctl, "KVM_GET_IRQCHIP", 0xc208_ae62),
    (Family::Ioctl, "KVM_SET_IRQCHIP", 0x8208_ae63),
    (Family::Ioctl, "KVM_IRQ_LINE_STATUS", 0xc008_ae67),
    (Family::Ioctl, "KVM_SET_GSI_ROUTING", 0x4008_ae6a),
    (Family::Ioctl, "KVM_REINJECT_CONTROL", 0xae71),
    (Family::Ioctl, "KVM_IRQFD", 0x4020_ae76),
    (Family::Ioctl, "KVM_CREATE_PIT2", 0x4040_ae77),
    (Family::Ioctl, "KVM_SET_BOOT_CPU_ID", 0xae78),
    (Family::Ioctl, "KVM_IOEVENTFD", 0x4040_ae79),
    (Family::Ioctl, "KVM_SET_CLOCK", 0x4030_ae7b),
    (Family::Ioctl, "KVM_GET_CLOCK", 0x8030_ae7c),
    (Family::Ioctl, "KVM_GET_PIT2", 0x8070_ae9f),
    (Family::Ioctl, "KVM_SET_PIT2", 0x4070_aea0),
    (Family::Ioctl, "KVM_ENABLE_CAP", 0x4068_aea3),
    (Family::Ioctl, "KVM_SIGNAL_MSI", 0x4020_aea5),
    (Family::Ioctl, "KVM_CLEAR_DIRTY_LOG", 0xc018_aec0),
    (Family::Ioctl, "KVM_CREATE_DEVICE", 0xc00c_aee0),
    (Family::Ioctl, "KVM_CREATE_GUEST_MEMFD", 0xc040_aed4),
    // KVM, a vCPU's descriptor.
    (Family::Ioctl, "KVM_RUN", 0xae80),
    (Family::Ioctl, "KVM_GET_REGS", 0x8090_ae81),
    (Family::Ioctl, "KVM_SET_REGS", 0x4090_ae82),
    (Family::Ioctl, "KVM_GET_SREGS", 0x8138_ae83),
    (Family::Ioctl, "KVM_SET_SREGS", 0x4138_ae84),
    (Family::Ioctl, "KVM_TRANSLATE", 0xc018_ae85),
    (Family::Ioctl, "KVM_INTERRUPT", 0x4004_ae86),
    (Family::Ioctl, "KVM_GET_MSRS", 0xc008_ae88),
    (Family::Ioctl, "KVM_SET_MSRS", 0x4008_ae89),
    (Family::Ioctl, "KVM_SET_SIGNAL_MASK", 0x4004_ae8b),
    (Family::Ioctl, "KVM_GET_FPU", 0x81a0_ae8c),
    (Family::Ioctl, "KVM_SET_FPU", 0x41a0_ae8d),
    (Family::Ioctl, "KVM_GET_LAPIC", 0x8400_ae8e),
    (Family::Ioctl, "KVM_SET_LAPIC", 0x4400_ae8f),
    (Family::Ioctl, "KVM_SET_CPUID2", 0x4008_ae90),
    (Family::Ioctl, "KVM_GET_CPUID2", 0xc008_ae91),
    (Family::Ioctl, "KVM_GET_MP_STATE", 0x8004_ae98),
    (Family::Ioctl, "KVM_SET_MP_STATE", 0x4004_ae99),
    (Family::Ioctl, "KVM_NMI", 0xae9a),
    (Family::Ioctl, "KVM_SET_GUEST_DEBUG", 0x4048_ae9b),
    (Family::Ioctl, "KVM_X86_SETUP_MCE", 0x4008_ae9c),
    (Family::Ioctl, "KVM_X86_GET_MCE_CAP_SUPPORTED", 0x8008_ae9d),
    (Family::Ioctl, "KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
    (Family::Ioctl, "KVM_SET_VCPU_EVENTS", 0x4040_aea0),
    (Family::Ioctl, "KVM_GET_DEBUGREGS", 0x8080_aea1),
    (Family::Ioctl, "KVM_SET_DEBUGREGS", 0x4080_aea2),
    (Family::Ioctl, "KVM_SET_TSC_KHZ", 0xaea2),
    (Family::Ioctl, "KVM_GET_TSC_KHZ", 0xaea3),
    (Family::Ioctl, "KVM_GET_XSAVE", 0x9000_aea4),
    (Family::Ioctl, "KVM_SET_XSAVE", 0x5000_aea5),
    (Family::Ioctl, "KVM_GET_XCRS", 0x8188_aea6),
    (Family::Ioctl, "KVM_SET_XCRS", 0x4188_aea7),
    (Family::Ioctl, "KVM_KVMCLOCK_CTRL", 0xaead),
    (Family::Ioctl, "KVM_GET_ONE_REG", 0x4010_aeab),
    (Family::Ioctl, "KVM_SET_ONE_REG", 0x4010_aeac),
    (Family::Ioctl, "KVM_SMI", 0xaeb7),
    (Family::Ioctl, "KVM_GET_NESTED_STATE", 0xc080_aebe),
    (Family::Ioctl, "KVM_SET_NESTED_STATE", 0x4080_aebf),
    (Family::Ioctl, "KVM_GET_SREGS2", 0x8140_aecc),
    (Family::Ioctl, "KVM_SET_SREGS2", 0x4140_aecd),
    (Family::Ioctl, "KVM_GET_STATS_FD", 0xaece),
    (Family::Ioctl, "KVM_GET_XSAVE2", 0x9000_aecf),
    (Family::Ioctl, "KVM_PRE_FAULT_MEMORY", 0xc040_aed5),
    (Family::Ioctl, "KVM_SET_DEVICE_ATTR", 0x4018_aee1),
    (Family::Ioctl, "KVM_GET_DEVICE_ATTR", 0x4018_aee2),
    (Family::Ioctl, "KVM_HAS_DEVICE_ATTR", 0x4018_aee3),
    // Taps (`linux/if_tun.h`) and block devices (`linux/fs.h`).
    (Family::Ioctl, "TUNSETIFF", 0x4004_54ca),
    (Family::Ioctl, "TUNSETOFFLOAD", 0x4004_54d0),
    (Family::Ioctl, "TUNGETIFF", 0x8004_54d2),
    (Family::Ioctl, "TUNSETVNETHDRSZ", 0x4004_54d8),
    (Family::Ioctl, "BLKSSZGET", 0x1268),
    (Family::Ioctl, "BLKDISCARD", 0x1277),
    (Family::Ioctl, "BLKZEROOUT", 0x127f),
    (Family::Ioctl, "BLKGETSIZE64", 0x8008_1272),
    (Family::Ioctl, "FIONBIO", 0x5421),
    (Family::Ioctl, "TIOCGPTN", 0x8004_5430),
    // VFIO (`linux/vfio.h`): numbers alone, without direction and size. Some are used twice, for different descriptors.
    (Family::Ioctl, "VFIO_DEVICE_SET_IRQS", 0x3b6e),
    (Family::Ioctl, "VFIO_DEVICE_RESET", 0x3b6f),
    (Family::Ioctl, "VFIO_IOMMU_MAP_DMA", 0x3b71),
    (Family::Ioctl, "VFIO_IOMMU_UNMAP_DMA", 0x3b72),
    // fcntl.
    (Family::Fcntl, "F_DUPFD", 0),
    (Family::Fcntl, "F_GETFD", 1),
    (Family::Fcntl, "F_SETFD", 2),
    (Family::Fcntl, "F_GETFL", 3),
    (Family::Fcntl, "F_SETFL", 4),
    (Family::Fcntl, "F_OFD_GETLK", 36),
    (Family::Fcntl, "F_OFD_SETLK", 37),
    (Family::Fcntl, "F_DUPFD_CLOEXEC", 1030),
    (Family::Fcntl, "F_ADD_SEALS", 1033),
    (Family::Fcntl, "F_GET_SEALS", 1034),
    // Memory.
    (Family::Prot, "PROT_NONE", 0),
    (Family::Prot, "PROT_READ", 1),
    (Family::Prot, "PROT_WRITE", 2),
    (Family::Prot, "PROT_EXEC", 4),
    (Family::Map, "MAP_SHARED", 0x01),
    (Family::Map, "MAP_PRIVATE", 0x02),
    (Family::Map, "MAP_DROPPABLE", 0x08),
    (Family::Map, "MAP_FIXED", 0x10),
    (Family::Map, "MAP_ANONYMOUS", 0x20),
    (Family::Map, "MAP_NORESERVE", 0x4000),
    (Family::Map, "MAP_STACK", 0x2_0000),
    (Family::Madvise, "MADV_DONTNEED", 4),
    (Family::Madvise, "MADV_FREE", 8),
    (Family::Madvise, "MADV_REMOVE", 9),
    (Family::Madvise, "MADV_DONTFORK", 10),
    (Family::Madvise, "MADV_HUGEPAGE", 14),
    (Family::Madvise, "MADV_NOHUGEPAGE", 15),
    (Family::Madvise, "MADV_DONTDUMP", 16),
    (Family::Madvise, "MADV_POPULATE_READ", 22),
    (Family::Madvise, "MADV_POPULATE_WRITE", 23),
    // Threads.
    (Family::Clone, "CLONE_VM", 0x0000_0100),
    (Family::Clone, "CLONE_FS", 0x0000_0200),
    (Family::Clone, "CLONE_FILES", 0x0000_0400),
    (Family::Clone, "CLONE_SIGHAND", 0x0000_0800),
    (Family::Clone, "CLONE_THREAD", 0x0001_0000),
    (Family::Clone, "CLONE_SYSVSEM", 0x0004_0000),
    (Family::Clone, "CLONE_SETTLS", 0x0008_0000),
    (Family::Clone, "CLONE_PARENT_SETTID", 0x0010_0000),
    (Family::Clone, "CLONE_CHILD_CLEARTID", 0x0020_0000),
    (Family::Futex, "FUTEX_WAIT", 0),
    (Family::Futex, "FUTEX_WAKE", 1),
    (Family::Futex, "FUTEX_WAIT_BITSET", 9),
    (Family::Futex, "FUTEX_WAKE_BITSET", 10),
    (Family::Futex, "FUTEX_WAIT_PRIVATE", 128),
    (Family::Futex, "FUTEX_WAKE_PRIVATE", 129),
    (Family::Futex, "FUTEX_WAIT_BITSET_PRIVATE", 137),
    (Family::Futex, "FUTEX_WAKE_BITSET_PRIVATE", 138),
    (Family::Futex, "FUTEX_CLOCK_REALTIME", 256),
    // The process itself.
    (Family::Prctl, "PR_SET_PDEATHSIG", 1),
    (Family::Prctl, "PR_SET_DUMPABLE", 4),
    (Family::Prctl, "PR_SET_NAME", 15),
    (Family::Prctl, "PR_GET_NAME", 16),
    (Family::Prctl, "PR_SET_TIMERSLACK", 29),
    (Family::Prctl, "PR_SET_NO_NEW_PRIVS", 38),
    (Family::Prctl, "PR_GET_NO_NEW_PRIVS", 39),
    (Family::ArchPrctl, "ARCH_SET_FS", 0x1002),
    (Family::ArchPrctl, "ARCH_CET_STATUS", 0x3001),
    (Family::ArchPrctl, "ARCH_SHSTK_STATUS", 0x5005),
    (Family::Seccomp, "SECCOMP_SET_MODE_FILTER", 1),
    (Family::Seccomp, "SECCOMP_GET_ACTION_AVAIL", 2),
    (Family::At, "AT_SYMLINK_NOFOLLOW", 0x100),
    (Family::At, "AT_NO_AUTOMOUNT", 0x800),
    (Family::At, "AT_EMPTY_PATH", 0x1000),
    (Family::Signal, "SIGABRT", 6),
    (Family::Signal, "SIGKILL", 9),
    (Family::Signal, "SIGSEGV", 11),
    (Family::Signal, "SIGPIPE", 13),
    (Family::Signal, "SIGTERM", 15),
    (Family::Signal, "SIGCONT", 18),
    (Family::Signal, "SIGSTOP", 19),
    (Family::Signal, "SIGSYS", 31),
    // Files and sockets.
    (Family::Whence, "SEEK_SET", 0),
    (Family::Whence, "SEEK_CUR", 1),
    (Family::Whence, "SEEK_END", 2),
    (Family::Whence, "SEEK_DATA", 3),
    (Family::Whence, "SEEK_HOLE", 4),
    (Family::Fallocate, "FALLOC_FL_KEEP_SIZE", 0x01),
    (Family::Fallocate, "FALLOC_FL_PUNCH_HOLE", 0x02),
    (Family::Fallocate, "FALLOC_FL_ZERO_RANGE", 0x10),
    (Family::Message, "MSG_PEEK", 0x2),
    (Family::Message, "MSG_CTRUNC", 0x8),
    (Family::Message, "MSG_TRUNC", 0x20),
    (Family::Message, "MSG_DONTWAIT", 0x40),
    (Family::Message, "MSG_EOR", 0x80),
    (Family::Message, "MSG_WAITALL", 0x100),
    (Family::Message, "MSG_NOSIGNAL", 0x4000),
    (Family::Message, "MSG_CMSG_CLOEXEC", 0x4000_0000),
    (Family::Socket, "AF_UNIX", 1),
    (Family::Socket, "SOL_SOCKET", 1),
    (Family::Socket, "SO_TYPE", 3),
    (Family::Socket, "SO_ERROR", 4),
    (Family::Socket, "SO_DOMAIN", 39),
];

/// The value of `name` where an argument of `family` is meant.
#[must_use]
pub fn value(family: Family, name: &str) -> Option<u64> {
    TABLE
        .iter()
        .find(|(of, known, _)| *of == family && *known == name)
        .map(|(_, _, value)| *value)
}

/// The name of `value` in `family`, for people to read.
#[must_use]
pub fn name(family: Family, value: u64) -> Option<&'static str> {
    TABLE
        .iter()
        .find(|(of, _, known)| *of == family && *known == value)
        .map(|(_, name, _)| *name)
}

/// Every constant of `family`.
pub fn of_family(family: Family) -> impl Iterator<Item = (&'static str, u64)> {
    TABLE
        .iter()
        .filter(move |(of, ..)| *of == family)
        .map(|(_, name, value)| (*name, *value))
}

#[cfg(test)]
mod tests;
