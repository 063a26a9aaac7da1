//! The host's end of a guest's devices, kept busy while its worker is replaced: a tap's wire that answers each frame, and a
//! connection of its vsock on which the guest sends back what it gets. Its disk and its console keep themselves busy.

use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use baton_guest::CommandLine;
use baton_guest::layout;
use baton_tests::Wire;
use serde::Serialize;

use crate::guest::Guest;

/// The port of the host that the guest connects to.
const PORT: u32 = 52;
/// Bytes on the vsock before their echo is read.
const CHUNK: usize = 8 << 10;
/// Of the disk.
const DISK_BYTES: u64 = 16 << 20;

/// What the devices have done, all of it verified by the guest or by its peer.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Traffic {
    pub(crate) disk_requests: u64,
    pub(crate) frames_sent: u64,
    pub(crate) frames_received: u64,
    pub(crate) vsock_bytes: u64,
}

/// The devices' files, before the VM is started.
#[derive(Debug)]
pub(crate) struct Peers {
    tap: String,
    listener: UnixListener,
}

/// What runs at the host's end.
#[derive(Debug)]
pub(crate) struct Busy {
    _wire: Wire,
    talk: JoinHandle<Result<()>>,
}

impl Peers {
    /// Makes what the VM is to open, in `directory`.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        std::fs::File::create(directory.join("data.img"))?.set_len(DISK_BYTES)?;
        let listener = UnixListener::bind(directory.join(format!("v_{PORT}")))?;
        let tap = format!("bb{}", std::process::id());
        Ok(Self { tap, listener })
    }

    /// The tables of the VM file.
    pub(crate) fn tables(&self) -> String {
        let tap = &self.tap;
        format!(
            "[console]\nkind = \"file\"\npath = \"console.log\"\n[[disk]]\nid = \"data\"\npath = \"data.img\"\n[[net]]\n\
             id = \"net0\"\ntap = \"{tap}\"\nmac = \"52:54:00:00:00:01\"\n[vsock]\ncid = 3\nsocket = \"v\"\n"
        )
    }

    /// What the guest is to drive.
    pub(crate) fn words(line: CommandLine) -> CommandLine {
        line.disk_irq()
            .net_rest()
            .vsock(PORT)
            .console()
            .period_ms(5)
    }

    /// Begins, once the guest runs.
    pub(crate) fn start(self, guest: &Guest) -> Result<Busy> {
        let wire = Wire::new(&self.tap);
        guest.mail(layout::COMMAND_NET_WORK)?;
        let (mut socket, _) = self.listener.accept().context("the guest's vsock")?;
        let talk = std::thread::spawn(move || {
            let mut echo = vec![0; CHUNK];
            for turn in 0_u64.. {
                let chunk: Vec<u8> = (turn..)
                    .flat_map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
                    .take(CHUNK)
                    .collect();
                socket.write_all(&chunk)?;
                socket.read_exact(&mut echo)?;
                if echo != chunk {
                    bail!("chunk {turn} came back as something else");
                }
            }
            Ok(())
        });
        Ok(Busy { _wire: wire, talk })
    }
}

impl Busy {
    /// Fails if anything was lost, changed or repeated.
    pub(crate) fn check(&self, guest: &Guest) -> Result<Traffic> {
        let (disk, net, vsock) = (guest.disk()?, guest.net()?, guest.vsock()?);
        if disk.faults() + net.faults() + vsock.wrong + vsock.refused > 0 || self.talk.is_finished()
        {
            bail!("the devices were disturbed: {disk:?} {net:?} {vsock:?}");
        }
        Ok(Traffic {
            disk_requests: disk.done,
            frames_sent: net.sent,
            frames_received: net.received,
            vsock_bytes: vsock.echoed,
        })
    }
}
