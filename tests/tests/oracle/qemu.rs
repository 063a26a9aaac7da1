//! A QEMU to ask: the smallest q35 that QEMU's manual lets cpr-transfer be tried with, its guest a jump to itself.

use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use baton_tests::Qmp;
use baton_tests::until;

/// The smallest ROM that QEMU takes, in bytes; the processor starts 16 bytes before its end (AMD64 manual, volume 2, 14.1.5).
const ROM: usize = 64 << 10;

/// When one that is to end is taken for one that waits.
const ENDED: Duration = Duration::from_secs(3);

/// Where guest memory is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// In memfds, all of it, as cpr-transfer needs it.
    Shared,
    /// In a memfd that is nobody else's.
    Private,
    /// In a file.
    File,
    /// Where it is without a backend: `-m` alone.
    NoBackend,
    /// As `Shared`, but for ROMs and tables.
    NoAuxShare,
}

/// What differs from one to the other.
#[derive(Clone, Copy)]
pub(crate) struct Machine {
    pub(crate) cpus: u8,
    pub(crate) mebibytes: u32,
    pub(crate) memory: Memory,
}

pub(crate) const SMALL: Machine = Machine {
    cpus: 1,
    mebibytes: 16,
    memory: Memory::Shared,
};

/// Dropped, it is killed.
pub(crate) struct Qemu {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // The only error is that it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Qemu {
    /// Starts one whose files are in `dir`, by its name, with these further arguments.
    pub(crate) fn start(dir: &Path, name: &str, machine: Machine, more: &[&str]) -> Self {
        let program = std::env::var_os("BATON_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let path = |file: &str| dir.join(format!("{name}.{file}"));
        let Machine {
            cpus,
            mebibytes,
            memory,
        } = machine;
        let object = match memory {
            Memory::NoBackend => None,
            Memory::File => Some(format!(
                "file,share=on,mem-path={}",
                path("memory").display()
            )),
            Memory::Private => Some("memfd,share=off".to_owned()),
            Memory::Shared | Memory::NoAuxShare => Some("memfd,share=on".to_owned()),
        };
        let object = object.map(|kind| format!("memory-backend-{kind},id=ram0,size={mebibytes}M"));
        let aux = if memory == Memory::NoAuxShare {
            "off"
        } else {
            "on"
        };
        let main = if object.is_some() {
            ",memory-backend=ram0"
        } else {
            ""
        };
        let mut rom = vec![0xf4; ROM];
        rom.splice(ROM - 16..ROM - 14, [0xeb, 0xfe]);
        std::fs::write(path("rom"), rom).unwrap();
        let log = path("log");
        let child = Command::new(&program)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                "tcg",
            ])
            .args(["-machine", &format!("q35,aux-ram-share={aux}{main}")])
            .args(["-smp", &cpus.to_string(), "-m", &format!("{mebibytes}M")])
            .args(object.iter().flat_map(|object| ["-object", object]))
            .arg("-bios")
            .arg(path("rom"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", path("qmp").display()))
            .args(more)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "{program:?}: {error}: install qemu-system-x86 10.0, or name one in BATON_QEMU"
                )
            });
        let socket = path("qmp");
        Self { child, socket, log }
    }

    /// What it has written, if it ends by itself soon.
    pub(crate) fn ends(&mut self) -> Option<String> {
        let deadline = Instant::now() + ENDED;
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return Some(std::fs::read_to_string(&self.log).unwrap());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Where it serves QMP.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects, and makes sure that it is of the series that the cases are of.
    pub(crate) fn connect(&self) -> Qmp {
        until("QEMU listens", || {
            std::os::unix::net::UnixStream::connect(&self.socket).ok()
        });
        let qmp = Qmp::at(&self.socket);
        let version = qmp.greeting.pointer("/QMP/version/qemu").unwrap();
        assert!(
            version["major"] == 10 && version["minor"] == 0,
            "the cases are QEMU 10.0's, and this is {version}: name one in BATON_QEMU; its log is {}",
            self.log.display()
        );
        qmp
    }
}
