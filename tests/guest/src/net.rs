//! What the guest says of its network interface, and the other end of its wire.

use crate::driver_state::DriverState;
use crate::driver_state::word;
use crate::layout::*;

/// The network's part of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetReport {
    /// How far the guest is with it.
    pub state: DriverState,
    /// Frames that the guest has sent.
    pub sent: u64,
    /// The number of the last frame that it has received.
    pub received: u64,
    /// Numbers before that which never came.
    pub lost: u64,
    /// Frames that came again, or late.
    pub repeated: u64,
    /// Frames with another content than was sent.
    pub corrupt: u64,
    /// Frames of other protocols.
    pub others: u64,
}

impl NetReport {
    /// Reads it from the bytes of a report.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |offset| word(bytes, offset);
        Self {
            state: DriverState::parse(word(NET_STATE_OFFSET)),
            sent: word(NET_SENT_OFFSET),
            received: word(NET_RECEIVED_OFFSET),
            lost: word(NET_LOST_OFFSET),
            repeated: word(NET_REPEATED_OFFSET),
            corrupt: word(NET_CORRUPT_OFFSET),
            others: word(NET_OTHERS_OFFSET),
        }
    }

    /// Frames that were lost, repeated or changed on their way to the guest.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.lost + self.repeated + self.corrupt
    }
}

/// The other end: answers each frame of the guest with one of its own, and counts what is wrong with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetPeer {
    /// Frames that it has sent.
    pub sent: u64,
    /// The number of the last frame of the guest.
    pub received: u64,
    /// Numbers before that which never came.
    pub lost: u64,
    /// Frames that came again, or late.
    pub repeated: u64,
    /// Frames with another content than was sent.
    pub corrupt: u64,
}

impl NetPeer {
    /// Takes what came from the guest; what to answer, if it is a frame of the guest's program.
    pub fn take(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let ours = frame.get(12..14) == NET_FRAME_HEADER.get(12..14);
        let data = frame
            .get(usize::try_from(NET_DATA).ok()?..)
            .filter(|_| ours)?;
        let words: Vec<u64> = data
            .chunks_exact(8)
            .filter_map(|word| word.try_into().ok().map(u64::from_le_bytes))
            .collect();
        let (number, acknowledged) = (*words.first()?, *words.get(1)?);
        let expected =
            (0..net_words(number)).map(|word| net_word(NET_FROM_GUEST, number, acknowledged, word));
        let whole =
            words.len() as u64 >= net_words(number) && expected.zip(&words).all(|(a, b)| a == *b);
        if !whole {
            self.corrupt += 1;
        } else if number <= self.received {
            self.repeated += 1;
        } else {
            self.lost += number - self.received - 1;
            self.received = number;
        }
        self.sent += 1;
        let number = self.sent;
        let mut answer = NET_FRAME_HEADER.to_vec();
        for word in 0..net_words(number) {
            answer.extend(net_word(NET_FROM_HOST, number, self.received, word).to_le_bytes());
        }
        Some(answer)
    }

    /// Frames that were lost, repeated or changed on their way from the guest.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.lost + self.repeated + self.corrupt
    }
}
