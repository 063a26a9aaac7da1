//! Kernels made here, good and bad, loaded into memory without KVM; and run by KVM.

mod bad;
mod good;
mod kvm;
mod tables;

use std::fs::File;
use std::io::Write as _;

use vm_memory::Bytes as _;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::AcpiExtras;
use super::BootError;
use super::BootParams;
use super::Loaded;
use super::RamContent;
use super::load;

/// Guest memory of `mib` MiB.
pub(in crate::boot) fn guest_memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn params(kernel: &File) -> BootParams<'_> {
    BootParams {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        cpus: 2,
        ram: RamContent::Blank,
        acpi: AcpiExtras::default(),
    }
}

fn boot(mem: &GuestMemoryMmap, kernel: &[u8]) -> Result<Loaded, BootError> {
    load(mem, &params(&file(kernel)))
}

fn bytes_at(mem: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(mem: &GuestMemoryMmap, address: u64) -> u32 {
    u32::from_le_bytes(bytes_at(mem, address, 4).try_into().unwrap())
}

fn u64_at(mem: &GuestMemoryMmap, address: u64) -> u64 {
    u64::from_le_bytes(bytes_at(mem, address, 8).try_into().unwrap())
}

/// One program header and its bytes.
#[derive(Clone)]
struct Part {
    kind: u32,
    address: u64,
    bytes: Vec<u8>,
    memory: u64,
}

/// An ELF file to be.
#[derive(Clone)]
struct ElfFile {
    entry: u64,
    parts: Vec<Part>,
}

impl ElfFile {
    /// One segment with `code` at `address`, entered at its start.
    fn new(address: u64, code: &[u8]) -> Self {
        ElfFile {
            entry: address,
            parts: Vec::new(),
        }
        .segment(address, code, code.len() as u64)
    }

    fn segment(mut self, address: u64, bytes: &[u8], memory: u64) -> Self {
        self.parts.push(Part {
            kind: 1,
            address,
            bytes: bytes.to_vec(),
            memory,
        });
        self
    }

    /// A PVH note (owner "Xen", type 18) that names `entry`, after a note of another kind.
    fn pvh(mut self, entry: u32) -> Self {
        let mut bytes = Vec::new();
        for (kind, desc) in [
            (6_u32, vec![1, 2, 3, 4, 5]),
            (18, entry.to_le_bytes().to_vec()),
        ] {
            bytes.extend(4_u32.to_le_bytes());
            bytes.extend((desc.len() as u32).to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(b"Xen\0");
            bytes.extend(&desc);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        self.parts.push(Part {
            kind: 4,
            address: 0,
            memory: bytes.len() as u64,
            bytes,
        });
        self
    }

    fn build(&self) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend(2_u16.to_le_bytes());
        file.extend(62_u16.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        for field in [self.entry, 64, 0] {
            file.extend(field.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        for field in [64, 56, self.parts.len() as u16, 64, 0, 0] {
            file.extend(field.to_le_bytes());
        }
        let mut offset = 64 + 56 * self.parts.len() as u64;
        for part in &self.parts {
            file.extend(part.kind.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            for field in [
                offset,
                part.address,
                part.address,
                part.bytes.len() as u64,
                part.memory,
                4096,
            ] {
                file.extend(field.to_le_bytes());
            }
            offset += part.bytes.len() as u64;
        }
        self.parts.iter().for_each(|part| file.extend(&part.bytes));
        file
    }
}

/// A bzImage whose payload is `code` at its 64-bit entry point, with what a recent kernel has in its header.
fn bz_image(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x400];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x1FE, &[0x55, 0xAA]);
    put(0x202, b"HdrS");
    put(0x206, &0x020F_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &0x7F_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x250, &0xDEAD_BEEF_u64.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    file.extend([0x90; 0x200]);
    file.extend(code);
    file
}

/// Changes a field of a file.
fn patched(mut file: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}
