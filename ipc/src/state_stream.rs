//! The main channel: a stream socket straight from worker to worker, which the broker cannot read.
//!
//! ```text
//! new worker                                old worker
//!   │ offer: what it can load, its machine    │   guest runs
//!   │             answer: versions, preview   │   (or a refusal with its reason: the guest was never paused)
//!   │                                         │
//!   │        preamble, section …, end+digest  │   guest paused
//! ```
//!
//! Before the pause both sides exchange [`Frame`]s of postcard. In the pause the old worker sends one state stream:
//!
//! ```text
//! preamble  magic "BTNM" | container version u16 | reserved u16 | VM 16 | generation u32                    28 bytes
//! section   kind u16 | instance u16 | version u16 | flags u16 | length u32 | payload                        12 + n
//! end       kind 0xffff | 0 | 0 | 0 | length 36 | number of sections u32 | SHA-256 of all before this       48 bytes
//! ```
//!
//! All numbers are little-endian and of fixed width, so that any later version can read the frame of any earlier one. A
//! section's payload is its owner's. The digest guards against accidents; the old worker is not trusted for what it says.

use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;
use thiserror::Error;

use crate::Description;
use crate::DescriptorKey;
use crate::VmId;

/// The first bytes of a state stream.
pub const MAGIC: [u8; 4] = *b"BTNM";
/// The version of the container; sections have their own.
pub const CONTAINER_VERSION: u16 = 1;
/// The longest payload of a section, in bytes. The largest today is a vCPU's, about 12 KiB.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// The most sections of a stream.
pub const MAX_SECTIONS: usize = 1024;
/// The longest state stream, in bytes.
pub const MAX_STREAM: usize = 16 << 20;
/// The longest frame before the pause, in bytes.
pub const MAX_FRAME: usize = 1 << 16;

const PREAMBLE: usize = 28;
const HEADER: usize = 12;
const END_KIND: u16 = 0xffff;
const END_PAYLOAD: usize = 36;
const MANDATORY: u16 = 1;

/// SHA-256 of a state stream, up to its end record.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDigest(pub [u8; 32]);

impl std::fmt::Display for StateDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for StateDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A section's owner: what kind of device, and which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SectionId {
    /// The kind; 0xffff is the end record's.
    pub kind: u16,
    /// The index among the devices of this kind.
    pub instance: u16,
}

impl std::fmt::Display for SectionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#06x}.{}", self.kind, self.instance)
    }
}

/// One device's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose it is.
    pub id: SectionId,
    /// The version of the payload's layout.
    pub version: u16,
    /// Whether a reader that does not know the kind has to refuse the stream.
    pub mandatory: bool,
    /// The state; hostile until its owner has parsed it.
    pub payload: Vec<u8>,
}

/// The range of layout versions of one kind that a worker can load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionSupport {
    /// The kind.
    pub kind: u16,
    /// The oldest version.
    pub oldest: u16,
    /// The newest version.
    pub newest: u16,
}

/// What the guest sees of its machine; equal on both sides, or the upgrade is refused before the pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u8,
    /// RAM: (guest physical address, bytes), ascending.
    pub ram: Vec<(u64, u64)>,
    /// CPUID features that the guest does not see, by name, ascending. (The tables themselves are compared by the new
    /// worker, once it holds `/dev/kvm`: the answer's preview has the old worker's.)
    pub hidden: Vec<String>,
    /// The devices, in order.
    pub devices: Vec<SectionId>,
}

/// What the new worker says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The newest container version that it reads.
    pub container: u16,
    /// The sections that it can load.
    pub sections: Vec<SectionSupport>,
    /// Its machine.
    pub machine: Machine,
    /// Its build, for messages.
    pub build: String,
}

/// What the old worker answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It will save sections in versions that the offer has.
    Accept {
        /// Guest state that is needed before the pause (interrupt routes, BARs), as the workers agree on it.
        preview: Vec<u8>,
        /// The descriptors that it was handed itself, which the new worker compares with those that it is handed. Connections
        /// of a vsock are among them only if the new worker has another broker: they come and go.
        entries: Vec<(DescriptorKey, Description)>,
    },
    /// It cannot; nothing has happened.
    Refuse(String),
}

