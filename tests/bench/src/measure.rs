//! What is measured of one kind of VM.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use baton_guest::CommandLine;
use baton_guest::Report;
use serde::Serialize;

use crate::clock::TscOrigin;
use crate::footprint::Footprint;
use crate::guest::Guest;
use crate::peers::Peers;
use crate::peers::Traffic;
use crate::qemu;
use crate::qemu::Transfer;
use crate::summary::Summary;
use crate::vm::Vm;

/// How long a guest may take to go through all its memory, cold.
const SWEEP: Duration = Duration::from_secs(300);

/// A turn or two, so that the guest has seen how long it stood still.
const SETTLE: Duration = Duration::from_millis(5);

/// What guest RAM is called in a process's memory map.
const GUEST_RAM: &str = "/memfd:guest-ram";

/// What to do.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) binaries: PathBuf,
    pub(crate) upgrades: u32,
    pub(crate) sweeps: u32,
    pub(crate) audits: u32,
    pub(crate) starts: u32,
    pub(crate) transfers: u32,
    pub(crate) walk: bool,
    pub(crate) busy: bool,
}

/// Of which VM.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Case {
    pub(crate) memory: String,
    pub(crate) pages: String,
    pub(crate) cpus: u8,
}

/// What came out. Each summary is absent if nothing of its kind was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    #[serde(flatten)]
    pub(crate) case: Case,
    /// Upgrades that did not happen, and are in no other figure.
    pub(crate) aborted: u32,
    pub(crate) blackout_us: Option<Summary>,
    pub(crate) pause_us: Option<Summary>,
    pub(crate) guest_gap_us: Option<Summary>,
    /// The guest's gap while nothing was done to it for as long: what the host's other work does.
    pub(crate) quiet_gap_us: Option<Summary>,
    pub(crate) request_to_commit_us: Option<Summary>,
    /// The guest's first round over its memory after an upgrade.
    pub(crate) first_sweep_us: Option<Summary>,
    /// The median of its undisturbed rounds.
    pub(crate) warm_sweep_us: Option<Summary>,
    /// Each step's time by the broker's clock.
    pub(crate) steps_us: BTreeMap<String, Summary>,
    pub(crate) state_bytes: Option<Summary>,
    /// The longest that a thread of the worker stood still in an audit.
    pub(crate) audit_us: Option<Summary>,
    /// The guest's gap meanwhile.
    pub(crate) audit_gap_us: Option<Summary>,
    /// What its devices did meanwhile, with `--busy`.
    pub(crate) traffic: Option<Traffic>,
    /// How long all of that took.
    pub(crate) seconds: f64,
    /// `baton run` executed to the guest's first instructions, by the guest's clock.
    pub(crate) start_to_guest_us: Option<Summary>,
    /// The broker's first instruction to "running".
    pub(crate) start_to_running_us: Option<Summary>,
    /// `baton run` executed to its end.
    pub(crate) start_to_return_us: Option<Summary>,
    pub(crate) broker: Footprint,
    pub(crate) worker: Footprint,
    pub(crate) qemu: Option<QemuFigures>,
}

/// QEMU's cpr-transfer, of as much memory.
#[derive(Debug, Serialize)]
pub(crate) struct QemuFigures {
    pub(crate) version: String,
    pub(crate) accelerator: String,
    /// STOP of the old QEMU to RESUME of the new one.
    pub(crate) stop_to_resume_us: Option<Summary>,
    /// What `query-migrate` calls downtime.
    pub(crate) downtime_us: Option<Summary>,
    /// `migrate` sent to RESUME.
    pub(crate) request_to_resume_us: Option<Summary>,
    /// The process before a transfer, without guest RAM.
    pub(crate) footprint: Footprint,
}

#[derive(Default)]
struct Samples {
    aborted: u32,
    blackout: Vec<f64>,
    pause: Vec<f64>,
    gap: Vec<f64>,
    quiet_gap: Vec<f64>,
    commit: Vec<f64>,
    first_sweep: Vec<f64>,
    warm_sweep: Vec<f64>,
    state: Vec<f64>,
    audit: Vec<f64>,
    audit_gap: Vec<f64>,
    steps: BTreeMap<String, Vec<f64>>,
    transfers: Vec<Transfer>,
}

