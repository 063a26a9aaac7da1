//! Who is asked: QEMU, or Baton, with a guest on one side and, when a flow wants it, sides that wait for it.

use std::path::Path;
use std::path::PathBuf;

use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Vm;
use baton_tests::kill_process;
use baton_tests::transfer::channel;
use baton_tests::until;
use baton_tests::with_children;
use serde_json::Value;
use serde_json::json;
use tempfile::TempDir;

use crate::listener::Listener;
use crate::qemu::Machine;
use crate::qemu::Memory;
use crate::qemu::Qemu;
use crate::qemu::SMALL;

/// How the side that waits is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum New {
    /// There is none.
    Nobody,
    /// Both channels are named.
    Listening,
    /// The main channel comes by `migrate-incoming`.
    Deferred,
    /// Only the cpr channel is named.
    CprAlone,
    /// As `Deferred`, and its guest is to stand still.
    Stands,
    /// As `Deferred`, of a machine with two processors.
    TwoCpus,
    /// As `Deferred`, of a machine with twice as much memory.
    MoreMemory,
    /// As `Deferred`, of a machine with half as much memory.
    LessMemory,
    /// As `Deferred`, of a machine that lacks the device that the guest has.
    FewerDevices,
    /// As `Deferred`, with memory of its own, of the same size: a file's.
    OtherMemory,
    /// As `Deferred`; QEMU's sides are under a sandbox, as ours always are.
    Sandboxed,
    /// As `Deferred`; both sides listen at one socket.
    OneSocket,
    /// As `Deferred`; both sides have one disk.
    OneDisk,
    /// As `Deferred`; both sides have one tap.
    OneTap,
    /// As `Deferred`; a device can be added.
    Port,
}

impl New {
    /// What a QEMU whose files are in `dir` is started with on either side.
    fn arguments(self, dir: &Path) -> Vec<String> {
        let path = |name: &str| dir.join(name).display().to_string();
        let arguments = match self {
            Self::Sandboxed => {
                "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
                    .to_owned()
            }
            Self::OneSocket => format!(
                "-chardev socket,id=c0,path={},server=on,wait=off -serial chardev:c0",
                path(SERIAL)
            ),
            Self::OneDisk => format!("-drive file={},format=raw,if=virtio", path(DISK)),
            Self::OneTap => format!(
                "-netdev tap,id=n0,ifname={},script=no,downscript=no -device virtio-net-pci,netdev=n0,romfile=",
                tap()
            ),
            Self::Port => "-device pcie-root-port,id=port0,slot=1".to_owned(),
            _ => return Vec::new(),
        };
        arguments.split(' ').map(str::to_owned).collect()
    }

    /// What of ours is like it.
    fn builder(self) -> Builder {
        let builder = Builder::release();
        match self {
            Self::FewerDevices | Self::OneSocket => builder.vsock(),
            Self::OneDisk => builder.disk("root", 1, ""),
            Self::OneTap => builder.net(&tap(), ""),
            // A broker that runs reaches the directories that its policy names.
            Self::Port => {
                let here = format!(
                    "paths = [\"/**\", \"{}/**\"",
                    std::env::temp_dir().display()
                );
                let (before, disk) = baton_policy::BUILTIN.split_once("name = \"disk\"").unwrap();
                let disk = disk.replacen("paths = [\"/**\"", &here, 1);
                assert!(disk.contains(&here));
                builder.policy(&format!("{before}name = \"disk\"{disk}"))
            }
            _ => builder,
        }
    }
}

/// QEMU's serial port, and a disk, in a directory of its own.
const SERIAL: &str = "serial";
const DISK: &str = "disk.img";

/// A tap of this test's own.
fn tap() -> String {
    format!("bo{}", std::process::id())
}

/// A side that waits.
#[derive(Clone)]
pub(crate) struct Waiting {
    pub(crate) pid: i32,
    /// Where it serves QMP.
    pub(crate) qmp: PathBuf,
    pub(crate) main: PathBuf,
    pub(crate) cpr: PathBuf,
}

