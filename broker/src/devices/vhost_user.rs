//! The process that implements a device of the guest: the broker connects to it, once, agrees with it on the protocol and
//! hands it guest RAM. Every worker then gets the same connection, so that over an upgrade the process is neither restarted
//! nor told anything anew.
//!
//! It maps all of the guest's memory. What it answers is bounded in length and time all the same, as a worker's messages are.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use baton_ipc::descriptor;
use baton_ipc::vhost_user::F_PROTOCOL_FEATURES;
use baton_ipc::vhost_user::PROTOCOL_CONFIG;
use baton_ipc::vhost_user::PROTOCOL_MQ;
use baton_ipc::vhost_user::Replies;
use baton_ipc::vhost_user::Reply;
use baton_ipc::vhost_user::Request;
use baton_ipc::vhost_user::VhostUserError;
use baton_ipc::worker::RamRegion;
use baton_ipc::worker::VhostUserConfig;
use baton_ipc::worker::VhostUserKind;
use baton_policy::Policy;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

use crate::devices::granted_socket;
use crate::devices::granted_socket::NotConnected;
use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::vm_file::vhost_user::MAX_TAG;
use crate::vm_file::vhost_user::VhostUser;

/// How long it may take to answer everything.
const PATIENCE: Duration = Duration::from_secs(5);

/// Feature bits that a guest is offered if the process has them. Of rings and of the version (virtio 1.2, chapter 6): indirect
/// descriptors, chosen indices of notifications, version 1.
const RING_FEATURES: u64 = 1 << 28 | 1 << 29 | VERSION_1;
const VERSION_1: u64 = 1 << 32;
/// Of a disk (5.2.3): largest segment and their number, geometry, read-only, block size, flush, topology, queues, discard,
/// write-zeroes. Not what a guest configures by writing, which nobody would tell the process.
const BLK_FEATURES: u64 =
    1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | BLK_MQ | 1 << 13 | 1 << 14;
const BLK_MQ: u64 = 1 << 12;
/// Bytes of `struct virtio_blk_config` up to what belongs to those features, and where in it the number of queues is (5.2.4).
const BLK_CONFIG: u16 = 60;
const BLK_QUEUES_AT: usize = 34;

/// A process that is ready.
#[derive(Debug)]
pub(crate) struct OpenBackend {
    pub(crate) connection: OwnedFd,
    pub(crate) config: VhostUserConfig,
    /// Where it listens.
    pub(crate) place: PathBuf,
    pub(crate) pid: i32,
    pub(crate) uid: u32,
}

