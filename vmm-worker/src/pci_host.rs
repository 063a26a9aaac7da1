//! What KVM does for PCI functions: interrupt routes and irqfds for their vectors, ioeventfds for their notifications.
//!
//! Everything here is arranged before the guest runs in this worker, an upgrade's new worker included: it is told in
//! advance where the guest has its BARs and what its vectors write ([`Preview`]). What a guest changes later, or changed
//! between that and the pause, still works (vectors fire by hand, notifications exit to this process) and is arranged
//! anew by the control thread, outside any pause.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use baton_ipc::worker::MAX_SLOTS;
use kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
use kvm_bindings::KVM_IRQ_ROUTING_MSI;
use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KVM_IRQCHIP_PIC_MASTER;
use kvm_bindings::KVM_IRQCHIP_PIC_SLAVE;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_msi;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::NoDatamatch;
use kvm_ioctls::VmFd;
use rustix::event::EventfdFlags;
use serde::Deserialize;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::layout;
use crate::devices::Trigger;
use crate::devices::lifecycle::DeviceError;
use crate::devices::pci::msix::MAX_VECTORS;
use crate::devices::pci::msix::Message;
use crate::devices::pci::msix::Sink;
use crate::devices::virtio::transport::BAR_SIZE;
use crate::devices::virtio::transport::NOTIFY;
use crate::devices::virtio::transport::NOTIFY_STEP;
use crate::devices::virtio::transport::Transport;
use crate::diagnostics::log;
use crate::platform::PlatformError;
use crate::vfio::device::HostDevice;
use crate::vm;

/// Interrupts of the I/O APIC; vectors have numbers from here on.
const FIRST_VECTOR: u32 = 24;
/// Interrupts that the PICs have too.
const PIC_PINS: u32 = 16;

/// Whether something is to be arranged anew.
pub(crate) struct Stale {
    flag: AtomicBool,
    wake: Arc<dyn Trigger>,
}

/// A function's vectors, as KVM has them.
pub(crate) struct KvmSink {
    vm: Arc<VmFd>,
    /// One a vector, this worker's own.
    irqs: Arc<Vec<OwnedFd>>,
    stale: Arc<Stale>,
}

impl Sink for KvmSink {
    fn fire(&self, vector: u16) {
        if let Some(irq) = self.irqs.get(usize::from(vector)) {
            // Only a counter at its end refuses, and KVM empties it at once.
            let _ = rustix::io::write(irq, &1_u64.to_ne_bytes());
        }
    }

    fn deliver(&self, message: Message) {
        let [a0, a1, a2, a3, a4, a5, a6, a7] = message.address.to_le_bytes();
        // A message that no local APIC takes is lost, as on a PC.
        let _ = self.vm.signal_msi(kvm_msi {
            address_lo: u32::from_le_bytes([a0, a1, a2, a3]),
            address_hi: u32::from_le_bytes([a4, a5, a6, a7]),
            data: message.data,
            ..kvm_msi::default()
        });
    }

    fn stale(&self) {
        if !self.stale.flag.swap(true, Ordering::SeqCst) {
            self.stale.wake.trigger();
        }
    }
}

/// What an old worker tells a new one in advance of a function.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FunctionPreview {
    slot: u8,
    bar: u64,
    routes: Vec<(u16, Message)>,
}

/// What an old worker tells a new one in advance of all functions. Hostile, and of no consequence: what is wrong or
/// missing in it is arranged after the upgrade.
pub(crate) type Preview = Vec<FunctionPreview>;

struct Wired {
    slot: u8,
    transport: Arc<Mutex<Transport>>,
    irqs: Arc<Vec<OwnedFd>>,
    /// Where the BAR was when its notifications were arranged; nowhere if they are not.
    notified_at: Option<u64>,
}

impl Wired {
    fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A function that is a device of the host.
struct Assigned {
    slot: u8,
    device: Arc<Mutex<HostDevice>>,
}

impl Assigned {
    fn device(&self) -> MutexGuard<'_, HostDevice> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All functions.
pub(crate) struct PciHost {
    vm: Arc<VmFd>,
    functions: Vec<Wired>,
    assigned: Vec<Assigned>,
    stale: Arc<Stale>,
}

/// The interrupt number of a vector.
pub(crate) fn interrupt(slot: u8, vector: u16) -> u32 {
    FIRST_VECTOR + u32::from(slot) * u32::from(MAX_VECTORS) + u32::from(vector)
}

/// Where a function's BAR is at power-on, guest-physical.
pub(crate) fn first_bar(slot: u8) -> u32 {
    let window = u32::try_from(layout::PCI_WINDOW_32).unwrap_or(0);
    window + u32::from(slot) * BAR_SIZE
}

/// Where BARs of devices of the host go at power-on: behind those of our own devices, one after the other.
pub(crate) struct Room {
    next: u64,
    end: u64,
}

impl Room {
    pub(crate) fn below_4_gib() -> Self {
        Self {
            next: first_bar(MAX_SLOTS).into(),
            end: layout::PCI_WINDOW_32 + layout::PCI_WINDOW_32_SIZE,
        }
    }