/// Measures one.
pub(crate) fn case(plan: &Plan, case: &Case) -> Result<Figures> {
    let directory = tempfile::Builder::new().prefix("baton-bench-").tempdir()?;
    let (mut to_guest, mut to_running, mut to_return) = (Vec::new(), Vec::new(), Vec::new());
    let mut line = CommandLine::new().cpus(usize::from(case.cpus));
    for _ in 0..plan.starts {
        // Without the walk: what it does is no part of a start.
        let vm = Vm::start(&plan.binaries, directory.path(), case, &line, "")?;
        to_guest.push(first_instruction_us(&vm)?);
        to_running.push(vm.start_us as f64);
        to_return.push(us(vm.returned));
    }

    let peers = plan
        .busy
        .then(|| Peers::new(directory.path()))
        .transpose()?;
    if plan.walk {
        line = line.walk();
    }
    if peers.is_some() {
        line = Peers::words(line);
    }
    let devices = peers.as_ref().map(Peers::tables).unwrap_or_default();
    let vm = Vm::start(&plan.binaries, directory.path(), case, &line, &devices)?;
    let guest = Guest::open(vm.broker)?;
    let patient = guest.until("to boot on all its vCPUs", SWEEP, |report| {
        report.vcpus_running == usize::from(case.cpus)
            && (!plan.walk || report.slots.iter().all(|slot| slot.walk.sweeps > 2))
    });
    let booted = patient?;
    let busy = peers.map(|peers| peers.start(&guest)).transpose()?;
    let began = Instant::now();
    let mut samples = Samples::default();
    // QEMU's turns are spread evenly over ours.
    let every = plan
        .upgrades
        .checked_div(plan.transfers)
        .unwrap_or(0)
        .max(1);
    for number in 0..plan.upgrades {
        let sweep = plan.walk && number < plan.sweeps;
        upgrade(&vm, &guest, sweep, &mut samples)?;
        let due = usize::try_from(plan.transfers)?.min(usize::try_from(number / every)? + 1);
        if plan.transfers > 0 && samples.transfers.len() < due {
            samples
                .transfers
                .push(qemu::transfer(directory.path(), case)?);
        }
    }
    for _ in 0..plan.audits {
        audit(&vm, &guest, &mut samples)?;
    }
    let report = guest.report()?;
    if report.nonce != booted.nonce || report.boots != booted.boots || report.faults() > 0 {
        bail!("the guest was disturbed: {report:?}");
    }
    let traffic = busy.map(|busy| busy.check(&guest)).transpose()?;
    let status = vm.status()?;
    Ok(Figures {
        case: case.clone(),
        aborted: samples.aborted,
        blackout_us: Summary::of(samples.blackout),
        pause_us: Summary::of(samples.pause),
        guest_gap_us: Summary::of(samples.gap),
        quiet_gap_us: Summary::of(samples.quiet_gap),
        request_to_commit_us: Summary::of(samples.commit),
        first_sweep_us: Summary::of(samples.first_sweep),
        warm_sweep_us: Summary::of(samples.warm_sweep),
        steps_us: samples
            .steps
            .into_iter()
            .filter_map(|(step, times)| Some((step, Summary::of(times)?)))
            .collect(),
        state_bytes: Summary::of(samples.state),
        audit_us: Summary::of(samples.audit),
        audit_gap_us: Summary::of(samples.audit_gap),
        traffic,
        seconds: began.elapsed().as_secs_f64(),
        start_to_guest_us: Summary::of(to_guest),
        start_to_running_us: Summary::of(to_running),
        start_to_return_us: Summary::of(to_return),
        broker: Footprint::of(vm.broker, GUEST_RAM)?,
        worker: Footprint::of(status.worker_pid, GUEST_RAM)?,
        qemu: summarise(&samples.transfers),
    })
}

fn summarise(transfers: &[Transfer]) -> Option<QemuFigures> {
    let first = transfers.first()?;
    let of = |value: fn(&Transfer) -> f64| Summary::of(transfers.iter().map(value));
    Some(QemuFigures {
        version: first.version.clone(),
        accelerator: qemu::ACCELERATOR.to_owned(),
        stop_to_resume_us: of(|transfer| transfer.stop_to_resume_us),
        downtime_us: of(|transfer| transfer.downtime_us),
        request_to_resume_us: of(|transfer| transfer.request_to_resume_us),
        footprint: first.footprint,
    })
}

