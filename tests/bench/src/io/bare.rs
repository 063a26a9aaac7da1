//! The embedded guest under QEMU, without firmware: a ROM of ours enters it in 32-bit protected mode, and what a boot loader
//! would say lies in RAM already.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;
use anyhow::Result;
use baton_guest::CommandLine;
use baton_guest::layout;

use crate::guest::Guest;
use crate::measure::Case;
use crate::qemu::ACCELERATOR;
use crate::qemu::PROGRAM;
use crate::qemu::Qemu;

/// The smallest ROM that QEMU takes, in bytes. It ends at 4 GiB.
const ROM: usize = 64 << 10;
/// Where in it the code is that the reset vector, 16 bytes below its end, jumps to.
const CODE: usize = 0xff00;
const RESET: usize = 0xfff0;
const GDT: usize = 0xff80;
/// Its linear address.
const ROM_AT: u32 = 0xffff_0000;
/// A page, and the pointer to the command line in the zero page (Documentation/arch/x86/zero-page.rst).
const PAGE: usize = 4096;
const COMMAND_LINE_POINTER: usize = 0x228;
/// Of the devices.
const SLOT: &str = "addr=4,disable-legacy=on";

/// A QEMU with the guest.
#[derive(Debug)]
pub(super) struct Bare {
    ram: PathBuf,
    _qemu: Qemu,
}

/// The arguments for a disk.
pub(super) fn disk(path: &Path, aio: &str) -> Vec<String> {
    let node = format!(
        "driver=file,node-name=data,filename={},aio={aio}",
        path.display()
    );
    let device =
        format!("virtio-blk-pci,drive=data,iothread=io,queue-size=256,num-queues=1,{SLOT}");
    [
        "-object",
        "iothread,id=io",
        "-blockdev",
        &node,
        "-device",
        &device,
    ]
    .map(str::to_owned)
    .to_vec()
}

/// The arguments for a network interface on a tap that QEMU makes.
pub(super) fn net(tap: &str) -> Vec<String> {
    let wire = format!("tap,id=net0,ifname={tap},script=no,downscript=no,vhost=off");
    let device = format!("virtio-net-pci,netdev=net0,{SLOT}");
    ["-netdev", &wire, "-device", &device]
        .map(str::to_owned)
        .to_vec()
}

impl Bare {
    pub(super) fn start(
        directory: &Path,
        case: &Case,
        line: &CommandLine,
        devices: &[String],
    ) -> Result<Self> {
        let path = |name: &str| directory.join(name);
        std::fs::write(path("guest.elf"), baton_guest::ELF)?;
        std::fs::write(path("qemu.rom"), rom()?)?;
        std::fs::write(path("zero.bin"), zero_page(line)?)?;
        let log = std::fs::File::create(path("qemu.log"))?;
        let show = |name: &str| path(name).display().to_string();
        let child = Command::new(PROGRAM)
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-machine", "q35,memory-backend=ram0", "-accel", ACCELERATOR])
            .args(["-cpu", "host,-arch-capabilities", "-m", &case.memory])
            .args(["-smp", &case.cpus.to_string(), "-object"])
            .arg(format!(
                "memory-backend-file,id=ram0,mem-path={},share=on,size={}",
                show("ram"),
                case.memory
            ))
            .args(["-bios", &show("qemu.rom"), "-device"])
            .arg(format!("loader,file={}", show("guest.elf")))
            .arg("-device")
            .arg(format!(
                "loader,file={},addr={:#x},force-raw=on",
                show("zero.bin"),
                layout::BARE_ZERO_PAGE
            ))
            .args(devices)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {PROGRAM}: install qemu-system-x86"))?;
        Ok(Self {
            ram: path("ram"),
            _qemu: Qemu(child),
        })
    }

    /// The guest's RAM, which is a file.
    pub(super) fn guest(&self) -> Result<Guest> {
        while !self.ram.exists() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Guest::of_file(&self.ram)
    }
}

/// A zero page that says where the command line is, and the command line after it.
fn zero_page(line: &CommandLine) -> Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE];
    let at = u32::try_from(layout::BARE_ZERO_PAGE)? + u32::try_from(PAGE)?;
    put(&mut bytes, COMMAND_LINE_POINTER, &at.to_le_bytes());
    bytes.extend(line.to_string().bytes());
    bytes.push(0);
    Ok(bytes)
}

fn rom() -> Result<Vec<u8>> {
    let mut rom = vec![0xf4; ROM];
    let near = u16::try_from(CODE)?.wrapping_sub(u16::try_from(RESET + 3)?);
    put(&mut rom, RESET, &[0xe9]); // jmp CODE
    put(&mut rom, RESET + 1, &near.to_le_bytes());
    let pointer = u16::try_from(GDT + 24)?.to_le_bytes();
    let image = u32::try_from(layout::IMAGE_ADDRESS)?.to_le_bytes();
    let code = [
        &[0xfa, 0x66, 0x2e, 0x0f, 0x01, 0x16][..], // cli; lgdt cs:[pointer]
        &pointer,
        &[0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0], // mov eax, cr0; or al, 1; mov cr0, eax
        &[0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0], // mov ax, 0x10; mov ds, es, ss
        &[0x66, 0xea],                                     // jmp 0x08:IMAGE_ADDRESS
        &image,
        &[0x08, 0x00],
    ]
    .concat();
    put(&mut rom, CODE, &code);
    // None, flat code, flat data, both accessed already: this is no memory that a processor can write to.
    for (index, entry) in [0, 0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        put(&mut rom, GDT + 8 * index, &entry.to_le_bytes());
    }
    put(&mut rom, GDT + 24, &23_u16.to_le_bytes());
    let gdt = ROM_AT + u32::try_from(GDT)?;
    put(&mut rom, GDT + 26, &gdt.to_le_bytes());
    Ok(rom)
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (byte, value) in bytes.iter_mut().skip(at).zip(new) {
        *byte = *value;
    }
}