    /// The address of the next `size` bytes, a power of two, at a multiple of them.
    pub(crate) fn take(&mut self, size: u64) -> Option<u32> {
        let address = self.next.checked_next_multiple_of(size)?;
        let end = address.checked_add(size).filter(|end| *end <= self.end)?;
        self.next = end;
        u32::try_from(address).ok()
    }
}

impl PciHost {
    pub(crate) fn new(vm: Arc<VmFd>, wake: Arc<dyn Trigger>) -> Self {
        let stale = Arc::new(Stale {
            flag: AtomicBool::new(false),
            wake,
        });
        Self {
            vm,
            functions: Vec::new(),
            assigned: Vec::new(),
            stale,
        }
    }

    /// Makes the vectors of the function of `slot`; each is bound to its interrupt for good.
    ///
    /// # Errors
    ///
    /// [`PlatformError`].
    pub(crate) fn vectors(
        &self,
        slot: u8,
        count: u16,
    ) -> Result<(KvmSink, Arc<Vec<OwnedFd>>), PlatformError> {
        let mut irqs = Vec::new();
        for vector in 0..count {
            let irq = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                .map_err(|e| PlatformError::EventFd(e.into()))?;
            self.vm
                .register_irqfd(&copy(&irq)?, interrupt(slot, vector))
                .map_err(vm::ioctl("KVM_IRQFD"))?;
            irqs.push(irq);
        }
        let irqs = Arc::new(irqs);
        let sink = KvmSink {
            vm: Arc::clone(&self.vm),
            irqs: Arc::clone(&irqs),
            stale: Arc::clone(&self.stale),
        };
        Ok((sink, irqs))
    }

    /// The sink of vectors that a device of the host fires by itself.
    pub(crate) fn sink(&self) -> KvmSink {
        KvmSink {
            vm: Arc::clone(&self.vm),
            irqs: Arc::default(),
            stale: Arc::clone(&self.stale),
        }
    }

    /// Takes a device of the host in.
    pub(crate) fn assign(&mut self, slot: u8, device: Arc<Mutex<HostDevice>>) {
        self.assigned.push(Assigned { slot, device });
    }

    /// Takes a function in.
    pub(crate) fn add(
        &mut self,
        slot: u8,
        transport: Arc<Mutex<Transport>>,
        irqs: Arc<Vec<OwnedFd>>,
    ) {
        self.functions.push(Wired {
            slot,
            transport,
            irqs,
            notified_at: None,
        });
    }

    /// Takes a function in that has come just now. What KVM does for it is arranged when the guest has set it up.
    pub(crate) fn join(
        &mut self,
        slot: u8,
        transport: Arc<Mutex<Transport>>,
        irqs: Arc<Vec<OwnedFd>>,
    ) {
        self.add(slot, transport, irqs);
        self.functions.sort_by_key(|function| function.slot);
    }

    /// The function of `slot`, if there is one.
    pub(crate) fn transport(&self, slot: u8) -> Option<&Arc<Mutex<Transport>>> {
        let mut functions = self.functions.iter();
        let function = functions.find(|function| function.slot == slot)?;
        Some(&function.transport)
    }

    /// Lets a function go that is ended: KVM has nothing of it any more.
    ///
    /// # Errors
    ///
    /// [`PlatformError`]: what KVM would not let go of.
    pub(crate) fn leave(&mut self, slot: u8) -> Result<(), PlatformError> {
        let at = self
            .functions
            .iter()
            .position(|function| function.slot == slot);
        let Some(mut function) = at.map(|at| self.functions.remove(at)) else {
            return Ok(());
        };
        let mut outcome = match function.notified_at.take() {
            Some(bar) => notifications(&self.vm, &function, bar, false),
            None => Ok(()),
        };
        for (irq, vector) in function.irqs.iter().zip(0..) {
            let unbound = copy(irq).and_then(|irq| {
                self.vm
                    .unregister_irqfd(&irq, interrupt(slot, vector))
                    .map_err(vm::ioctl("KVM_IRQFD"))?;
                Ok(())
            });
            outcome = outcome.and(unbound);
        }
        outcome
    }