/// One of the two, with everything that ends when this is dropped.
pub(crate) enum Party {
    Qemu {
        dir: TempDir,
        all: Vec<Qemu>,
    },
    Ours {
        vm: Box<Vm>,
        waiting: Vec<i32>,
        /// One was killed, and could not remove what is its own; the next one does.
        killed: bool,
    },
}

impl Drop for Party {
    fn drop(&mut self) {
        if let Self::Ours {
            vm,
            waiting,
            killed,
        } = self
        {
            // One that stands still cannot be asked to end.
            for pid in waiting.iter().copied().flat_map(with_children) {
                baton_tests::continue_process(pid);
            }
            if *killed {
                vm.wait_for_guest();
            }
            let name = format!("{}.incoming", vm.site.name);
            vm.site.baton(["stop", "--force", &name]);
        }
    }
}

impl Party {
    /// QEMU, and its monitor.
    pub(crate) fn qemu(new: New) -> (Self, Qmp) {
        let dir = tempfile::tempdir().unwrap();
        let mut more = new.arguments(dir.path());
        if new == New::FewerDevices {
            more.extend(["-device", "virtio-rng-pci"].map(str::to_owned));
        }
        let disk = std::fs::File::create(dir.path().join(DISK)).unwrap();
        disk.set_len(1 << 20).unwrap();
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let old = Qemu::start(dir.path(), "old", SMALL, &more);
        let mut qmp = old.connect();
        qmp.done("qmp_capabilities", json!({}));
        (
            Self::Qemu {
                dir,
                all: vec![old],
            },
            qmp,
        )
    }

    /// Baton, and its.
    pub(crate) fn baton(new: New) -> (Self, Qmp) {
        let vm = Box::new(new.builder().start());
        let mut qmp = Qmp::greeted(&vm);
        qmp.done("qmp_capabilities", json!({}));
        (
            Self::Ours {
                vm,
                waiting: Vec::new(),
                killed: false,
            },
            qmp,
        )
    }

    pub(crate) fn dir(&self) -> PathBuf {
        match self {
            Self::Qemu { dir, .. } => dir.path().to_owned(),
            Self::Ours { vm, .. } => vm.site.path(""),
        }
    }

    /// Where the side that has the guest serves QMP.
    pub(crate) fn socket(&self) -> PathBuf {
        match self {
            Self::Qemu { all, .. } => all.first().unwrap().socket().to_owned(),
            Self::Ours { vm, .. } => vm.site.run_dir().join(&vm.site.name).join("qmp.sock"),
        }
    }

    /// The process of the side that has the guest.
    pub(crate) fn pid(&self) -> i32 {
        match self {
            Self::Qemu { all, .. } => all.first().unwrap().pid(),
            Self::Ours { vm, .. } => vm.broker,
        }
    }

    /// The socket that both sides listen at.
    pub(crate) fn one_socket(&self) -> PathBuf {
        match self {
            Self::Qemu { dir, .. } => dir.path().join(SERIAL),
            Self::Ours { vm, .. } => vm.site.path("v"),
        }
    }

    /// Somebody who listens to the guest's serial port.
    pub(crate) fn listen(&self) -> Listener {
        match self {
            Self::Qemu { .. } => Listener::at(&self.one_socket()),
            Self::Ours { vm, .. } => Listener::of(vm),
        }
    }