/// Connects to it, and hands it guest RAM.
pub(crate) fn open(
    device: &VhostUser,
    policy: &Policy,
    ram: &[(RamRegion, BorrowedFd<'_>)],
) -> Result<OpenBackend> {
    let (id, path) = (&device.id.0, device.socket.display());
    let (connection, place) =
        granted_socket::connect(&device.socket, policy, descriptor::VHOST_USER).map_err(|why| {
            match why {
                NotConnected::Failed(e) => unfit(
                    format_args!("vhost_user {id}: cannot connect to {path}: {e}"),
                    "start the process that listens there; it serves one VM",
                ),
                denied @ NotConnected::Denied { .. } => {
                    refused(format_args!("vhost_user {id}: {denied}"), "")
                }
            }
        })?;
    let peer = rustix::net::sockopt::socket_peercred(&connection)
        .doing(format_args!("cannot examine the peer at {path}"))?;
    let uid = peer.uid.as_raw();
    let own = rustix::process::geteuid().as_raw();
    let expected = match device.user {
        Some(user) => uid == user,
        None => uid == 0 || uid == own,
    };
    if !expected {
        return Err(refused(
            format_args!("vhost_user {id}: user {uid} listens at {path}"),
            format_args!("if that one may have all of the guest's memory, say `user = {uid}`"),
        ));
    }
    let config = Talk {
        connection: &connection,
        replies: Replies::default(),
        by: Instant::now() + PATIENCE,
    }
    .agree(device, ram)
    .map_err(|why| {
        unfit(
            format_args!("vhost_user {id}: the process at {path}: {why}"),
            "it has to implement this kind of device, and to be another VM's no more",
        )
    })?;
    Ok(OpenBackend {
        connection,
        config,
        place,
        pid: peer.pid.as_raw_nonzero().get(),
        uid,
    })
}

/// Why the process is not to be had.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error(transparent)]
    Protocol(#[from] VhostUserError),
    #[error("it has not answered within {PATIENCE:?}")]
    Silent,
    #[error("it has no {0}")]
    Lacks(&'static str),
    #[error("it has {most} queues, the VM file wants {wanted}")]
    Queues { most: u64, wanted: u8 },
}

struct Talk<'a> {
    connection: &'a OwnedFd,
    replies: Replies,
    by: Instant,
}

impl Talk<'_> {
    fn tell(&self, request: Request<'_>, fds: &[BorrowedFd<'_>]) -> std::result::Result<(), Unfit> {
        Ok(request.send(self.connection, fds)?)
    }

    fn ask(&mut self, request: Request<'_>) -> std::result::Result<Reply, Unfit> {
        self.tell(request, &[])?;
        loop {
            if let Some(reply) = self.replies.receive(self.connection)? {
                return Ok(reply);
            }
            let left = self.by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Unfit::Silent);
            }
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut source = [PollFd::new(self.connection, PollFlags::IN)];
            match rustix::event::poll(&mut source, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(VhostUserError::Io {
                        call: "poll",
                        errno,
                    }
                    .into());
                }
            }
        }
    }

    fn number(&mut self, request: Request<'_>) -> std::result::Result<u64, Unfit> {
        Ok(self.ask(request)?.number(&request)?)
    }

    fn agree(
        mut self,
        device: &VhostUser,
        ram: &[(RamRegion, BorrowedFd<'_>)],
    ) -> std::result::Result<VhostUserConfig, Unfit> {
        let offered = self.number(Request::GetFeatures)?;
        for (bit, name) in [
            (F_PROTOCOL_FEATURES, "protocol features"),
            (VERSION_1, "virtio 1"),
        ] {
            if offered & bit == 0 {
                return Err(Unfit::Lacks(name));
            }
        }
        self.tell(Request::SetOwner, &[])?;
        let protocol = self.number(Request::GetProtocolFeatures)?;
        let wanted = match device.kind {
            VhostUserKind::Blk => PROTOCOL_MQ | PROTOCOL_CONFIG,
            VhostUserKind::Fs => PROTOCOL_MQ,
        };
        let protocol = protocol & wanted;
        self.tell(Request::SetProtocolFeatures(protocol), &[])?;
        let regions: Vec<_> = ram.iter().map(|(region, _)| *region).collect();
        let files: Vec<_> = ram.iter().map(|(_, file)| *file).collect();
        self.tell(Request::SetMemTable(&regions), &files)?;

        let queues = device.virtqueues();
        let most = if protocol & PROTOCOL_MQ != 0 {
            self.number(Request::GetQueueNum)?
        } else {
            // Those that each such device has.
            match device.kind {
                VhostUserKind::Blk => 1,
                VhostUserKind::Fs => 2,
            }
        };
        if u64::from(queues) > most {
            return Err(Unfit::Queues {
                most,
                wanted: queues,
            });
        }
        let (features, config) = match device.kind {
            VhostUserKind::Blk => (
                blk_features(offered, queues),
                self.blk_config(protocol, queues)?,
            ),
            VhostUserKind::Fs => (0, fs_config(device)),
        };
        self.replies.expect_none(self.connection)?;
        Ok(VhostUserConfig {
            kind: device.kind,
            queues,
            features: features | offered & RING_FEATURES,
            config,
        })
    }

    fn blk_config(&mut self, protocol: u64, queues: u8) -> std::result::Result<Vec<u8>, Unfit> {
        if protocol & PROTOCOL_CONFIG == 0 {
            return Err(Unfit::Lacks("configuration to ask for"));
        }
        let reply = self.ask(Request::GetConfig { length: BLK_CONFIG })?;
        let mut config = reply.config(BLK_CONFIG)?;
        let count = u16::from(queues).to_le_bytes();
        for (to, from) in config.iter_mut().skip(BLK_QUEUES_AT).zip(count) {
            *to = from;
        }
        Ok(config)
    }
}

fn blk_features(offered: u64, queues: u8) -> u64 {
    let features = offered & BLK_FEATURES;
    if queues > 1 {
        features | BLK_MQ
    } else {
        features & !BLK_MQ
    }
}

/// `struct virtio_fs_config` (5.11.4): the tag, padded with NULs, and how many queues there are for requests.
fn fs_config(device: &VhostUser) -> Vec<u8> {
    let mut config = device.tag().as_bytes().to_vec();
    config.resize(MAX_TAG, 0);
    config.extend(u32::from(device.queues.0).to_le_bytes());
    config
}

/// What a worker of another broker was told of this device, as far as the VM file says it; the rest is as it is `found`.
pub(crate) fn config(device: &VhostUser, found: Option<&VhostUserConfig>) -> VhostUserConfig {
    VhostUserConfig {
        kind: device.kind,
        queues: device.virtqueues(),
        features: found.map_or(0, |found| found.features),
        config: match device.kind {
            VhostUserKind::Blk => found.map(|found| found.config.clone()).unwrap_or_default(),
            VhostUserKind::Fs => fs_config(device),
        },
    }
}

/// Whether a connection that another broker made is to where the VM file says, and policy grants.
pub(crate) fn check_peer(
    device: &VhostUser,
    policy: &Policy,
    connection: BorrowedFd<'_>,
) -> Result<()> {
    let (id, wanted) = (&device.id.0, device.socket.display());
    let peer = rustix::net::getpeername(connection).doing(format_args!(
        "vhost_user {id}: cannot examine its connection"
    ))?;
    let peer = peer.and_then(|peer| SocketAddrUnix::try_from(peer).ok());
    let found = peer
        .as_ref()
        .and_then(SocketAddrUnix::path_bytes)
        .map(|path| Path::new(OsStr::from_bytes(path)))
        .filter(|path| path.is_absolute())
        .and_then(|path| path.canonicalize().ok());
    let Some(place) =
        found.filter(|found| device.socket.canonicalize().ok().as_ref() == Some(found))
    else {
        return Err(unfit(
            format_args!("vhost_user {id}: the running VM's process does not listen at {wanted}"),
            "name its socket; the process has to have been given it by an absolute path",
        ));
    };
    if !permits(policy, &place) {
        let name = &policy.name;
        return Err(refused(
            format_args!(
                "vhost_user {id}: policy {name} does not grant {}",
                place.display()
            ),
            "",
        ));
    }
    Ok(())
}

fn permits(policy: &Policy, place: &Path) -> bool {
    let grant = policy.grant(descriptor::VHOST_USER);
    grant.is_some_and(|grant| grant.permits_path(place))
}
