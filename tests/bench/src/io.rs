//! What a guest gets out of its disk and its network, under Baton and under QEMU: the same guest drives the same kind of
//! device as fast as it goes, and the two take turns so that both meet the same host.

mod bare;

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_tests::Flood;

use crate::guest::Guest;
use crate::io::bare::Bare;
use crate::measure::Case;
use crate::summary::Summary;
use crate::vm::Vm;

/// How long a guest may take to boot and find its device. QEMU is slow to start.
const BOOT: Duration = Duration::from_secs(30);
/// Before anything is counted.
const WARM_UP: Duration = Duration::from_millis(500);
/// Of the disk, all written: a hole is nothing to read.
const DISK_BYTES: usize = 256 << 20;
/// Requests of a disk that are under way.
const DEPTH: u16 = 32;

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Plan {
    /// Seconds that are counted of each VM
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// VMs of each kind and load
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How QEMU does its disk I/O: threads or io_uring
    #[arg(long, value_name = "AIO", default_value = "io_uring")]
    aio: String,
    /// Where the guest's memory and disk are: a directory on tmpfs
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    directory: std::path::PathBuf,
}

/// One kind of load.
struct Load {
    name: &'static str,
    words: fn(CommandLine) -> CommandLine,
    device: Device,
    /// Bytes of a request or a frame; 0 where their number is what counts.
    bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    Disk,
    /// The tap counts.
    Sender,
    /// The guest counts.
    Receiver,
}

const LOADS: [Load; 7] = [
    Load {
        name: "random reads of 4 KiB",
        words: |line| line.load_disk(4096, DEPTH).load_random(),
        device: Device::Disk,
        bytes: 0,
    },
    Load {
        name: "random writes of 4 KiB",
        words: |line| line.load_disk(4096, DEPTH).load_random().load_writing(),
        device: Device::Disk,
        bytes: 0,
    },
    Load {
        name: "sequential reads of 128 KiB",
        words: |line| line.load_disk(128 << 10, DEPTH),
        device: Device::Disk,
        bytes: 128 << 10,
    },
    Load {
        name: "sequential writes of 128 KiB",
        words: |line| line.load_disk(128 << 10, DEPTH).load_writing(),
        device: Device::Disk,
        bytes: 128 << 10,
    },
    Load {
        name: "frames of 64 bytes, sent",
        words: |line| line.load_sending(64),
        device: Device::Sender,
        bytes: 0,
    },
    Load {
        name: "frames of 1514 bytes, sent",
        words: |line| line.load_sending(1514),
        device: Device::Sender,
        bytes: 1514,
    },
    Load {
        name: "frames of 64 bytes, received",
        words: CommandLine::load_receiving,
        device: Device::Receiver,
        bytes: 0,
    },
];

/// Measures all loads, and prints a table.
pub(crate) fn measure(binaries: &Path, plan: &Plan) -> Result<()> {
    println!(
        "{:<30} {:>16} {:>16} {:>8}",
        "each second (median)", "Baton", "QEMU", "ratio"
    );
    for load in &LOADS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            ours.push(
                baton(binaries, plan, load).with_context(|| format!("Baton: {}", load.name))?,
            );
            theirs.push(qemu(plan, load).with_context(|| format!("QEMU: {}", load.name))?);
        }
        let median = |samples: Vec<f64>| Summary::of(samples).map_or(0.0, |summary| summary.p50);
        let (ours, theirs) = (median(ours), median(theirs));
        let shown = |rate: f64| match load.bytes {
            0 => format!("{rate:.0}"),
            bytes => format!("{:.0} MiB", rate * bytes as f64 / f64::from(1 << 20)),
        };
        println!(
            "{:<30} {:>16} {:>16} {:>8.2}",
            load.name,
            shown(ours),
            shown(theirs),
            ours / theirs
        );
    }
    Ok(())
}

