//! QEMU's own cpr-transfer between two QEMU processes, driven over QMP.
//!
//! The guest is a ROM that jumps to itself: what it does is no part of the time between STOP and RESUME. Its RAM is a
//! populated memfd of as much memory as ours, on the smallest q35 that QEMU can be.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use serde_json::Value;
use serde_json::json;

use crate::footprint::Footprint;
use crate::measure::Case;

/// KVM, as ours.
pub(crate) const ACCELERATOR: &str = "kvm";
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(60);
/// The smallest ROM that QEMU takes, in bytes.
const ROM: usize = 64 << 10;

/// One transfer, times in microseconds.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) version: String,
    pub(crate) stop_to_resume_us: f64,
    pub(crate) downtime_us: f64,
    pub(crate) request_to_resume_us: f64,
    pub(crate) footprint: Footprint,
}

/// A QEMU. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Qemu(pub(crate) Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // The only error is that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Qmp {
    stream: BufReader<UnixStream>,
    version: String,
    events: Vec<Value>,
}

impl Qmp {
    fn connect(path: &Path, child: &mut Qemu) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => {
                    if let Some(status) = child.0.try_wait()? {
                        bail!("{PROGRAM} ended: {status}");
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            version: String::new(),
            events: Vec::new(),
        };
        let greeting = qmp.read()?;
        let number = |name: &str| {
            let value = greeting.pointer(&format!("/QMP/version/qemu/{name}"));
            value.and_then(Value::as_u64).unwrap_or(0)
        };
        qmp.version = format!(
            "{}.{}.{}",
            number("major"),
            number("minor"),
            number("micro")
        );
        qmp.order("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("{PROGRAM} closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn order(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{message}")?;
        loop {
            let reply = self.read()?;
            if reply.get("event").is_some() {
                self.events.push(reply);
            } else if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            } else {
                bail!("{command}: {reply}");
            }
        }
    }

    /// Waits for an event, and returns its time in microseconds.
    fn event(&mut self, wish: impl Fn(&Value) -> bool) -> Result<f64> {
        let mut next = 0;
        loop {
            while let Some(event) = self.events.get(next) {
                next += 1;
                if wish(event) {
                    let part = |name: &str| {
                        let value = event.pointer(&format!("/timestamp/{name}"));
                        value.and_then(Value::as_f64).unwrap_or(0.0)
                    };
                    return Ok(part("seconds") * 1e6 + part("microseconds"));
                }
            }
            let event = self.read()?;
            self.events.push(event);
        }
    }

    fn named(&mut self, name: &str) -> Result<f64> {
        self.event(|event| event.get("event").and_then(Value::as_str) == Some(name))
    }
}

fn start(directory: &Path, side: &str, case: &Case, more: &[String]) -> Result<Qemu> {
    let path = |name: &str| directory.join(name).display().to_string();
    let log = std::fs::File::create(directory.join(format!("qemu-{side}.log")))?;
    let child = Command::new(PROGRAM)
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-machine", "q35,aux-ram-share=on,memory-backend=ram0"])
        .args(["-accel", ACCELERATOR, "-cpu", "host,-arch-capabilities"])
        .args(["-m", &case.memory, "-smp", &case.cpus.to_string()])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=ram0,share=on,prealloc=on,size={}",
            case.memory
        ))
        .args(["-bios", &path("qemu.rom")])
        .args([
            "-qmp",
            &format!(
                "unix:{},server=on,wait=off",
                path(&format!("qemu-{side}.qmp"))
            ),
        ])
        .args(more)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot run {PROGRAM}: install qemu-system-x86 10.0 or later"))?;
    Ok(Qemu(child))
}

/// Takes a guest from one QEMU to another.
pub(crate) fn transfer(directory: &Path, case: &Case) -> Result<Transfer> {
    let path = |name: &str| directory.join(name);
    let mut rom = vec![0xf4; ROM];
    // At the reset vector, 16 bytes below the end: jmp to itself.
    for (byte, value) in rom.iter_mut().skip(ROM - 16).zip([0xeb, 0xfe]) {
        *byte = value;
    }
    std::fs::write(path("qemu.rom"), rom)?;
    for stale in [
        "qemu-old.qmp",
        "qemu-new.qmp",
        "qemu-main.sock",
        "qemu-cpr.sock",
    ] {
        // There is none before the first transfer.
        let _ = std::fs::remove_file(path(stale));
    }
    let channel = |kind: &str| {
        json!({"channel-type": kind, "addr": {
            "transport": "socket", "type": "unix", "path": path(&format!("qemu-{kind}.sock")).display().to_string(),
        }})
    };
    let mut old = start(directory, "old", case, &[])?;
    let mut old_qmp = Qmp::connect(&path("qemu-old.qmp"), &mut old)?;
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    old_qmp.order("migrate-set-capabilities", &events)?;
    old_qmp.order("migrate-set-parameters", &json!({"mode": "cpr-transfer"}))?;
    let footprint = Footprint::of(old.0.id(), "/memfd:memory-backend-memfd")?;
    let incoming = ["-incoming", "defer", "-incoming"].map(str::to_owned);
    let incoming = [&incoming[..], &[channel("cpr").to_string()]].concat();
    let mut new = start(directory, "new", case, &incoming)?;
    let deadline = Instant::now() + PATIENCE;
    while !path("qemu-cpr.sock").exists() {
        if let Some(status) = new.0.try_wait()? {
            bail!("the new {PROGRAM} ended: {status}");
        }
        if Instant::now() > deadline {
            bail!("the new {PROGRAM} does not listen");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // It takes one client only, so that nobody can ask whether it listens; it binds before it does.
    std::thread::sleep(Duration::from_millis(20));
    let asked = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    old_qmp.order(
        "migrate",
        &json!({"channels": [channel("main"), channel("cpr")]}),
    )?;
    let mut new_qmp = Qmp::connect(&path("qemu-new.qmp"), &mut new)?;
    new_qmp.order("migrate-set-capabilities", &events)?;
    new_qmp.order("migrate-incoming", &json!({"channels": [channel("main")]}))?;
    let resumed = new_qmp.named("RESUME")?;
    let stopped = old_qmp.named("STOP")?;
    old_qmp.event(|event| {
        event.pointer("/data/status").and_then(Value::as_str) == Some("completed")
    })?;
    let told = old_qmp.order("query-migrate", &json!({}))?;
    let downtime = told.get("downtime").and_then(Value::as_f64);
    Ok(Transfer {
        version: old_qmp.version,
        stop_to_resume_us: resumed - stopped,
        downtime_us: downtime.context("query-migrate tells no downtime")? * 1e3,
        request_to_resume_us: resumed - asked.as_secs_f64() * 1e6,
        footprint,
    })
}
