//! The other end of a tap's wire: a packet socket that answers the guest's frames.
#![expect(unsafe_code, reason = "packet(7) has no safe wrapper")]

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::FromRawFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use baton_guest::NetPeer;
use baton_guest::layout::NET_FRAME_HEADER;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

/// The protocol of the guest's frames (`baton_guest::layout::NET_FRAME_HEADER`).
const PROTOCOL: u16 = 0x88b5;

/// Answers the guest's frames in a thread, until it is dropped.
#[derive(Debug)]
pub struct Wire {
    peer: Arc<Mutex<NetPeer>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// At the other end of this interface of the host.
    ///
    /// # Panics
    ///
    /// Without CAP_NET_RAW, or when there is no such interface.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        let socket = packet_socket(interface).unwrap();
        let (peer, end) = (
            Arc::new(Mutex::new(NetPeer::default())),
            Arc::new(AtomicBool::new(false)),
        );
        let (own_peer, own_end) = (Arc::clone(&peer), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 16];
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            while !own_end.load(Ordering::SeqCst) {
                let mut polled = [PollFd::new(&socket, PollFlags::IN)];
                let _ = rustix::event::poll(&mut polled, Some(&timeout));
                while let Ok(length) = rustix::io::read(&socket, &mut frame) {
                    let answer = own_peer
                        .lock()
                        .unwrap()
                        .take(frame.get(..length).unwrap_or_default());
                    if let Some(answer) = answer {
                        rustix::io::write(&socket, &answer).unwrap();
                    }
                }
            }
        });
        Self {
            peer,
            end,
            thread: Some(thread),
        }
    }

    /// What it has seen so far.
    ///
    /// # Panics
    ///
    /// When its thread has panicked.
    #[must_use]
    pub fn peer(&self) -> NetPeer {
        self.peer.lock().unwrap().clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sends frames in a thread, as fast as it goes, until it is dropped.
#[derive(Debug)]
pub struct Flood {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Of that many bytes, to whoever is at the other end of this interface of the host.
    ///
    /// # Panics
    ///
    /// Without CAP_NET_RAW, or when there is no such interface.
    #[must_use]
    pub fn new(interface: &str, bytes: usize) -> Self {
        let socket = packet_socket(interface).unwrap();
        let mut frame = NET_FRAME_HEADER.to_vec();
        frame.resize(bytes, 0);
        let end = Arc::new(AtomicBool::new(false));
        let own_end = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            while !own_end.load(Ordering::Relaxed) {
                // One that the tap has no room for is lost, as on any wire.
                let _ = rustix::io::write(&socket, &frame);
            }
        });
        Self {
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A packet socket that takes and sends frames of the guest's protocol on one interface (packet(7)).
fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let check = |outcome: i32| match outcome {
        -1 => Err(io::Error::last_os_error()),
        other => Ok(other),
    };
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: makes a descriptor, which is owned at once.
    let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, 0))?) };
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name is a string with its end, which lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).unwrap(),
        sll_protocol: PROTOCOL.to_be(),
        sll_ifindex: i32::try_from(index).unwrap(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is one of this family, of the length that is said, and lives through the call.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap(),
        )
    })?;
    Ok(socket)
}
