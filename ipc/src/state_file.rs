//! A guest in a file, for mode `cpr-reboot`: what one worker writes, and another one, after the end of every process of the VM,
//! reads.
//!
//! ```text
//! prelude  magic "BTNR", or "BTNT" once its guest was let out | version u16 | flags u16 | VM 16 | generation u32 | header's length u32 | state's length u32    36 bytes
//! header   postcard of [`Header`]
//! state    a state stream, as on the main channel
//! extent   region u32 | reserved u32 | offset u64 | length u64 | the RAM's bytes, unless they stay in place        24 + n
//! …
//! end      an extent of region 0xffffffff, offset 0 and length 0                                                24 bytes
//! digest   SHA-256 of all before this, and of the RAM's bytes also where they stay in place                    32 bytes
//! ```
//!
//! All numbers are little-endian. RAM that no extent has is zero. The digest covers RAM that stays in place too, so that a file
//! is never loaded with RAM that is another guest's, or this one's of another moment. Like that of the main channel it guards
//! against accidents: whoever may write the file is not kept from forging it, and every length in it is hostile.

use std::io;
use std::io::Read;
use std::io::Write;

use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;
use thiserror::Error;

use crate::StateDigest;
use crate::VmId;
use crate::state_stream::MAX_FRAME;
use crate::state_stream::MAX_STREAM;
use crate::state_stream::Machine;

/// The first bytes of the file.
pub const MAGIC: [u8; 4] = *b"BTNR";
/// What they become just before the guest runs: from then on its disks are no longer those that this RAM knows.
pub const TAKEN: [u8; 4] = *b"BTNT";
/// The version of the file's layout.
pub const VERSION: u16 = 1;
/// The length of the prelude, in bytes.
pub const PRELUDE: usize = 36;
/// The longest state, in bytes: a state stream with its end record.
pub const MAX_STATE: usize = MAX_STREAM + 48;
/// The most extents. A guest of 16 GiB whose every second page exists has twice as many; runs of such pages are joined.
pub const MAX_EXTENTS: usize = 1 << 20;
/// Extents begin and end at multiples of this, in bytes.
pub const GRAIN: u64 = 4096;

/// RAM stays where it is.
const IN_PLACE: u16 = 1;
/// The guest stands still at the operator's wish.
const STANDS: u16 = 2;
const EXTENT: usize = 24;
const END: u32 = u32::MAX;
/// How much RAM is read or written at a time, in bytes.
const PIECE: usize = 1 << 20;

/// Why a file is refused, or cannot be written.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// Another file.
    #[error("it is no state file: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// Its guest has run since.
    #[error(
        "its guest was let out of it, and may have changed its disks since: to run it twice would corrupt them"
    )]
    Taken,
    /// Another version.
    #[error("it is a state file of version {0} (this reads {VERSION})")]
    Version(u16),
    /// Flags that this version does not know.
    #[error("it has flags {0:#06x}")]
    Flags(u16),
    /// A length past its bound.
    #[error("its {what} has {length} bytes (at most {bound})")]
    Oversize {
        /// What is too long.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The bound in bytes.
        bound: usize,
    },
    /// The header is malformed.
    #[error("its header is malformed: {0}")]
    Header(String),
    /// An extent lies outside its region, is not made of pages, or not after the one before it.
    #[error(
        "its extent of {length:#x} bytes at {offset:#x} of RAM region {region} does not belong there"
    )]
    Extent {
        /// The region's index.
        region: u32,
        /// Bytes from the region's start.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// More than [`MAX_EXTENTS`].
    #[error("it has more than {MAX_EXTENTS} extents of RAM")]
    Extents,
    /// RAM that stays in place has other extents.
    #[error("the guest's RAM is not as it was when the state was saved: its extents differ")]
    OtherExtents,
    /// The bytes are not those that were written.
    #[error(
        "digest {announced} announced, {computed} computed: the file or the RAM beside it is not as it was when it was saved"
    )]
    Digest {
        /// The file's digest.
        announced: StateDigest,
        /// The digest of what was read.
        computed: StateDigest,
    },
    /// It ends early, or cannot be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The operator wants the guest back.
    #[error("the operator cancelled it")]
    Cancelled,
}

/// The file's fixed part: all of it that a broker reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prelude {
    /// The VM.
    pub vm: VmId,
    /// The generation of the worker that loads it.
    pub generation: u32,
    /// RAM is not in the file: it stays where it is.
    pub in_place: bool,
    /// The guest stands still at the operator's wish.
    pub stands: bool,
    header: usize,
    state: usize,
}