/// Why a state stream or a frame was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StreamError {
    /// Not a state stream.
    #[error("bad magic {0:02x?}")]
    Magic([u8; 4]),
    /// Another container.
    #[error("container version {0} (this reads {CONTAINER_VERSION})")]
    Container(u16),
    /// Another VM's or another generation's stream.
    #[error("the stream belongs to VM {0} generation {1}")]
    Stranger(VmId, u32),
    /// A length past its bound.
    #[error("{what} of {length} bytes (at most {bound})")]
    Oversize {
        /// What is too long.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The bound in bytes.
        bound: usize,
    },
    /// More than [`MAX_SECTIONS`].
    #[error("more than {MAX_SECTIONS} sections")]
    Sections,
    /// A section came twice.
    #[error("section {0} came twice")]
    Duplicate(SectionId),
    /// Flags that this version does not know.
    #[error("section {id} has flags {flags:#06x}")]
    Flags {
        /// Which.
        id: SectionId,
        /// Its flags.
        flags: u16,
    },
    /// A malformed end record.
    #[error("malformed end record")]
    End,
    /// The end record counts differently.
    #[error("{announced} sections announced, {received} received")]
    Count {
        /// The end record's number.
        announced: u32,
        /// The number received.
        received: usize,
    },
    /// The bytes are not those that were sent.
    #[error("digest {announced} announced, {computed} computed")]
    Digest {
        /// The end record's digest.
        announced: StateDigest,
        /// The digest of what came.
        computed: StateDigest,
    },
    /// Bytes after the end record.
    #[error("{0} bytes after the end record")]
    Trailing(usize),
    /// The stream ended early.
    #[error("ended after {0} bytes, before its end record")]
    Truncated(usize),
    /// A frame's content.
    #[error("malformed frame: {0}")]
    Frame(String),
}

/// Writes a state stream into memory.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    sections: u32,
}

impl Encoder {
    /// Begins a stream for the VM's next generation.
    #[must_use]
    pub fn new(vm: VmId, generation: u32) -> Self {
        let mut bytes = Vec::with_capacity(64 << 10);
        bytes.extend(MAGIC);
        bytes.extend(CONTAINER_VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(vm.0);
        bytes.extend(generation.to_le_bytes());
        Self { bytes, sections: 0 }
    }

    /// Appends a section.
    ///
    /// # Errors
    ///
    /// [`StreamError::Oversize`] and [`StreamError::Sections`]: what no reader would take is not written.
    pub fn section(&mut self, section: &Section) -> Result<(), StreamError> {
        let length = bounded("section", section.payload.len(), MAX_PAYLOAD)?;
        if usize::try_from(self.sections).is_ok_and(|n| n >= MAX_SECTIONS) {
            return Err(StreamError::Sections);
        }
        bounded(
            "stream",
            self.bytes.len() + section.payload.len(),
            MAX_STREAM,
        )?;
        let flags = if section.mandatory { MANDATORY } else { 0 };
        self.header(section.id, section.version, flags, length);
        self.bytes.extend_from_slice(&section.payload);
        self.sections += 1;
        Ok(())
    }

    /// Ends the stream: its bytes, and their digest.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, StateDigest) {
        let digest = StateDigest(Sha256::digest(&self.bytes).into());
        let end = SectionId {
            kind: END_KIND,
            instance: 0,
        };
        self.header(end, 0, 0, 36);
        self.bytes.extend(self.sections.to_le_bytes());
        self.bytes.extend(digest.0);
        (self.bytes, digest)
    }

    fn header(&mut self, id: SectionId, version: u16, flags: u16, length: u32) {
        for half in [id.kind, id.instance, version, flags] {
            self.bytes.extend(half.to_le_bytes());
        }
        self.bytes.extend(length.to_le_bytes());
    }
}

fn bounded(what: &'static str, length: usize, bound: usize) -> Result<u32, StreamError> {
    match u32::try_from(length) {
        Ok(value) if length <= bound => Ok(value),
        _ => Err(StreamError::Oversize {
            what,
            length,
            bound,
        }),
    }
}

/// A whole, well-formed stream: its sections are as sent, and still hostile.
#[derive(Debug)]
pub struct StateStream {
    /// The sections, in the order sent; no two have the same id.
    pub sections: Vec<Section>,
    /// The digest that sender and receiver agree on.
    pub digest: StateDigest,
}

/// Parses a state stream as its bytes arrive, in pieces of any size.
#[derive(Debug)]
pub struct Decoder {
    vm: VmId,
    generation: u32,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are parsed.
    parsed: usize,
    sections: Vec<Section>,
}

impl Decoder {
    /// A decoder of the stream that brings `generation` of `vm` its state.
    #[must_use]
    pub fn new(vm: VmId, generation: u32) -> Self {
        Self {
            vm,
            generation,
            buffer: Vec::with_capacity(64 << 10),
            parsed: 0,
            sections: Vec::new(),
        }
    }

