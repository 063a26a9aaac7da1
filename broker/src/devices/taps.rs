//! Taps: opened once with their final flags, a descriptor a queue, and described to the worker.
//!
//! A tap that exists is used as it is: whoever made it has bridged, addressed and filtered it. One that does not is made
//! if policy lets /dev/net/tun be a tap's origin, brought up, and gone with the last descriptor of it.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use baton_policy::kernel;
use nix::libc;
use rustix::fs::OFlags;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use crate::refusal::Doing;
use crate::refusal::Result;
use crate::refusal::unfit;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Interface;

/// Where the kernel makes taps.
pub(crate) const TUN: &str = "/dev/net/tun";
/// Where interfaces that exist are found (Documentation/ABI/testing/sysfs-class-net).
const SYSFS: &str = "/sys/class/net";
/// Bytes of the header of each frame (`struct virtio_net_hdr_v1`, `linux/virtio_net.h`).
const HEADER: i32 = 12;
/// The least MTU that a guest can be told (virtio 1.2, 5.1.4.1: VIRTIO_NET_F_MTU).
const MIN_MTU: u16 = 68;

/// A tap that is open.
#[derive(Debug)]
pub(crate) struct OpenTap {
    /// One a queue pair.
    pub(crate) queues: Vec<OwnedFd>,
    /// Bytes.
    pub(crate) mtu: u16,
    /// Held as long as the VM has the tap, so that no other broker gives it to another VM.
    pub(crate) claim: OwnedFd,
}

/// Where an interface that exists is found, as policy is asked.
pub(crate) fn place(tap: &Interface) -> PathBuf {
    Path::new(SYSFS).join(&tap.0)
}

/// Where a tap comes from, as policy is asked: its place in sysfs when it exists, else /dev/net/tun.
pub(crate) fn origin(tap: &Interface) -> PathBuf {
    // The kernel answers for the broker's own network namespace, which sysfs may not.
    if kernel::interface_mtu(&tap.0).is_ok() {
        place(tap)
    } else {
        PathBuf::from(TUN)
    }
}

/// The abstract name of a tap's claim.
fn claim_name(tap: &str) -> String {
    format!("baton/tap/{tap}")
}

/// Takes the claim of this tap out of those that came.
pub(crate) fn take_claim(claims: &mut Vec<OwnedFd>, tap: &Interface) -> Result<OwnedFd> {
    let name = |claim: &OwnedFd| {
        let address = rustix::net::getsockname(claim).ok()?;
        let address = SocketAddrUnix::try_from(address).ok()?;
        String::from_utf8(address.abstract_name()?.to_vec()).ok()
    };
    let wanted = Some(claim_name(&tap.0));
    match claims.iter().position(|one| name(one) == wanted) {
        Some(index) => Ok(claims.swap_remove(index)),
        None => Err(unfit(
            format_args!("the claim of the tap {} did not come", tap.0),
            "",
        )),
    }
}

/// The interface that an open queue of a tap belongs to, by the kernel's own word (tun_chr_show_fdinfo, drivers/net/tun.c).
pub(crate) fn interface_of(queue: BorrowedFd<'_>) -> Result<Interface> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", queue.as_raw_fd()))
        .doing("cannot examine a tap")?;
    let name = info.lines().find_map(|line| line.strip_prefix("iff:"));
    let name = name.map(str::trim).unwrap_or_default();
    Interface::try_from(name.to_owned()).map_err(|reason| unfit(reason, ""))
}

/// Claims a tap's name among all brokers of this network namespace: an abstract socket has one owner there, as a tap's name
/// has, and is gone with the last descriptor of it (unix(7)). The kernel itself lets several have queues of one tap.
fn claim(tap: &str) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new_abstract_name(claim_name(tap).as_bytes())?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

/// Opens every queue of the tap of the network interface of this id.
pub(crate) fn open(id: &Label, tap: &Interface, pairs: u8) -> Result<OpenTap> {
    let (id, tap) = (&id.0, tap.0.as_str());
    let cannot = |what: &str, e: &dyn std::fmt::Display, remedy: &str| {
        unfit(
            format_args!("network interface {id}: cannot {what}: {e}"),
            remedy,
        )
    };
    let claim = claim(tap).map_err(|e| {
        cannot(
            &format!("have {tap} to itself"),
            &e,
            "end what uses it; a tap belongs to one VM",
        )
    })?;
    let exists = kernel::interface_mtu(tap).is_ok();
    let mut flags = kernel::IFF_TAP | kernel::IFF_NO_PI | kernel::IFF_VNET_HDR;
    if pairs > 1 {
        flags |= kernel::IFF_MULTI_QUEUE;
    }
    let mut queues = Vec::new();
    for _ in 0..pairs {
        // Non-blocking from the start: no holder changes it later, all share the open file.
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let queue = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nonblock)
            .open(TUN)
            .map_err(|e| {
                cannot(
                    "open /dev/net/tun",
                    &e,
                    "load the module tun, and let this user read and write /dev/net/tun",
                )
            })?;
        kernel::tun_set_iff(queue.as_fd(), tap, flags).map_err(|e| {
            let remedy = match e.raw_os_error() {
                Some(libc::EPERM) if exists => "make it with this user as its owner: ip tuntap add user",
                Some(libc::EPERM) => "make it beforehand (ip tuntap add mode tap user), or give the broker CAP_NET_ADMIN",
                Some(libc::EBUSY) => "end what uses it; a tap belongs to one VM",
                Some(libc::EINVAL) if exists && pairs > 1 => {
                    "it has to be a tap that was made with multi_queue"
                }
                Some(libc::EINVAL) if exists => "it has to be a tap, and one without multi_queue",
                _ => "",
            };
            cannot(&format!("attach to {tap}"), &e, remedy)
        })?;
        queues.push(OwnedFd::from(queue));
    }
    if let Some(first) = queues.first() {
        kernel::tun_set_vnet_header(first.as_fd(), HEADER)
            .map_err(|e| cannot("set the length of headers", &e, ""))?;
    }
    if !exists {
        kernel::interface_up(tap).map_err(|e| cannot(&format!("bring {tap} up"), &e, ""))?;
    }
    let mtu = kernel::interface_mtu(tap)
        .map_err(|e| cannot(&format!("ask for the MTU of {tap}"), &e, ""))?;
    let mtu = u16::try_from(mtu)
        .ok()
        .filter(|mtu| *mtu >= MIN_MTU)
        .ok_or_else(|| {
            cannot(
                "use it",
                &format_args!("its MTU is {mtu}"),
                "ip link set mtu, 68 to 65535",
            )
        })?;
    Ok(OpenTap { queues, claim, mtu })
}