impl Prelude {
    /// Parses the first bytes of a file.
    ///
    /// # Errors
    ///
    /// [`StateFileError`].
    pub fn parse(bytes: &[u8; PRELUDE]) -> Result<Self, StateFileError> {
        let mut rest = bytes.as_slice();
        let magic = take::<4>(&mut rest);
        if magic == TAKEN {
            return Err(StateFileError::Taken);
        }
        if magic != MAGIC {
            return Err(StateFileError::Magic(magic));
        }
        let version = u16::from_le_bytes(take(&mut rest));
        if version != VERSION {
            return Err(StateFileError::Version(version));
        }
        let flags = u16::from_le_bytes(take(&mut rest));
        if flags & !(IN_PLACE | STANDS) != 0 {
            return Err(StateFileError::Flags(flags));
        }
        let vm = VmId(take(&mut rest));
        let generation = u32::from_le_bytes(take(&mut rest));
        let header = bounded("header", u32::from_le_bytes(take(&mut rest)), MAX_FRAME)?;
        let state = bounded("state", u32::from_le_bytes(take(&mut rest)), MAX_STATE)?;
        Ok(Self {
            vm,
            generation,
            in_place: flags & IN_PLACE != 0,
            stands: flags & STANDS != 0,
            header,
            state,
        })
    }

    fn encode(&self) -> Result<Vec<u8>, StateFileError> {
        let length = |what, length, bound| {
            u32::try_from(length).map_err(|_| StateFileError::Oversize {
                what,
                length,
                bound,
            })
        };
        let mut flags = 0;
        flags |= if self.in_place { IN_PLACE } else { 0 };
        flags |= if self.stands { STANDS } else { 0 };
        let mut bytes = Vec::from(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.vm.0);
        bytes.extend(self.generation.to_le_bytes());
        bytes.extend(length("header", self.header, MAX_FRAME)?.to_le_bytes());
        bytes.extend(length("state", self.state, MAX_STATE)?.to_le_bytes());
        Ok(bytes)
    }
}

/// What has to be known before there is a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The host's boot in which it was saved, by `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// When it was saved, for a guest that goes on in another boot; `None` if this host's KVM does not tell.
    pub moment: Option<Moment>,
    /// The machine of the guest.
    pub machine: Machine,
    /// As in [`Answer::Accept`](crate::state_stream::Answer::Accept).
    pub preview: Vec<u8>,
}

/// One moment on three clocks: KVM_GET_CLOCK with KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC (Documentation/virt/kvm/api.rst,
/// 4.29).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The VM's paravirtual clock, in nanoseconds.
    pub clock_ns: u64,
    /// The host's CLOCK_REALTIME, in nanoseconds.
    pub real_ns: u64,
    /// The host's TSC.
    pub host_tsc: u64,
}

/// A stretch of RAM that is not a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The region's index.
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Guest RAM, to whoever saves or loads it.
pub trait Ram {
    /// Copies RAM out, from `offset` bytes into a region.
    ///
    /// # Errors
    ///
    /// Where there is no such RAM.
    fn read(&self, region: u32, offset: u64, to: &mut [u8]) -> io::Result<()>;

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// Where there is no such RAM.
    fn write(&mut self, region: u32, offset: u64, from: &[u8]) -> io::Result<()>;

    /// The sizes of the regions, in bytes.
    fn sizes(&self) -> Vec<u64>;

    /// What is not a hole, ascending.
    ///
    /// # Errors
    ///
    /// When it cannot be found out.
    fn extents(&self) -> io::Result<Vec<Extent>>;
}

/// What is to be written.
#[derive(Debug)]
pub struct Saved<'a> {
    /// The VM.
    pub vm: VmId,
    /// The generation of the worker that will load it.
    pub generation: u32,
    /// RAM stays where it is.
    pub in_place: bool,
    /// The guest stood still at the operator's wish.
    pub stands: bool,
    /// What has to be known before there is a VM.
    pub header: &'a Header,
    /// The state stream.
    pub state: &'a [u8],
}