    /// The configuration of the device in `slot` has changed by no doing of its driver.
    pub(crate) fn reconfigured(&self, slot: u8) {
        self.functions
            .iter()
            .filter(|function| function.slot == slot)
            .for_each(|function| function.transport().reconfigured());
    }

    /// The device in `slot` has this many bytes from now on.
    ///
    /// # Errors
    ///
    /// [`DeviceError`], also when there is none.
    pub(crate) fn resize(&self, slot: u8, bytes: u64) -> Result<(), DeviceError> {
        let mut functions = self.functions.iter();
        functions
            .find(|function| function.slot == slot)
            .ok_or(DeviceError::Fixed)?
            .transport()
            .resize(bytes)
    }

    /// Arranges everything for the first time: as the preview says, or as it is at power-on. What KVM refuses, which a guest can bring
    /// about, such as two functions in one place, goes on by hand.
    pub(crate) fn arrange(&mut self, preview: &Preview) {
        let mut routes = Vec::new();
        for function in &mut self.functions {
            let told = preview.iter().find(|told| told.slot == function.slot);
            let window = layout::PCI_WINDOW_32
                ..layout::PCI_WINDOW_32 + layout::PCI_WINDOW_32_SIZE - u64::from(BAR_SIZE) + 1;
            let bar = told
                .map(|told| told.bar)
                .filter(|bar| window.contains(bar) && bar % u64::from(BAR_SIZE) == 0)
                .unwrap_or(first_bar(function.slot).into());
            arrange_notifications(&self.vm, function, bar);
            routes.push((function.slot, announced(told, function.irqs.len())));
        }
        for function in &self.assigned {
            let told = preview.iter().find(|told| told.slot == function.slot);
            let vectors = usize::from(function.device().msix().vectors());
            routes.push((function.slot, announced(told, vectors)));
        }
        let routed = match routes.iter().all(|(_, routes)| routes.is_empty()) {
            true => Ok(()),
            false => self.route(&routes),
        };
        match routed {
            Ok(()) => self.installed(&routes),
            Err(error) => log!("interrupt routes: {error}"),
        }
    }

    /// Tells every function which routes KVM holds of it now.
    fn installed(&self, routes: &[(u8, Vec<(u16, Message)>)]) {
        let of = |slot: u8| {
            let mut routes = routes.iter();
            let found = routes.find(|(routed, _)| *routed == slot);
            found.map_or(&[][..], |(_, routes)| routes.as_slice())
        };
        for function in &self.functions {
            let transport = function.transport();
            transport.interrupts().msix().installed(of(function.slot));
        }
        for function in &self.assigned {
            function.device().msix().installed(of(function.slot));
        }
    }

    /// The routes that KVM should hold.
    fn routes(&self) -> Vec<(u8, Vec<(u16, Message)>)> {
        let own = self.functions.iter().map(|function| {
            let routes = function.transport().interrupts().msix().routes();
            (function.slot, routes)
        });
        let assigned = self.assigned.iter().map(|function| {
            let routes = function.device().msix().routes();
            (function.slot, routes)
        });
        own.chain(assigned).collect()
    }

    /// How many vectors of all functions fire by hand, or do not fire, for want of their routes.
    fn stale_vectors(&self) -> u32 {
        let own = self.functions.iter();
        let own = own.map(|function| function.transport().interrupts().msix().stale());
        let assigned = self.assigned.iter();
        let assigned = assigned.map(|function| function.device().msix().stale());
        own.chain(assigned).sum()
    }

    fn route(&self, routes: &[(u8, Vec<(u16, Message)>)]) -> Result<(), PlatformError> {
        let mut entries = fixed_routes();
        for (slot, routes) in routes {
            entries.extend(
                routes
                    .iter()
                    .map(|(vector, message)| message_route(interrupt(*slot, *vector), *message)),
            );
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| PlatformError::Routes(entries.len()))?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(vm::ioctl("KVM_SET_GSI_ROUTING"))?;
        Ok(())
    }

