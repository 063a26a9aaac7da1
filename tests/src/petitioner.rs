//! Somebody else than root at a broker's control socket, who speaks its protocol as `baton` does.

use std::path::Path;
use std::time::Duration;

use baton_ipc::Channel;
use baton_ipc::FdSocket;
use baton_ipc::Received;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::thread::set_thread_groups;
use rustix::thread::set_thread_res_gid;
use rustix::thread::set_thread_res_uid;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to a broker's control socket.
pub type Connection = Channel<Request, Reply>;

/// Asks once as this user, who is in one group of the same number, and returns the first answer.
///
/// # Panics
///
/// When nobody answers.
#[must_use]
pub fn ask_as(user: u32, socket: &Path, request: Request) -> Reply {
    let socket = socket.to_owned();
    let asked = std::thread::spawn(move || {
        become_user(user);
        let mut channel = connect(&socket);
        assert!(matches!(next(&mut channel), Reply::Hello { .. }));
        channel.send(&request).unwrap();
        next(&mut channel)
    });
    asked.join().unwrap()
}

/// Makes the calling thread this user's, who is in one group of the same number. Ids are a thread's own (setuid(2), C
/// library/kernel differences), and end with it.
///
/// # Panics
///
/// When it is not root's.
pub fn become_user(user: u32) {
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(user),
        rustix::fs::Gid::from_raw(user),
    );
    set_thread_groups(&[gid]).unwrap();
    set_thread_res_gid(gid, gid, gid).unwrap();
    set_thread_res_uid(uid, uid, uid).unwrap();
}

/// Connects as whoever the calling thread is.
///
/// # Panics
///
/// When that is not possible.
#[must_use]
pub fn connect(path: &Path) -> Connection {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    Channel::new(FdSocket::from(socket))
}

/// Waits for the broker's greeting; false: it has hung up instead.
///
/// # Panics
///
/// When neither comes.
#[must_use]
pub fn is_greeted(connection: &mut Connection) -> bool {
    wait(connection);
    match connection.receive() {
        Ok(Received::Message(Reply::Hello { .. }, _)) => true,
        Ok(Received::HungUp) | Err(_) => false,
        other => panic!("no greeting: {other:?}"),
    }
}

fn wait(channel: &Connection) {
    let patience = Timespec::try_from(PATIENCE).unwrap();
    rustix::event::poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&patience)).unwrap();
}

fn next(channel: &mut Connection) -> Reply {
    wait(channel);
    match channel.receive() {
        Ok(Received::Message(reply, _)) => reply,
        other => panic!("no answer: {other:?}"),
    }
}