/// Writes a file, without making it durable; its digest, and its length in bytes. `cancelled` is asked now and then.
///
/// # Errors
///
/// [`StateFileError`]; what was written until then is no state file.
pub fn write(
    to: &mut impl Write,
    saved: &Saved<'_>,
    ram: &impl Ram,
    cancelled: &mut dyn FnMut() -> bool,
) -> Result<(StateDigest, u64), StateFileError> {
    let header =
        postcard::to_stdvec(saved.header).map_err(|e| StateFileError::Header(e.to_string()))?;
    let prelude = Prelude {
        vm: saved.vm,
        generation: saved.generation,
        in_place: saved.in_place,
        stands: saved.stands,
        header: header.len(),
        state: saved.state.len(),
    };
    for (what, length, bound) in [
        ("header", header.len(), MAX_FRAME),
        ("state", saved.state.len(), MAX_STATE),
    ] {
        if length > bound {
            return Err(StateFileError::Oversize {
                what,
                length,
                bound,
            });
        }
    }
    let extents = ram.extents()?;
    if extents.len() > MAX_EXTENTS {
        return Err(StateFileError::Extents);
    }
    let mut digest = Sha256::new();
    let mut length = 0;
    let mut put = |bytes: &[u8], digest: &mut Sha256| {
        digest.update(bytes);
        length += bytes.len() as u64;
        to.write_all(bytes)
    };
    put(&prelude.encode()?, &mut digest)?;
    put(&header, &mut digest)?;
    put(saved.state, &mut digest)?;
    let mut piece = vec![0; PIECE];
    for extent in extents {
        put(&encode_extent(extent), &mut digest)?;
        for (offset, size) in pieces(extent) {
            if cancelled() {
                return Err(StateFileError::Cancelled);
            }
            let piece = piece.get_mut(..size).unwrap_or_default();
            ram.read(extent.region, offset, piece)?;
            if saved.in_place {
                digest.update(&*piece);
            } else {
                put(piece, &mut digest)?;
            }
        }
    }
    let end = Extent {
        region: END,
        offset: 0,
        length: 0,
    };
    put(&encode_extent(end), &mut digest)?;
    let digest = StateDigest(digest.finalize().into());
    to.write_all(&digest.0)?;
    Ok((digest, length + 32))
}

/// A file that is being read.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    digest: Sha256,
    /// The file's fixed part.
    pub prelude: Prelude,
    /// What has to be known before there is a VM.
    pub header: Header,
    /// The state stream, hostile until its own digest and its owners have judged it.
    pub state: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads everything but RAM.
    ///
    /// # Errors
    ///
    /// [`StateFileError`].
    pub fn open(mut from: R) -> Result<Self, StateFileError> {
        let mut digest = Sha256::new();
        let mut prelude = [0; PRELUDE];
        from.read_exact(&mut prelude)?;
        digest.update(prelude);
        let prelude = Prelude::parse(&prelude)?;
        let header = read_vec(&mut from, prelude.header, &mut digest)?;
        let header = crate::decode(&header).map_err(|e| StateFileError::Header(e.to_string()))?;
        let state = read_vec(&mut from, prelude.state, &mut digest)?;
        Ok(Self {
            from,
            digest,
            prelude,
            header,
            state,
        })
    }

    /// Reads RAM into where it belongs, or compares what is there, and then the digest, which is the result: only now is
    /// anything that was read known to be whole. Until then, and after an error, RAM must not be used.
    ///
    /// # Errors
    ///
    /// [`StateFileError`].
    pub fn load(mut self, ram: &mut impl Ram) -> Result<(StateDigest, Vec<u8>), StateFileError> {
        let sizes = ram.sizes();
        let in_place = self.prelude.in_place;
        let expected = if in_place { ram.extents()? } else { Vec::new() };
        let mut expected = expected.into_iter();
        let mut last = (0, 0);
        let mut piece = vec![0; PIECE];
        for count in 0.. {
            let mut bytes = [0; EXTENT];
            self.from.read_exact(&mut bytes)?;
            self.digest.update(bytes);
            let (extent, reserved) = parse_extent(&bytes);
            let wrong = || StateFileError::Extent {
                region: extent.region,
                offset: extent.offset,
                length: extent.length,
            };
            if extent.region == END {
                if (reserved, extent.offset, extent.length) != (0, 0, 0) {
                    return Err(wrong());
                }
                break;
            }
            if count >= MAX_EXTENTS {
                return Err(StateFileError::Extents);
            }
            let region = usize::try_from(extent.region).map_err(|_| wrong())?;
            let size = *sizes.get(region).ok_or_else(wrong)?;
            let end = extent.offset.checked_add(extent.length);
            let end = end.filter(|end| *end <= size).ok_or_else(wrong)?;
            let whole = extent.offset % GRAIN == 0 && extent.length % GRAIN == 0;
            let follows = (extent.region, extent.offset) >= last;
            if reserved != 0 || extent.length == 0 || !whole || !follows {
                return Err(wrong());
            }
            last = (extent.region, end);
            if in_place && expected.next() != Some(extent) {
                return Err(StateFileError::OtherExtents);
            }
            for (offset, size) in pieces(extent) {
                let piece = piece.get_mut(..size).unwrap_or_default();
                if in_place {
                    ram.read(extent.region, offset, piece)?;
                    self.digest.update(&*piece);
                } else {
                    self.from.read_exact(piece)?;
                    self.digest.update(&*piece);
                    ram.write(extent.region, offset, piece)?;
                }
            }
        }
        if expected.next().is_some() {
            return Err(StateFileError::OtherExtents);
        }
        let mut announced = [0; 32];
        self.from.read_exact(&mut announced)?;
        let computed = StateDigest(self.digest.finalize().into());
        if announced == computed.0 {
            Ok((computed, self.state))
        } else {
            Err(StateFileError::Digest {
                announced: StateDigest(announced),
                computed,
            })
        }
    }
}

