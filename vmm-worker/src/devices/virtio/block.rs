//! The block device (5.2): one file or block device, one or more queues.
//!
//! A request is served by one I/O thread with preadv and pwritev; there is never more than one request of a queue under way.
//! A long one looks between its parts whether it is to stop or has used up its byte rate, and is then put back into its ring.
//! It goes on from there, in another worker from its start: reading, writing and zeroing again what was read, written or
//! zeroed already changes nothing, as long as the driver has not been told.

mod request;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use baton_ipc::worker::BlockConfig;
use serde::Deserialize;
use serde::Serialize;

use super::Backend;
use super::Identity;
use super::VirtioDevice;
use super::rate::Limits;
use super::rate::SavedLimits;
use crate::clock;
use crate::devices::DeviceKind;
use crate::devices::state;
use crate::devices::state::StateError;
use request::BlockQueue;

/// A sector, in which capacities and places are counted whatever the block size (5.2.4).
pub(super) const SECTOR: u64 = 512;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Parts of a request: a queue's descriptors without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of one discard or write-zeroes segment: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Segments of one such request.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 16;

// Feature bits (5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Of PCI's class mass storage, other.
const IDENTITY: Identity = Identity {
    kind: DeviceKind::BLOCK,
    virtio_type: 2,
    pci_class: 0x01_8000,
};
/// Bytes of `struct virtio_blk_config` up to the fields of write-zeroes.
const CONFIG_LENGTH: usize = 60;

/// What the queues of a disk share.
pub(super) struct Disk {
    pub(super) file: OwnedFd,
    /// Made fewer only while no request is under way.
    sectors: AtomicU64,
    pub(super) readonly: bool,
    /// A block device, not a file.
    pub(super) device: bool,
    /// The file wants aligned buffers.
    pub(super) direct: bool,
    /// The device id string, padded with NULs (5.2.6).
    pub(super) serial: [u8; 20],
    /// The driver flushes when it wants to; otherwise each write has to be stable at its end (5.2.6.2).
    pub(super) write_back: AtomicBool,
    pub(super) limits: Mutex<Limits>,
}

impl Disk {
    /// How many there are.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::SeqCst)
    }

    pub(super) fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The half that the driver configures.
pub struct Block {
    disk: Arc<Disk>,
    queues: u16,
    block_size: u32,
}

/// Version 2, in the transport's section.
#[derive(Debug, Serialize, Deserialize)]
struct SavedBlock {
    sectors: u64,
    limits: SavedLimits,
    block_size: u32,
}

/// Version 1, whose writer was told the same block size as its reader.
#[derive(Debug, Serialize, Deserialize)]
struct SavedBlock1 {
    sectors: u64,
    limits: SavedLimits,
}

impl Block {
    /// A disk on `file`, whose size is what `config` says.
    #[must_use]
    pub fn new(file: OwnedFd, config: &BlockConfig) -> Self {
        let mut serial = [0; 20];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let disk = Disk {
            file,
            sectors: AtomicU64::new(config.bytes / SECTOR),
            readonly: config.readonly,
            device: config.device,
            direct: config.direct,
            serial,
            write_back: AtomicBool::new(false),
            limits: Mutex::new(Limits::new(config.limits, clock::monotonic_ns())),
        };
        Self {
            disk: Arc::new(disk),
            queues: config.queues.into(),
            block_size: config.block_size,
        }
    }

    fn layout(&self) -> [u8; CONFIG_LENGTH] {
        let mut config = [0; CONFIG_LENGTH];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        let alignment = u32::try_from(u64::from(self.block_size) / SECTOR).unwrap_or(1);
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(52, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn identity(&self) -> Identity {
        IDENTITY
    }

    fn features(&self) -> u64 {
        let kind = if self.disk.readonly {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        let queues = if self.queues > 1 { F_MQ } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | kind | queues
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn backends(&mut self) -> Vec<(Vec<u16>, Box<dyn Backend>)> {
        (0..self.queues)
            .map(|index| {
                let queue = BlockQueue::new(Arc::clone(&self.disk));
                (vec![index], Box::new(queue) as Box<dyn Backend>)
            })
            .collect()
    }

    fn config(&self) -> Vec<u8> {
        self.layout().to_vec()
    }

    fn size(&self) -> Option<u64> {
        Some(self.disk.sectors() * SECTOR)
    }

    fn resize(&mut self, bytes: u64) {
        self.disk.sectors.store(bytes / SECTOR, Ordering::SeqCst);
    }

    fn activate(&mut self, features: u64) {
        let write_back = features & F_FLUSH != 0;
        self.disk.write_back.store(write_back, Ordering::SeqCst);
    }

    fn reset(&mut self) {
        self.disk.write_back.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Self {
            disk,
            queues: _,
            block_size,
        } = self;
        let Disk {
            file: _,
            sectors,
            // What the VM file says, each worker is told.
            readonly: _,
            device: _,
            direct: _,
            serial: _,
            // By the features, which are the transport's.
            write_back: _,
            limits: _,
        } = &**disk;
        let saved = SavedBlock {
            sectors: sectors.load(Ordering::SeqCst),
            limits: disk.limits().save(),
            block_size: *block_size,
        };
        postcard::to_stdvec(&saved).map_err(StateError::Malformed)
    }

    fn load_version(
        &mut self,
        version: u16,
        state: &[u8],
        features: Option<u64>,
    ) -> Result<(), StateError> {
        let saved = if version == 1 {
            let SavedBlock1 { sectors, limits } = state::parse(state)?;
            SavedBlock {
                sectors,
                limits,
                block_size: self.block_size,
            }
        } else {
            state::parse(state)?
        };
        self.take_over(saved, features)
    }

    fn load(&mut self, state: &[u8], features: Option<u64>) -> Result<(), StateError> {
        self.take_over(state::parse(state)?, features)
    }
}

impl Block {
    fn take_over(&mut self, saved: SavedBlock, features: Option<u64>) -> Result<(), StateError> {
        let SavedBlock {
            sectors,
            limits,
            block_size,
        } = saved;
        if sectors != self.disk.sectors() {
            return Err(StateError::field(
                "sectors",
                sectors,
                "not the size of this disk",
            ));
        }
        if block_size != self.block_size {
            return Err(StateError::field(
                "block_size",
                block_size,
                "not what this disk is read and written by",
            ));
        }
        self.disk.limits().load(limits, clock::monotonic_ns())?;
        if let Some(features) = features {
            self.activate(features);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
