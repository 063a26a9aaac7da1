//! A device's vectors. Each signals an eventfd of the broker's from the guest's start to its end, whatever the guest makes of it:
//! which of them KVM turns into interrupts is for this worker to say, by binding it. One that is not bound counts, and fires once
//! when it is: while the guest has its vector masked, and while the worker is replaced.
#![expect(
    unsafe_code,
    reason = "an ioctl of VFIO, which takes descriptors in memory"
)]

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_ipc::worker::VfioInterrupts;
use kvm_ioctls::VmFd;
use vfio_bindings::bindings::vfio;
use vmm_sys_util::eventfd::EventFd;

use super::VfioError;
use super::request;
use crate::vm;

const VFIO_DEVICE_SET_IRQS: libc::c_ulong = request(10);

/// Words of `struct vfio_irq_set` before its descriptors: its size, flags, index, first interrupt, their number.
const HEADER: usize = 5;

/// Has a device's vectors signal these eventfds, for good.
///
/// # Errors
///
/// [`VfioError::Ioctl`], also when the host has not as many vectors left.
pub(crate) fn enable(
    device: BorrowedFd<'_>,
    kind: VfioInterrupts,
    eventfds: &[OwnedFd],
) -> Result<(), VfioError> {
    let index = match kind {
        VfioInterrupts::Msi => vfio::VFIO_PCI_MSI_IRQ_INDEX,
        VfioInterrupts::MsiX => vfio::VFIO_PCI_MSIX_IRQ_INDEX,
    };
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let mut set = vec![
        number((HEADER + eventfds.len()) * size_of::<u32>()),
        vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        number(eventfds.len()),
    ];
    set.extend(eventfds.iter().map(|fd| fd.as_raw_fd().unsigned_abs()));
    // SAFETY: the request reads as many bytes as the first word says, which are those of `set`, and keeps no pointer to them.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), VFIO_DEVICE_SET_IRQS, set.as_mut_ptr()) };
    let source = match result {
        0 => return Ok(()),
        ..0 => io::Error::last_os_error(),
        // How many there are.
        1.. => io::Error::from_raw_os_error(libc::ENOSPC),
    };
    Err(VfioError::Ioctl {
        call: "VFIO_DEVICE_SET_IRQS",
        source,
    })
}

struct Vector {
    eventfd: EventFd,
    gsi: u32,
    bound: bool,
}

impl Vector {
    fn forget(&self) {
        // Nothing to read is as good: it does not block.
        let _ = self.eventfd.read();
    }
}

/// The vectors in this worker's VM.
pub(crate) struct Vectors {
    vm: Arc<VmFd>,
    vectors: Vec<Vector>,
}

impl Vectors {
    /// None of these is bound. `first` is the interrupt number of the first.
    pub(crate) fn new(vm: Arc<VmFd>, first: u32, eventfds: Vec<OwnedFd>) -> Self {
        let vectors = eventfds.into_iter().zip(first..);
        let vectors = vectors.map(|(eventfd, gsi)| Vector {
            eventfd: vm::event_fd(eventfd),
            gsi,
            bound: false,
        });
        Self {
            vm,
            vectors: vectors.collect(),
        }
    }

    /// Binds these, and no others.
    ///
    /// # Errors
    ///
    /// The first that KVM refuses; the others are as they should be.
    pub(crate) fn bind(&mut self, wanted: &[u16]) -> Result<(), vm::VmError> {
        let mut outcome = Ok(());
        for (vector, number) in self.vectors.iter_mut().zip(0_u16..) {
            let wanted = wanted.contains(&number);
            if wanted == vector.bound {
                continue;
            }
            let done = match wanted {
                true => self.vm.register_irqfd(&vector.eventfd, vector.gsi),
                false => self.vm.unregister_irqfd(&vector.eventfd, vector.gsi),
            };
            match done {
                Ok(()) => {
                    vector.bound = wanted;
                    // KVM fires by what was counted, and leaves the count (`kvm_irqfd_assign`, virt/kvm/eventfd.c): it would fire
                    // again the next time. What is signalled from now on KVM takes at once.
                    if wanted {
                        vector.forget();
                    }
                }
                Err(error) => outcome = outcome.and(Err(vm::ioctl("KVM_IRQFD")(error))),
            }
        }
        outcome
    }

    /// Forgets what those that are not bound have counted.
    pub(crate) fn forget(&self) {
        let unbound = self.vectors.iter().filter(|vector| !vector.bound);
        unbound.for_each(Vector::forget);
    }
}