/// A directory for one VM, with its disk.
fn place(plan: &Plan, load: &Load) -> Result<tempfile::TempDir> {
    let directory = tempfile::Builder::new()
        .prefix("baton-bench-")
        .tempdir_in(&plan.directory)?;
    if load.device == Device::Disk {
        let mut disk = File::create(directory.path().join("data.img"))?;
        let chunk = vec![0xa5; 1 << 20];
        for _ in 0..DISK_BYTES / chunk.len() {
            disk.write_all(&chunk)?;
        }
    }
    Ok(directory)
}

fn case() -> Case {
    Case {
        memory: "256M".into(),
        pages: "4K".into(),
        cpus: 1,
    }
}

/// A tap's name that nobody else has.
fn tap(side: char) -> String {
    format!("b{side}{}", std::process::id())
}

fn baton(binaries: &Path, plan: &Plan, load: &Load) -> Result<f64> {
    let directory = place(plan, load)?;
    let tap = tap('b');
    let devices = match load.device {
        Device::Disk => "[[disk]]\nid = \"data\"\npath = \"data.img\"\n".to_owned(),
        Device::Sender | Device::Receiver => {
            format!("[[net]]\nid = \"net0\"\ntap = \"{tap}\"\nmac = \"52:54:00:00:00:01\"\n")
        }
    };
    let line = (load.words)(CommandLine::new());
    let vm = Vm::start(binaries, directory.path(), &case(), &line, &devices)?;
    rate(&Guest::open(vm.broker)?, &tap, load, plan)
}

fn qemu(plan: &Plan, load: &Load) -> Result<f64> {
    let directory = place(plan, load)?;
    let tap = tap('q');
    let devices = match load.device {
        Device::Disk => bare::disk(&directory.path().join("data.img"), &plan.aio),
        Device::Sender | Device::Receiver => bare::net(&tap),
    };
    let line = (load.words)(CommandLine::new()).bare();
    let vm = Bare::start(directory.path(), &case(), &line, &devices)?;
    if load.device != Device::Disk {
        up(&tap)?;
    }
    rate(&vm.guest()?, &tap, load, plan)
}

/// Brings an interface up, once it is there. Baton does that by itself with a tap that it makes.
fn up(tap: &str) -> Result<()> {
    let deadline = Instant::now() + BOOT;
    while !Path::new("/sys/class/net").join(tap).exists() {
        if Instant::now() > deadline {
            bail!("QEMU makes no tap");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = Command::new("ip")
        .args(["link", "set", "dev", tap, "up"])
        .status()
        .context("cannot run ip: install iproute2")?;
    if !status.success() {
        bail!("ip link set dev {tap} up: {status}");
    }
    Ok(())
}

/// Requests or frames in a second.
fn rate(guest: &Guest, tap: &str, load: &Load, plan: &Plan) -> Result<f64> {
    let deadline = Instant::now() + BOOT;
    while guest.load()?.state != DriverState::Working {
        if Instant::now() > deadline {
            bail!(
                "the guest drives no device: {:?}, {:?}",
                guest.load(),
                guest.report()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let flood = (load.device == Device::Receiver).then(|| Flood::new(tap, 64));
    let count = || match load.device {
        Device::Sender => {
            let path = format!("/sys/class/net/{tap}/statistics/rx_packets");
            let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
            text.trim().parse().with_context(|| path)
        }
        Device::Disk | Device::Receiver => anyhow::Ok(guest.load()?.done),
    };
    std::thread::sleep(WARM_UP);
    let (began, first) = (Instant::now(), count()?);
    std::thread::sleep(Duration::from_secs(plan.seconds));
    let (seconds, last) = (began.elapsed().as_secs_f64(), count()?);
    drop(flood);
    let report = guest.load()?;
    if report.errors > 0 || report.state != DriverState::Working || last == first {
        bail!("the device was disturbed: {report:?}, {first} to {last}");
    }
    Ok((last - first) as f64 / seconds)
}
