//! A checkpoint: how many records a log had, and the digest of the last. Kept elsewhere, or signed, it shows what the chain
//! by itself cannot: that the end was cut off, or that the whole was written anew.
//!
//! Text, so that `ssh-keygen -Y sign`, `minisign -S` or `gpg --detach-sign` sign it as it is:
//!
//! ```text
//! baton audit checkpoint 1
//! web1
//! 182
//! 5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef
//! ```

use std::fmt;
use std::str::FromStr;

use baton_policy::Digest;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// The first line.
const HEADING: &str = "baton audit checkpoint 1";

/// The most bytes that a checkpoint may have.
pub const MAX_CHECKPOINT: usize = 512;

/// Where a log's chain stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The VM.
    pub vm: String,
    /// How many records the chain had, rotated ones too: the sequence number of the next.
    pub count: u64,
    /// SHA-256 of the last record's line without its line feed; of nothing for an empty log.
    pub head: String,
}

/// Text that is no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CheckpointError {
    /// Another first line, or none.
    #[error("not a checkpoint: its first line is not {HEADING:?}")]
    Heading,
    /// A line is missing or too much.
    #[error("a checkpoint has 4 lines, this has {0}")]
    Lines(usize),
    /// The number of records is none.
    #[error("the number of records is {0:?}")]
    Count(String),
    /// The digest is none.
    #[error("{0}")]
    Digest(#[from] baton_policy::DigestError),
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HEADING}\n{}\n{}\n{}\n", self.vm, self.count, self.head)
    }
}

impl FromStr for Checkpoint {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, CheckpointError> {
        let lines: Vec<&str> = text.lines().collect();
        match lines.as_slice() {
            [HEADING, vm, count, head] => Ok(Self {
                vm: crate::quoted(vm),
                count: count
                    .parse()
                    .map_err(|_| CheckpointError::Count(crate::quoted(count)))?,
                head: head.parse::<Digest>()?.to_string(),
            }),
            [HEADING, ..] => Err(CheckpointError::Lines(lines.len())),
            _ => Err(CheckpointError::Heading),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_as_it_was_written() {
        let checkpoint = Checkpoint {
            vm: "web1".to_owned(),
            count: 182,
            head: Digest::of(b"x").to_string(),
        };
        let text = checkpoint.to_string();
        assert_eq!(text.parse(), Ok(checkpoint));
        assert!(text.len() < MAX_CHECKPOINT);
        for bad in [
            "",
            "something else",
            &text.replace("182", "-1"),
            &text.replace("182", "99999999999999999999"),
            &format!("{text}more\n"),
            &text[..text.len() - 3],
        ] {
            assert!(bad.parse::<Checkpoint>().is_err(), "{bad:?}");
        }
    }
}
