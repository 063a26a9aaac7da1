//! The PCI transport (4.1): a virtio device's configuration space, its capabilities, and the registers behind its BAR.
//!
//! ```text
//! BAR 0   0x0000  common configuration (4.1.4.3)      0x3000  notifications (4.1.4.4), 4 bytes a queue
//!         0x1000  ISR status (4.1.4.5)                0x4000  MSI-X table
//!         0x2000  device configuration (4.1.4.6)      0x6000  MSI-X pending bits
//! ```
//!
//! Notifications usually never come here: KVM turns them into the queues' eventfds where the BAR was when that was last
//! arranged. One that does come here is written to the same eventfd.

mod registers;
mod saved;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::StartMode;

use super::DRIVER_OK;
use super::F_EVENT_IDX;
use super::F_VERSION_1;
use super::NEEDS_RESET;
use super::VirtioDevice;
use super::buffers::Ram;
use super::interrupts::Interrupts;
use super::queue::SavedQueue;
use super::queue::Virtqueue;
use super::seat::Seat;
use crate::devices::Device;
use crate::devices::DeviceId;
use crate::devices::Trigger;
use crate::devices::lifecycle::DeviceError;
use crate::devices::pci::Function;
use crate::devices::pci::config_space::ConfigSpace;
use crate::devices::pci::config_space::Identity;
use crate::devices::pci::msix;
use crate::devices::pci::msix::Msix;
use crate::devices::state::SavedSection;

/// Bytes of the BAR.
pub const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
/// Where in the BAR notifications go.
pub const NOTIFY: u64 = 0x3000;
/// Bytes from one queue's notification to the next.
pub const NOTIFY_STEP: u64 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x6000;
/// Bytes of each of those regions that a driver may use.
const REGION: u64 = 0x1000;

/// Red Hat's vendor id, and the first device id of modern virtio (4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// A subsystem id from 0x40 on and a revision from 1 on say that the device is not transitional (4.1.2.1).
const SUBSYSTEM: u16 = 0x0040;
const REVISION: u8 = 1;
/// The capability id of vendors' capabilities (PCI Local Bus 3.0, appendix H).
const VENDOR_SPECIFIC: u8 = 0x09;

/// What a transport is made with.
pub struct Parts {
    /// The PCI device number.
    pub slot: u8,
    /// Where the BAR is at power-on: guest-physical, a multiple of [`BAR_SIZE`].
    pub bar: u32,
    /// How vectors fire.
    pub sink: Box<dyn msix::Sink>,
    /// What the driver notifies each queue by, in the queues' order.
    pub kicks: Vec<Arc<OwnedFd>>,
    /// Guest RAM.
    pub ram: Ram,
    /// What wakes the I/O thread of each backend, in the backends' order.
    pub wakers: Vec<Arc<dyn Trigger>>,
    /// How long requests in flight may take when the device is to park.
    pub drain: Duration,
}

/// What the driver does with the device.
#[derive(Clone, Debug)]
struct Driver {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    features: u64,
    queue_select: u16,
    queues: Vec<SavedQueue>,
    /// The driver has reset the device, and a backend still works for what was before.
    resetting: bool,
}

/// A virtio device on PCI.
pub struct Transport {
    slot: u8,
    bar: u32,
    config: ConfigSpace,
    /// Where the MSI-X capability and the configuration access capability are.
    msix_at: u8,
    access_at: u8,
    device: Box<dyn VirtioDevice>,
    max_sizes: Vec<u16>,
    seats: Vec<(Vec<u16>, Arc<Seat>)>,
    interrupts: Arc<Interrupts>,
    kicks: Vec<Arc<OwnedFd>>,
    ram: Ram,
    drain: Duration,
    driver: Driver,
    config_generation: u8,
    /// The state came from another worker, and nothing was done with it yet.
    loaded: bool,
}

impl Driver {
    fn new(max_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            features: 0,
            queue_select: 0,
            queues: max_sizes.iter().copied().map(SavedQueue::reset).collect(),
            resetting: false,
        }
    }
}

