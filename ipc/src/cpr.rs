//! The cpr channel: descriptors from the broker to a worker, by name and id, in one direction.
//!
//! ```text
//! broker                                           worker
//!   │ header: magic, version, mode, VM, generation   │
//!   │ entry: name, id, description  + 1 descriptor   │  verified on arrival, into the registry
//!   │ …                                              │
//!   │ end: number of entries                         │
//!   │                                                │  … builds the VM, says `ready` on its control socket …
//!   │                                     hang-up    │  "I am listening" (or dead, when no `ready` came before)
//! ```
//!
//! A cold start uses the same channel, with [`StartMode::None`]: there is one way in which a worker gets descriptors.

use std::os::fd::OwnedFd;

use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

use crate::ChannelError;
use crate::Description;
use crate::DescriptorKey;
use crate::FdSocket;
use crate::Received;
use crate::Registry;
use crate::RegistryError;
use crate::StartMode;
use crate::VmId;
use crate::channel::decode;

/// The first bytes of a CPR state.
pub const MAGIC: [u8; 4] = *b"BCPR";
/// The first bytes of QEMU's (QEMU_CPR_FILE_MAGIC, big-endian 0x51435052), known so that it can be refused by name.
pub const QEMU_MAGIC: [u8; 4] = *b"QCPR";
/// The version of the CPR state.
pub const VERSION: u32 = 1;

/// What a CPR state begins with, after [`MAGIC`] and [`VERSION`] in little-endian order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CprHeader {
    /// How the worker comes to its guest.
    pub mode: StartMode,
    /// The VM that the descriptors belong to.
    pub vm: VmId,
    /// The generation of the worker that they are for.
    pub generation: u32,
}

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    Entry(DescriptorKey, Description),
    End(u32),
}

/// Why a CPR state was refused.
#[derive(Debug, Error)]
pub enum CprError {
    /// The socket or the encoding.
    #[error("cpr channel: {0}")]
    Channel(#[from] ChannelError),
    /// A descriptor.
    #[error("cpr channel: {0}")]
    Registry(#[from] RegistryError),
    /// Not a CPR state.
    #[error("cpr channel: bad magic {0:02x?}")]
    Magic(Vec<u8>),
    /// QEMU's CPR state.
    #[error(
        "cpr channel: this is a QEMU's CPR state; Baton and QEMU cannot take over each other's guests"
    )]
    Qemu,
    /// Another version.
    #[error("cpr channel: unsupported version {0} (this is {VERSION})")]
    Version(u32),
    /// The channel ended before its end record.
    #[error("cpr channel: ended after {0} entries, without an end record")]
    Truncated(usize),
    /// The end record counts differently.
    #[error("cpr channel: {announced} entries announced, {received} received")]
    Count {
        /// The end record's number.
        announced: u32,
        /// The number received.
        received: usize,
    },
    /// An entry without its descriptor, or with several.
    #[error("cpr channel: {descriptors} descriptors came with entry {key}")]
    Descriptors {
        /// The entry.
        key: DescriptorKey,
        /// How many came.
        descriptors: usize,
    },
    /// Descriptors with a header or an end record.
    #[error("cpr channel: descriptors without an entry")]
    Stray,
}

/// Sends the whole CPR state.
///
/// # Errors
///
/// [`CprError::Channel`]; the receiver sees a truncated state.
pub fn send(socket: &FdSocket, header: &CprHeader, registry: &Registry) -> Result<(), CprError> {
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(postcard::to_stdvec(header).map_err(ChannelError::Encode)?);
    socket.send(&bytes, &[]).map_err(ChannelError::from)?;
    for (key, description, fd) in registry.iter() {
        let record = Record::Entry(key.clone(), description.clone());
        let bytes = postcard::to_stdvec(&record).map_err(ChannelError::Encode)?;
        socket.send(&bytes, &[fd]).map_err(ChannelError::from)?;
    }
    let count = u32::try_from(registry.len()).unwrap_or(u32::MAX);
    let bytes = postcard::to_stdvec(&Record::End(count)).map_err(ChannelError::Encode)?;
    socket.send(&bytes, &[]).map_err(ChannelError::from)?;
    Ok(())
}

/// Collects a CPR state message by message.
#[derive(Debug, Default)]
pub struct CprReceiver {
    header: Option<CprHeader>,
    registry: Registry,
    buffer: Vec<u8>,
}

impl CprReceiver {
    /// Takes what is queued on the socket; the header and the verified descriptors once the end record is there, `None`
    /// while more has to come.
    ///
    /// # Errors
    ///
    /// [`CprError`]; everything received is closed when this receiver is dropped.
    pub fn receive(
        &mut self,
        socket: &FdSocket,
    ) -> Result<Option<(CprHeader, Registry)>, CprError> {
        loop {
            match socket
                .receive(&mut self.buffer)
                .map_err(ChannelError::from)?
            {
                Received::Empty => return Ok(None),
                Received::HungUp => return Err(CprError::Truncated(self.registry.len())),
                Received::Message((), descriptors) => {
                    if let Some(header) = self.take(descriptors)? {
                        return Ok(Some((header, std::mem::take(&mut self.registry))));
                    }
                }
            }
        }
    }

