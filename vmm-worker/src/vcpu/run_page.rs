//! The page that a vCPU shares with KVM, as far as more than its own thread looks at it.
#![expect(
    unsafe_code,
    reason = "one byte of the shared page is written by another thread while KVM_RUN runs"
)]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// `immediate_exit` of `struct kvm_run`, and the size of a port access.
///
/// The control thread sets the flag and signals; the vCPU's thread reads it. KVM looks at it at the start of KVM_RUN,
/// after completing the I/O that is pending (Documentation/virt/kvm/api.rst, section 5, `immediate_exit`).
#[derive(Debug)]
pub(crate) struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: the page is mapped for the process's whole life (see `new`), and other threads reach it only through the atomic
// byte; `port_access_size` is for the vCPU's own thread, which is the one that calls KVM_RUN.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The page of `vcpu`, which must never be dropped: its thread owns it and lives as long as the process.
    pub(crate) fn of(vcpu: &mut VcpuFd) -> Self {
        Self {
            page: NonNull::from(vcpu.get_kvm_run()),
        }
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the field is one byte inside the mapping, which outlives `self`. Every access in this process is made
        // through this atomic, and the kernel's are single bytes too.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// Makes the next or current KVM_RUN return EINTR (a current one needs a signal as well), or stops making it.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.flag().store(u8::from(on), Ordering::SeqCst);
    }

    /// Whether KVM_RUN is to return at once.
    pub(crate) fn immediate_exit(&self) -> bool {
        self.flag().load(Ordering::SeqCst) != 0
    }

    /// The size in bytes of each of the accesses of the KVM_EXIT_IO that has just happened.
    pub(crate) fn port_access_size(&self) -> usize {
        // SAFETY: a byte inside the mapping, which the kernel wrote before KVM_RUN returned, and nobody writes now. For
        // another exit it is meaningless but initialised, since the kernel zeroes the page when it makes it.
        usize::from(unsafe { (*self.page.as_ptr()).__bindgen_anon_1.io.size })
    }
}