impl Transport {
    /// Puts a device behind PCI.
    #[must_use]
    pub fn new(mut device: Box<dyn VirtioDevice>, parts: Parts) -> Self {
        let Parts {
            slot,
            bar,
            sink,
            kicks,
            ram,
            wakers,
            drain,
        } = parts;
        let max_sizes = device.queue_sizes();
        let vectors = u16::try_from(max_sizes.len())
            .unwrap_or(0)
            .saturating_add(1);
        let interrupts = Arc::new(Interrupts::new(Msix::new(vectors, sink), max_sizes.len()));
        let id = DeviceId::new(device.identity().kind, slot.into());
        let seats: Vec<(Vec<u16>, Arc<Seat>)> = device
            .backends()
            .into_iter()
            .zip(wakers)
            .map(|((queues, backend), waker)| {
                let seat = Seat::new(id, backend, Arc::clone(&interrupts), waker);
                (queues, Arc::new(seat))
            })
            .collect();
        device.seated(seats.iter().map(|(_, seat)| Arc::downgrade(seat)).collect());
        let (config, msix_at, access_at) = config_space(&*device, bar, vectors);
        Self {
            slot,
            bar,
            config,
            msix_at,
            access_at,
            driver: Driver::new(&max_sizes),
            device,
            max_sizes,
            seats,
            interrupts,
            kicks,
            ram,
            drain,
            config_generation: 0,
            loaded: false,
        }
    }

    /// The seats of its backends.
    pub fn seats(&self) -> impl Iterator<Item = &Arc<Seat>> {
        self.seats.iter().map(|(_, seat)| seat)
    }

    /// Its interrupts.
    #[must_use]
    pub fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    /// What the driver notifies each queue by.
    #[must_use]
    pub fn kicks(&self) -> &[Arc<OwnedFd>] {
        &self.kicks
    }

    /// The device's configuration has changed by no doing of its driver, which is told.
    pub fn reconfigured(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.driver.status & DRIVER_OK != 0 {
            self.interrupts.config();
        }
    }

    /// Where its BAR is, whether it answers or not.
    #[must_use]
    pub fn bar_address(&self) -> u64 {
        self.config.bar_address()
    }

    /// Where its BAR answers now, in guest-physical bytes; nowhere while memory decoding is off.
    #[must_use]
    pub fn bar(&self) -> Option<Range<u64>> {
        self.config.bar()
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | self.device.ring_features()
    }

    fn status(&self) -> u8 {
        let needs_reset = self.interrupts.needs_reset() && self.driver.status != 0;
        self.driver.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    /// The driver is ready: its queues become live.
    fn activate(&mut self) {
        let Ok(mut queues) = self.live_queues() else {
            self.interrupts.fail();
            return;
        };
        self.device.activate(self.driver.features);
        self.seat(&mut queues);
        self.run();
    }

    /// The queues that the driver has enabled, each checked to be in RAM.
    fn live_queues(&self) -> Result<Vec<Virtqueue>, crate::devices::state::StateError> {
        let event_idx = self.driver.features & F_EVENT_IDX != 0;
        let mut live = Vec::new();
        let all = (0..)
            .zip(&self.driver.queues)
            .zip(&self.max_sizes)
            .zip(&self.kicks);
        for (((index, queue), max_size), kick) in all {
            if queue.enabled {
                let queue = queue.queue(*max_size, event_idx, self.ram)?;
                let (kick, interrupts) = (Arc::clone(kick), Arc::clone(&self.interrupts));
                live.push(Virtqueue::new(index, queue, self.ram, kick, interrupts));
            }
        }
        Ok(live)
    }

    /// Gives the queues to the backends that serve them. All seats are stopped.
    fn seat(&self, queues: &mut Vec<Virtqueue>) {
        for (served, seat) in &self.seats {
            let (mine, rest) = std::mem::take(queues)
                .into_iter()
                .partition(|queue| served.contains(&queue.index()));
            *queues = rest;
            seat.with(|occupant| occupant.queues = mine);
        }
    }

    fn run(&self) {
        if self.driver.status & DRIVER_OK != 0
            && !self.driver.resetting
            && !self.interrupts.needs_reset()
        {
            self.seats().for_each(|seat| seat.run());
        }
    }

    /// Asks all backends to stop. Whether one worked.
    fn stop(&self) -> bool {
        let stopped: Vec<bool> = self.seats().map(|seat| seat.stop()).collect();
        stopped.contains(&true)
    }

    /// Waits until all backends stand still, which were asked to.
    fn drain(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + self.drain;
        let busy: Vec<_> = self
            .seats()
            .filter(|seat| !seat.wait_until(deadline))
            .collect();
        match (busy.len(), busy.iter().find_map(|seat| seat.delay())) {
            (0, _) => Ok(()),
            (_, Some(delay)) => Err(DeviceError::Elsewhere(delay)),
            (busy, None) => Err(DeviceError::Busy(busy)),
        }
    }

    /// What the device stands for has this many bytes from now on, and the driver is told. Where they are fewer, no request that
    /// was checked against the old size is under way afterwards.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Busy`] when requests do not finish in time, [`DeviceError::Fixed`] for a device without a size; it is as
    /// before then.
    pub fn resize(&mut self, bytes: u64) -> Result<(), DeviceError> {
        let size = self.device.size().ok_or(DeviceError::Fixed)?;
        if bytes < size {
            // One that is parked stays so.
            let running = self.stop();
            let drained = self.drain();
            if drained.is_ok() {
                self.device.resize(bytes);
            }
            if running {
                self.run();
            }
            drained?;
        } else {
            self.device.resize(bytes);
        }
        self.reconfigured();
        Ok(())
    }

    /// Ends the device, which is off the bus: nobody serves it any more, and its backends are gone.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Busy`] when requests do not finish in time; it can be tried again.
    pub fn end(&mut self) -> Result<(), DeviceError> {
        self.stop();
        self.drain()?;
        self.seats().for_each(|seat| seat.clear());
        Ok(())
    }

    /// The driver has written a status of 0. It is over when no backend works any more, which the driver finds out by
    /// reading the status.
    fn begin_reset(&mut self) {
        self.driver.resetting = true;
        self.stop();
        self.finish_reset();
    }

    fn finish_reset(&mut self) {
        if self.driver.resetting {
            let still = |seat: &Arc<Seat>| seat.with(|_| ()).is_some();
            if self.seats().all(still) {
                self.forget_driver();
            }
        }
    }

    /// All seats are stopped.
    fn forget_driver(&mut self) {
        for seat in self.seats() {
            seat.with(|occupant| occupant.queues.clear());
        }
        self.device.reset();
        self.interrupts.reset();
        self.driver = Driver::new(&self.max_sizes);
    }

    fn notify(&self, queue: u64) {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.kicks.get(queue));
        if let Some(kick) = kick {
            // Only a counter at its end refuses, and then the queue is served anyhow.
            let _ = rustix::io::write(kick, &1_u64.to_ne_bytes());
        }
    }