/// From the execution of `baton run` to the guest's boot stamp, by the guest's clock.
fn first_instruction_us(vm: &Vm) -> Result<f64> {
    let guest = Guest::open(vm.broker)?;
    guest.until("to boot", SWEEP, |report| {
        report
            .slots
            .iter()
            .any(|slot| slot.running && slot.sequence > 0)
    })?;
    let tsc_khz = vm.status()?.tsc_khz;
    let mut origin = TscOrigin::default();
    let mut boot = 0;
    for _ in 0..200 {
        let report = guest.report()?;
        origin.sample(&report, tsc_khz);
        boot = report.boot_tsc;
        std::thread::sleep(Duration::from_micros(50));
    }
    let booted = origin.at(boot, tsc_khz).context("no sample of the TSC")?;
    Ok((booted - vm.executed_ns) as f64 / 1e3)
}

fn audit(vm: &Vm, guest: &Guest, samples: &mut Samples) -> Result<()> {
    guest.clear()?;
    let Some(stood) = vm.audit()? else {
        return Ok(());
    };
    samples.audit.push(stood as f64);
    std::thread::sleep(SETTLE);
    samples.audit_gap.push(us_of(
        guest.report()?.cleared_max_gap(),
        vm.status()?.tsc_khz,
    ));
    Ok(())
}

fn upgrade(vm: &Vm, guest: &Guest, sweep: bool, samples: &mut Samples) -> Result<()> {
    guest.clear()?;
    let before = guest.report()?;
    let tsc_khz = vm.status()?.tsc_khz;
    let Some(upgraded) = vm.upgrade()? else {
        samples.aborted += 1;
        return Ok(());
    };
    let outcome = upgraded.outcome;
    std::thread::sleep(SETTLE);
    let after = guest.report()?;
    let micros = |ticks: u64| us_of(ticks, tsc_khz);
    let gap = after.cleared_max_gap();
    samples.gap.push(micros(gap));
    samples.blackout.push(outcome.blackout_us as f64);
    samples.pause.push(outcome.pause_us as f64);
    samples.commit.push(us(upgraded.took));
    samples.state.push(outcome.state_bytes as f64);
    for phase in &outcome.phases {
        let step = samples
            .steps
            .entry(format!("{:02} {}", phase.step.number(), phase.step));
        step.or_default().push(phase.us as f64);
    }
    if sweep {
        let (first, warm) = swept(guest, &before)?;
        samples.first_sweep.push(micros(first));
        samples.warm_sweep.push(micros(warm));
    }
    guest.clear()?;
    std::thread::sleep(upgraded.took);
    let quiet = guest.report()?.cleared_max_gap();
    samples.quiet_gap.push(micros(quiet));
    Ok(())
}

/// Waits for the round over all memory that began when the upgrade's gap ended: its ticks, and those of a warm one, of the
/// vCPU that took longest.
fn swept(guest: &Guest, before: &Report) -> Result<(u64, u64)> {
    let swept = guest.until("to go through its memory", SWEEP, |report| {
        report.slots.iter().zip(&before.slots).all(|(now, then)| {
            now.walk.gap_rounds > then.walk.gap_rounds && now.walk.cleared_max_gap_round > 0
        })
    })?;
    let walks = || swept.slots.iter().map(|slot| &slot.walk);
    let first = walks().map(|walk| walk.cleared_max_gap_round).max();
    // On a busy host hardly a sweep is without a gap; the fastest is then the best that is known.
    let warm = walks().map(|walk| match walk.median_sweep {
        0 => walk.min_sweep,
        median => median,
    });
    Ok((first.unwrap_or(0), warm.max().unwrap_or(0)))
}

/// Ticks of the guest's clock in microseconds.
fn us_of(ticks: u64, tsc_khz: u32) -> f64 {
    ticks as f64 * 1e3 / f64::from(tsc_khz.max(1))
}

fn us(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
