//! A typed connection: what this end sends and what it receives are two types, so that neither side can send the other's
//! messages. Each message is one postcard value with nothing after it.

use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::FdSocket;
use crate::Received;
use crate::SocketError;

/// Why a typed message could not be sent or received.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The socket's error.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message could not be encoded; only a length past [`crate::MAX_MESSAGE`] does this.
    #[error("cannot encode the message: {0}")]
    Encode(postcard::Error),
    /// The peer's bytes are no message of the expected type.
    #[error("the peer's message of {length} bytes cannot be decoded: {source}")]
    Decode {
        /// The message's length in bytes.
        length: usize,
        /// What postcard says.
        source: postcard::Error,
    },
    /// The peer's bytes hold a message and more.
    #[error("{0} bytes follow the peer's message")]
    Trailing(usize),
}

/// Encodes one message.
///
/// # Errors
///
/// [`ChannelError::Encode`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, ChannelError> {
    postcard::to_stdvec(message).map_err(ChannelError::Encode)
}

/// Decodes one postcard value that must take up all of `bytes`. (postcard's own `from_bytes` ignores what follows.)
///
/// # Errors
///
/// [`ChannelError::Decode`] or [`ChannelError::Trailing`].
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, ChannelError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(ChannelError::Trailing(rest.len())),
        Err(source) => Err(ChannelError::Decode {
            length: bytes.len(),
            source,
        }),
    }
}

/// The longest message that can be looked at before it is received, in bytes: a request that is but a word has one.
pub const MAX_PEEK: usize = 16;

/// A connection that sends `S` and receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    socket: FdSocket,
    buffer: Vec<u8>,
    types: PhantomData<fn(S) -> R>,
}

impl<S: Serialize, R: DeserializeOwned> Channel<S, R> {
    /// Makes a channel of one end of a connection.
    #[must_use]
    pub fn new(socket: FdSocket) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            types: PhantomData,
        }
    }

    /// Sends a message that carries no descriptors.
    ///
    /// # Errors
    ///
    /// See [`FdSocket::send`].
    pub fn send(&self, message: &S) -> Result<(), ChannelError> {
        self.send_with(message, &[])
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    ///
    /// See [`FdSocket::send`].
    pub fn send_with(
        &self,
        message: &S,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = encode(message)?;
        Ok(self.socket.send(&bytes, descriptors)?)
    }

    /// Receives the next message, if one is queued.
    ///
    /// # Errors
    ///
    /// See [`FdSocket::receive`] and [`decode`]; descriptors that came with a refused message are closed.
    pub fn receive(&mut self) -> Result<Received<R>, ChannelError> {
        match self.socket.receive(&mut self.buffer)? {
            Received::Message((), descriptors) => {
                Ok(Received::Message(decode(&self.buffer)?, descriptors))
            }
            Received::Empty => Ok(Received::Empty),
            Received::HungUp => Ok(Received::HungUp),
        }
    }

    /// The next message, which stays queued, if it is one of at most [`MAX_PEEK`] bytes. Its descriptors stay, too.
    #[must_use]
    pub fn peek(&self) -> Option<R> {
        let mut bytes = [0; MAX_PEEK];
        decode(self.socket.peek(&mut bytes)?).ok()
    }
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S, R> From<Channel<S, R>> for OwnedFd {
    fn from(channel: Channel<S, R>) -> Self {
        channel.socket.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_looked_at_stays() {
        let (here, there) = FdSocket::pair().unwrap();
        let (sender, mut receiver) = (
            Channel::<String, ()>::new(here),
            Channel::<(), String>::new(there),
        );
        assert_eq!(receiver.peek(), None);
        let long = "x".repeat(MAX_PEEK);
        for text in ["word", &long] {
            sender.send(&text.to_owned()).unwrap();
            let seen = receiver.peek();
            assert_eq!(seen.is_some(), text == "word");
            assert!(matches!(receiver.receive(), Ok(Received::Message(got, _)) if got == text));
        }
        drop(sender);
        assert_eq!(receiver.peek(), None);
    }

    #[test]
    fn bytes_after_a_message_are_refused() {
        let mut bytes = postcard::to_stdvec(&7_u32).unwrap();
        assert_eq!(decode::<u32>(&bytes).unwrap(), 7);
        bytes.push(0);
        assert!(matches!(
            decode::<u32>(&bytes),
            Err(ChannelError::Trailing(1))
        ));
    }

    #[test]
    fn a_hostile_length_is_refused_without_allocating_it() {
        // A postcard byte string that claims 2^35 - 1 bytes.
        let claim = [0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(matches!(
            decode::<Vec<u8>>(&claim),
            Err(ChannelError::Decode { .. })
        ));
    }

    #[test]
    fn each_side_receives_what_the_other_sends() {
        let (a, b) = FdSocket::pair().unwrap();
        let (a, mut b) = (
            Channel::<u32, String>::new(a),
            Channel::<String, u32>::new(b),
        );
        a.send(&5).unwrap();
        assert!(matches!(b.receive().unwrap(), Received::Message(5, _)));
    }
}
