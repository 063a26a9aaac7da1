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

use crate::qemu::Machine;
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
        let device = ["-device", "virtio-rng-pci"];
        let more: &[&str] = if new == New::FewerDevices {
            &device
        } else {
            &[]
        };
        let old = Qemu::start(dir.path(), "old", SMALL, more);
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
        let builder = Builder::release();
        let vm = match new {
            New::FewerDevices => builder.vsock(),
            _ => builder,
        };
        let vm = Box::new(vm.start());
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
    let mut arguments: Vec<&str> = Vec::new();
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
        memory_is_a_file: new == New::OtherMemory,
        ..SMALL
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
