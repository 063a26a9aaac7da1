//! `[[disk]]` of the VM file.

use std::path::PathBuf;

use baton_ipc::worker::BlockConfig;
use baton_ipc::worker::DeviceLimits;
use baton_ipc::worker::MAX_DISK_QUEUES;
use baton_ipc::worker::MAX_SERIAL;
use baton_ipc::worker::RateLimit;
use serde::Deserialize;

/// The most disks of a VM.
pub(crate) const MAX_DISKS: usize = 16;

/// One disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disk {
    /// Its name, of no other disk.
    pub(crate) id: Label,
    /// A regular file, raw, or a block device.
    pub(crate) path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub(crate) readonly: bool,
    /// Opened with O_DIRECT.
    #[serde(default)]
    pub(crate) direct: bool,
    /// How many queues.
    #[serde(default)]
    pub(crate) queues: Queues,
    /// What the guest reads as its serial number; without it, the id.
    pub(crate) serial: Option<Label>,
    /// Rate limits.
    #[serde(default)]
    pub(crate) limit: Limit,
}

impl Disk {
    /// What a worker is told: this, and what only the open file tells. Sizes in bytes; `device` is a block device.
    pub(crate) fn config(&self, bytes: u64, device: bool, block_size: u32) -> BlockConfig {
        let serial = self.serial.as_ref().unwrap_or(&self.id);
        BlockConfig {
            bytes,
            device,
            readonly: self.readonly,
            direct: self.direct,
            block_size,
            queues: self.queues.0,
            serial: serial.0.clone(),
            limits: self.limit.limits(),
        }
    }
}

/// A disk's name or serial number.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Label(pub(crate) String);

impl TryFrom<String> for Label {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if plain && (1..=MAX_SERIAL).contains(&text.len()) {
            Ok(Self(text))
        } else {
            Err(format!(
                "{text:?} is no id or serial number: 1 to {MAX_SERIAL} of A-Z a-z 0-9 . _ -"
            ))
        }
    }
}

/// 1 to [`MAX_DISK_QUEUES`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u32")]
pub(crate) struct Queues(pub(crate) u8);

impl Default for Queues {
    fn default() -> Self {
        Self(1)
    }
}

impl TryFrom<u32> for Queues {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        match u8::try_from(count) {
            Ok(n @ 1..=MAX_DISK_QUEUES) => Ok(Self(n)),
            _ => Err(format!("{count} queues; a disk has 1 to {MAX_DISK_QUEUES}")),
        }
    }
}

/// `limit` of a disk or a network interface: what may go through it in a second, and at once after a rest.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limit {
    /// Bytes a second.
    bytes: Option<Amount>,
    /// Bytes at once; without it, those of a second.
    bytes_burst: Option<Amount>,
    /// Requests or packets a second.
    operations: Option<Operations>,
    /// Those at once; without it, those of a second.
    operations_burst: Option<Operations>,
}

/// A number of bytes with a binary unit.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct Amount(u64);

impl TryFrom<String> for Amount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        super::binary_size(&text)
            .filter(|bytes| *bytes > 0)
            .map(Self)
            .ok_or_else(|| {
                format!("{text:?} is no number of bytes; write a whole number and K, M or G, as in \"100M\"")
            })
    }
}

/// A number of requests.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u64")]
struct Operations(u64);

impl TryFrom<u64> for Operations {
    type Error = String;

    fn try_from(count: u64) -> Result<Self, String> {
        if (1..=1_000_000_000).contains(&count) {
            Ok(Self(count))
        } else {
            Err(format!("{count} operations; a limit is 1 to 1000000000"))
        }
    }
}

impl Limit {
    /// As the worker is told.
    pub(crate) fn limits(self) -> DeviceLimits {
        let limit = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|per_second| RateLimit {
                per_second,
                burst: burst.unwrap_or(per_second),
            })
        };
        DeviceLimits {
            bytes: limit(
                self.bytes.map(|amount| amount.0),
                self.bytes_burst.map(|amount| amount.0),
            ),
            operations: limit(
                self.operations.map(|count| count.0),
                self.operations_burst.map(|count| count.0),
            ),
        }
    }

    /// A burst of something that has no limit means nothing.
    pub(crate) fn fits(self) -> bool {
        let bytes = self.bytes.is_some() || self.bytes_burst.is_none();
        let operations = self.operations.is_some() || self.operations_burst.is_none();
        bytes && operations
    }
}

/// The disks of a VM, checked together.
#[derive(Debug, Default, Deserialize)]
#[serde(try_from = "Vec<Disk>")]
pub(crate) struct Disks(pub(crate) Vec<Disk>);

impl TryFrom<Vec<Disk>> for Disks {
    type Error = String;

    fn try_from(disks: Vec<Disk>) -> Result<Self, String> {
        if disks.len() > MAX_DISKS {
            return Err(format!(
                "{} disks; a VM has at most {MAX_DISKS}",
                disks.len()
            ));
        }
        for (index, disk) in disks.iter().enumerate() {
            if disks.iter().take(index).any(|other| other.id == disk.id) {
                return Err(format!("two disks have the id {:?}", disk.id.0));
            }
            if !disk.limit.fits() {
                return Err(format!(
                    "disk {:?} has a burst without the limit that it belongs to",
                    disk.id.0
                ));
            }
        }
        Ok(Self(disks))
    }
}
