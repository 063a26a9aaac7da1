//! The network interface (5.1): a tap, one or more pairs of a receive and a transmit queue.
//!
//! A packet is in the tap or in the guest, never between: it is read straight into the driver's buffers and completed, or
//! written to the tap and completed, by one I/O thread, before anything else is done. So a device that is parked holds
//! none, and nothing of a packet is ever saved. A tap is read by nobody before the commit of an upgrade: I/O threads serve
//! no seat until then.

mod control;
mod pair;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use baton_ipc::worker::NetConfig;
use serde::Deserialize;
use serde::Serialize;

use super::Backend;
use super::Identity;
use super::VirtioDevice;
use super::guest_io;
use super::rate::Limits;
use super::rate::SavedLimits;
use super::seat::Seat;
use crate::clock;
use crate::devices::DeviceKind;
use crate::devices::state;
use crate::devices::state::StateError;
use crate::diagnostics::log;
use control::Control;
use pair::Pair;

/// Descriptors of a queue, and of the queue for commands.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;

// Feature bits (5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;

/// Offloads of a tap (TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6; `linux/if_tun.h`): what the reader of its frames can take.
const TUN_CSUM: u32 = 1;
const TUN_TSO4: u32 = 2;
const TUN_TSO6: u32 = 4;

/// Bytes of the header of each packet (`struct virtio_net_hdr_v1`, 5.1.6), here and in the tap.
const HEADER: usize = 12;
/// The largest packet with its header (5.1.6.3.1: 65,562 bytes are enough with segmentation offload).
const MAX_PACKET: usize = 65_562;
/// Ethernet header and two VLAN tags.
const LINK_HEADER: usize = 14 + 2 * 4;
/// Packets of one direction that are served before others of the same thread get their turn.
const BATCH: usize = 64;

/// Of PCI's class network, Ethernet.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::NET,
    virtio_type: 1,
    pci_class: 0x02_0000,
};
/// Bytes of `struct virtio_net_config` up to the MTU.
const CONFIG_LENGTH: usize = 12;
/// Link status: up.
const LINK_UP: u16 = 1;

/// Tells a tap what its reader can take.
pub type SetOffloads = fn(BorrowedFd<'_>, u32) -> io::Result<()>;

/// What the queues of an interface share.
struct Shared {
    /// One a pair.
    taps: Vec<Arc<OwnedFd>>,
    mtu: u16,
    /// What the driver has accepted.
    features: AtomicU64,
    /// How many pairs the driver uses (5.1.6.5.5).
    pairs: AtomicU16,
    /// What the taps were told last by this worker.
    offloads: Mutex<Option<u32>>,
    set_offloads: SetOffloads,
    received: Mutex<Limits>,
    sent: Mutex<Limits>,
    seats: OnceLock<Vec<Weak<Seat>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::SeqCst) & feature != 0
    }

    /// The taps that a pair reads: its own, and in turn those of the pairs that the driver does not use. A tap has one
    /// reader.
    fn taps_of(&self, pair: u16) -> impl Iterator<Item = &Arc<OwnedFd>> {
        let pairs = usize::from(self.pairs.load(Ordering::SeqCst).max(1));
        let pair = usize::from(pair);
        let mine = move |index: usize| pair < pairs && index % pairs == pair;
        self.taps
            .iter()
            .enumerate()
            .filter(move |(index, _)| mine(*index))
            .map(|(_, tap)| tap)
    }

    /// Room that any packet finds enough, its header included.
    fn room(&self) -> usize {
        if self.has(F_GUEST_TSO4 | F_GUEST_TSO6) {
            MAX_PACKET
        } else {
            HEADER + LINK_HEADER + usize::from(self.mtu)
        }
    }

    /// Has the taps make what the driver can take, unless they do already. They share it: one is told for all.
    fn apply_offloads(&self) {
        let mut wanted = 0;
        // Segments have no checksums of their own.
        if self.has(F_GUEST_CSUM) {
            wanted |= TUN_CSUM;
            for (feature, offload) in [(F_GUEST_TSO4, TUN_TSO4), (F_GUEST_TSO6, TUN_TSO6)] {
                wanted |= if self.has(feature) { offload } else { 0 };
            }
        }
        let mut offloads = lock(&self.offloads);
        if *offloads != Some(wanted) {
            *offloads = Some(wanted);
            let told = self
                .taps
                .first()
                .map(|tap| (self.set_offloads)(tap.as_fd(), wanted));
            if let Some(Err(error)) = told {
                // Packets that the driver cannot take are dropped.
                log!("virtio-net: offloads {wanted:#x}: {error}");
            }
        }
    }

    /// Has every backend look anew at what it is to wait for.
    fn nudge(&self) {
        for seat in self.seats.get().into_iter().flatten() {
            if let Some(seat) = seat.upgrade() {
                seat.nudge();
            }
        }
    }
}

