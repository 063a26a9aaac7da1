//! Mode `cpr-reboot`: the guest goes into a file, and a worker of later makes it run again.
//!
//! The file is written in the pause, which lasts until the broker's order to roll back, or for ever. It is read before there
//! is anything that could run, and its state is loaded by the order to commit, as one that came over the main channel is.

use std::fs::File;
use std::io;

use baton_ipc::VmId;
use baton_ipc::state_file;
use baton_ipc::state_file::Extent;
use baton_ipc::state_file::Header;
use baton_ipc::state_file::Ram;
use baton_ipc::state_file::Reader;
use baton_ipc::state_file::Saved;
use baton_ipc::state_file::StateFileError;
use baton_ipc::state_stream::Decoder;
use baton_ipc::state_stream::Machine;
use baton_ipc::state_stream::StateStream;
use baton_ipc::state_stream::StreamError;
use baton_ipc::worker::Order;
use baton_ipc::worker::RamBacking;
use baton_ipc::worker::Report;
use baton_ipc::worker::WorkerConfig;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::Bytes as _;
use vm_memory::FileOffset;
use vm_memory::GuestMemoryBackend as _;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion as _;
use vm_memory::MemoryRegionAddress;
use vm_memory::mmap::GuestRegionMmap;

use crate::control::Exit;
use crate::control::Phase;
use crate::control::Worker;
use crate::gap::Gap;
use crate::handover::Failure;
use crate::handover::failure;
use crate::kvmclock;
use crate::life::BUILD;
use crate::sections;
use crate::transfer::incoming;
use crate::transfer::outgoing::Preview;

/// Why a guest cannot come out of a file.
#[derive(Debug, Error)]
pub(crate) enum RestoreError {
    /// The file.
    #[error("the state file: {0}")]
    File(#[from] StateFileError),
    /// Another machine.
    #[error("the guest was saved on another machine: {0}")]
    Machine(String),
    /// The host's clocks began anew, and nobody knows when.
    #[error(
        "the host has booted since the guest was saved, and its KVM did not tell the moment of all clocks then: the guest's would go back"
    )]
    Booted,
    /// RAM is not where it would have to be.
    #[error("the state file was saved {found} its RAM, and this VM's RAM is {expected}")]
    Backing {
        found: &'static str,
        expected: &'static str,
    },
    /// What is needed before there is a VM.
    #[error("the state file's preview: {0}")]
    Preview(String),
    /// The state stream.
    #[error("the state file's state: {0}")]
    Stream(#[from] StreamError),
}

/// A file whose guest is to run here.
pub(crate) struct Opened {
    reader: Reader<File>,
    /// How long it has lain there.
    pub(crate) gap: Gap,
}

/// A guest whose RAM is here, and what is still to be loaded of it.
pub(crate) struct Restored {
    stream: StateStream,
    gap: Gap,
}

/// Reads everything but RAM, and compares the machine.
///
/// # Errors
///
/// [`RestoreError`].
pub(crate) fn open(
    file: File,
    config: &WorkerConfig,
    machine: &Machine,
) -> Result<Opened, RestoreError> {
    let reader = Reader::open(file)?;
    let gap = match reader.header.moment {
        _ if reader.header.boot == config.boot => Gap::Stored,
        Some(moment) => Gap::Boot(moment),
        None => return Err(RestoreError::Booted),
    };
    sections::judge(
        &reader.header.machine,
        &sections::offer(machine.clone(), BUILD),
    )
    .map_err(RestoreError::Machine)?;
    let in_file = config.backing == RamBacking::File;
    if reader.prelude.in_place != in_file {
        let words = [
            ("with", "to be in a file of its own (memory.path)"),
            ("without", "not in a file of its own (memory.path)"),
        ];
        let [with, without] = words;
        let (found, expected) = if in_file { with } else { without };
        return Err(RestoreError::Backing { found, expected });
    }
    Ok(Opened { reader, gap })
}

/// What is needed before there is a VM.
///
/// # Errors
///
/// [`RestoreError::Preview`].
pub(crate) fn preview(opened: &Opened) -> Result<Preview, RestoreError> {
    baton_ipc::decode(&opened.reader.header.preview)
        .map_err(|e| RestoreError::Preview(e.to_string()))
}

/// Reads RAM, or compares it where it is in place; the state, when all of the file is known to be as it was written.
///
/// # Errors
///
/// [`RestoreError`]; RAM must not be used then.
pub(crate) fn load(
    opened: Opened,
    memory: &GuestMemoryMmap,
    config: &WorkerConfig,
) -> Result<Restored, RestoreError> {
    let Opened { reader, gap } = opened;
    let (_, state) = reader.load(&mut GuestRam(memory))?;
    let mut decoder = Decoder::new(config.vm, config.generation);
    match decoder.push(&state)? {
        Some(stream) => Ok(Restored { stream, gap }),
        None => Err(decoder.hang_up().into()),
    }
}