    /// Arranges anew what the guest has changed. What KVM refuses goes on by hand.
    pub(crate) fn settle(&mut self) {
        if !self.stale.flag.swap(false, Ordering::SeqCst) {
            return;
        }
        if self.stale_vectors() > 0 {
            let routes = self.routes();
            match self.route(&routes) {
                Ok(()) => self.installed(&routes),
                Err(error) => log!("interrupt routes: {error}"),
            }
        }
        for function in &self.assigned {
            function.device().settle();
        }
        for function in &mut self.functions {
            let bar = function.transport().bar().map(|bar| bar.start);
            let Some(bar) = bar.filter(|bar| Some(*bar) != function.notified_at) else {
                continue;
            };
            let left = match function.notified_at.take() {
                Some(old) => notifications(&self.vm, function, old, false),
                None => Ok(()),
            };
            match left {
                Ok(()) => arrange_notifications(&self.vm, function, bar),
                Err(error) => log!("notifications of PCI device {}: {error}", function.slot),
            }
        }
    }

    /// What a new worker is to know in advance.
    pub(crate) fn preview(&self) -> Preview {
        let own = self.functions.iter().map(|function| {
            let transport = function.transport();
            FunctionPreview {
                slot: function.slot,
                bar: transport.bar_address(),
                routes: transport.interrupts().msix().enabled_messages(),
            }
        });
        // KVM has nothing to do with the BARs of these.
        let assigned = self.assigned.iter().map(|function| FunctionPreview {
            slot: function.slot,
            bar: 0,
            routes: function.device().msix().enabled_messages(),
        });
        own.chain(assigned).collect()
    }

    /// How much of the preview was no longer so in the state that was loaded: vectors and BARs. It is arranged anew once
    /// the guest runs.
    pub(crate) fn changed(&self) -> u32 {
        let mut changed = self.stale_vectors();
        for function in &self.functions {
            let transport = function.transport();
            let bar = transport.bar().map(|bar| bar.start);
            changed += u32::from(bar.is_some() && bar != function.notified_at);
        }
        if changed > 0 {
            self.stale.flag.store(true, Ordering::SeqCst);
            self.stale.wake.trigger();
        }
        changed
    }
}

/// The routes that an old worker announces of a function with so many vectors.
fn announced(told: Option<&FunctionPreview>, vectors: usize) -> Vec<(u16, Message)> {
    let routes = told.into_iter().flat_map(|told| &told.routes);
    routes
        .filter(|(vector, _)| usize::from(*vector) < vectors)
        .take(vectors)
        .copied()
        .collect()
}

/// A copy of an eventfd as the KVM crates want it.
fn copy(fd: &OwnedFd) -> Result<EventFd, PlatformError> {
    let copy = fd.try_clone().map_err(PlatformError::EventFd)?;
    Ok(vm::event_fd(copy))
}

/// Arranges them there, for all queues or, where KVM does not take that, for none.
fn arrange_notifications(vm: &VmFd, function: &mut Wired, bar: u64) {
    match notifications(vm, function, bar, true) {
        Ok(()) => function.notified_at = Some(bar),
        Err(error) => {
            // It ends where those end that were arranged, if there are any.
            let _ = notifications(vm, function, bar, false);
            log!("notifications of PCI device {}: {error}", function.slot);
        }
    }
}

/// Arranges that KVM signals the queues of a function whose BAR is at `bar`, or that it does no more.
fn notifications(vm: &VmFd, function: &Wired, bar: u64, on: bool) -> Result<(), PlatformError> {
    let transport = function.transport();
    for (kick, queue) in transport.kicks().iter().zip(0..) {
        let kick = copy(kick)?;
        let address = IoEventAddress::Mmio(bar + NOTIFY + NOTIFY_STEP * queue);
        if on {
            vm.register_ioevent(&kick, &address, NoDatamatch)
        } else {
            vm.unregister_ioevent(&kick, &address, NoDatamatch)
        }
        .map_err(vm::ioctl("KVM_IOEVENTFD"))?;
    }
    Ok(())
}

/// The routes that KVM makes by itself (`default_routing`, arch/x86/kvm/irq_comm.c): every pin of the I/O APIC, and of
/// the PICs.
fn fixed_routes() -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, chip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let mut entries = Vec::new();
    for gsi in 0..FIRST_VECTOR {
        entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        if gsi < PIC_PINS / 2 {
            entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
        } else if gsi < PIC_PINS {
            entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS / 2));
        }
    }
    entries
}

fn message_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [a0, a1, a2, a3, a4, a5, a6, a7] = message.address.to_le_bytes();
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi.address_lo = u32::from_le_bytes([a0, a1, a2, a3]);
    entry.u.msi.address_hi = u32::from_le_bytes([a4, a5, a6, a7]);
    entry.u.msi.data = message.data;
    entry
}