    /// How far the queues are, of which the stopped seats know.
    fn note_positions(&mut self) {
        for (_, seat) in &self.seats {
            seat.with(|occupant| {
                for queue in &occupant.queues {
                    let (next_available, next_used) = queue.position();
                    if let Some(noted) = self.driver.queues.get_mut(usize::from(queue.index())) {
                        noted.next_available = next_available;
                        noted.next_used = next_used;
                    }
                }
            });
        }
    }
}

/// The configuration space of a virtio device, and where its MSI-X and its access capability are.
fn config_space(device: &dyn VirtioDevice, bar: u32, vectors: u16) -> (ConfigSpace, u8, u8) {
    let super::Identity {
        kind: _,
        virtio_type,
        pci_class,
    } = device.identity();
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + virtio_type,
        class: pci_class,
        revision: REVISION,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    })
    .with_bar(BAR_SIZE, bar);
    let mut body = Vec::new();
    body.extend(vectors.saturating_sub(1).to_le_bytes());
    // Both in BAR 0, whose number is in the lowest bits.
    body.extend(u32::try_from(MSIX_TABLE).unwrap_or(0).to_le_bytes());
    body.extend(u32::try_from(MSIX_PENDING).unwrap_or(0).to_le_bytes());
    let control = (msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes();
    let msix_at = config.add_capability(msix::CAPABILITY, &body, &control);

    // struct virtio_pci_cap (4.1.4) after id and link: length, type, BAR, id, padding, offset, length.
    let region = |kind: u8, offset: u64, length: u64, more: &[u8]| {
        let size = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
        let mut body = vec![size, kind, 0, 0, 0, 0];
        body.extend(u32::try_from(offset).unwrap_or(0).to_le_bytes());
        body.extend(u32::try_from(length).unwrap_or(0).to_le_bytes());
        body.extend(more);
        body
    };
    let step = u32::try_from(NOTIFY_STEP).unwrap_or(0).to_le_bytes();
    for body in [
        region(1, COMMON, registers::COMMON_LENGTH, &[]),
        region(2, NOTIFY, REGION, &step),
        region(3, ISR, 1, &[]),
        region(4, DEVICE, REGION, &[]),
    ] {
        config.add_capability(VENDOR_SPECIFIC, &body, &[]);
    }
    // VIRTIO_PCI_CAP_PCI_CFG (4.1.4.9): the driver chooses BAR, offset and length, then reads or writes the data.
    let body = region(5, 0, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    for bits in writable.iter_mut().skip(2).take(1) {
        *bits = 0xFF;
    }
    for bits in writable.iter_mut().skip(6) {
        *bits = 0xFF;
    }
    let access_at = config.add_capability(VENDOR_SPECIFIC, &body, &writable);
    (config, msix_at, access_at)
}

impl Function for Transport {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.config.read(offset, data);
        if let Some(at) = self.accessed(offset, data.len()) {
            data.fill(0xFF);
            self.bar_read(at, data);
        }
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        let before = self.config.bar();
        self.config.write(offset, data);
        if self.config.bar().is_some_and(|bar| Some(bar) != before) {
            self.interrupts.msix().note_stale();
        }
        let control = self.config.word(self.msix_at + 2);
        self.interrupts.msix().control(control);
        if let Some(at) = self.accessed(offset, data.len()) {
            self.bar_write(at, data);
        }
    }

    fn decode(&self, bytes: &Range<u64>) -> Option<u64> {
        let bar = self.config.bar()?;
        (bar.start <= bytes.start && bytes.end <= bar.end).then(|| bytes.start - bar.start)
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        self.finish_reset();
        match offset {
            COMMON..ISR => self.common_read(offset - COMMON, data),
            ISR => {
                let isr = self.interrupts.take_isr();
                data.iter_mut().for_each(|byte| *byte = 0);
                if let Some(first) = data.first_mut() {
                    *first = isr;
                }
            }
            DEVICE..NOTIFY => {
                data.fill(0);
                let config = self.device.config();
                let at = usize::try_from(offset - DEVICE).unwrap_or(usize::MAX);
                for (to, from) in data.iter_mut().zip(config.iter().skip(at)) {
                    *to = *from;
                }
            }
            MSIX_TABLE..MSIX_PENDING => {
                self.interrupts.msix().table_read(offset - MSIX_TABLE, data)
            }
            MSIX_PENDING.. => self
                .interrupts
                .msix()
                .pending_read(offset - MSIX_PENDING, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        self.finish_reset();
        match offset {
            COMMON..ISR => self.common_write(offset - COMMON, data),
            DEVICE..NOTIFY => self.device.write_config(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => self.notify((offset - NOTIFY) / NOTIFY_STEP),
            MSIX_TABLE..MSIX_PENDING => {
                self.interrupts
                    .msix()
                    .table_write(offset - MSIX_TABLE, data);
            }
            _ => {}
        }
    }
}

impl Transport {
    /// Where in the BAR an access to the data of the access capability goes, if it is one that the driver has set up.
    fn accessed(&self, offset: u8, length: usize) -> Option<u64> {
        let at = self.access_at;
        let bar = self.config.word(at.checked_add(4)?) & 0xFF;
        let (target, chosen) = (
            self.config.dword(at.checked_add(8)?),
            self.config.dword(at.checked_add(12)?),
        );
        let fits = bar == 0
            && offset == at.checked_add(16)?
            && u32::try_from(length) == Ok(chosen)
            && matches!(chosen, 1 | 2 | 4)
            && target % chosen == 0
            && target < BAR_SIZE;
        fits.then(|| u64::from(target))
    }
}

impl Device for Transport {
    fn id(&self) -> DeviceId {
        DeviceId::new(self.device.identity().kind, self.slot.into())
    }

    fn setup(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        let vectors = self.interrupts.msix().vectors();
        (self.config, self.msix_at, self.access_at) =
            config_space(&*self.device, self.bar, vectors);
        self.interrupts.msix().reset();
        self.forget_driver();
        self.config_generation = 0;
        self.loaded = false;
        Ok(())
    }

    /// Requests in flight are finished, or put back. The others stay in their rings. What serves them elsewhere has
    /// stopped.
    fn park(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        self.stop();
        self.drain()?;
        self.finish_reset();
        self.note_positions();
        Ok(())
    }

    fn save(&mut self, _mode: StartMode) -> Result<SavedSection, DeviceError> {
        Ok(self.encode()?)
    }

    fn load(&mut self, _mode: StartMode, section: &SavedSection) -> Result<(), DeviceError> {
        Ok(self.decode(section)?)
    }

    fn resume(&mut self, _mode: StartMode) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.loaded) && self.driver.status & DRIVER_OK != 0 {
            self.interrupts.repeat_all();
        }
        self.run();
        Ok(())
    }

    fn failed(&mut self, _mode: StartMode) {}
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("id", &self.id())
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