impl Worker {
    /// Stops the guest and writes it into a file. Whatever fails is reported; the guest stands still in either case until the
    /// broker rolls back or dies.
    pub(crate) fn save_to(&mut self, file: File) {
        self.stood = matches!(self.phase, Phase::Paused);
        let outcome = self.stop_and_write(file);
        self.phase = Phase::Parked(None);
        if let Err((step, reason)) = outcome {
            self.fail(step, reason);
        }
    }

    fn stop_and_write(&mut self, mut file: File) -> Result<(), Failure> {
        let (state, _) = self.stop_and_encode()?;
        let preview = Preview {
            cpuid: self.machinery.cpuid.clone(),
            pci: self.machinery.platform.pci.preview(),
        };
        let moment = kvmclock::moment(&self.machinery.vm).map_err(failure("save"))?;
        let header = Header {
            boot: self.boot,
            moment: moment.map(|(moment, _)| moment),
            machine: self.machine.clone(),
            preview: baton_ipc::encode(&preview).map_err(failure("save"))?,
        };
        let saved = Saved {
            vm: VmId(self.vm.0),
            generation: self.generation + 1,
            in_place: self.backing == RamBacking::File,
            stands: self.stood,
            header: &header,
            state: &state,
        };
        let control = self.control.as_ref();
        let mut cancelled =
            || control.is_some_and(|control| control.peek() == Some(Order::Rollback));
        let ram = GuestRam(self.machinery.memory);
        ram.sync().map_err(failure("save"))?;
        let (digest, bytes) =
            state_file::write(&mut file, &saved, &ram, &mut cancelled).map_err(failure("save"))?;
        file.sync_all().map_err(failure("save"))?;
        self.report(Report::Saved { digest, bytes });
        Ok(())
    }

    /// Runs a guest that came out of a file, or holds it `paused`.
    pub(crate) fn restore(&mut self, restored: Restored, paused: bool) -> Result<(), Exit> {
        let Restored { stream, gap } = restored;
        match incoming::load(&mut self.machinery, stream, gap) {
            Ok(_) => {
                self.phase = Phase::Loaded;
                self.commit(paused)
            }
            Err(error) => self.give_up("load", &error),
        }
    }
}

/// Guest RAM, region by region.
struct GuestRam<'a>(&'a GuestMemoryMmap);

impl GuestRam<'_> {
    /// What stays in files of their own has to be there, too, when the host is up again: on DAX the processor's caches are all that
    /// is between; on tmpfs and hugetlbfs there is nothing to do.
    fn sync(&self) -> io::Result<()> {
        let files = self.0.iter().filter_map(|region| region.file_offset());
        files.map(FileOffset::file).try_for_each(File::sync_all)
    }

    fn region(&self, index: u32) -> io::Result<&GuestRegionMmap> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.0
            .iter()
            .nth(index)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

impl Ram for GuestRam<'_> {
    fn read(&self, region: u32, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.region(region)?
            .read_slice(to, MemoryRegionAddress(offset))
            .map_err(io::Error::other)
    }

    fn write(&mut self, region: u32, offset: u64, from: &[u8]) -> io::Result<()> {
        self.region(region)?
            .write_slice(from, MemoryRegionAddress(offset))
            .map_err(io::Error::other)
    }

    fn sizes(&self) -> Vec<u64> {
        self.0.iter().map(|region| region.len()).collect()
    }

    fn extents(&self) -> io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        for (index, region) in (0..).zip(self.0.iter()) {
            match region.file_offset().map(FileOffset::file) {
                Some(file) => data(file, index, region.len(), &mut extents)?,
                None => touched(region, index, &mut extents)?,
            }
        }
        Ok(extents)
    }
}

/// What of a region's file is no hole.
fn data(file: &File, region: u32, size: u64, extents: &mut Vec<Extent>) -> io::Result<()> {
    let mut end = 0;
    loop {
        // A file's position means nothing to anybody: RAM is only ever mapped.
        let offset = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(offset) if offset < size => offset,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(offset))?.min(size);
        extents.push(Extent {
            region,
            offset,
            length: end - offset,
        });
    }
}

/// What of a region that has no file is not zero, in steps of 64 KiB. To read what nobody has written takes no memory.
fn touched(region: &GuestRegionMmap, index: u32, extents: &mut Vec<Extent>) -> io::Result<()> {
    const STEP: usize = 64 << 10;
    let mut bytes = vec![0; STEP];
    for offset in (0..region.len()).step_by(STEP) {
        let length = usize::try_from(region.len() - offset)
            .unwrap_or(STEP)
            .min(STEP);
        let bytes = bytes.get_mut(..length).unwrap_or_default();
        region
            .read_slice(bytes, MemoryRegionAddress(offset))
            .map_err(io::Error::other)?;
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let length = length as u64;
        match extents.last_mut() {
            Some(last) if last.region == index && last.offset + last.length == offset => {
                last.length += length;
            }
            _ => extents.push(Extent {
                region: index,
                offset,
                length,
            }),
        }
    }
    Ok(())
}
