//! `baton-bench`: what an upgrade costs a guest, what a start costs, and what the processes cost the host; beside QEMU's
//! own cpr-transfer, run in turns with ours so that both meet the same host.
//!
//! It runs the built programs as people do, and asks the guest itself how long it stood still. It judges nothing: timings
//! belong to a host, and a busy one makes them worse. Needs root and `/dev/kvm`.
#![forbid(unsafe_code)]

mod clock;
mod footprint;
mod guest;
mod io;
mod measure;
mod peers;
mod qemu;
mod summary;
mod table;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use clap::Parser;

use crate::measure::Case;
use crate::measure::Plan;

/// Measures upgrades, starts and footprints of VMs on this host
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Blackout   from the first vCPU's exit in the old worker to the last vCPU's first KVM_RUN in the new
Pause      the broker's own view of it: \"park\" sent to \"running\" received
Guest gap  the longest time between two turns of the guest's loop, by its own clock
Audit      the longest that a thread of the worker stood still, and the guest's gap meanwhile
Sweep      the guest's first round over all its memory after the upgrade, beside a warm one

Examples:
  baton-bench
  baton-bench --memory 256M,4G --cpus 1,4 --upgrades 100 --qemu 10
  baton-bench --memory 256M --no-walk --busy --upgrades 1000 --starts 1
  baton-bench io --seconds 3 --rounds 5
  baton-bench --json | jq '.cases[0].blackout_us.p50'"
)]
struct Arguments {
    /// Where baton, baton-broker and baton-worker are [default: beside this program]
    #[arg(long, value_name = "DIR", global = true)]
    binaries: Option<PathBuf>,
    /// The guests' memory sizes
    #[arg(
        long,
        value_name = "SIZE,...",
        value_delimiter = ',',
        default_value = "256M,4G"
    )]
    memory: Vec<String>,
    /// The guests' numbers of vCPUs
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1")]
    cpus: Vec<u8>,
    /// How the guests' memory is backed: 4K, 2M or thp
    #[arg(
        long,
        value_name = "PAGES,...",
        value_delimiter = ',',
        default_value = "4K"
    )]
    pages: Vec<String>,
    /// Upgrades of each VM
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    upgrades: u32,
    /// After how many of them the first sweep over memory is waited for
    #[arg(long, value_name = "N", default_value_t = 5)]
    sweeps: u32,
    /// Audits of each VM, of its last worker
    #[arg(long, value_name = "N", default_value_t = 0)]
    audits: u32,
    /// Starts of each VM
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
    /// Transfers between two QEMUs, for each memory size
    #[arg(long, value_name = "N", default_value_t = 0)]
    qemu: u32,
    /// Let the guest idle in its counting loop, without going through its memory
    #[arg(long)]
    no_walk: bool,
    /// Keep disk, network, vsock and console of the guest busy, and check what they carry
    #[arg(long)]
    busy: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    other: Option<Other>,
}

#[derive(Debug, clap::Subcommand)]
enum Other {
    /// Measures disk and network of a guest instead, under Baton and under QEMU in turns
    Io(io::Plan),
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let binaries = match &arguments.binaries {
        Some(directory) => directory.clone(),
        None => std::env::current_exe()?
            .parent()
            .context("this program lies in no directory")?
            .to_owned(),
    };
    if let Some(Other::Io(plan)) = &arguments.other {
        return io::measure(&binaries, plan);
    }
    let plan = Plan {
        binaries,
        upgrades: arguments.upgrades,
        sweeps: arguments.sweeps,
        audits: arguments.audits,
        starts: arguments.starts,
        transfers: arguments.qemu,
        walk: !arguments.no_walk,
        busy: arguments.busy,
    };
    let mut measured = Vec::new();
    for memory in &arguments.memory {
        for pages in &arguments.pages {
            for cpus in &arguments.cpus {
                let case = Case {
                    memory: memory.clone(),
                    pages: pages.clone(),
                    cpus: *cpus,
                };
                let figures = measure::case(&plan, &case)
                    .with_context(|| format!("{memory}, {pages} pages, {cpus} vCPUs"))?;
                if !arguments.json {
                    println!("{}", table::of(&figures));
                }
                measured.push(figures);
            }
        }
    }
    if arguments.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&table::document(&measured)?)?
        );
    } else if let Some(line) = table::scaling(&measured) {
        println!("{line}");
    }
    Ok(())
}
