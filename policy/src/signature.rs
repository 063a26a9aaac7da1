//! Signatures of worker binaries, as minisign makes them (`minisign -S`, <https://jedisct1.github.io/minisign/>): the other way
//! onto the allow-list.
//!
//! Only signatures of a binary's BLAKE2b hash are taken (`ED`, what minisign makes since 0.10), so that a binary is read once, piece by
//! piece. What a signature does not say is that a binary is the newest one: a key is taken back by taking it out of the policy.

use std::fmt;
use std::io::{self, Read};

use minisign_verify::{Error, PublicKey, Signature, StreamVerifier};

/// What a signature's file is called: the binary's name, and this.
pub const SUFFIX: &str = ".minisig";

/// The longest signature that is read, in bytes. Four lines: two comments, which minisign bounds at 1 KiB and 8 KiB, and 136
/// and 88 characters of base64.
pub const MAX_SIGNATURE: u64 = 16 << 10;

/// The longest public key, in characters. 42 bytes take 56.
const MAX_KEY: usize = 64;

/// Bytes of a binary that are read at a time.
const PIECE: usize = 64 << 10;

/// Who may sign worker binaries.
#[derive(Clone, PartialEq, Eq)]
pub struct SigningKey {
    text: String,
    key: PublicKey,
    /// The policy's reason.
    pub why: String,
}

/// A text is no public key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no minisign public key; it is the second line of minisign.pub, and begins with RW"
)]
pub struct KeyError(String);

/// A binary is not signed as it would have to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// Longer than a signature can be.
    #[error("its signature has more than {MAX_SIGNATURE} bytes")]
    TooLong,
    /// Something else.
    #[error("its signature is none of minisign's: {0}")]
    Malformed(String),
    /// By somebody else.
    #[error("its signature is by a key that the policy does not have")]
    UnknownKey,
    /// Of a kind that would have the whole binary in memory.
    #[error(
        "its signature is of the binary itself, not of its hash: sign it anew with minisign 0.10 or newer"
    )]
    Legacy,
    /// Of other bytes, or altered.
    #[error("its signature is of another file, or altered")]
    Wrong,
    /// The binary cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

impl SigningKey {
    /// The key of this text, for this reason.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn new(text: &str, why: String) -> Result<Self, KeyError> {
        let error = || KeyError(text.chars().take(2 * MAX_KEY).collect());
        if text.len() > MAX_KEY {
            return Err(error());
        }
        let key = PublicKey::from_base64(text).map_err(|_| error())?;
        Ok(Self {
            text: text.to_owned(),
            key,
            why,
        })
    }

    /// The key as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Which of these keys has signed the binary. What is read of `signature` and of `binary` is what is judged.
///
/// # Errors
///
/// When none has.
pub fn signer<'a>(
    keys: &'a [SigningKey],
    signature: impl Read,
    binary: &mut impl Read,
) -> Result<&'a SigningKey, SignatureError> {
    let mut text = String::new();
    let length = signature
        .take(MAX_SIGNATURE + 1)
        .read_to_string(&mut text)
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => SignatureError::Malformed(error.to_string()),
            _ => SignatureError::Read(error),
        })?;
    if length as u64 > MAX_SIGNATURE {
        return Err(SignatureError::TooLong);
    }
    let malformed = |error: Error| SignatureError::Malformed(error.to_string());
    let signature = Signature::decode(&text).map_err(malformed)?;
    let mut candidates: Vec<(&SigningKey, StreamVerifier<'_>)> = Vec::new();
    for key in keys {
        match key.key.verify_stream(&signature) {
            Ok(verifier) => candidates.push((key, verifier)),
            Err(Error::UnexpectedKeyId) => {}
            Err(Error::UnsupportedLegacyMode) => return Err(SignatureError::Legacy),
            Err(error) => return Err(malformed(error)),
        }
    }
    if candidates.is_empty() {
        return Err(SignatureError::UnknownKey);
    }
    let mut piece = vec![0; PIECE];
    loop {
        let length = match binary.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let read = piece.get(..length).unwrap_or_default();
        for (_, verifier) in &mut candidates {
            verifier.update(read);
        }
    }
    let found = candidates
        .into_iter()
        .find_map(|(key, mut verifier)| verifier.finalize().is_ok().then_some(key));
    found.ok_or(SignatureError::Wrong)
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SigningKey").field(&self.text).finish()
    }
}

