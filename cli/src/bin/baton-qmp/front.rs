//! The front's life: confined, told its last filter, and then one poll(2) over the broker and all clients.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use baton_ipc::ChannelError;
use baton_ipc::FdSocket;
use baton_ipc::MAX_MESSAGE;
use baton_ipc::Received;
use baton_ipc::control::PROTOCOL;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_policy::Program;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketType;

use crate::session::Control;
use crate::session::Session;
use crate::shared::Shared;

/// Serves until the broker hangs up. The error is for people.
pub(crate) fn serve() -> Result<(), String> {
    let mut broker = begin()?;
    let mut shared = Shared::default();
    let mut sessions: Vec<Session> = Vec::new();
    loop {
        let ready = wait(&broker, &sessions)?;
        // An answer follows the events that it follows from: what was taken before them is looked at after them.
        sessions.iter_mut().for_each(Session::take_replies);
        let here = hear(&mut broker, &mut shared, &mut sessions)?;
        for event in shared.take_events() {
            sessions.iter_mut().for_each(|session| session.tell(&event));
        }
        for (session, events) in sessions.iter_mut().zip(
            ready
                .into_iter()
                .chain(std::iter::repeat(PollFlags::empty())),
        ) {
            session.heed_replies(&mut shared);
            if events.contains(PollFlags::IN) && session.wants_input() {
                session.read();
            } else if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                session.hang_up();
            }
            session.advance(&mut shared);
            session.flush();
        }
        sessions.retain(|session| !session.is_dead());
        if !here {
            return Ok(());
        }
    }
}

/// Takes the broker's connection, and the last filter.
fn begin() -> Result<Control, String> {
    let not_ours = "it is started by baton-broker, not by hand";
    let stdin = std::io::stdin();
    match rustix::net::sockopt::socket_type(&stdin) {
        Ok(SocketType::SEQPACKET) => {}
        _ => return Err(not_ours.to_owned()),
    }
    let first = first_word(&stdin)?;
    let socket = stdin
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| error.to_string())?;
    let mut broker = Control::new(FdSocket::from(socket));
    match first {
        Reply::Front { protocol, filter } if protocol == PROTOCOL => {
            let filter = Program::from_bytes(&filter).map_err(|error| error.to_string())?;
            filter
                .install()
                .map_err(|error| format!("cannot take its last filter: {error}"))?;
        }
        Reply::Front { protocol, .. } => {
            return Err(format!(
                "the broker speaks version {protocol}, this program version {PROTOCOL}"
            ));
        }
        _ => return Err(not_ours.to_owned()),
    }
    broker.send(&Request::Subscribe).map_err(in_words)?;
    match next(&mut broker)? {
        Reply::Done => Ok(broker),
        _ => Err(not_ours.to_owned()),
    }
}

/// Says that this process is there, and hears what it has to do first. The broker looks at its descriptors meanwhile: there
/// is no second one for its connection yet.
fn first_word(broker: impl AsFd) -> Result<Reply, String> {
    let io = |error: Errno| format!("the broker: {error}");
    let word = baton_ipc::encode(&Request::Subscribe).map_err(in_words)?;
    rustix::net::send(&broker, &word, SendFlags::NOSIGNAL).map_err(io)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        poll(&mut [PollFd::new(&broker, PollFlags::IN)])?;
        match rustix::net::recv(&broker, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err("the broker has hung up".to_owned()),
            Ok((count, _)) => {
                let message = buffer.get(..count).unwrap_or_default();
                return baton_ipc::decode(message).map_err(in_words);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(io(error)),
        }
    }
}

fn in_words(error: ChannelError) -> String {
    format!("the broker: {error}")
}

fn next(broker: &mut Control) -> Result<Reply, String> {
    loop {
        match broker.receive().map_err(in_words)? {
            Received::Message(reply, _) => return Ok(reply),
            Received::HungUp => return Err("the broker has hung up".to_owned()),
            Received::Empty => {}
        }
        let mut fds = [PollFd::new(broker, PollFlags::IN)];
        poll(&mut fds)?;
    }
}

fn poll(fds: &mut [PollFd<'_>]) -> Result<(), String> {
    match rustix::event::poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(format!("poll: {error}")),
    }
}

/// Waits for anything; what there is on each client's stream.
fn wait(broker: &Control, sessions: &[Session]) -> Result<Vec<PollFlags>, String> {
    let mut fds = vec![PollFd::new(broker, PollFlags::IN)];
    for session in sessions {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, session.wants_input());
        flags.set(PollFlags::OUT, session.wants_output());
        fds.push(PollFd::from_borrowed_fd(session.stream(), flags));
        let controls = session.controls().into_iter();
        fds.extend(controls.map(|control| PollFd::from_borrowed_fd(control, PollFlags::IN)));
    }
    poll(&mut fds)?;
    let streams = fds.iter().skip(1).step_by(3);
    Ok(streams.map(PollFd::revents).collect())
}

/// Takes everything that the broker has said. Whether it is still there.
fn hear(
    broker: &mut Control,
    shared: &mut Shared,
    sessions: &mut Vec<Session>,
) -> Result<bool, String> {
    loop {
        match broker.receive().map_err(in_words)? {
            Received::Empty => return Ok(true),
            Received::HungUp => return Ok(false),
            Received::Message(Reply::Event(event), _) => shared.happened(&event),
            Received::Message(Reply::QmpClient, descriptors) => {
                let [stream, in_band, out_of_band] = <[OwnedFd; 3]>::try_from(descriptors)
                    .map_err(|_| "a client came without its connections".to_owned())?;
                sessions.push(Session::new(stream, in_band, out_of_band));
            }
            Received::Message(..) => return Err("the broker said something unexpected".to_owned()),
        }
    }
}
