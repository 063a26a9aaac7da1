//! The common configuration (4.1.4.3): each access is one field, or half of a 64-bit one; any other reads as zeroes and
//! writes nothing.

use super::Transport;
use crate::devices::virtio::DRIVER_BITS;
use crate::devices::virtio::DRIVER_OK;
use crate::devices::virtio::F_VERSION_1;
use crate::devices::virtio::FEATURES_OK;

/// Bytes of `struct virtio_pci_common_cfg`, with the fields of version 1.2.
pub(super) const COMMON_LENGTH: u64 = 0x40;

// Offsets in it.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0C;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1A;
const QUEUE_ENABLE: u64 = 0x1C;
const QUEUE_NOTIFY_OFF: u64 = 0x1E;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_NOTIFY_DATA: u64 = 0x38;

/// Puts a number into an access of its size.
fn answer(data: &mut [u8], bytes: &[u8]) {
    if data.len() == bytes.len() {
        data.copy_from_slice(bytes);
    }
}

/// Puts a 64-bit number, or the half of it that is accessed.
fn answer_wide(data: &mut [u8], half: u64, value: u64) {
    let bytes = value.to_le_bytes();
    let from = if half == 0 { 0 } else { 4 };
    if data.len() == 4 || (data.len() == 8 && half == 0) {
        answer(data, bytes.get(from..from + data.len()).unwrap_or_default());
    }
}

/// Writes a 64-bit number, or half of it.
fn change_wide(value: &mut u64, half: u64, data: &[u8]) {
    let mut bytes = value.to_le_bytes();
    let from = if half == 0 { 0 } else { 4 };
    if data.len() == 4 || (data.len() == 8 && half == 0) {
        for (to, new) in bytes.iter_mut().skip(from).zip(data) {
            *to = *new;
        }
        *value = u64::from_le_bytes(bytes);
    }
}

/// Which half of a 64-bit field an offset is in, if it is in that field.
fn half(offset: u64, field: u64) -> Option<u64> {
    offset
        .checked_sub(field)
        .filter(|half| matches!(half, 0 | 4))
}

/// 32 of 64 feature bits; none beyond.
fn window(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

impl Transport {
    pub(super) fn common_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let driver = &self.driver;
        let selected = driver.queue_select;
        let queue = driver.queues.get(usize::from(selected)).copied();
        match offset {
            DEVICE_FEATURE_SELECT => answer(data, &driver.device_feature_select.to_le_bytes()),
            DEVICE_FEATURE => {
                let bits = window(self.offered(), driver.device_feature_select);
                answer(data, &bits.to_le_bytes());
            }
            DRIVER_FEATURE_SELECT => answer(data, &driver.driver_feature_select.to_le_bytes()),
            DRIVER_FEATURE => {
                let bits = window(driver.features, driver.driver_feature_select);
                answer(data, &bits.to_le_bytes());
            }
            CONFIG_VECTOR => answer(data, &self.interrupts.config_vector().to_le_bytes()),
            NUM_QUEUES => {
                let count = u16::try_from(driver.queues.len()).unwrap_or(0);
                answer(data, &count.to_le_bytes());
            }
            STATUS => answer(data, &[self.status()]),
            CONFIG_GENERATION => answer(data, &[self.config_generation]),
            QUEUE_SELECT => answer(data, &selected.to_le_bytes()),
            QUEUE_VECTOR => answer(data, &self.interrupts.queue_vector(selected).to_le_bytes()),
            // The rest is a queue's; without one all of it is 0, which says that there is none.
            _ => {
                let Some(queue) = queue else { return };
                match offset {
                    QUEUE_SIZE => answer(data, &queue.size.to_le_bytes()),
                    QUEUE_ENABLE => answer(data, &u16::from(queue.enabled).to_le_bytes()),
                    QUEUE_NOTIFY_OFF | QUEUE_NOTIFY_DATA => answer(data, &selected.to_le_bytes()),
                    _ => {
                        for (field, value) in [
                            (QUEUE_DESC, queue.descriptors),
                            (QUEUE_DRIVER, queue.available),
                            (QUEUE_DEVICE, queue.used),
                        ] {
                            if let Some(half) = half(offset, field) {
                                answer_wide(data, half, value);
                            }
                        }
                    }
                }
            }
        }
    }

    pub(super) fn common_write(&mut self, offset: u64, data: &[u8]) {
        if self.driver.resetting {
            return;
        }
        match (offset, data) {
            (DEVICE_FEATURE_SELECT, &[a, b, c, d]) => {
                self.driver.device_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (DRIVER_FEATURE_SELECT, &[a, b, c, d]) => {
                self.driver.driver_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (DRIVER_FEATURE, &[a, b, c, d]) => self.accept(u32::from_le_bytes([a, b, c, d])),
            (CONFIG_VECTOR, &[a, b]) => {
                self.interrupts
                    .set_config_vector(u16::from_le_bytes([a, b]));
            }
            (STATUS, &[status]) => self.set_status(status),
            (QUEUE_SELECT, &[a, b]) => self.driver.queue_select = u16::from_le_bytes([a, b]),
            (QUEUE_VECTOR, &[a, b]) => {
                let queue = self.driver.queue_select;
                self.interrupts
                    .set_queue_vector(queue, u16::from_le_bytes([a, b]));
            }
            _ => self.configure_queue(offset, data),
        }
    }

    /// Features are chosen before they are agreed (3.1.1).
    fn accept(&mut self, bits: u32) {
        if self.driver.status & FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.driver.features;
        match self.driver.driver_feature_select {
            0 => *features = (*features & !u64::from(u32::MAX)) | u64::from(bits),
            1 => *features = (*features & u64::from(u32::MAX)) | u64::from(bits) << 32,
            _ => {}
        }
    }

    /// A queue is configured before it is enabled, and enabled before the driver is ready; a ring never moves.
    fn configure_queue(&mut self, offset: u64, data: &[u8]) {
        let ready = self.driver.status & DRIVER_OK != 0;
        let selected = usize::from(self.driver.queue_select);
        let max_size = self.max_sizes.get(selected).copied();
        let Some(queue) = self
            .driver
            .queues
            .get_mut(selected)
            .filter(|queue| !ready && !queue.enabled)
        else {
            return;
        };
        match (offset, data) {
            (QUEUE_SIZE, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && Some(size) <= max_size {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, &[1, 0]) => queue.enabled = true,
            _ => {
                for (field, value) in [
                    (QUEUE_DESC, &mut queue.descriptors),
                    (QUEUE_DRIVER, &mut queue.available),
                    (QUEUE_DEVICE, &mut queue.used),
                ] {
                    if let Some(half) = half(offset, field) {
                        change_wide(value, half, data);
                    }
                }
            }
        }
    }

    /// Bits are only ever added (2.1.1); 0 resets.
    fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.begin_reset();
            return;
        }
        let before = self.driver.status;
        let mut now = before | (status & DRIVER_BITS);
        if now & FEATURES_OK != 0 && before & FEATURES_OK == 0 {
            let features = self.driver.features;
            if features & !self.offered() != 0 || features & F_VERSION_1 == 0 {
                now &= !FEATURES_OK;
            }
        }
        if now & FEATURES_OK == 0 {
            now &= !DRIVER_OK;
        }
        self.driver.status = now;
        if now & DRIVER_OK != 0 && before & DRIVER_OK == 0 {
            self.activate();
        }
    }
}