    /// Takes the next bytes; the stream once its end record is there.
    ///
    /// # Errors
    ///
    /// [`StreamError`] at the first byte that cannot belong to a valid stream.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<StateStream>, StreamError> {
        bounded(
            "stream",
            self.buffer.len() + bytes.len(),
            MAX_STREAM + HEADER + END_PAYLOAD,
        )?;
        self.buffer.extend_from_slice(bytes);
        if self.parsed == 0 && !self.preamble()? {
            return Ok(None);
        }
        while let Some((id, version, flags, length)) = self.peek_header() {
            if id.kind == END_KIND {
                return self.end(id, version, flags, length);
            }
            bounded("section", length, MAX_PAYLOAD)?;
            if flags & !MANDATORY != 0 {
                return Err(StreamError::Flags { id, flags });
            }
            if self.sections.len() >= MAX_SECTIONS {
                return Err(StreamError::Sections);
            }
            if self.sections.iter().any(|section| section.id == id) {
                return Err(StreamError::Duplicate(id));
            }
            let start = self.parsed + HEADER;
            let Some(payload) = self.buffer.get(start..start + length) else {
                break;
            };
            self.sections.push(Section {
                id,
                version,
                mandatory: flags & MANDATORY != 0,
                payload: payload.to_vec(),
            });
            self.parsed = start + length;
        }
        Ok(None)
    }

    /// Says that the peer has closed the channel.
    #[must_use]
    pub fn hang_up(&self) -> StreamError {
        StreamError::Truncated(self.buffer.len())
    }

    fn preamble(&mut self) -> Result<bool, StreamError> {
        let mut fields = Fields(&self.buffer);
        let Some(magic) = fields.take::<4>() else {
            return Ok(false);
        };
        if magic != MAGIC {
            return Err(StreamError::Magic(magic));
        }
        let (Some(version), Some(reserved), Some(vm), Some(generation)) = (
            fields.u16(),
            fields.u16(),
            fields.take::<16>(),
            fields.u32(),
        ) else {
            return Ok(false);
        };
        if version != CONTAINER_VERSION || reserved != 0 {
            return Err(StreamError::Container(version));
        }
        if (VmId(vm), generation) != (self.vm, self.generation) {
            return Err(StreamError::Stranger(VmId(vm), generation));
        }
        self.parsed = PREAMBLE;
        Ok(true)
    }

    fn peek_header(&self) -> Option<(SectionId, u16, u16, usize)> {
        let mut fields = Fields(self.buffer.get(self.parsed..)?);
        let id = SectionId {
            kind: fields.u16()?,
            instance: fields.u16()?,
        };
        let (version, flags, length) = (fields.u16()?, fields.u16()?, fields.u32()?);
        Some((
            id,
            version,
            flags,
            usize::try_from(length).unwrap_or(usize::MAX),
        ))
    }

    fn end(
        &mut self,
        id: SectionId,
        version: u16,
        flags: u16,
        length: usize,
    ) -> Result<Option<StateStream>, StreamError> {
        if (id.instance, version, flags, length) != (0, 0, 0, END_PAYLOAD) {
            return Err(StreamError::End);
        }
        let start = self.parsed + HEADER;
        let mut fields = Fields(self.buffer.get(start..).unwrap_or_default());
        let (Some(announced), Some(digest)) = (fields.u32(), fields.take::<32>()) else {
            return Ok(None);
        };
        if !fields.0.is_empty() {
            return Err(StreamError::Trailing(fields.0.len()));
        }
        let received = self.sections.len();
        if usize::try_from(announced) != Ok(received) {
            return Err(StreamError::Count {
                announced,
                received,
            });
        }
        let content = self.buffer.get(..self.parsed).unwrap_or_default();
        let computed = StateDigest(Sha256::digest(content).into());
        if digest != computed.0 {
            return Err(StreamError::Digest {
                announced: StateDigest(digest),
                computed,
            });
        }
        Ok(Some(StateStream {
            sections: std::mem::take(&mut self.sections),
            digest: computed,
        }))
    }
}

/// Little-endian fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
}

/// The frames before the pause: a little-endian u32 length, then one postcard value.
#[derive(Debug, Default)]
pub struct Frame {
    buffer: Vec<u8>,
}

impl Frame {
    /// Encodes one value as a frame.
    ///
    /// # Errors
    ///
    /// [`StreamError::Oversize`] past [`MAX_FRAME`].
    pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, StreamError> {
        let payload =
            postcard::to_stdvec(message).map_err(|e| StreamError::Frame(e.to_string()))?;
        let length = bounded("frame", payload.len(), MAX_FRAME)?;
        let mut bytes = Vec::from(length.to_le_bytes());
        bytes.extend(payload);
        Ok(bytes)
    }