/// The pieces of an extent: offset into the region, and size.
fn pieces(extent: Extent) -> impl Iterator<Item = (u64, usize)> {
    let end = extent.offset.saturating_add(extent.length);
    (extent.offset..end).step_by(PIECE).map(move |offset| {
        let size = usize::try_from(end - offset).unwrap_or(PIECE).min(PIECE);
        (offset, size)
    })
}

fn encode_extent(extent: Extent) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(EXTENT);
    bytes.extend(extent.region.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(extent.offset.to_le_bytes());
    bytes.extend(extent.length.to_le_bytes());
    bytes
}

fn parse_extent(bytes: &[u8; EXTENT]) -> (Extent, u32) {
    let mut rest = bytes.as_slice();
    let region = u32::from_le_bytes(take(&mut rest));
    let reserved = u32::from_le_bytes(take(&mut rest));
    let extent = Extent {
        region,
        offset: u64::from_le_bytes(take(&mut rest)),
        length: u64::from_le_bytes(take(&mut rest)),
    };
    (extent, reserved)
}

/// Bytes off the front of what is long enough.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((field, after)) => {
            *rest = after;
            *field
        }
        None => [0; N],
    }
}

fn bounded(what: &'static str, length: u32, bound: usize) -> Result<usize, StateFileError> {
    match usize::try_from(length) {
        Ok(length) if length <= bound => Ok(length),
        length => Err(StateFileError::Oversize {
            what,
            length: length.unwrap_or(usize::MAX),
            bound,
        }),
    }
}