    fn take(&mut self, descriptors: Vec<OwnedFd>) -> Result<Option<CprHeader>, CprError> {
        let Some(header) = self.header else {
            if !descriptors.is_empty() {
                return Err(CprError::Stray);
            }
            self.header = Some(parse_header(&self.buffer)?);
            return Ok(None);
        };
        match decode(&self.buffer)? {
            Record::Entry(key, description) => {
                let count = descriptors.len();
                let mut descriptors = descriptors.into_iter();
                match (descriptors.next(), count) {
                    (Some(fd), 1) => {
                        self.registry.save_verified(key, description, fd)?;
                        Ok(None)
                    }
                    _ => Err(CprError::Descriptors {
                        key,
                        descriptors: count,
                    }),
                }
            }
            Record::End(_) if !descriptors.is_empty() => Err(CprError::Stray),
            Record::End(announced) => {
                let received = self.registry.len();
                if usize::try_from(announced) == Ok(received) {
                    Ok(Some(header))
                } else {
                    Err(CprError::Count {
                        announced,
                        received,
                    })
                }
            }
        }
    }
}

fn parse_header(bytes: &[u8]) -> Result<CprHeader, CprError> {
    let Some((magic, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(CprError::Magic(bytes.to_vec()));
    };
    match *magic {
        MAGIC => {}
        QEMU_MAGIC => return Err(CprError::Qemu),
        other => return Err(CprError::Magic(other.to_vec())),
    }
    let Some((version, rest)) = rest.split_first_chunk::<4>() else {
        return Err(CprError::Truncated(0));
    };
    match u32::from_le_bytes(*version) {
        VERSION => Ok(decode(rest)?),
        other => Err(CprError::Version(other)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::DescriptorKind;

    fn header() -> CprHeader {
        CprHeader {
            mode: StartMode::CprTransfer,
            vm: VmId([9; 16]),
            generation: 2,
        }
    }

    fn registry() -> Registry {
        let mut registry = Registry::default();
        for id in 0..3 {
            let key = DescriptorKey::new("image", id).unwrap();
            let file = File::open("/proc/self/exe").unwrap();
            registry
                .save(key, DescriptorKind::Image, file.into())
                .unwrap();
        }
        registry
    }

    #[test]
    fn a_state_arrives_whole() {
        let (a, b) = FdSocket::pair().unwrap();
        let mut receiver = CprReceiver::default();
        assert!(receiver.receive(&b).unwrap().is_none());
        send(&a, &header(), &registry()).unwrap();
        let (got, registry) = receiver.receive(&b).unwrap().unwrap();
        assert_eq!(got, header());
        assert_eq!(registry.len(), 3);
    }

    #[test]
    fn other_magics_and_versions_are_refused_by_name() {
        for (bytes, expected) in [
            (b"QCPR\0\0\0\x01".to_vec(), "QEMU"),
            (b"HELO\0\0\0\x01".to_vec(), "bad magic"),
            (b"BC".to_vec(), "bad magic"),
            (b"BCPR\x02\0\0\0".to_vec(), "version 2"),
        ] {
            let (a, b) = FdSocket::pair().unwrap();
            a.send(&bytes, &[]).unwrap();
            let error = CprReceiver::default().receive(&b).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_missing_an_extra_and_a_stray_descriptor_are_refused() {
        let file = File::open("/proc/self/exe").unwrap();
        let description = Description::of(DescriptorKind::Image, file.as_fd()).unwrap();
        let key = DescriptorKey::new("kernel", 0).unwrap();
        let entry = postcard::to_stdvec(&Record::Entry(key, description)).unwrap();
        let end = postcard::to_stdvec(&Record::End(0)).unwrap();
        for (bytes, count) in [(&entry, 0), (&entry, 2), (&end, 1)] {
            let (a, b) = FdSocket::pair().unwrap();
            let mut start = Vec::from(MAGIC);
            start.extend(VERSION.to_le_bytes());
            start.extend(postcard::to_stdvec(&header()).unwrap());
            a.send(&start, &[]).unwrap();
            a.send(bytes, &vec![file.as_fd(); count]).unwrap();
            let error = CprReceiver::default().receive(&b).unwrap_err();
            assert!(
                matches!(error, CprError::Descriptors { .. } | CprError::Stray),
                "{error}"
            );
        }
    }

    #[test]
    fn an_early_end_and_a_wrong_count_are_refused() {
        for message in [None, Some(postcard::to_stdvec(&Record::End(4)).unwrap())] {
            let (a, b) = FdSocket::pair().unwrap();
            let mut start = Vec::from(MAGIC);
            start.extend(VERSION.to_le_bytes());
            start.extend(postcard::to_stdvec(&header()).unwrap());
            a.send(&start, &[]).unwrap();
            if let Some(bytes) = &message {
                a.send(bytes, &[]).unwrap();
            }
            drop(a);
            let error = CprReceiver::default().receive(&b).unwrap_err();
            assert!(matches!(
                error,
                CprError::Truncated(0)
                    | CprError::Count {
                        announced: 4,
                        received: 0
                    }
            ));
        }
    }
}