impl fmt::Display for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use minisign::KeyPair;

    use super::*;

    fn key(pair: &KeyPair) -> SigningKey {
        SigningKey::new(&pair.pk.to_base64(), "a test".to_owned()).unwrap()
    }

    fn sign(pair: &KeyPair, bytes: &[u8]) -> String {
        minisign::sign(None, &pair.sk, Cursor::new(bytes), Some("a test"), None)
            .unwrap()
            .into_string()
    }

    fn judge(keys: &[SigningKey], signature: &str, bytes: &[u8]) -> Result<String, SignatureError> {
        signer(keys, signature.as_bytes(), &mut Cursor::new(bytes)).map(ToString::to_string)
    }

    #[test]
    fn only_the_bytes_that_a_known_key_has_signed_are_taken() {
        let [ours, other] = [(); 2].map(|()| KeyPair::generate_unencrypted_keypair().unwrap());
        let keys = [key(&other), key(&ours)];
        let binary: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let good = sign(&ours, &binary);
        assert_eq!(judge(&keys, &good, &binary).unwrap(), ours.pk.to_base64());
        let mut altered = binary.clone();
        altered[150_000] ^= 1;
        assert!(matches!(
            judge(&keys, &good, &altered),
            Err(SignatureError::Wrong)
        ));
        assert!(matches!(
            judge(&keys, &good, &binary[1..]),
            Err(SignatureError::Wrong)
        ));
        // One that was made for an older build.
        let older = sign(&ours, b"an older build");
        assert!(matches!(
            judge(&keys, &older, &binary),
            Err(SignatureError::Wrong)
        ));
        let strange = sign(&KeyPair::generate_unencrypted_keypair().unwrap(), &binary);
        assert!(matches!(
            judge(&keys, &strange, &binary),
            Err(SignatureError::UnknownKey)
        ));
        assert!(matches!(
            judge(&[], &good, &binary),
            Err(SignatureError::UnknownKey)
        ));
        // The trusted comment is signed, too.
        let comment = good.replace("trusted comment: a test", "trusted comment: b test");
        assert_ne!(comment, good);
        assert!(matches!(
            judge(&keys, &comment, &binary),
            Err(SignatureError::Wrong)
        ));
    }

    #[test]
    fn what_is_no_signature_is_refused_before_the_binary_is_read() {
        let ours = KeyPair::generate_unencrypted_keypair().unwrap();
        let keys = [key(&ours)];
        let good = sign(&ours, b"x");
        let long = "x".repeat(usize::try_from(MAX_SIGNATURE).unwrap() + 1);
        assert!(matches!(
            judge(&keys, &long, b"x"),
            Err(SignatureError::TooLong)
        ));
        let malformed =
            |text: &str| matches!(judge(&keys, text, b"x"), Err(SignatureError::Malformed(_)));
        for end in 0..good.trim_end().len() {
            assert!(malformed(&good[..end]), "{end}");
        }
        assert!(malformed(&good.replace("trusted comment: a", "a")));
        let mut unread = signer(&keys, &b"\xff\xfe"[..], &mut Cursor::new(b"x")).unwrap_err();
        assert!(matches!(unread, SignatureError::Malformed(_)));
        // Signatures of the binary itself begin with `Ed` instead of `ED`.
        let line = good.lines().nth(1).unwrap();
        let legacy = good.replace(line, &line.replacen("RU", "RW", 1));
        assert_ne!(legacy, good);
        unread = signer(&keys, legacy.as_bytes(), &mut Cursor::new(b"x")).unwrap_err();
        assert!(matches!(unread, SignatureError::Legacy), "{unread}");
    }

    #[test]
    fn a_key_is_what_minisign_prints() {
        let good = KeyPair::generate_unencrypted_keypair()
            .unwrap()
            .pk
            .to_base64();
        let parse = |text: &str| SigningKey::new(text, String::new());
        assert_eq!(parse(&good).unwrap().as_str(), good);
        let long = format!("{good}{good}");
        for bad in [
            "",
            "RWQ",
            &good[1..],
            &long,
            "untrusted comment: minisign public key",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