    /// Takes the next bytes; the value once all of it is there.
    ///
    /// # Errors
    ///
    /// [`StreamError::Oversize`], [`StreamError::Trailing`] (one frame at a time is all that the protocol has), and
    /// [`StreamError::Frame`].
    pub fn push<M: serde::de::DeserializeOwned>(
        &mut self,
        bytes: &[u8],
    ) -> Result<Option<M>, StreamError> {
        bounded("frame", self.buffer.len() + bytes.len(), MAX_FRAME + 4)?;
        self.buffer.extend_from_slice(bytes);
        let mut fields = Fields(&self.buffer);
        let Some(length) = fields.u32().and_then(|n| usize::try_from(n).ok()) else {
            return Ok(None);
        };
        bounded("frame", length, MAX_FRAME)?;
        let Some(payload) = fields.0.get(..length) else {
            return Ok(None);
        };
        let trailing = fields.0.len() - length;
        if trailing > 0 {
            return Err(StreamError::Trailing(trailing));
        }
        let message =
            crate::channel::decode(payload).map_err(|e| StreamError::Frame(e.to_string()))?;
        self.buffer.clear();
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([3; 16]);

    fn section(kind: u16, instance: u16, payload: &[u8]) -> Section {
        Section {
            id: SectionId { kind, instance },
            version: 1,
            mandatory: true,
            payload: payload.to_vec(),
        }
    }

    fn stream() -> (Vec<u8>, StateDigest) {
        let mut encoder = Encoder::new(VM, 2);
        encoder.section(&section(1, 0, b"vcpu zero")).unwrap();
        encoder.section(&section(1, 1, b"")).unwrap();
        encoder.section(&section(7, 0, &[0xa5; 300])).unwrap();
        encoder.finish()
    }

    #[test]
    fn a_stream_arrives_in_pieces_of_any_size() {
        let (bytes, digest) = stream();
        for size in [1, 2, 11, 12, 13, 28, 29, bytes.len()] {
            let mut decoder = Decoder::new(VM, 2);
            let mut done = None;
            for piece in bytes.chunks(size) {
                assert!(done.is_none());
                done = decoder.push(piece).unwrap();
            }
            let state = done.unwrap();
            assert_eq!(state.digest, digest);
            assert_eq!(state.sections.len(), 3);
            assert_eq!(state.sections[2], section(7, 0, &[0xa5; 300]));
        }
    }

    #[test]
    fn a_stream_cut_at_any_byte_never_completes() {
        let (bytes, _) = stream();
        for cut in 0..bytes.len() {
            let mut decoder = Decoder::new(VM, 2);
            assert!(decoder.push(&bytes[..cut]).unwrap().is_none(), "{cut}");
            assert_eq!(decoder.hang_up(), StreamError::Truncated(cut));
        }
    }

    #[test]
    fn every_flipped_bit_is_refused_or_leaves_the_stream_incomplete() {
        let (bytes, _) = stream();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let result = Decoder::new(VM, 2).push(&bytes);
            assert!(!matches!(result, Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn another_vm_or_generation_is_a_stranger() {
        let (bytes, _) = stream();
        assert_eq!(
            Decoder::new(VM, 3).push(&bytes).unwrap_err(),
            StreamError::Stranger(VM, 2)
        );
        assert_eq!(
            Decoder::new(VmId([4; 16]), 2).push(&bytes).unwrap_err(),
            StreamError::Stranger(VM, 2)
        );
    }

    #[test]
    fn duplicates_and_oversize_claims_are_refused_at_once() {
        let mut encoder = Encoder::new(VM, 2);
        encoder.section(&section(1, 0, b"a")).unwrap();
        encoder.section(&section(1, 0, b"b")).unwrap();
        let (bytes, _) = encoder.finish();
        let id = SectionId {
            kind: 1,
            instance: 0,
        };
        assert_eq!(
            Decoder::new(VM, 2).push(&bytes).unwrap_err(),
            StreamError::Duplicate(id)
        );

        let (mut bytes, _) = Encoder::new(VM, 2).finish();
        bytes.truncate(PREAMBLE);
        bytes.extend([1, 0, 0, 0, 1, 0, 1, 0, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(
            Decoder::new(VM, 2).push(&bytes),
            Err(StreamError::Oversize {
                length: 0xffff_ffff,
                ..
            })
        ));
        assert!(
            Encoder::new(VM, 2)
                .section(&section(1, 0, &vec![0; MAX_PAYLOAD + 1]))
                .is_err()
        );
    }

    #[test]
    fn a_frame_arrives_in_pieces_and_alone() {
        let message = Answer::Refuse("no".into());
        let bytes = Frame::encode(&message).unwrap();
        let mut frame = Frame::default();
        for byte in &bytes[..bytes.len() - 1] {
            assert_eq!(frame.push::<Answer>(&[*byte]).unwrap(), None);
        }
        assert_eq!(
            frame.push(&bytes[bytes.len() - 1..]).unwrap(),
            Some(message)
        );
        let twice = [bytes.clone(), bytes].concat();
        assert!(matches!(
            Frame::default().push::<Answer>(&twice),
            Err(StreamError::Trailing(_))
        ));
        assert!(Frame::default().push::<Answer>(&[0xff; 4]).is_err());
    }
}