/// The half that the driver configures.
pub struct Net {
    shared: Arc<Shared>,
    mac: [u8; 6],
    queues: u8,
}

/// Version 1, in the transport's section.
#[derive(Debug, Serialize, Deserialize)]
struct SavedNet {
    mac: [u8; 6],
    mtu: u16,
    pairs: u16,
    received: SavedLimits,
    sent: SavedLimits,
}

impl Net {
    /// An interface on the queues of a tap, one a pair.
    #[must_use]
    pub fn new(taps: Vec<OwnedFd>, config: &NetConfig) -> Self {
        Self::with_offloads(taps, config, guest_io::set_tap_offloads)
    }

    /// The same, whose offloads are told to its taps in another way, for tests of what is no tap.
    #[must_use]
    pub fn with_offloads(
        taps: Vec<OwnedFd>,
        config: &NetConfig,
        set_offloads: SetOffloads,
    ) -> Self {
        let now = clock::monotonic_ns();
        let shared = Shared {
            taps: taps.into_iter().map(Arc::new).collect(),
            mtu: config.mtu,
            features: AtomicU64::new(0),
            pairs: AtomicU16::new(1),
            offloads: Mutex::new(None),
            set_offloads,
            received: Mutex::new(Limits::new(config.limits, now)),
            sent: Mutex::new(Limits::new(config.limits, now)),
            seats: OnceLock::new(),
        };
        Self {
            shared: Arc::new(shared),
            mac: config.mac,
            queues: config.queues,
        }
    }

    fn layout(&self) -> [u8; CONFIG_LENGTH] {
        let [a, b, c, d, e, f] = self.mac;
        let [status, _] = LINK_UP.to_le_bytes();
        let [mtu_low, mtu_high] = self.shared.mtu.to_le_bytes();
        [
            a,
            b,
            c,
            d,
            e,
            f,
            status,
            0,
            self.queues,
            0,
            mtu_low,
            mtu_high,
        ]
    }
}

impl VirtioDevice for Net {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        let several = if self.queues > 1 { F_CTRL_VQ | F_MQ } else { 0 };
        let own = F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS | several;
        let to_guest = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6;
        own | to_guest | F_CSUM | F_HOST_TSO4 | F_HOST_TSO6
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; usize::from(self.queues) * 2];
        if self.queues > 1 {
            sizes.push(CONTROL_SIZE);
        }
        sizes
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        let queues = u16::from(self.queues);
        let mut backends: Vec<(Vec<u16>, Box<dyn Backend>)> = Vec::new();
        for index in 0..queues {
            let pair = Pair::new(Arc::clone(&self.shared), index);
            backends.push((vec![2 * index, 2 * index + 1], Box::new(pair)));
        }
        if queues > 1 {
            let control = Control::new(Arc::clone(&self.shared));
            backends.push((vec![2 * queues], Box::new(control)));
        }
        backends
    }

    fn seated(&mut self, seats: Vec<Weak<Seat>>) {
        // Once in a device's life.
        let _ = self.shared.seats.set(seats);
    }

    fn config(&self) -> Vec<u8> {
        self.layout().to_vec()
    }

    fn activate(&mut self, features: u64) {
        self.shared.features.store(features, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        self.shared.features.store(0, Ordering::SeqCst);
        self.shared.pairs.store(1, Ordering::SeqCst);
        *lock(&self.shared.offloads) = None;
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self {
            shared,
            mac,
            queues: _,
        } = self;
        let Shared {
            taps: _,
            mtu,
            // The transport's.
            features: _,
            pairs,
            // Each generation tells the taps once more.
            offloads: _,
            set_offloads: _,
            received,
            sent,
            seats: _,
        } = &**shared;
        let saved = SavedNet {
            mac: *mac,
            mtu: *mtu,
            pairs: pairs.load(Ordering::SeqCst),
            received: lock(received).save(),
            sent: lock(sent).save(),
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    fn load(&mut self, state: &[u8], features: Option<u64>) -> Result<(), StateError> {
        let SavedNet {
            mac,
            mtu,
            pairs,
            received,
            sent,
        } = state::parse(state)?;
        if mac != self.mac {
            let [a, b, c, d, e, f] = mac;
            return Err(StateError::field(
                "mac",
                u64::from_be_bytes([0, 0, a, b, c, d, e, f]),
                "not the address of this interface",
            ));
        }
        if mtu != self.shared.mtu {
            return Err(StateError::field("mtu", mtu, "not the MTU of this tap"));
        }
        if pairs == 0 || pairs > u16::from(self.queues) {
            return Err(StateError::field(
                "pairs",
                pairs,
                "not a number of pairs of this interface",
            ));
        }
        let now = clock::monotonic_ns();
        lock(&self.shared.received).load(received, now)?;
        lock(&self.shared.sent).load(sent, now)?;
        self.shared.pairs.store(pairs, Ordering::SeqCst);
        if let Some(features) = features {
            self.activate(features);
        }
        Ok(())
    }
}