/// Reads bytes of a bounded number, allocated as they come.
fn read_vec(
    from: &mut impl Read,
    length: usize,
    digest: &mut Sha256,
) -> Result<Vec<u8>, StateFileError> {
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    digest.update(&bytes);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RAM of two regions, of which only what was written is no hole.
    #[derive(Clone, Debug, PartialEq)]
    struct Pages(Vec<Vec<u8>>);

    impl Pages {
        fn blank() -> Self {
            Self(vec![vec![0; 0x8000], vec![0; 0x4000]])
        }

        fn written() -> Self {
            let mut pages = Self::blank();
            pages.0[0][0x1000..0x3000].fill(7);
            pages.0[0][0x7fff] = 1;
            pages.0[1][5] = 9;
            pages
        }
    }

    fn range(offset: u64, length: usize) -> std::ops::Range<usize> {
        let offset = usize::try_from(offset).unwrap();
        offset..offset + length
    }

    impl Ram for Pages {
        fn read(&self, region: u32, offset: u64, to: &mut [u8]) -> io::Result<()> {
            to.copy_from_slice(&self.0[region as usize][range(offset, to.len())]);
            Ok(())
        }

        fn write(&mut self, region: u32, offset: u64, from: &[u8]) -> io::Result<()> {
            self.0[region as usize][range(offset, from.len())].copy_from_slice(from);
            Ok(())
        }

        fn sizes(&self) -> Vec<u64> {
            self.0.iter().map(|region| region.len() as u64).collect()
        }

        fn extents(&self) -> io::Result<Vec<Extent>> {
            let mut extents = Vec::new();
            for (region, bytes) in (0..).zip(&self.0) {
                for (index, page) in (0_u64..).zip(bytes.chunks(4096)) {
                    if page.iter().any(|byte| *byte != 0) {
                        extents.push(Extent {
                            region,
                            offset: index * 4096,
                            length: 4096,
                        });
                    }
                }
            }
            Ok(extents)
        }
    }

    fn header() -> Header {
        Header {
            moment: Some(Moment {
                clock_ns: 1,
                real_ns: 2,
                host_tsc: 3,
            }),
            boot: [3; 16],
            machine: Machine {
                cpus: 1,
                ram: vec![(0, 0x8000), (0x10_0000, 0x4000)],
                hidden: Vec::new(),
                devices: Vec::new(),
            },
            preview: vec![1, 2],
        }
    }

    fn file(in_place: bool) -> Vec<u8> {
        let header = header();
        let saved = Saved {
            vm: VmId([7; 16]),
            generation: 4,
            in_place,
            stands: true,
            header: &header,
            state: b"state",
        };
        let mut bytes = Vec::new();
        let (_, length) = write(&mut bytes, &saved, &Pages::written(), &mut || false).unwrap();
        assert_eq!(length, bytes.len() as u64);
        bytes
    }

    fn load(bytes: &[u8], ram: &mut Pages) -> Result<Vec<u8>, StateFileError> {
        Ok(Reader::open(bytes)?.load(ram)?.1)
    }

    #[test]
    fn a_guest_comes_back_with_its_ram() {
        let bytes = file(false);
        let reader = Reader::open(bytes.as_slice()).unwrap();
        assert_eq!(reader.prelude.vm, VmId([7; 16]));
        assert_eq!(reader.prelude.generation, 4);
        assert!(reader.prelude.stands && !reader.prelude.in_place);
        assert_eq!(reader.header, header());
        let mut ram = Pages::blank();
        assert_eq!(load(&bytes, &mut ram).unwrap(), b"state");
        assert_eq!(ram, Pages::written());
    }

    #[test]
    fn ram_that_stays_is_not_in_the_file_and_has_to_be_the_same() {
        let bytes = file(true);
        assert!(bytes.len() < 4096);
        load(&bytes, &mut Pages::written()).unwrap();
        let mut other = Pages::written();
        other.0[0][0x1234] ^= 1;
        assert!(matches!(
            load(&bytes, &mut other),
            Err(StateFileError::Digest { .. })
        ));
        let mut more = Pages::written();
        more.0[1][0x2000] = 1;
        assert!(matches!(
            load(&bytes, &mut more),
            Err(StateFileError::OtherExtents)
        ));
        assert!(matches!(
            load(&bytes, &mut Pages::blank()),
            Err(StateFileError::OtherExtents)
        ));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        for in_place in [false, true] {
            let good = file(in_place);
            let ram = || match in_place {
                true => Pages::written(),
                false => Pages::blank(),
            };
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 1 << (at % 8);
                assert!(load(&bad, &mut ram()).is_err(), "byte {at}");
            }
            for length in (0..good.len()).step_by(97) {
                assert!(load(&good[..length], &mut ram()).is_err(), "{length} bytes");
            }
        }
    }

    #[test]
    fn lengths_are_refused_before_anything_is_allocated() {
        for (at, what) in [(28, "header"), (32, "state")] {
            let mut bad = file(false);
            bad[at..at + 4].copy_from_slice(&[0xff; 4]);
            match load(&bad, &mut Pages::blank()) {
                Err(StateFileError::Oversize { what: found, .. }) => assert_eq!(found, what),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn extents_outside_of_ram_are_refused_by_name() {
        let good = file(false);
        let at = PRELUDE + postcard::to_stdvec(&header()).unwrap().len() + 5;
        for (field, value) in [
            (0, 2_u64),
            (8, 0x8000),
            (8, u64::MAX - 4095),
            (16, 0),
            (8, 17),
        ] {
            let mut bad = good.clone();
            let width = if field == 0 { 4 } else { 8 };
            bad[at + field..at + field + width].copy_from_slice(&value.to_le_bytes()[..width]);
            assert!(
                matches!(
                    load(&bad, &mut Pages::blank()),
                    Err(StateFileError::Extent { .. })
                ),
                "{field} {value}"
            );
        }
    }

    #[test]
    fn a_cancelled_one_stops() {
        let header = header();
        let saved = Saved {
            vm: VmId([7; 16]),
            generation: 4,
            in_place: false,
            stands: false,
            header: &header,
            state: b"",
        };
        let cancelled = write(&mut Vec::new(), &saved, &Pages::written(), &mut || true);
        assert!(matches!(cancelled, Err(StateFileError::Cancelled)));
    }
}