    /// What adds a device called `x`.
    pub(crate) fn addition(&self) -> Vec<String> {
        let steps: &[&str] = match self {
            Self::Qemu { .. } => {
                &[r#"old device_add {"driver": "virtio-rng-pci", "id": "x", "bus": "port0"}"#]
            }
            Self::Ours { vm, .. } => {
                std::fs::File::create(vm.site.path(DISK))
                    .and_then(|image| image.set_len(1 << 20))
                    .unwrap();
                &[
                    r#"old blockdev-add {"driver": "file", "node-name": "n", "filename": "$dir/disk.img"}"#,
                    r#"old device_add {"driver": "virtio-blk-pci", "id": "x", "drive": "n"}"#,
                ]
            }
        };
        steps.iter().map(|step| (*step).to_owned()).collect()
    }

    /// Starts a side that waits, the `number`th.
    pub(crate) fn wait(&mut self, new: New, number: usize) -> Waiting {
        let dir = self.dir();
        let main = dir.join(format!("main{number}"));
        let cpr = dir.join(format!("cpr{number}"));
        let mut incoming = vec![channel("cpr", &cpr).to_string()];
        match new {
            New::Listening => incoming.push(format!("unix:{}", main.display())),
            New::CprAlone => {}
            _ => incoming.push("defer".to_owned()),
        }
        let (pid, qmp) = match self {
            Self::Qemu { dir, all } => {
                let waiting = qemu_waits(dir.path(), new, number, &incoming);
                // Ours has said that it waits.
                until("it waits", || listens(&cpr).then_some(()));
                let found = (waiting.pid(), waiting.socket().to_owned());
                all.push(waiting);
                found
            }
            Self::Ours { vm, waiting, .. } => {
                let pid = baton_waits(vm, new, &incoming);
                waiting.push(pid);
                let directory = vm.site.run_dir().join(format!("{}.incoming", vm.site.name));
                (pid, directory.join("qmp.sock"))
            }
        };
        Waiting {
            pid,
            qmp,
            main,
            cpr,
        }
    }

    /// Ends what waits, whatever it is doing.
    pub(crate) fn kill(&mut self, waiting: &Waiting) {
        if let Self::Ours { killed, .. } = self {
            *killed = true;
        }
        with_children(waiting.pid)
            .into_iter()
            .for_each(kill_process);
        until("it has ended", || {
            (!baton_tests::is_alive(waiting.pid)).then_some(())
        });
    }
}

/// Whether somebody listens there: a connection would tell, and be taken for a peer's. (Of proc_net_unix's columns, the fourth is
/// 00010000, __SO_ACCEPTCON, for such a socket.)
fn listens(path: &Path) -> bool {
    let path = path.display().to_string();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|socket| {
        let mut columns = socket.split_whitespace();
        columns.nth(3) == Some("00010000") && columns.last() == Some(&path)
    })
}

fn qemu_waits(dir: &Path, new: New, number: usize, incoming: &[String]) -> Qemu {
    let more = new.arguments(dir);
    let mut arguments: Vec<&str> = more.iter().map(String::as_str).collect();
    for one in incoming {
        arguments.extend(["-incoming", one]);
    }
    arguments.extend((new == New::Stands).then_some("-S"));
    let machine = Machine {
        cpus: if new == New::TwoCpus { 2 } else { SMALL.cpus },
        mebibytes: match new {
            New::MoreMemory => SMALL.mebibytes * 2,
            New::LessMemory => SMALL.mebibytes / 2,
            _ => SMALL.mebibytes,
        },
        memory: match new {
            New::OtherMemory => Memory::File,
            _ => SMALL.memory,
        },
    };
    Qemu::start(dir, &format!("new{number}"), machine, &arguments)
}

fn baton_waits(vm: &Vm, new: New, incoming: &[String]) -> i32 {
    let text = std::fs::read_to_string(vm.site.path("vm.toml")).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    let file = match new {
        New::TwoCpus => changed("count = 1", "count = 2"),
        New::MoreMemory => changed("\"64M\"", "\"128M\""),
        New::LessMemory => changed("\"64M\"", "\"32M\""),
        New::FewerDevices => text.split_once("[vsock]").unwrap().0.to_owned(),
        New::OtherMemory => {
            let path = format!("/dev/shm/{}", vm.site.name);
            changed(
                "size = \"64M\"",
                &format!("size = \"64M\"\npath = \"{path}\""),
            )
        }
        _ => text,
    };
    let file = vm.site.write("new.toml", file).display().to_string();
    let mut arguments = vec!["run", "--detach", &file];
    for one in incoming {
        arguments.extend(["--incoming", one]);
    }
    arguments.extend((new == New::Stands).then_some("-S"));
    let started = vm.site.baton(arguments).expect(0).json();
    let pid = started.get("broker_pid").and_then(Value::as_i64);
    i32::try_from(pid.unwrap()).unwrap()
}
