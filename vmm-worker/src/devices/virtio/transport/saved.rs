//! The saved state of a virtio device: what PCI, the transport and the device each have to say.

use serde::Deserialize;
use serde::Serialize;

use super::Driver;
use super::Transport;
use crate::devices::pci::config_space::SavedConfigSpace;
use crate::devices::pci::msix::SavedMsix;
use crate::devices::state;
use crate::devices::state::SavedSection;
use crate::devices::state::StateError;
use crate::devices::virtio::DRIVER_BITS;
use crate::devices::virtio::DRIVER_OK;
use crate::devices::virtio::F_EVENT_IDX;
use crate::devices::virtio::F_VERSION_1;
use crate::devices::virtio::FEATURES_OK;
use crate::devices::virtio::interrupts::NO_VECTOR;
use crate::devices::virtio::queue::SavedQueue;

/// Bits of the ISR status.
const ISR_BITS: u8 = 3;

/// In all versions, of which only `device` makes several.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedTransport {
    config: SavedConfigSpace,
    msix: SavedMsix,
    pub(super) driver: SavedDriver,
    pub(super) isr: u8,
    needs_reset: bool,
    config_generation: u8,
    device: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedDriver {
    pub(super) status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) features: u64,
    queue_select: u16,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    pub(super) queues: Vec<SavedQueue>,
}

impl Transport {
    pub(super) fn encode(&self) -> Result<SavedSection, StateError> {
        self.section_of(&self.state()?)
    }

    pub(super) fn section_of(&self, state: &SavedTransport) -> Result<SavedSection, StateError> {
        let id = crate::devices::Device::id(self);
        state::encode(id, *id.kind.versions().end(), state)
    }

    pub(super) fn state(&self) -> Result<SavedTransport, StateError> {
        let Self {
            slot: _,
            bar: _,
            config,
            msix_at: _,
            access_at: _,
            device,
            max_sizes: _,
            seats: _,
            interrupts,
            kicks: _,
            ram: _,
            drain: _,
            driver,
            config_generation,
            loaded: _,
        } = self;
        let Driver {
            status,
            device_feature_select,
            driver_feature_select,
            features,
            queue_select,
            queues,
            // A parked device has finished its reset.
            resetting: _,
        } = driver;
        let vectors = (0..).take(queues.len());
        Ok(SavedTransport {
            config: config.save(),
            msix: interrupts.msix().save(),
            driver: SavedDriver {
                status: *status,
                device_feature_select: *device_feature_select,
                driver_feature_select: *driver_feature_select,
                features: *features,
                queue_select: *queue_select,
                config_vector: interrupts.config_vector(),
                queue_vectors: vectors
                    .map(|index| interrupts.queue_vector(index))
                    .collect(),
                queues: queues.clone(),
            },
            isr: interrupts.isr(),
            needs_reset: interrupts.needs_reset(),
            config_generation: *config_generation,
            device: device.save()?,
        })
    }

    fn parse(&self, section: &SavedSection) -> Result<SavedTransport, StateError> {
        let versions = self.device.identity().kind.versions();
        if !versions.contains(&section.version) {
            return Err(StateError::Version {
                found: section.version,
                supported: *versions.end(),
            });
        }
        state::parse(&section.bytes)
    }

    pub(super) fn decode(&mut self, section: &SavedSection) -> Result<(), StateError> {
        let SavedTransport {
            config,
            msix,
            driver,
            isr,
            needs_reset,
            config_generation,
            device,
        } = self.parse(section)?;
        let SavedDriver {
            status,
            device_feature_select,
            driver_feature_select,
            features,
            queue_select,
            config_vector,
            queue_vectors,
            queues,
        } = driver;
        if status & !DRIVER_BITS != 0 || (status & DRIVER_OK != 0 && status & FEATURES_OK == 0) {
            return Err(StateError::field(
                "status",
                status,
                "not one that a driver reaches",
            ));
        }
        let agreed = status & FEATURES_OK != 0;
        if agreed && (features & !self.offered() != 0 || features & F_VERSION_1 == 0) {
            return Err(StateError::field(
                "features",
                features,
                "not among those that this device offers",
            ));
        }
        if isr & !ISR_BITS != 0 {
            return Err(StateError::field(
                "isr",
                isr,
                "has bits that the register does not",
            ));
        }
        if queues.len() != self.max_sizes.len() || queue_vectors.len() != queues.len() {
            return Err(StateError::field(
                "queues",
                queues.len() as u64,
                "not the number of queues of this device",
            ));
        }
        let vectors = self.interrupts.msix().vectors();
        for (name, chosen) in [
            ("config_vector", [config_vector].as_slice()),
            ("queue_vector", queue_vectors.as_slice()),
        ] {
            let impossible = |vector: &&u16| **vector >= vectors && **vector != NO_VECTOR;
            if let Some(vector) = chosen.iter().find(impossible) {
                return Err(StateError::field(
                    name,
                    *vector,
                    "not a vector of this device",
                ));
            }
        }
        let event_idx = features & F_EVENT_IDX != 0;
        let ready = status & DRIVER_OK != 0;
        for (queue, max_size) in queues.iter().zip(&self.max_sizes) {
            if !queue.size.is_power_of_two() || queue.size > *max_size {
                return Err(StateError::field(
                    "queue.size",
                    queue.size,
                    "not a size of this queue",
                ));
            }
            if ready && !needs_reset && queue.enabled {
                queue.queue(*max_size, event_idx, self.ram)?;
            }
        }
        let loaded = Driver {
            status,
            device_feature_select,
            driver_feature_select,
            features,
            queue_select,
            queues,
            resetting: false,
        };
        self.config.load(config)?;
        let control = self.config.word(self.msix_at + 2);
        self.interrupts.msix().load(msix, control)?;
        let accepted = ready.then_some(features);
        self.device
            .load_version(section.version, &device, accepted)?;
        self.driver = loaded;
        self.interrupts.set_config_vector(config_vector);
        for (index, vector) in (0..).zip(queue_vectors) {
            self.interrupts.set_queue_vector(index, vector);
        }
        self.interrupts.set_isr(isr);
        self.interrupts.set_needs_reset(needs_reset);
        self.config_generation = config_generation;
        let mut queues = if ready && !needs_reset {
            self.live_queues()?
        } else {
            Vec::new()
        };
        self.seat(&mut queues);
        self.loaded = true;
        Ok(())
    }
}
